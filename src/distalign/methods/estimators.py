"""Expectations under the policy, estimated from its own responses, with a CORRECT gradient.

The sampling distribution moves with the parameters, so the derivative of a sample average misses a term: for y ~ π,

    ∇ E[f(y)] = E[ ∇f(y) + f(y) ∇ ln π(y|x) ]

and what it misses is the second, the score term (for f = ln π/π₀ the first has expectation zero). Every estimator of an
expectation takes `Samples` and returns one SURROGATE for each response: its value is the unbiased estimate of the
quantity, and the gradient that autograd finds in it is an unbiased estimate of the gradient of the expectation. Average
surrogates; never square or clip them.

Two forms, both unbiased in value and gradient:

    *_plain   needs the probabilities of the sampled tokens only
    *_full    needs the quantity over the full vocabulary at each step; far less noisy for one term on its own

Columns off the mask may hold anything, NaN included. Leave-one-out baselines are taken within `samples.group`; a
baseline does not move the mean of the gradient, only its noise. Responses that an earlier policy π_t drew
(`samples.behavior_token_logps`) are weighted by `importance_weights`: value and gradient stay unbiased, and at π = π_t
nothing changes.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from distalign.methods.base import Pairs, Samples


def sequence_sum(
    values: Float[Tensor, "samples steps"], mask: Bool[Tensor, "samples steps"]
) -> Float[Tensor, "samples"]:
    """Sum over the response tokens of each row, in the unit of `values`; off the mask even NaN is ignored."""
    return masked(values, mask).sum(-1)


def leave_one_out(
    values: Float[Tensor, "samples *steps"], group: Int[Tensor, "samples"]
) -> Float[Tensor, "samples *steps"]:
    """Mean of the OTHER rows of the same group, for each row, in the unit of `values`; 0 for a row that is alone.

    A baseline that contains the row's own value b = (1/K) Σ_k v_k would shrink the gradient to (K − 1)/K of itself.
    A baseline of few rows is noisy itself: in pairs (K = 2) it lowers the noise of the gradient only if the values are
    far from zero against their spread.
    """
    labels, index = group.unique(return_inverse=True)
    total = values.new_zeros((len(labels), *values.shape[1:])).index_add(0, index, values)
    others = (torch.bincount(index, minlength=len(labels))[index] - 1).view(-1, *[1] * (values.dim() - 1))
    # A row that is alone must get exactly 0, so it is not left to the rounding of total − value.
    return torch.where(others > 0, (total[index] - values) / others.clamp(min=1), 0.0)


def importance_weights(samples: Samples) -> Float[Tensor, "samples steps"]:
    """Probability of each response up to and including token t under π, relative to the policy π_t that drew it.

        w_t = Π_{u≤t} π(y_u|s_u) / π_t(y_u|s_u)

    Constants; after the end a row keeps its last value, which is the weight of the whole response. Their mean is 1; far
    from π_t few responses carry all of it.
    """
    return masked((samples.token_logps - samples.behavior_token_logps).detach(), samples.mask).cumsum(-1).exp()


def kl_plain(samples: Samples) -> Float[Tensor, "samples"]:
    """KL(π ‖ π₀) per sequence from the sampled tokens' log-ratio, in nats.

        value      Σ_t ln π(y_t|s_t)/π₀(y_t|s_t)
        gradient   Σ_t ∇ ln π(y_t|s_t) · ( Σ_{u≥t} ln π(y_u|s_u)/π₀(y_u|s_u) − baseline_t )

    Single values may be negative. Vanishing noise at π = π₀, large noise away from it: see `kl_full`.

    Source: arXiv 2506.01523v2, the regulariser of eq. 5, 12, 14.
    """
    return _plain(samples, samples.token_logps - samples.reference_token_logps)


def kl_full(samples: Samples) -> Float[Tensor, "samples"]:
    """KL(π ‖ π₀) per sequence from its full-vocabulary value at each step, KL_t = KL(π(·|s_t) ‖ π₀(·|s_t)), in nats.

        value      Σ_t KL_t
        gradient   Σ_t ∇KL_t  +  Σ_t ∇ ln π(y_t|s_t) · ( Σ_{u>t} KL_u − baseline_t )

    The second sum is there because y_t decides which prefixes come later; it is zero for responses of one token, so no
    test at length one can notice its absence.

    Source: arXiv 2506.01523v2, the regulariser of eq. 5, 12, 14.
    """
    return _full(samples, samples.step_kl)


def entropy_plain(samples: Samples) -> Float[Tensor, "samples"]:
    """Entropy H(π) per sequence from the sampled tokens, in nats.

        value      −Σ_t ln π(y_t|s_t)
        gradient   −Σ_t ∇ ln π(y_t|s_t) · ( Σ_{u≥t} ln π(y_u|s_u) − baseline_t )

    Source: arXiv 2506.01523v2, the entropy of eq. 14.
    """
    return _plain(samples, -samples.token_logps)


def entropy_full(samples: Samples) -> Float[Tensor, "samples"]:
    """Entropy H(π) per sequence from its full-vocabulary value at each step, H_t = H(π(·|s_t)), in nats.

        value      Σ_t H_t
        gradient   Σ_t ∇H_t  +  Σ_t ∇ ln π(y_t|s_t) · ( Σ_{u>t} H_u − baseline_t )

    Source: arXiv 2506.01523v2, the entropy of eq. 14.
    """
    return _full(samples, samples.step_entropy)


def expected_reward(samples: Samples, rewards: Float[Tensor, "samples"]) -> Float[Tensor, "samples"]:
    """Expected reward E[R(x,y)] from scored responses, in the unit of `rewards`.

        value      R(x,y)
        gradient   ∇ ln π(y|x) · ( R(x,y) − baseline )

    `rewards` are constants: no gradient enters them. They are `samples.rewards`, or these with other terms folded in.
    This is REINFORCE with a leave-one-out baseline (arXiv 2402.14740).

    Source: arXiv 2506.01523v2, the first term of eq. 14.
    """
    rewards = rewards.detach()
    weights = importance_weights(samples)[:, -1]
    advantages = rewards - leave_one_out(rewards, samples.group)
    return weights * rewards + _gradient_only(weights * sequence_sum(samples.token_logps, samples.mask) * advantages)


def penalised_rewards(pairs: Pairs, *, beta: float) -> Float[Tensor, "pairs 2"]:
    """Rewards of sampled pairs with the KL term folded in, in nats: R̂ − β ln π_t/π₀, π_t being what drew the pair."""
    return pairs.rewards - beta * (pairs.behavior_logps - pairs.reference_logps) if beta > 0 else pairs.rewards


def masked(
    values: Float[Tensor, "samples steps"], mask: Bool[Tensor, "samples steps"]
) -> Float[Tensor, "samples steps"]:
    """The values on the mask, in their unit; 0 off it."""
    # Not values * mask: 0 · NaN and 0 · (−inf) are NaN.
    return torch.where(mask, values, 0.0)


def _plain(samples: Samples, step_values: Float[Tensor, "samples steps"]) -> Float[Tensor, "samples"]:
    # The direct derivative of the sampled values has expectation zero: noise without signal, so it is cut off.
    weights = importance_weights(samples)
    step_values = masked(step_values.detach(), samples.mask) * weights
    return step_values.sum(-1) + _gradient_only(_score(samples, _sum_from_here(step_values), weights))


def _full(samples: Samples, step_values: Float[Tensor, "samples steps"]) -> Float[Tensor, "samples"]:
    weights = importance_weights(samples)
    # A step's value is known before its token is drawn: it is weighted by what came before.
    before = torch.cat([torch.ones_like(weights[:, :1]), weights[:, :-1]], 1)
    step_values = masked(step_values, samples.mask) * before
    later = _sum_from_here(step_values.detach()) - step_values.detach()
    return step_values.sum(-1) + _gradient_only(_score(samples, later, weights))


def _score(
    samples: Samples, to_go: Float[Tensor, "samples steps"], weights: Float[Tensor, "samples steps"]
) -> Float[Tensor, "samples"]:
    """Σ_t ln π(y_t|s_t) · (to_go_t − w_t baseline_t): its gradient is the score term, its value means nothing."""
    baseline = weights * leave_one_out(to_go, samples.group)
    return (masked(samples.token_logps, samples.mask) * (to_go - baseline)).sum(-1)


def _sum_from_here(values: Float[Tensor, "samples steps"]) -> Float[Tensor, "samples steps"]:
    return values.flip(-1).cumsum(-1).flip(-1)


def _gradient_only(score: Float[Tensor, "samples"]) -> Float[Tensor, "samples"]:
    return score - score.detach()
