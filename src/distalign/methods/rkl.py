"""RKL, reverse KL (arXiv 2506.01523v2, eq. 14, 15): minimise γ KL(π ‖ π̃) + β KL(π ‖ π₀), π̃ ∝ exp(R̂/γ).

By policy gradient: needs a reward model and the policy's own responses. It is RLHF plus an entropy term with a
meaning: γ is the sharpness of the preference model, so the optimum is the target language model and not the
best-scoring answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float, Int
from torch import Tensor

from distalign.methods.base import Credit, Needs, Pairs, Samples, check_setting, declared
from distalign.methods.estimators import entropy_full, kl_full, reward_plain, sequence_sum
from distalign.methods.ppo import PolicyGradient, gae_credit


def rkl_loss(
    token_logps: Float[Tensor, "samples steps"],
    reference_token_logps: Float[Tensor, "samples steps"] | None,
    rewards: Float[Tensor, "samples"],
    mask: Bool[Tensor, "samples steps"],
    group: Int[Tensor, "samples"] | None = None,
    behavior_token_logps: Float[Tensor, "samples steps"] | None = None,
    *,
    gamma: float,
    beta: float,
) -> Float[Tensor, "samples"]:
    """Regularised negative reward of a response sampled from the policy, in nats, with a correct gradient.

        value      −A,   A = R̂(x,y) − γ ln π(y|x) − β ln π(y|x)/π₀(y|x)
        gradient   −∇ ln π(y|x) · ( A − mean of A over the other responses to the prompt )

    The mean of the value is −E[R̂] − γ H(π) + β KL(π ‖ π₀). A is constant at the optimum π ∝ π₀^{β/(β+γ)}
    exp(R̂/(β+γ)), so the noise of the gradient vanishes there, which is why the three terms share one estimator.
    `group` numbers the prompts (None: no baseline). `reference_token_logps` is read only if `beta` is not 0. Responses
    that an earlier policy drew are weighted (`estimators.importance_weights`).

    Source: arXiv 2506.01523v2, eq. 14.
    """
    logps = sequence_sum(token_logps.detach(), mask)
    regularised = rewards - gamma * logps
    if beta != 0:
        reference = declared(reference_token_logps, "reference_token_logps")
        regularised = regularised - beta * (logps - sequence_sum(reference, mask))
    return -reward_plain(token_logps, regularised, mask, group, behavior_token_logps)


def rkl_split_loss(
    token_logps: Float[Tensor, "samples steps"],
    step_kl: Float[Tensor, "samples steps"] | None,
    step_entropy: Float[Tensor, "samples steps"] | None,
    rewards: Float[Tensor, "samples"],
    mask: Bool[Tensor, "samples steps"],
    group: Int[Tensor, "samples"] | None = None,
    behavior_token_logps: Float[Tensor, "samples steps"] | None = None,
    *,
    gamma: float,
    beta: float,
) -> Float[Tensor, "samples"]:
    """The same expectation as `rkl_loss`, each term by its own estimator, in nats, with a correct gradient.

        −R̂(x,y) − γ Σ_t H_t + β Σ_t KL_t

    Less noisy than `rkl_loss` far from the optimum, far noisier near it. `step_entropy` is read if `gamma` is not 0,
    `step_kl` if `beta` is not 0.

    Source: arXiv 2506.01523v2, eq. 14.
    """
    rest = (mask, group, behavior_token_logps)
    loss = -reward_plain(token_logps, rewards, *rest)
    if gamma != 0:
        loss = loss - gamma * entropy_full(token_logps, declared(step_entropy, "step_entropy"), *rest)
    if beta != 0:
        loss = loss + beta * kl_full(token_logps, declared(step_kl, "step_kl"), *rest)
    return loss


@dataclass(frozen=True)
class RKL(PolicyGradient):
    """RKL with the paper's TL;DR settings: sharpness `gamma` (the entropy weight), KL weight `beta`."""

    gamma: float = 0.01
    beta: float = 0.05

    equation: ClassVar[str] = "−E[R̂] − γ H(π) + β KL(π‖π₀)"
    source: ClassVar[str] = "arXiv 2506.01523v2, eq. 14, 15"
    rate: ClassVar[str | None] = "1/n (theorem 7)"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_setting(self, "gamma", zero=True)
        check_setting(self, "beta", zero=True)
        if self.gamma == self.beta == 0:
            raise ValueError(
                "RKL: gamma and beta are both 0, which asks for the single best-scoring answer; set gamma > 0 "
                "(or beta > 0, which is RLHF)"
            )

    @property
    def needs(self) -> Needs:
        """Scored samples; with β > 0 also the reference; a value function with advantage "gae"."""
        return self._needs(gamma=self.gamma, beta=self.beta)

    def credit(self, samples: Samples) -> Credit:
        """Advantages and returns of a round, for advantage "gae"."""
        return gae_credit(samples, gamma=self.gamma, beta=self.beta, gae_lambda=self.gae_lambda, whiten=self.whiten)

    def loss(self, pairs: Pairs | None, samples: Samples | None) -> Float[Tensor, ""]:
        """Mean regularised negative reward of the samples, in nats (with advantage "gae" PPO's surrogate for it)."""
        samples = declared(samples, "samples")
        if self.advantage == "gae":
            return self._ppo_loss(samples)
        rewards = declared(samples.rewards, "samples.rewards")
        rest = (rewards, samples.mask, samples.group, samples.behavior_token_logps)
        weights = {"gamma": self.gamma, "beta": self.beta}
        if self.estimator == "split":
            kl = samples.step_kl if self.beta > 0 else None
            entropy = samples.step_entropy if self.gamma > 0 else None
            return rkl_split_loss(samples.token_logps, kl, entropy, *rest, **weights).mean()
        reference = samples.reference_token_logps if self.beta > 0 else None
        return rkl_loss(samples.token_logps, reference, *rest, **weights).mean()

    def implied_reward(
        self, logps: Float[Tensor, "*shape"], reference_logps: Float[Tensor, "*shape"] | None
    ) -> Float[Tensor, "*shape"]:
        """γ ln π(a|x) + β ln π(a|x)/π₀(a|x), in nats: the reward at the optimum, up to a constant per prompt."""
        reward = self.gamma * logps
        if self.beta > 0:
            reward = reward + self.beta * (logps - declared(reference_logps, "reference_logps"))
        return reward
