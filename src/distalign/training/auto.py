"""γ and β that the pairs choose: what `auto` stands for in a recipe.

γ   the one at which the start's log-probabilities predict the labels best (`stats.calibration.calibrate`), kept where
    labels carry information: the median |γ Δ ln π₀| of the pairs within `INFORMATIVE`.
β   as much pull towards π₀ as the pairs themselves ask for, which a Gaussian prior on a reward γ ln π₀ + f says. f is
    linear in token counts, with weights w ~ N(0, I/λ) and λ of the largest evidence (`stats.laplace`).

    on labels          n β KL(π‖π₀) = λ|w|²/2 at the most probable weights: the pull costs what the prior costs
                       (`prior_beta`), with KL(π‖π₀) ≈ half the variance of f/γ on π₀'s responses
    on drawn responses γ noise/signal of f/γ: the share of the reward's move that the labels' noise alone makes
                       (`rewards.potential.Potential.beta`)

Both fall like 1/n.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from distalign.data import EncodedPair
from distalign.engine import Group
from distalign.methods import Needs
from distalign.rewards.fit import fit_head
from distalign.rewards.heads import new_head
from distalign.rewards.potential import Potential, moves
from distalign.rewards.reward_model import TrainedReward
from distalign.stats.calibration import calibrate
from distalign.training.prompts import INFORMATIVE


@dataclass(frozen=True)
class Choice:
    """A number and why it is that one."""

    value: float
    reason: str

    def __str__(self) -> str:
        return f"{self.value:g}: {self.reason}"


def _rounded(value: float) -> float:
    # As it is shown, so that a run goes on from what its files say.
    return float(f"{value:.3g}")


def labels_of(pairs: Sequence[EncodedPair]) -> Float[Tensor, "pairs"]:
    """The probability that `chosen` is preferred."""
    return torch.tensor([1.0 if pair.probability is None else pair.probability for pair in pairs]).double()


def choose_gamma(logps: Float[Tensor, "pairs 2"], probability: Float[Tensor, "pairs"]) -> Choice:
    """The γ of the start's log-probabilities of labelled pairs.

    Raises ValueError where `calibrate` does: too few pairs, or no differences.
    """
    found = calibrate(logps, probability)
    gap = (logps[:, 0] - logps[:, 1]).double().abs()
    median = float(gap[gap > 0].median())
    low, high = (bound / median for bound in INFORMATIVE)
    estimate = found.gamma
    reason = f"the start's calibration on {found.pairs} training pairs"
    number = f"{estimate.mean:.3g} [{estimate.low:.3g}, {estimate.high:.3g}]"
    if low <= estimate.mean <= high:
        return Choice(_rounded(estimate.mean), f"{reason}, 95 % interval [{estimate.low:.3g}, {estimate.high:.3g}]")
    side, bound, value = ("below", INFORMATIVE[0], low) if estimate.mean < low else ("above", INFORMATIVE[1], high)
    return Choice(
        _rounded(value),
        f"{reason} is {number}, {side} where labels carry information; the bound is taken, a median |γ Δ ln π₀| of "
        f"{bound:g} nats",
    )


@dataclass(frozen=True)
class Evidence:
    """What a reward of token counts learned from `pairs` pairs: λ|w|²/2 in nats, and how far f/γ moves π₀, in nats.

    noise: what the labels' noise alone moves, of these pairs. noise_of_all: of all n.
    """

    prior: float
    moved: float
    noise: float
    noise_of_all: float
    gamma: float
    n: int


def count_evidence(
    base: PreTrainedModel,
    pairs: Sequence[EncodedPair],
    prompts: Sequence[list[int]],
    responses: Sequence[list[list[int]]],
    *,
    gamma: float,
    n: int,
    token_budget: int,
) -> Evidence:
    """Fit the reward to some of `n` pairs, and see how far it moves π₀'s `responses` to `prompts`."""
    reward = TrainedReward(base, base, new_head("counts", base), gamma=gamma, token_budget=token_budget)
    groups = [Group(pair.prompt, [pair.chosen, pair.rejected]) for pair in pairs]
    posterior = fit_head(reward, groups, labels_of(pairs), None)
    moved, noise = moves(reward, posterior, prompts, responses, gamma=gamma)
    _, noise_of_all = moves(reward, posterior.repeated(n / len(pairs)), prompts, responses, gamma=gamma)
    prior = posterior.precision * float(posterior.mean.square().sum()) / 2
    return Evidence(prior, moved, noise, noise_of_all, gamma, n)


def choose_beta(needs: Needs, evidence: Evidence) -> Choice:
    """The β of a method that reads labelled pairs alone, or responses that a learned reward scores."""
    return prior_beta(evidence) if needs.pairs == "labelled" else noise_beta(evidence)


def prior_beta(evidence: Evidence) -> Choice:
    """β with n β KL(π‖π₀) = λ|w|²/2 at the most probable weights."""
    return Choice(
        _rounded(evidence.prior / (evidence.n * max(evidence.moved, 1e-12))),
        f"on {evidence.n} pairs, β KL(π‖π₀) at {evidence.moved:.3g} nats from π₀ costs what the prior of the largest "
        f"evidence does, {evidence.prior:.3g} nats",
    )


def noise_beta(evidence: Evidence) -> Choice:
    """β = γ noise/signal, and γ (half of the correction) where the noise is larger."""
    signal = max(evidence.moved - evidence.noise, 0.0)
    made = Potential(signal + evidence.noise_of_all, evidence.noise_of_all, evidence.gamma)
    return Choice(
        _rounded(made.beta),
        f"a reward learned from {evidence.n} pairs moves π₀ by {made.moved:.3g} nats, {made.noise:.3g} of them noise "
        "of the labels",
    )
