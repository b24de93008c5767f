"""The one assumption: a preference model IS a language model (arXiv 2506.01523v2, eq. 2-4, 8, 9, 11).

A policy π prefers response a to b with probability σ(γ[ln π(a|x) − ln π(b|x)]). Everything here follows from that
line. Functions take floats in nats, return one value per pair, and leave the reduction to the caller. The last axis
of size 2 holds the two responses of a pair; column 0 is the one whose preference is asked for (the preferred one, in
labelled data).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


def preference_logit(logps: Float[Tensor, "*batch 2"], *, gamma: float) -> Float[Tensor, "*batch"]:
    """Preference log-odds of the first response over the second under a policy, in nats.

        γ [ln π(a|x) − ln π(b|x)]

    `logps` are sums over response tokens, end-of-sequence included; a tokenwise mean is a different model. `gamma` is
    the sharpness of the preference. Raises ValueError if `gamma` is not a positive finite number.

    Source: arXiv 2506.01523v2, eq. 2, 3.
    """
    _check_gamma(gamma)
    return gamma * (logps[..., 0] - logps[..., 1])


def preference_nll(
    logit: Float[Tensor, "*batch"], probability: Float[Tensor, "*batch"] | None = None
) -> Float[Tensor, "*batch"]:
    """Negative log-likelihood of the labels under the preference log-odds, in nats.

        −ln σ(logit)                                  for certain labels, eq. 4
        −p ln σ(logit) − (1 − p) ln σ(−logit)         for labels that hold with probability p

    Without `probability` the first response is the preferred one, for certain. Finite and exact to rounding for any
    finite logit, in value and gradient.

    Source: arXiv 2506.01523v2, eq. 4, 9.
    """
    # softplus(−logit) is the same function, but torch's softplus is cut to a straight line beyond 20: wrong by 2e-9.
    preferred = -functional.logsigmoid(logit)
    if probability is None:
        return preferred
    return probability * preferred - (1 - probability) * functional.logsigmoid(-logit)


def bernoulli_kl(probability: Float[Tensor, "*batch"], logit: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Divergence of the preference log-odds from an expected preference (a soft label), in nats.

        KL( Bern(p) ‖ Bern(σ(logit)) ) = p ln[p / σ(logit)] + (1 − p) ln[(1 − p) / σ(−logit)]

    Zero where σ(logit) = p. At p = 1 it is −ln σ(logit) and at p = 0 −ln σ(−logit), both exactly. Its gradient in
    `logit` is σ(logit) − p. `probability` is meant as a constant: the gradient in it is infinite at 0 and 1.

    Source: arXiv 2506.01523v2, eq. 11.
    """
    negative_entropy = torch.xlogy(probability, probability) + torch.xlogy(1 - probability, 1 - probability)
    return preference_nll(logit, probability) + negative_entropy


def bradley_terry_nll(
    rewards: Float[Tensor, "*batch 2"], probability: Float[Tensor, "*batch"] | None = None
) -> Float[Tensor, "*batch"]:
    """Negative log-likelihood of the labels under a reward (Bradley-Terry) model, in nats.

        −ln σ( R(x,a⁺) − R(x,a⁻) )

    `rewards` are scores in nats, defined up to a constant per prompt, which cancels. `probability` is the probability
    of the label, as in `preference_nll`.

    Source: arXiv 2506.01523v2, eq. 9.
    """
    return preference_nll(rewards[..., 0] - rewards[..., 1], probability)


def induced_reward(logps: Float[Tensor, "*batch"], *, gamma: float) -> Float[Tensor, "*batch"]:
    """Reward that a policy stands for, in nats: its Bradley-Terry model is the policy's preference model.

        R_π(x,a) = γ ln π(a|x)

    Raises ValueError if `gamma` is not a positive finite number.

    Source: arXiv 2506.01523v2, eq. 8.
    """
    _check_gamma(gamma)
    return gamma * logps


def induced_logps(rewards: Float[Tensor, "*batch responses"], *, gamma: float) -> Float[Tensor, "*batch responses"]:
    """Log-probabilities of the language model that a reward stands for, in nats.

        ln π̃(a|x) = R(x,a)/γ − ln Σ_b exp(R(x,b)/γ)

    The last axis must hold EVERY response to the prompt, once: this is the normalised model on an enumerated set, not
    something that can be sampled from token by token. Raises ValueError if `gamma` is not a positive finite number.

    Source: arXiv 2506.01523v2, eq. 8.
    """
    _check_gamma(gamma)
    return torch.log_softmax(rewards / gamma, dim=-1)


def _check_gamma(gamma: float) -> None:
    if not (math.isfinite(gamma) and gamma > 0):
        raise ValueError(f"gamma is {gamma}; the preference sharpness must be a positive finite number")
