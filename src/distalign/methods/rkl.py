"""RKL, reverse KL (arXiv 2506.01523v2, eq. 14, 15): minimise γ KL(π ‖ π̃) + β KL(π ‖ π₀), π̃ ∝ exp(R̂/γ).

By policy gradient: needs a reward model and the policy's own responses. It is RLHF plus an entropy term with a
meaning: γ is the sharpness of the preference model, so the optimum is the target language model and not the
best-scoring answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from distalign.methods.base import Needs, Pairs, Samples, check_setting, require_reference
from distalign.methods.estimators import entropy_full, expected_reward, kl_full, sequence_sum
from distalign.methods.ppo import PolicyGradient, ppo_loss


def rkl_loss(samples: Samples, *, gamma: float, beta: float) -> Float[Tensor, "samples"]:
    """Regularised negative reward of a response sampled from the policy, in nats, with a correct gradient.

        value      −A,   A = R̂(x,y) − γ ln π(y|x) − β ln π(y|x)/π₀(y|x)
        gradient   −∇ ln π(y|x) · ( A − mean of A over the other responses to the prompt )

    The mean of the value is −E[R̂] − γ H(π) + β KL(π ‖ π₀). A is constant at the optimum π ∝ π₀^{β/(β+γ)}
    exp(R̂/(β+γ)), so the noise of the gradient vanishes there, which is why the three terms share one estimator.

    Source: arXiv 2506.01523v2, eq. 14.
    """
    logps = sequence_sum(samples.token_logps.detach(), samples.mask)
    advantage = samples.rewards - gamma * logps
    if beta != 0:
        advantage = advantage - beta * (logps - sequence_sum(samples.reference_token_logps, samples.mask))
    return -expected_reward(samples, advantage)


def rkl_split_loss(samples: Samples, *, gamma: float, beta: float) -> Float[Tensor, "samples"]:
    """The same expectation, each term by its own estimator: −R̂(x,y) − γ Σ_t H_t + β Σ_t KL_t, in nats (eq. 14).

    Less noisy than `rkl_loss` far from the optimum, far noisier near it.

    Source: arXiv 2506.01523v2, eq. 14.
    """
    loss = -expected_reward(samples, samples.rewards)
    if gamma != 0:
        loss = loss - gamma * entropy_full(samples)
    return loss + beta * kl_full(samples) if beta != 0 else loss


@dataclass(frozen=True)
class RKL(PolicyGradient):
    """RKL with the paper's TL;DR settings: sharpness `gamma` (the entropy weight), KL weight `beta`."""

    gamma: float = 0.01
    beta: float = 0.05

    equation: ClassVar[str] = "−E[R̂] − γ H(π) + β KL(π‖π₀)"
    source: ClassVar[str] = "arXiv 2506.01523v2, eq. 14, 15"
    optimum: ClassVar[str] = "π₀^{β/(β+γ)} exp(R̂/(β+γ)): π* at β = 0"
    theorem: ClassVar[str | None] = "theorem 7"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_setting(self, "gamma", zero=True)
        check_setting(self, "beta", zero=True)
        if self.gamma == self.beta == 0 and type(self) is RKL:
            raise ValueError("RKL: gamma and beta are both 0, which asks for the best-scoring answer; set gamma > 0")

    @property
    def needs(self) -> Needs:
        """Scored samples; with β > 0 also the reference; a value function with PPO."""
        if self.estimator == "split":
            return Needs(samples=True, reward=True, kl=self.beta > 0, entropy=self.gamma > 0)
        return Needs(samples=True, reward=True, reference=self.beta > 0, values=self.estimator == "ppo")

    def loss(self, pairs: Pairs, samples: Samples) -> Float[Tensor, ""]:
        """Mean regularised negative reward of the samples, in nats (PPO: its surrogate)."""
        if self.estimator == "ppo":
            return ppo_loss(samples, clip=self.clip, value_coefficient=self.value_coefficient).mean()
        estimate = rkl_loss if self.estimator == "joint" else rkl_split_loss
        return estimate(samples, gamma=self.gamma, beta=self.beta).mean()

    def implicit_reward(
        self, logps: Float[Tensor, "*shape"], reference_logps: Float[Tensor, "*shape"] | None
    ) -> Float[Tensor, "*shape"]:
        """γ ln π(a|x) + β ln π(a|x)/π₀(a|x), in nats: the reward at the optimum, up to a constant per prompt."""
        reward = self.gamma * logps
        return reward + self.beta * (logps - require_reference(reference_logps)) if self.beta > 0 else reward
