"""Enumeration: what a policy is and tends to, computed from every response's probability. Nothing is sampled here.

Log-probabilities are laid out [..., contexts, responses] and hold EVERY response to a context once: their exponentials
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


def table_features(contexts: int, responses: int) -> Float[Tensor, "1 contexts responses features"]:
    """The full table as a linear class: a weight for every response but the last of every context."""
    context = torch.eye(responses, dtype=torch.float64)[:, :-1]
    return torch.block_diag(*[context] * contexts).view(1, contexts, responses, -1)


def pair_moment(
    first: Float[Tensor, "*batch contexts responses f"],
    second: Float[Tensor, "*other contexts responses g"],
    weights: Float[Tensor, "*worlds contexts responses responses"],
) -> Float[Tensor, "*broadcast f g"]:
    """E_x Σ_ab w(a,b) [φ(a) − φ(b)] [ψ(a) − ψ(b)]ᵀ for weights that do not change when a and b are swapped.

    With w = π(a) π(b) / 2 it is the covariance of φ and ψ under π, the Fisher matrix of a log-linear policy if φ = ψ.
    """
    laplacian = torch.diag_embed(weights.sum(-1)) - weights
    return 2 * (first.mT @ laplacian @ second).mean(-3)


def independent(
    logps: Float[Tensor, "*batch contexts responses"],
) -> Float[Tensor, "*batch contexts responses responses"]:
    """Probability that two independent draws are a and b."""
    return logps.exp()[..., :, None] * logps.exp()[..., None, :]


def information_weights(
    source: Float[Tensor, "*batch contexts responses"],
    target: Float[Tensor, "*batch contexts responses"],
    *,
    gamma: float,
) -> Float[Tensor, "*batch contexts responses responses"]:
    """Weights of the Fisher information that one labelled pair from `source` has on the reward: μ(a) μ(b) P(1 − P)."""
    preferred = (gamma * (target[..., :, None] - target[..., None, :])).sigmoid()
    return independent(source) * preferred * (1 - preferred)


def asymptotic_constant(
    target: Float[Tensor, "worlds contexts responses"],
    behavior: Float[Tensor, "worlds contexts responses"],
    policy: Float[Tensor, "_ contexts responses f"],
    reward: Float[Tensor, "_ contexts responses g"] | None = None,
    projection: Float[Tensor, "worlds contexts responses responses"] | None = None,
    *,
    gamma: float,
) -> Float[Tensor, "worlds"]:
    """C = lim n · E_x KL(π* ‖ π̂) as n → ∞, in nats, for an estimator without regularisation and a realisable target.

        likelihood (PMLE)      C = tr(F L⁻¹) / (2γ²)
        through a reward       C = tr(F B L_R⁻¹ Bᵀ) / (2γ²),   B = M_φφ⁻¹ M_φψ

    F is the Fisher matrix of the policy class (features φ) at π*, L the information of one labelled pair about it and
    L_R about the reward class (features ψ). M is the pair moment under `projection`, by which the policy is fitted to
    the reward: π*(a) π*(b) for RKL, π(a) π(b) P(1 − P) for PD with pairs from π. Where the policy class holds all of
    exp(R/γ) every projection gives tr(F_ψ L_R⁻¹) / (2γ²).
    """
    information = information_weights(behavior, target, gamma=gamma)
    fisher = pair_moment(policy, policy, independent(target) / 2)
    if reward is None:
        covariance = torch.linalg.inv(pair_moment(policy, policy, information))
    else:
        weights = independent(target) if projection is None else projection
        inner = torch.linalg.inv(pair_moment(reward, reward, information))
        fitted = torch.linalg.solve(pair_moment(policy, policy, weights), pair_moment(policy, reward, weights))
        covariance = fitted @ inner @ fitted.mT
    return (fisher * covariance.mT).sum((-2, -1)) / (2 * gamma**2)


def coverage(
    features: Float[Tensor, "_ contexts responses f"],
    target: Float[Tensor, "worlds contexts responses"],
    behavior: Float[Tensor, "worlds contexts responses"],
) -> Float[Tensor, "worlds"]:
    """Smallest C with E_{π*}[ΔR̄²] ≤ C · E_μ[ΔR̄²] for all differences ΔR = v·φ of the class, centred under μ.

    The largest generalised eigenvalue of the two second moments. With the features of the policy class and μ it is
    C_Π, with π₀ in the place of μ it is C_0, with the features of the reward class and μ it is C_R.

    Source: arXiv 2506.01523v2, theorems 4, 7, 14.
    """
    centred = features - (behavior.exp()[..., None] * features).sum(-2, keepdim=True)
    seen, wanted = ((centred.mT @ (policy.exp()[..., None] * centred)).mean(-3) for policy in (behavior, target))
    factor = torch.linalg.cholesky(seen)
    half = torch.linalg.solve_triangular(factor, wanted, upper=False)
    return torch.linalg.eigvalsh(torch.linalg.solve_triangular(factor, half.mT, upper=False))[..., -1]


def rlhf_limit(
    target: Float[Tensor, "*batch contexts responses"],
    reference: Float[Tensor, "*batch contexts responses"],
    *,
    gamma: float,
) -> Float[Tensor, "*batch"]:
    """Forward KL of RLHF as n → ∞ with the best β: min over β of KL(π* ‖ π₀ exp(γ ln π*/β)), in nats.

    A grid of 61 values of β, evenly in ln β, then finer ones around the best: exact where there is one minimum.
    """
    low = target.new_full(target.shape[:-2], math.log(1e-3 * gamma))
    high = low + math.log(1e7)
    for _ in range(6):
        grid = torch.stack([low + (high - low) * share for share in torch.linspace(0, 1, 61).tolist()])
        optima = optimum(gamma * target, reference, gamma=0.0, beta=grid.exp()[..., None, None])
        distance = divergence(target, optima)
        best = distance.argmin(0, keepdim=True)
        low, high = (grid.gather(0, (best + step).clamp(0, 60))[0] for step in (-1, 1))
    return distance.amin(0)


def dpo_limit(
    target: Float[Tensor, "*batch contexts responses"], reference: Float[Tensor, "*batch contexts responses"]
) -> Float[Tensor, "*batch"]:
    """Forward KL of DPO as n → ∞ in a class that holds its optimum, π₀ π* up to normalisation, in nats.

    DPO's gap γ Δ ln π/π₀ then equals the labels' log-odds γ Δ ln π*, so its limit does not depend on γ. REBEL with
    β = γ ends at the same policy, and RLHF with β = γ.
    """
    return divergence(target, torch.log_softmax(reference + target, -1))
