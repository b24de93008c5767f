"""PPO, as the paper's experiments estimate the policy gradient: a value function, GAE, and a clipped surrogate.

Used by RKL and RLHF with estimator "ppo".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from distalign.methods.base import Method, Samples, check_choice, check_setting
from distalign.methods.estimators import masked, sequence_sum


def ppo_loss(samples: Samples, *, clip: float, value_coefficient: float) -> Float[Tensor, "samples"]:
    """Clipped surrogate and value error of a response, summed over its tokens, everything masked after its end.

        −Σ_t min( r_t A_t, clip(r_t, 1 − clip, 1 + clip) A_t )  +  value_coefficient · ½ Σ_t (V(s_t) − returns_t)²

    Advantages and returns are those of `gae_credit`, in nats. A sum where others take a mean over the tokens of a
    batch, so that the gradient does not depend on how the batch is split.

    Source: arXiv 1707.06347, eq. 7, 9.
    """
    surrogate = clipped_surrogate(
        samples.token_logps, samples.behavior_token_logps, samples.advantages, samples.mask, clip=clip
    )
    # Masked before it is squared: off the mask a value may be NaN, and 0 · NaN would be the gradient.
    error = masked(samples.values - samples.returns.detach(), samples.mask).square().sum(-1)
    return -sequence_sum(surrogate, samples.mask) + value_coefficient * error / 2


def gae_credit(
    samples: Samples, *, gamma: float, beta: float, gae_lambda: float, whiten: bool
) -> tuple[Float[Tensor, "samples steps"], Float[Tensor, "samples steps"]]:
    """(advantages, returns) of a round under the reward that RKL and RLHF maximise, token by token, in nats.

        r_t = −γ ln π_t(y_t|s_t) − β ln π_t(y_t|s_t)/π₀(y_t|s_t),   plus R̂(x,y) at the last token

    No discount. `whiten` shifts and scales the advantages of all tokens of the round to mean 0 and variance 1.

    Source: arXiv 2506.01523v2, eq. 14; arXiv 1506.02438, eq. 16.
    """
    logps, mask, values = samples.behavior_token_logps, samples.mask, samples.values.detach()
    rewards = -gamma * logps
    if beta != 0:
        rewards = rewards - beta * (logps - samples.reference_token_logps)
    last = mask & ~torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)
    rewards = rewards + last * samples.rewards[:, None]
    advantages = gae(rewards, values, mask, discount=1.0, gae_lambda=gae_lambda)
    returns = masked(advantages + values, mask)
    if whiten:
        tokens = advantages[mask]
        scale = tokens.std(correction=0).clamp(min=1e-8)
        advantages = masked((advantages - tokens.mean()) / scale, mask)
    return advantages, returns


def clipped_surrogate(
    token_logps: Float[Tensor, "samples steps"],
    behavior_token_logps: Float[Tensor, "samples steps"],
    advantages: Float[Tensor, "samples steps"],
    mask: Bool[Tensor, "samples steps"],
    *,
    clip: float,
) -> Float[Tensor, "samples steps"]:
    """Clipped policy-gradient objective of PPO per token, to be MAXIMISED, in the unit of `advantages`; 0 off the mask.

        min( r_t A_t, clip(r_t, 1 − clip, 1 + clip) A_t ),    r_t = π(y_t|s_t) / π_t(y_t|s_t)

    `behavior_token_logps` are those of the policy π_t that sampled the responses. Biased away from π = π_t, on
    purpose: no gradient flows where a step in the wanted direction has already been taken. Raises ValueError if
    `clip` is not a positive finite number.

    Source: arXiv 1707.06347, eq. 7.
    """
    if not (math.isfinite(clip) and clip > 0):
        raise ValueError(f"clip is {clip}; it must be a positive finite number (PPO uses 0.2)")
    advantages = masked(advantages.detach(), mask)
    ratio = masked(token_logps - behavior_token_logps.detach(), mask).exp()
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def gae(
    rewards: Float[Tensor, "samples steps"],
    values: Float[Tensor, "samples steps"],
    mask: Bool[Tensor, "samples steps"],
    *,
    discount: float,
    gae_lambda: float,
) -> Float[Tensor, "samples steps"]:
    """Generalised advantage estimates per token, in the unit of `rewards`; constants, 0 off the mask.

        A_t = δ_t + (discount · gae_lambda) A_{t+1},    δ_t = r_t + discount · V_{t+1} − V_t

    `values` are V_t = V(s_t), before token t is drawn; the value after the last response token is 0. Each row's
    response tokens must be contiguous. The regression target of the value function is A_t + V_t. Raises ValueError if
    `discount` or `gae_lambda` is outside [0, 1].

    Source: arXiv 1506.02438, eq. 16.
    """
    for name, value in (("discount", discount), ("gae_lambda", gae_lambda)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; it must lie between 0 and 1")
    rewards, values = masked(rewards.detach(), mask), masked(values.detach(), mask)
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = rewards.new_zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        surprise = rewards[:, t] + discount * next_value - values[:, t]
        next_advantage = torch.where(mask[:, t], surprise + discount * gae_lambda * next_advantage, 0.0)
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages


@dataclass(frozen=True, kw_only=True)
class PolicyGradient(Method):
    """How RKL and RLHF estimate their gradient.

    estimator "joint": the regularised reward of a whole response against the mean of the other responses to its prompt
    (`rkl_loss`); "split": each term by its own estimator (`rkl_split_loss`); both are unbiased, also for responses that
    an earlier policy drew. "ppo" is biased on purpose, and alone reads the other settings.
    """

    estimator: Literal["joint", "split", "ppo"] = "joint"
    gae_lambda: float = 0.95
    clip: float = 0.2
    value_coefficient: float = 0.1
    whiten: bool = True

    gamma: ClassVar[float]
    beta: ClassVar[float]

    def __post_init__(self) -> None:
        check_choice(self, "estimator", ("joint", "split", "ppo"))
        check_setting(self, "clip")
        check_setting(self, "value_coefficient")
        check_setting(self, "gae_lambda", zero=True)
        if self.gae_lambda > 1:
            raise ValueError(f"{type(self).__name__}: gae_lambda is {self.gae_lambda}; set it between 0 and 1")

    def credit(self, samples: Samples) -> tuple[Float[Tensor, "samples steps"], Float[Tensor, "samples steps"]]:
        """(advantages, returns) of a round, for estimator "ppo"."""
        settings = {"gae_lambda": self.gae_lambda, "whiten": self.whiten}
        return gae_credit(samples, gamma=self.gamma, beta=self.beta, **settings)
