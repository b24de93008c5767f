"""REBEL (arXiv 2404.16767; arXiv 2506.01523v2, eq. 10): regress reward differences on the policy's relative log-ratio.

Each round samples pairs from the policy π_t and moves it until its log-ratio gaps are the reward's. A KL penalty in the
reward keeps many rounds from collapse. With one step in a round it is RLHF at η = 1/β: give it num_iterations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from distalign.methods.base import Method, Needs, Pairs, Samples, check_setting, require_reference
from distalign.methods.estimators import penalised_rewards


def rebel_loss(
    logps: Float[Tensor, "pairs 2"],
    behavior_logps: Float[Tensor, "pairs 2"],
    rewards: Float[Tensor, "pairs 2"],
    *,
    eta: float,
) -> Float[Tensor, "pairs"]:
    """Squared error of the relative log-ratio of a sampled pair against its scaled reward gap, in nats squared.

        ( [ln π(a|x)/π_t(a|x) − ln π(b|x)/π_t(b|x)] − η [R̂(x,a) − R̂(x,b)] )²

    No gradient enters `behavior_logps`, of the policy π_t that sampled the pair, nor `rewards`. The minimum of one
    round is proportional to π_t exp(η R̂). Raises ValueError if `eta` is not above zero.

    Source: arXiv 2506.01523v2, eq. 10; arXiv 2404.16767, algorithm 1 (η multiplies the reward here).
    """
    if not eta > 0:
        raise ValueError(f"eta is {eta}; the step size must be a positive number")
    error = logps - behavior_logps.detach() - eta * rewards.detach()
    return (error[:, 0] - error[:, 1]).square()


@dataclass(frozen=True)
class REBEL(Method):
    """REBEL with the paper's TL;DR settings: step size `eta` (its chat experiment has 1e6), KL weight `beta`."""

    eta: float = 1.0
    beta: float = 0.05

    equation: ClassVar[str] = "(Δ ln π/π_t − η Δ[R̂ − β ln π_t/π₀])²"
    source: ClassVar[str] = "arXiv 2404.16767; arXiv 2506.01523v2, eq. 10"
    optimum: ClassVar[str] = "π₀ exp(R̂/β)"

    def __post_init__(self) -> None:
        check_setting(self, "eta")
        check_setting(self, "beta", zero=True)

    @property
    def needs(self) -> Needs:
        """Scored pairs sampled from the policy; with β > 0 the reference."""
        return Needs(pairs="sampled", reward=True, reference=self.beta > 0)

    def loss(self, pairs: Pairs, samples: Samples) -> Float[Tensor, ""]:
        """Mean squared error of the pairs, in nats squared."""
        rewards = penalised_rewards(pairs, beta=self.beta)
        return rebel_loss(pairs.logps, pairs.behavior_logps, rewards, eta=self.eta).mean()

    def implicit_reward(
        self, logps: Float[Tensor, "*shape"], reference_logps: Float[Tensor, "*shape"] | None
    ) -> Float[Tensor, "*shape"]:
        """β ln π(a|x)/π₀(a|x), in nats: what rounds settle at; at β = 0 that of one round, (1/η) ln π/π₀."""
        return (self.beta or 1 / self.eta) * (logps - require_reference(reference_logps))
