"""RLHF: reward maximisation with a KL penalty, which is exactly RKL at γ = 0 (arXiv 2506.01523v2, eq. 14).

Its optimum π₀ exp(R̂/β) is not the target language model for any β: too large a β underfits, too small a one
collapses to a deterministic answer. Kept as the baseline that RKL is compared with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float, Int
from torch import Tensor

from distalign.methods.base import Needs, Pairs, Samples, check_setting, declared
from distalign.methods.rkl import rkl_loss


def rlhf_loss(
    token_logps: Float[Tensor, "samples steps"],
    reference_token_logps: Float[Tensor, "samples steps"],
    rewards: Float[Tensor, "samples"],
    mask: Bool[Tensor, "samples steps"],
    group: Int[Tensor, "samples"] | None = None,
    *,
    beta: float,
) -> Float[Tensor, "samples"]:
    """KL-penalised negative reward of a response sampled from the policy, in nats, with a correct gradient.

        value      −A,   A = R̂(x,y) − β ln π(y|x)/π₀(y|x)
        gradient   −∇ ln π(y|x) · ( A − mean of A over the other responses to the prompt )

    `group` numbers the prompts (None: no baseline).

    Source: arXiv 2203.02155, eq. 2 (without its pretraining term); estimator arXiv 2402.14740.
    """
    return rkl_loss(token_logps, reference_token_logps, rewards, mask, group, gamma=0.0, beta=beta)


@dataclass(frozen=True)
class RLHF:
    """RLHF with the paper's TL;DR setting: KL weight `beta`."""

    beta: float = 0.05

    equation: ClassVar[str] = "−E[R̂] + β KL(π‖π₀)"
    source: ClassVar[str] = "arXiv 2203.02155, eq. 2; arXiv 2506.01523v2, eq. 14 at γ = 0"
    rate: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        check_setting(self, "beta")

    @property
    def needs(self) -> Needs:
        """Scored samples and the reference."""
        return Needs(samples=True, reward=True, reference=True)

    def loss(self, pairs: Pairs | None, samples: Samples | None) -> Float[Tensor, ""]:
        """Mean KL-penalised negative reward of the samples, in nats."""
        samples = declared(samples, "samples")
        return rlhf_loss(
            samples.token_logps,
            declared(samples.reference_token_logps, "samples.reference_token_logps"),
            declared(samples.rewards, "samples.rewards"),
            samples.mask,
            samples.group,
            beta=self.beta,
        ).mean()

    def implied_reward(
        self, logps: Float[Tensor, "*shape"], reference_logps: Float[Tensor, "*shape"] | None
    ) -> Float[Tensor, "*shape"]:
        """β ln π(a|x)/π₀(a|x), in nats: the reward at the optimum, up to a constant per prompt."""
        return self.beta * (logps - declared(reference_logps, "reference_logps"))
