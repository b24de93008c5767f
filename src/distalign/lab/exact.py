"""Enumeration: what a policy is and tends to, computed from every response's probability. Nothing is sampled here.

Log-probabilities are laid out [..., contexts, responses] and hold EVERY response to a context once, so their exponentials
sum to one along the last axis; leading axes are worlds, seeds, sample sizes. Divergences are in nats and are averages
over contexts, which are equally likely. A table's responses are single tokens; a sequence's are its enumeration.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def divergence(
    logps: Float[Tensor, "*batch contexts responses"], others: Float[Tensor, "*other contexts responses"]
) -> Float[Tensor, "*broadcast"]:
    """E_x KL(p ‖ q) from log-probabilities, in nats. Forward KL is `divergence(target, policy)`, reverse the other way.

    A response that p never gives counts nothing, whatever q says.
    """
    terms = torch.where(logps > -math.inf, logps.exp() * (logps - others), 0.0)
    return terms.sum(-1).mean(-1)


def entropy(logps: Float[Tensor, "*batch contexts responses"]) -> Float[Tensor, "*batch"]:
    """E_x H(π(x)), in nats."""
    return -torch.where(logps > -math.inf, logps.exp() * logps, 0.0).sum(-1).mean(-1)


def optimum(
    rewards: Float[Tensor, "*batch contexts responses"],
    reference: Float[Tensor, "*other contexts responses"],
    *,
    gamma: float | Tensor,
    beta: float | Tensor,
) -> Float[Tensor, "*broadcast contexts responses"]:
    """ln π of the policy that minimises −E[R] − γ H(π) + β KL(π ‖ π₀) over all policies, in nats.

        π(a|x) ∝ π₀(a|x)^{β/(β+γ)} · exp( R(x,a)/(β+γ) )

    γ = 0 is RLHF's optimum. Raises ValueError unless γ, β ≥ 0 and γ + β > 0.

    Source: arXiv 2506.01523v2, appendix B.
    """
    total = torch.as_tensor(gamma + beta)
    if not bool(((torch.as_tensor(gamma) >= 0) & (torch.as_tensor(beta) >= 0) & (total > 0)).all()):
        raise ValueError(f"gamma {gamma}, beta {beta}: neither may be negative, nor both be 0")
    return torch.log_softmax((beta * reference + rewards) / (gamma + beta), -1)
