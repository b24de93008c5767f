"""A recipe's `auto` becomes a number, chosen on the training pairs and logged with its reason.

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

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from distalign.data import EncodedPair, prompts_of
from distalign.engine import Group, score_in_batches
from distalign.errors import InputError
from distalign.experiments.recipe import Recipe
from distalign.methods import Needs
from distalign.rewards.fit import fit_head
from distalign.rewards.heads import new_head
from distalign.rewards.potential import FAR, PROMPTS, SAMPLES, Potential, moves
from distalign.rewards.reward_model import TrainedReward
from distalign.rollout.sample import sample
from distalign.stats.calibration import calibrate
from distalign.training.prompts import INFORMATIVE
from distalign.training.rollout_settings import draws_responses

logger = logging.getLogger("distalign.experiments.auto")

SUBSET = 1024  # training pairs that are looked at


def settle_gamma(recipe: Recipe, base: PreTrainedModel, train: Sequence[EncodedPair]) -> Recipe:
    """The recipe with a number for γ where it is auto: a known target's own, else the start's calibration.

    Raises InputError where the pairs do not say.
    """
    names = recipe.automatic("gamma")
    if not names:
        return recipe
    if recipe.target is not None:
        choice = Choice(recipe.target.gamma, "the known target's own")
    else:
        pairs = _some(train, recipe.seed)
        groups = [Group(pair.prompt, [pair.chosen, pair.rejected]) for pair in pairs]
        logps = score_in_batches(base, groups, token_budget=recipe.forward_budget).logps
        try:
            choice = choose_gamma(logps.view(-1, 2).cpu(), _labels(pairs))
        except ValueError as error:
            raise InputError(f"{recipe.name}: gamma is auto, which these pairs do not say ({error})") from None
        others = [name for name in names if draws_responses(recipe.method(name))]
        if others := [name for name in others if recipe.rollout_for(name).temperature != 1]:
            logger.warning(
                "gamma auto is found at temperature 1, and %s learns at that of its rollout: give gamma a number",
                ", ".join(others),
            )
    logger.info("gamma auto (%s) is %s", ", ".join(names), choice)
    return recipe.with_numbers("gamma", dict.fromkeys(names, choice.value))


def settle_beta(recipe: Recipe, base: PreTrainedModel, train: Sequence[EncodedPair], end_id: int) -> Recipe:
    """The recipe with a number for β where it is auto; every γ is a number already."""
    names = recipe.automatic("beta")
    if not names:
        return recipe
    pairs = _some(train, recipe.seed)
    prompts = [one.prompt for one in prompts_of(pairs)][:PROMPTS]
    length = recipe.rollout.max_completion_length
    responses = sample(base, prompts, n=SAMPLES, max_new_tokens=length, end_id=end_id, seed=20_000)
    read: dict[float, Evidence] = {}
    numbers = {}
    for name in names:
        needs, gamma = recipe.method(name).needs, recipe.methods[name]["gamma"]
        if needs.pairs != "labelled" and all(one.exact for one in recipe.reward):
            choice = Choice(0.0, "the exact reward has no noise")
        else:
            if gamma not in read:
                read[gamma] = count_evidence(
                    base, pairs, prompts, responses, gamma=gamma, n=len(train), token_budget=recipe.forward_budget
                )
            choice = choose_beta(needs, read[gamma])
        logger.info("beta auto (%s) is %s", name, choice)
        numbers[name] = choice.value
    return recipe.with_numbers("beta", numbers)


def _some(pairs: Sequence[EncodedPair], seed: int) -> list[EncodedPair]:
    """At most `SUBSET` of the pairs."""
    return list(pairs) if len(pairs) <= SUBSET else random.Random(seed).sample(pairs, SUBSET)


def _labels(pairs: Sequence[EncodedPair]) -> Float[Tensor, "pairs"]:
    return torch.tensor([pair.label for pair in pairs]).double()


# The rules ------------------------------------------------------------------------------------------------------------


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
    posterior = fit_head(reward, groups, _labels(pairs), None)
    moved, noise = moves(reward, posterior, prompts, responses, gamma=gamma)
    _, noise_of_all = moves(reward, posterior.repeated(n / len(pairs)), prompts, responses, gamma=gamma)
    prior = posterior.precision * float(posterior.mean.square().sum()) / 2
    return Evidence(prior, moved, noise, noise_of_all, gamma, n)


def choose_beta(needs: Needs, evidence: Evidence) -> Choice:
    """The β of a method that reads labelled pairs alone, or responses that a learned reward scores."""
    return prior_beta(evidence) if needs.pairs == "labelled" else noise_beta(evidence)


def prior_beta(evidence: Evidence) -> Choice:
    """β with n β KL(π‖π₀) = λ|w|²/2 at the most probable weights; γ where that is more, as for a reward's noise."""
    if evidence.moved > FAR:
        logger.warning(
            "beta auto: at γ = %.3g what the labels say is %.3g nats of moving from π₀, more than any policy does; γ "
            "is too small for these pairs, and the β that follows from it holds nothing: give a number",
            evidence.gamma, evidence.moved,
        )  # fmt: skip
    beta = evidence.prior / (evidence.n * max(evidence.moved, 1e-12))
    capped = f"; γ is the most that is taken ({beta:.3g})" if beta > evidence.gamma else ""
    return Choice(
        _rounded(min(beta, evidence.gamma)),
        f"on {evidence.n} pairs, β KL(π‖π₀) at {evidence.moved:.3g} nats from π₀ costs what the prior of the largest "
        f"evidence does, {evidence.prior:.3g} nats{capped}",
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
