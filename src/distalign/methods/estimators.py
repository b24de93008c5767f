"""Expectations under the policy, estimated from its own responses, with a CORRECT gradient.

The sampling distribution moves with the parameters, so the derivative of a sample average misses a term: for y ~ π,

    ∇ E[f(y)] = E[ ∇f(y) + f(y) ∇ ln π(y|x) ]

and what it misses is the second, the score term (for f = ln π/π₀ the first has expectation zero). Every estimator here
returns one SURROGATE per response: its value is the unbiased estimate of the quantity, and the gradient that autograd
finds in it is an unbiased estimate of the gradient of the expectation. Average surrogates; never square or clip them.

Two forms, both unbiased in value and gradient:

    *_plain   needs the probabilities of the sampled tokens only
    *_full    needs the quantity over the full vocabulary at each step; far less noisy for one term on its own

Tensors are laid out as in `methods.base.Samples`: a row a response, a column a token, nats, `mask` True on response
tokens (end-of-sequence included). Columns off the mask may hold anything, NaN included. `group` numbers the prompt
that a row answers and selects the leave-one-out baselines; None means no baseline. A baseline does not move the mean
of the gradient, only its noise.

Responses that an earlier policy π_t drew (`behavior_token_logps`) are weighted by `importance_weights`: value and
gradient stay unbiased, and at π = π_t nothing changes. None means that π itself drew them.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = [
    "clipped_surrogate",
    "entropy_full",
    "entropy_plain",
    "gae",
    "importance_weights",
    "kl_full",
    "kl_plain",
    "leave_one_out",
    "reward_plain",
    "sequence_sum",
]


def sequence_sum(
    values: Float[Tensor, "samples steps"], mask: Bool[Tensor, "samples steps"]
) -> Float[Tensor, "samples"]:
    """Sum over the response tokens of each row, in the unit of `values`; off the mask even NaN is ignored."""
    return _masked(values, mask).sum(-1)


def leave_one_out(
    values: Float[Tensor, "samples *steps"], group: Int[Tensor, "samples"] | None
) -> Float[Tensor, "samples *steps"]:
    """Mean of the OTHER rows of the same group, a row at a time, in the unit of `values`; 0 for a row that is alone.

    A baseline that contains the row's own value b = (1/K) Σ_k v_k would shrink the gradient to (K − 1)/K of itself.
    With `group` None every row is alone. A baseline of few rows is noisy itself: in pairs (K = 2) it lowers the noise
    of the gradient only if the values are far from zero against their spread.
    """
    if group is None:
        return torch.zeros_like(values)
    labels, index = torch.unique(group, return_inverse=True)
    total = values.new_zeros((len(labels), *values.shape[1:])).index_add(0, index, values)
    others = (torch.bincount(index, minlength=len(labels))[index] - 1).view(-1, *[1] * (values.dim() - 1))
    # A row that is alone must get exactly 0, so it is not left to the rounding of total − value.
    return torch.where(others > 0, (total[index] - values) / others.clamp(min=1), 0.0)


def importance_weights(
    token_logps: Float[Tensor, "samples steps"],
    behavior_token_logps: Float[Tensor, "samples steps"] | None,
    mask: Bool[Tensor, "samples steps"],
) -> Float[Tensor, "samples steps"]:
    """Probability of each response up to and including token t under π, relative to the policy π_t that drew it.

        w_t = Π_{u≤t} π(y_u|s_u) / π_t(y_u|s_u)

    Constants; after the end a row keeps its last value, which is the weight of the whole response. All 1 without
    `behavior_token_logps`. Their mean is 1; far from π_t few responses carry all of it.
    """
    if behavior_token_logps is None:
        return torch.ones_like(token_logps)
    return _masked((token_logps - behavior_token_logps).detach(), mask).cumsum(-1).exp()


def kl_plain(
    token_logps: Float[Tensor, "samples steps"],
    reference_token_logps: Float[Tensor, "samples steps"],
    mask: Bool[Tensor, "samples steps"],
    group: Int[Tensor, "samples"] | None = None,
    behavior_token_logps: Float[Tensor, "samples steps"] | None = None,
) -> Float[Tensor, "samples"]:
    """KL(π ‖ π₀) per sequence from the sampled tokens' log-ratio, in nats.

        value      Σ_t ln π(y_t|s_t)/π₀(y_t|s_t)
        gradient   Σ_t ∇ ln π(y_t|s_t) · ( Σ_{u≥t} ln π(y_u|s_u)/π₀(y_u|s_u) − baseline_t )

    Single values may be negative. Vanishing noise at π = π₀, large noise away from it: see `kl_full`.

    Source: arXiv 2506.01523v2, the regulariser of eq. 5, 12, 14.
    """
    return _plain(token_logps, token_logps - reference_token_logps, mask, group, behavior_token_logps)


def kl_full(
    token_logps: Float[Tensor, "samples steps"],
    step_kl: Float[Tensor, "samples steps"],
    mask: Bool[Tensor, "samples steps"],
    group: Int[Tensor, "samples"] | None = None,
    behavior_token_logps: Float[Tensor, "samples steps"] | None = None,
) -> Float[Tensor, "samples"]:
    """KL(π ‖ π₀) per sequence from its full-vocabulary value at each step, KL_t = KL(π(·|s_t) ‖ π₀(·|s_t)), in nats.

        value      Σ_t KL_t
        gradient   Σ_t ∇KL_t  +  Σ_t ∇ ln π(y_t|s_t) · ( Σ_{u>t} KL_u − baseline_t )

    `step_kl` must carry its gradient. The second sum is there because y_t decides which prefixes come later; it is zero
    for responses of one token, so no test at length one can notice its absence.

    Source: arXiv 2506.01523v2, the regulariser of eq. 5, 12, 14.
    """
    return _full(token_logps, step_kl, mask, group, behavior_token_logps)


def entropy_plain(
    token_logps: Float[Tensor, "samples steps"],
    mask: Bool[Tensor, "samples steps"],
    group: Int[Tensor, "samples"] | None = None,
    behavior_token_logps: Float[Tensor, "samples steps"] | None = None,
) -> Float[Tensor, "samples"]:
    """Entropy H(π) per sequence from the sampled tokens, in nats.

        value      −Σ_t ln π(y_t|s_t)
        gradient   −Σ_t ∇ ln π(y_t|s_t) · ( Σ_{u≥t} ln π(y_u|s_u) − baseline_t )

    Source: arXiv 2506.01523v2, the entropy of eq. 14.
    """
    return _plain(token_logps, -token_logps, mask, group, behavior_token_logps)


def entropy_full(
    token_logps: Float[Tensor, "samples steps"],
    step_entropy: Float[Tensor, "samples steps"],
    mask: Bool[Tensor, "samples steps"],
    group: Int[Tensor, "samples"] | None = None,
    behavior_token_logps: Float[Tensor, "samples steps"] | None = None,
) -> Float[Tensor, "samples"]:
    """Entropy H(π) per sequence from its full-vocabulary value at each step, H_t = H(π(·|s_t)), in nats.

        value      Σ_t H_t
        gradient   Σ_t ∇H_t  +  Σ_t ∇ ln π(y_t|s_t) · ( Σ_{u>t} H_u − baseline_t )

    `step_entropy` must carry its gradient.

    Source: arXiv 2506.01523v2, the entropy of eq. 14.
    """
    return _full(token_logps, step_entropy, mask, group, behavior_token_logps)


def reward_plain(
    token_logps: Float[Tensor, "samples steps"],
    rewards: Float[Tensor, "samples"],
    mask: Bool[Tensor, "samples steps"],
    group: Int[Tensor, "samples"] | None = None,
    behavior_token_logps: Float[Tensor, "samples steps"] | None = None,
) -> Float[Tensor, "samples"]:
    """Expected reward E[R(x,y)] from scored responses, in the unit of `rewards`.

        value      R(x,y)
        gradient   ∇ ln π(y|x) · ( R(x,y) − baseline )

    `rewards` are constants: no gradient enters them. This is REINFORCE with a leave-one-out baseline (arXiv
    2402.14740).

    Source: arXiv 2506.01523v2, the first term of eq. 14.
    """
    rewards = rewards.detach()
    weights = importance_weights(token_logps, behavior_token_logps, mask)[:, -1]
    score = weights * sequence_sum(token_logps, mask) * (rewards - leave_one_out(rewards, group))
    return weights * rewards + _gradient_only(score)


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
    advantages = _masked(advantages.detach(), mask)
    ratio = _masked(token_logps - behavior_token_logps.detach(), mask).exp()
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
    rewards, values = _masked(rewards.detach(), mask), _masked(values.detach(), mask)
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = rewards.new_zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        surprise = rewards[:, t] + discount * next_value - values[:, t]
        next_advantage = torch.where(mask[:, t], surprise + discount * gae_lambda * next_advantage, 0.0)
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages


def _plain(
    token_logps: Float[Tensor, "samples steps"],
    step_values: Float[Tensor, "samples steps"],
    mask: Bool[Tensor, "samples steps"],
    group: Int[Tensor, "samples"] | None,
    behavior_token_logps: Float[Tensor, "samples steps"] | None,
) -> Float[Tensor, "samples"]:
    # The direct derivative of the sampled values has expectation zero: noise without signal, so it is cut off.
    weights = importance_weights(token_logps, behavior_token_logps, mask)
    step_values = _masked(step_values.detach(), mask) * weights
    score = _score(token_logps, _sum_from_here(step_values), weights, mask, group)
    return step_values.sum(-1) + _gradient_only(score)


def _full(
    token_logps: Float[Tensor, "samples steps"],
    step_values: Float[Tensor, "samples steps"],
    mask: Bool[Tensor, "samples steps"],
    group: Int[Tensor, "samples"] | None,
    behavior_token_logps: Float[Tensor, "samples steps"] | None,
) -> Float[Tensor, "samples"]:
    weights = importance_weights(token_logps, behavior_token_logps, mask)
    # A step's value is known before its token is drawn: it is weighted by what came before.
    before = torch.cat([torch.ones_like(weights[:, :1]), weights[:, :-1]], 1)
    step_values = _masked(step_values, mask) * before
    later = _sum_from_here(step_values.detach()) - step_values.detach()
    return step_values.sum(-1) + _gradient_only(_score(token_logps, later, weights, mask, group))


def _score(
    token_logps: Float[Tensor, "samples steps"],
    to_go: Float[Tensor, "samples steps"],
    weights: Float[Tensor, "samples steps"],
    mask: Bool[Tensor, "samples steps"],
    group: Int[Tensor, "samples"] | None,
) -> Float[Tensor, "samples"]:
    """Σ_t ln π(y_t|s_t) · (to_go_t − w_t baseline_t): its gradient is the score term, its value means nothing."""
    return (_masked(token_logps, mask) * (to_go - weights * leave_one_out(to_go, group))).sum(-1)


def _sum_from_here(values: Float[Tensor, "samples steps"]) -> Float[Tensor, "samples steps"]:
    return values.flip(-1).cumsum(-1).flip(-1)


def _masked(
    values: Float[Tensor, "samples steps"], mask: Bool[Tensor, "samples steps"]
) -> Float[Tensor, "samples steps"]:
    # Not values * mask: 0 · NaN and 0 · (−inf) are NaN.
    return torch.where(mask, values, 0.0)


def _gradient_only(score: Float[Tensor, "samples"]) -> Float[Tensor, "samples"]:
    return score - score.detach()
