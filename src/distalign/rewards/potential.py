"""What a learned reward can give, before any training: how far its optimum moves, and how much of that is noise.

The optimum of RKL and PD is exp(R̂/γ) (β = 0), so an error of R̂ is divided by γ. Distances are nats per response.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distalign.engine import Group, score_in_batches
from distalign.errors import DAMAGED
from distalign.methods import Method
from distalign.rewards.base import RewardError
from distalign.rewards.reward_model import Trained, TrainedReward
from distalign.stats.intervals import Estimate, mean_and_se
from distalign.stats.laplace import Posterior

# The file of it in a trained reward's folder.
POTENTIAL = "potential.json"

# Prompts, and responses to each, of π₀ and of a known target; what no policy moves from π₀, in nats.
PROMPTS = 64
SAMPLES = 8
FAR = 100.0


@dataclass(frozen=True)
class Potential:
    """Half the variance of f/γ on π₀'s responses to a prompt, which is KL(exp(R̂/γ)‖π₀) for a small correction f.

    moved: all of it. noise: what the labels' noise alone gives. signal: the rest. distance: KL(π*‖exp(R̂/γ)) where
    there is a known target, start: KL(π*‖π₀) on the same responses.
    """

    moved: float
    noise: float
    gamma: float
    distance: Estimate | None = None
    start: Estimate | None = None

    @property
    def signal(self) -> float:
        """What of the move is not noise."""
        return max(self.moved - self.noise, 0.0)

    @property
    def beta(self) -> float:
        """The β of the best trade, γ · noise/signal, and γ (half of the correction) where the noise is larger."""
        return self.gamma * min(self.noise / max(self.signal, 1e-12), 1.0)

    def to_json(self) -> dict[str, Any]:
        """Plain data for a file."""
        known = {"distance": self.distance, "start": self.start}
        numbers = {name: value._asdict() for name, value in known.items() if value is not None}
        said = {"text": str(self), "warning": self.warning}
        return {"moved": self.moved, "noise": self.noise, "beta": self.beta, **numbers, **said}

    def __str__(self) -> str:
        text = f"its optimum is {self.moved:.2f} nats from π₀, {self.noise:.2f} of them noise of the labels"
        if self.distance is not None and self.start is not None:
            text += (
                f"; from the target {self.distance.mean:.2f} ± {self.distance.se:.2f} nats, "
                f"π₀ {self.start.mean:.2f} ± {self.start.se:.2f}"
            )
        return text

    @property
    def warning(self) -> str | None:
        """What to do where the noise exceeds the signal, or a known target says that the reward leads away; or None."""
        if self.distance is not None and self.start is not None and self.distance.mean > self.start.mean:
            return (
                f"reward: its optimum is farther from the target than π₀ is ({self.distance.mean:.2f} and "
                f"{self.start.mean:.2f} nats); take another head (auto chooses one), or more pairs"
            )
        if self.moved > FAR:
            return (
                f"reward: its optimum is {self.moved:.3g} nats from π₀, farther than a policy goes: γ "
                f"({self.gamma:.3g}) is too small for these pairs"
            )
        if self.noise <= self.signal:
            return None
        return (
            f"reward: of the {self.moved:.2f} nats that its optimum is from π₀, {self.noise:.2f} are noise of the "
            f"labels; train with beta {self.beta:.3g} (half of the correction), or with more pairs"
        )


def saved_potential(folder: str | None) -> list[str]:
    """What was said of the potential of the reward in a folder when it was trained; empty where nothing was.

    Raises RewardError for a file that cannot be read.
    """
    file = Path(folder or "") / POTENTIAL
    if folder is None or not file.is_file():
        return []
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
    except DAMAGED as error:
        raise RewardError(f"{file}: it cannot be read ({error}); remove it, or train the reward again") from None
    return [f"{folder}: {saved[name]}" for name in ("text", "warning") if saved.get(name)]


def potential(
    trained: Trained,
    prompts: Sequence[list[int]],
    reference: Sequence[list[list[int]]],
    *,
    gamma: float,
    target: nn.Module | None = None,
    target_responses: Sequence[list[list[int]]] = (),
) -> Potential:
    """The potential of a reward from `SAMPLES` or so responses of π₀ (and of a known target) to each prompt."""
    reward, samples = trained.reward, len(reference[0])
    moved, noise = moves(reward, trained.posterior, prompts, reference, gamma=gamma)
    if target is None:
        return Potential(moved, noise, gamma)
    groups = [Group(p, [*a, *b]) for p, a, b in zip(prompts, reference, target_responses, strict=True)]
    base, true = (score_together(model, groups, reward.token_budget) for model in (reward.base, target))
    learned = reward.values(groups).view(len(groups), -1) / gamma
    values = forward_kl(true, learned, base, samples)
    return Potential(moved, noise, gamma, mean_and_se(values), mean_and_se((true - base)[:, samples:].mean(1)))


def start_share(method: Method, gamma: float) -> float | None:
    """The s of π ∝ π₀^s π*^{1 − s}, if that is what a method ends at with the exact reward γ ln π*; else None.

    Its implicit reward is a ln π − b ln π₀. Set equal to the exact one it gives π ∝ π*^{γ/a} π₀^{b/a}: s = b/a, if
    a = γ + b.
    """
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    a, b = float(method.implicit_reward(one, zero)), -float(method.implicit_reward(zero, one))
    return b / a if b > 0 and abs(a - b - gamma) < 1e-9 else None


def moves(
    reward: TrainedReward,
    posterior: Posterior,
    prompts: Sequence[list[int]],
    reference: Sequence[list[list[int]]],
    *,
    gamma: float,
) -> tuple[float, float]:
    """Half the variance of f/γ on π₀'s responses to a prompt, and what of it the labels' noise alone gives."""
    groups = [Group(prompt, own) for prompt, own in zip(prompts, reference, strict=True)]
    offset, features = reward.encode(groups)
    _, rows = reward.linearise(groups, offset, features)
    rows = rows.cpu().view(len(groups), -1, rows.shape[1])
    rows = (rows - rows.mean(1, keepdim=True)).flatten(0, 1)
    samples = len(reference[0])
    unbiased = samples / max(samples - 1, 1) / (2 * gamma**2)
    mean, noise = posterior.moved(rows)
    return float(mean.square().mean()) * unbiased, float(noise.mean()) * unbiased


def score_together(model: nn.Module, groups: Sequence[Group], token_budget: int) -> Float[Tensor, "prompts both"]:
    """ln π of the groups' responses, as many for each prompt."""
    logps = score_in_batches(model, groups, token_budget=token_budget).logps
    return logps.double().cpu().view(len(groups), -1)


def forward_kl(
    true: Float[Tensor, "prompts both"],
    learned: Float[Tensor, "prompts both"],
    base: Float[Tensor, "prompts both"],
    samples: int,
) -> Float[Tensor, "prompts"]:
    """KL(π* ‖ exp(learned)/Z) of each prompt; the first `samples` responses are π₀'s, as many π*'s follow.

    E_{π*}[ln π* − learned] + ln Z, Z by importance sampling from (π₀ + π*)/2, its bias taken off by a jackknife.
    """
    log_weights = learned - torch.logaddexp(base, true) + torch.tensor(2.0).log()
    count = log_weights.shape[1]
    whole = log_weights.logsumexp(1)
    # Without each response in turn; a weight that is nearly all of the sum leaves the others'.
    left = torch.stack([log_weights[:, [j for j in range(count) if j != i]].logsumexp(1) for i in range(count)], 1)
    log_z = count * (whole - torch.tensor(count).log()) - (count - 1) * (left - torch.tensor(count - 1).log()).mean(1)
    return (true - learned)[:, samples:].mean(1) + log_z
