"""PD, preference distillation (arXiv 2506.01523v2, eq. 9-12): fit the policy to a reward model's preferences.

This is algorithm 1. The reward model turns two responses into an expected preference, a soft label; the policy's
preference model is fitted to it. Like PMLE, but the labels are soft and any two responses will do, also the policy's
own; like RKL it needs a reward model, but no policy gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from distalign.estimators import kl_full
from distalign.methods.base import Needs, Pairs, Samples, check_setting, declared
from distalign.preference import bernoulli_kl, induced_reward, preference_logit


def pd_loss(
    logps: Float[Tensor, "pairs 2"], probability: Float[Tensor, "pairs"], *, gamma: float
) -> Float[Tensor, "pairs"]:
    """Divergence of the policy's preference model from an expected preference, in nats.

        KL( Bern(p̃) ‖ Bern( σ( γ [ln π(a|x) − ln π(b|x)] ) ) )

    `probability` is p̃ = σ(R̂(x,a) − R̂(x,b)), the expected preference of column 0; no gradient enters it. At p̃ = 1
    this is `pmle_loss`. The KL term of eq. 12 is `estimators.kl_full`. Raises ValueError if gamma ≤ 0.

    Source: arXiv 2506.01523v2, eq. 11.
    """
    return bernoulli_kl(probability.detach(), preference_logit(logps, gamma=gamma))


@dataclass(frozen=True)
class PD:
    """PD with the paper's TL;DR settings: sharpness `gamma`, KL weight `beta`."""

    gamma: float = 0.1
    beta: float = 0.05

    equation: ClassVar[str] = "KL(Bern(σ(ΔR̂)) ‖ Bern(σ(γ Δ ln π))) + β KL(π‖π₀)"
    source: ClassVar[str] = "arXiv 2506.01523v2, eq. 9-12"
    rate: ClassVar[str | None] = "1/n (theorem 6)"

    def __post_init__(self) -> None:
        check_setting(self, "gamma")
        check_setting(self, "beta", zero=True)

    @property
    def needs(self) -> Needs:
        """Scored pairs sampled from the policy; with β > 0 also samples, and the reference for their KL."""
        return Needs(pairs="sampled", samples=self.beta > 0, reward=True, reference=self.beta > 0)

    def loss(self, pairs: Pairs | None, samples: Samples | None) -> Float[Tensor, ""]:
        """Mean distillation loss of the pairs plus β times the mean KL(π ‖ π₀) of the samples, in nats."""
        pairs = declared(pairs, "pairs")
        rewards = declared(pairs.rewards, "pairs.rewards")
        loss = pd_loss(pairs.logps, (rewards[:, 0] - rewards[:, 1]).sigmoid(), gamma=self.gamma).mean()
        if self.beta > 0:
            samples = declared(samples, "samples")
            step_kl = declared(samples.step_kl, "samples.step_kl")
            loss = loss + self.beta * kl_full(samples.token_logps, step_kl, samples.mask, samples.group).mean()
        return loss

    def implied_reward(
        self, logps: Float[Tensor, "*shape"], reference_logps: Float[Tensor, "*shape"] | None
    ) -> Float[Tensor, "*shape"]:
        """γ ln π(a|x), in nats (eq. 8): the preference model is the language model, whatever the reference."""
        return induced_reward(logps, gamma=self.gamma)
