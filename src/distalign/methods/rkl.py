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

from distalign.estimators import reward_plain, sequence_sum
from distalign.methods.base import Needs, Pairs, Samples, check_setting, declared


def rkl_loss(
    token_logps: Float[Tensor, "samples steps"],
    reference_token_logps: Float[Tensor, "samples steps"] | None,
    rewards: Float[Tensor, "samples"],
    mask: Bool[Tensor, "samples steps"],
    group: Int[Tensor, "samples"] | None = None,
    *,
    gamma: float,
    beta: float,
) -> Float[Tensor, "samples"]:
    """Regularised negative reward of a response sampled from the policy, in nats, with a correct gradient.

        value      −A,   A = R̂(x,y) − γ ln π(y|x) − β ln π(y|x)/π₀(y|x)
        gradient   −∇ ln π(y|x) · ( A − mean of A over the other responses to the prompt )

    The mean of the value is −E[R̂] − γ H(π) + β KL(π ‖ π₀). A is constant at the optimum π ∝ π₀^{β/(β+γ)}
    exp(R̂/(β+γ)), so the noise of the gradient vanishes there, which is why the three terms share one estimator.
    `group` numbers the prompts (None: no baseline). `reference_token_logps` is read only if `beta` is not 0.

    Source: arXiv 2506.01523v2, eq. 14.
    """
    logps = sequence_sum(token_logps.detach(), mask)
    regularised = rewards - gamma * logps
    if beta != 0:
        reference = declared(reference_token_logps, "reference_token_logps")
        regularised = regularised - beta * (logps - sequence_sum(reference, mask))
    return -reward_plain(token_logps, regularised, mask, group)


@dataclass(frozen=True)
class RKL:
    """RKL with the paper's TL;DR settings: sharpness `gamma` (the entropy weight), KL weight `beta`."""

    gamma: float = 0.01
    beta: float = 0.05

    equation: ClassVar[str] = "−E[R̂] − γ H(π) + β KL(π‖π₀)"
    source: ClassVar[str] = "arXiv 2506.01523v2, eq. 14, 15"
    rate: ClassVar[str | None] = "1/n (theorem 7)"

    def __post_init__(self) -> None:
        check_setting(self, "gamma", zero=True)
        check_setting(self, "beta", zero=True)
        if self.gamma == 0 and self.beta == 0:
            raise ValueError(
                "RKL: gamma and beta are both 0, which asks for the single best-scoring answer; set gamma > 0 "
                "(or beta > 0, which is RLHF)"
            )

    @property
    def needs(self) -> Needs:
        """Scored samples; with β > 0 also the reference."""
        return Needs(samples=True, reward=True, reference=self.beta > 0)

    def loss(self, pairs: Pairs | None, samples: Samples | None) -> Float[Tensor, ""]:
        """Mean regularised negative reward of the samples, in nats."""
        samples = declared(samples, "samples")
        reference = samples.reference_token_logps if self.beta > 0 else None
        return rkl_loss(
            samples.token_logps,
            reference,
            declared(samples.rewards, "samples.rewards"),
            samples.mask,
            samples.group,
            gamma=self.gamma,
            beta=self.beta,
        ).mean()

    def implied_reward(
        self, logps: Float[Tensor, "*shape"], reference_logps: Float[Tensor, "*shape"] | None
    ) -> Float[Tensor, "*shape"]:
        """γ ln π(a|x) + β ln π(a|x)/π₀(a|x), in nats: the reward at the optimum, up to a constant per prompt."""
        reward = self.gamma * logps
        if self.beta > 0:
            reward = reward + self.beta * (logps - declared(reference_logps, "reference_logps"))
        return reward
