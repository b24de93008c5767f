"""What RKL and RLHF share: how a policy gradient is estimated. No objective of its own.

advantage "loo": the regularised reward of a whole response against the mean of the other responses to its prompt.
Unbiased, also for responses that an earlier policy drew. advantage "gae": PPO, as in the paper's experiments: a value
function, generalised advantage estimates token by token, and a clipped surrogate, which is biased on purpose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from distalign.methods.base import Credit, Needs, Samples, check_choice, check_setting, declared
from distalign.methods.estimators import clipped_surrogate, gae, sequence_sum


def ppo_loss(
    token_logps: Float[Tensor, "samples steps"],
    behavior_token_logps: Float[Tensor, "samples steps"],
    values: Float[Tensor, "samples steps"],
    advantages: Float[Tensor, "samples steps"],
    returns: Float[Tensor, "samples steps"],
    mask: Bool[Tensor, "samples steps"],
    *,
    clip: float,
    value_coefficient: float,
) -> Float[Tensor, "samples"]:
    """Clipped surrogate and value error of a response, summed over its tokens, everything masked after its end.

        −Σ_t min( r_t A_t, clip(r_t, 1 − clip, 1 + clip) A_t )  +  value_coefficient · ½ Σ_t (V(s_t) − returns_t)²

    `advantages` and `returns` are those of `credit`, in nats. A sum where others take a mean over the tokens of a
    batch, so that the gradient does not depend on how the batch is split.

    Source: arXiv 1707.06347, eq. 7, 9.
    """
    surrogate = clipped_surrogate(token_logps, behavior_token_logps, advantages, mask, clip=clip)
    error = sequence_sum((values - returns.detach()).square(), mask)
    return -sequence_sum(surrogate, mask) + value_coefficient * error / 2


def gae_credit(samples: Samples, *, gamma: float, beta: float, gae_lambda: float, whiten: bool) -> Credit:
    """Advantages and returns of a round under the reward that RKL and RLHF maximise, token by token, in nats.

        r_t = −γ ln π_t(y_t|s_t) − β ln π_t(y_t|s_t)/π₀(y_t|s_t),   plus R̂(x,y) at the last token

    No discount. `whiten` shifts and scales the advantages of all tokens of the round to mean 0 and variance 1.
    """
    logps, mask = declared(samples.behavior_token_logps, "samples.behavior_token_logps"), samples.mask
    values = declared(samples.values, "samples.values").detach()
    steps = -gamma * logps
    if beta != 0:
        steps = steps - beta * (logps - declared(samples.reference_token_logps, "samples.reference_token_logps"))
    last = mask & ~torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)
    steps = steps + last * declared(samples.rewards, "samples.rewards")[:, None]
    advantages = gae(steps, values, mask, discount=1.0, gae_lambda=gae_lambda)
    returns = torch.where(mask, advantages + values, 0.0)
    if whiten:
        tokens = advantages[mask]
        scale = tokens.std(correction=0).clamp(min=1e-8)
        advantages = torch.where(mask, (advantages - tokens.mean()) / scale, 0.0)
    return Credit(advantages, returns)


@dataclass(frozen=True, kw_only=True)
class PolicyGradient:
    """Settings of the estimate. `estimator` "joint": one advantage R̂ − γ ln π − β ln π/π₀ for a whole response, whose
    noise vanishes at the optimum; "split": reward by itself, entropy and KL from the full vocabulary at each step.

    `gae_lambda`, `clip`, `value_coefficient` and `whiten` are PPO's, read with advantage "gae" only.
    """

    advantage: Literal["loo", "gae"] = "loo"
    estimator: Literal["joint", "split"] = "joint"
    gae_lambda: float = 0.95
    clip: float = 0.2
    value_coefficient: float = 0.1
    whiten: bool = True

    def __post_init__(self) -> None:
        check_choice(self, "advantage", ("loo", "gae"))
        check_choice(self, "estimator", ("joint", "split"))
        check_setting(self, "clip")
        check_setting(self, "value_coefficient")
        check_setting(self, "gae_lambda", zero=True)
        if self.gae_lambda > 1:
            raise ValueError(f"{type(self).__name__}: gae_lambda is {self.gae_lambda}; set it between 0 and 1")
        if self.advantage == "gae" and self.estimator == "split":
            raise ValueError(f'{type(self).__name__}: estimator "split" goes with advantage "loo"; change one of them')

    def _needs(self, *, gamma: float, beta: float) -> Needs:
        split = self.estimator == "split"
        return Needs(
            samples=True,
            reward=True,
            reference=beta > 0 and not split,
            kl=split and beta > 0,
            entropy=split and gamma > 0,
            values=self.advantage == "gae",
        )

    def _ppo_loss(self, samples: Samples) -> Float[Tensor, ""]:
        behavior = samples.behavior_token_logps
        return ppo_loss(
            samples.token_logps,
            samples.token_logps.detach() if behavior is None else behavior,
            declared(samples.values, "samples.values"),
            declared(samples.advantages, "samples.advantages"),
            declared(samples.returns, "samples.returns"),
            samples.mask,
            clip=self.clip,
            value_coefficient=self.value_coefficient,
        ).mean()
