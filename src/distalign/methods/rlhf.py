"""RLHF: reward maximisation with a KL penalty, which is exactly RKL at γ = 0 (arXiv 2506.01523v2, eq. 14).

Its optimum π₀ exp(R̂/β) is not the target language model for any β: too large a β underfits, too small a one
collapses to a deterministic answer. Kept as the baseline that RKL is compared with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float, Int
from torch import Tensor

from distalign.methods.base import Credit, Needs, Pairs, Samples, check_setting, declared
from distalign.methods.ppo import PolicyGradient, gae_credit
from distalign.methods.rkl import rkl_loss, rkl_split_loss


def rlhf_loss(
    token_logps: Float[Tensor, "samples steps"],
    reference_token_logps: Float[Tensor, "samples steps"] | None,
    rewards: Float[Tensor, "samples"],
    mask: Bool[Tensor, "samples steps"],
    group: Int[Tensor, "samples"] | None = None,
    behavior_token_logps: Float[Tensor, "samples steps"] | None = None,
    *,
    beta: float,
) -> Float[Tensor, "samples"]:
    """KL-penalised negative reward of a response sampled from the policy, in nats, with a correct gradient.

        value      −A,   A = R̂(x,y) − β ln π(y|x)/π₀(y|x)
        gradient   −∇ ln π(y|x) · ( A − mean of A over the other responses to the prompt )

    `group` numbers the prompts (None: no baseline).

    Source: arXiv 2203.02155, eq. 2 (without its pretraining term); estimator arXiv 2402.14740.
    """
    rest = (rewards, mask, group, behavior_token_logps)
    return rkl_loss(token_logps, reference_token_logps, *rest, gamma=0.0, beta=beta)


@dataclass(frozen=True)
class RLHF(PolicyGradient):
    """RLHF with the paper's TL;DR setting: KL weight `beta`. At β = 0 it looks for the single best-scoring answer."""

    beta: float = 0.05

    equation: ClassVar[str] = "−E[R̂] + β KL(π‖π₀)"
    source: ClassVar[str] = "arXiv 2203.02155, eq. 2; arXiv 2506.01523v2, eq. 14 at γ = 0"
    rate: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_setting(self, "beta", zero=True)

    @property
    def needs(self) -> Needs:
        """Scored samples; with β > 0 the reference; a value function with advantage "gae"."""
        return self._needs(gamma=0.0, beta=self.beta)

    def credit(self, samples: Samples) -> Credit:
        """Advantages and returns of a round, for advantage "gae"."""
        return gae_credit(samples, gamma=0.0, beta=self.beta, gae_lambda=self.gae_lambda, whiten=self.whiten)

    def loss(self, pairs: Pairs | None, samples: Samples | None) -> Float[Tensor, ""]:
        """Mean KL-penalised negative reward of the samples, in nats (with advantage "gae" PPO's surrogate for it)."""
        samples = declared(samples, "samples")
        if self.advantage == "gae":
            return self._ppo_loss(samples)
        rest = (declared(samples.rewards, "samples.rewards"), samples.mask, samples.group, samples.behavior_token_logps)
        if self.estimator == "split":
            kl = samples.step_kl if self.beta > 0 else None
            return rkl_split_loss(samples.token_logps, kl, None, *rest, gamma=0.0, beta=self.beta).mean()
        reference = samples.reference_token_logps if self.beta > 0 else None
        return rlhf_loss(samples.token_logps, reference, *rest, beta=self.beta).mean()

    def implied_reward(
        self, logps: Float[Tensor, "*shape"], reference_logps: Float[Tensor, "*shape"] | None
    ) -> Float[Tensor, "*shape"]:
        """β ln π(a|x)/π₀(a|x), in nats: the reward at the optimum, up to a constant per prompt."""
        if self.beta == 0:
            return logps * 0
        return self.beta * (logps - declared(reference_logps, "reference_logps"))
