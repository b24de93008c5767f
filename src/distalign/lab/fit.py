"""The methods on tables, solved to the end: each method's own loss under Newton's method, many worlds at once.

A policy class is linear in its logits, ln π = φ·w + constant: `features` φ are shared by all contexts, and None is the
full table, whose contexts are separate problems. A pair loss is a convex function of the gap ln π(a) − ln π(b) alone
(the constant cancels), so its second derivative in the gap, from autograd, gives the exact Hessian in w.

`ridge` is always on the reward that the estimate stands for (½ ridge Σ of its squares, centred in each context, against
the summed loss), so that methods which agree without it agree with it. Policies come back as normalised ln π.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from distalign.lab.exact import independent, pair_moment
from distalign.lab.tables import Counts, Tables
from distalign.methods.base import Samples
from distalign.methods.dpo import dpo_loss
from distalign.methods.pd import pd_loss
from distalign.methods.pmle import pmle_loss
from distalign.methods.preference import bradley_terry_nll
from distalign.methods.rebel import rebel_loss
from distalign.methods.rkl import rkl_loss

Table = Float[Tensor, "worlds contexts responses"]
Features = Float[Tensor, "_ contexts responses features"]
PairWeights = Float[Tensor, "worlds contexts pairs"]

# One value per pair from ln π of both responses; the pairs are flattened in the order worlds, contexts, pairs.
PairLoss = Callable[[Float[Tensor, "all 2"]], Float[Tensor, "all"]]

_TOLERANCE = 1e-9  # nats: the largest change of a logit in the last step
_CERTAIN = 1e-12  # a ridge: a preference that rounds to certainty asks for an infinite gap, and this keeps it finite


def fit_reward(tables: Tables, counts: Counts, features: Features | None = None, *, ridge: float) -> Table:
    """The Bradley-Terry maximum likelihood reward R̂, in nats (eq. 9)."""
    loss = partial(bradley_terry_nll, probability=counts.frequency.flatten())
    return fit_pairs(tables, loss, counts.total, features, ridge=ridge)


def fit_pmle(tables: Tables, counts: Counts, features: Features | None = None, *, ridge: float) -> Table:
    """PMLE at β = 0: ln π by maximum likelihood of the labels (eq. 4)."""
    loss = partial(pmle_loss, probability=counts.frequency.flatten(), gamma=tables.gamma)
    return fit_pairs(tables, loss, counts.total, features, ridge=ridge * tables.gamma**2).log_softmax(-1)


def fit_pd(tables: Tables, rewards: Table, weights: PairWeights, features: Features | None = None) -> Table:
    """PD at β = 0: ln π distilled from σ(ΔR̂), soft labels, on all pairs with these weights (eq. 11)."""
    gap = tables.pair_logps(rewards)
    probability = (gap[..., 0] - gap[..., 1]).sigmoid().flatten()
    loss = partial(pd_loss, probability=probability, gamma=tables.gamma)
    return fit_pairs(tables, loss, weights, features, ridge=_CERTAIN).log_softmax(-1)


def fit_dpo(tables: Tables, counts: Counts, *, ridge: float) -> Table:
    """DPO with its β = γ, in the full table."""
    reference, frequency = tables.pair_logps(tables.reference).reshape(-1, 2), counts.frequency.flatten()
    loss = partial(dpo_loss, reference_logps=reference, probability=frequency, gamma=tables.gamma)
    ridge *= tables.gamma**2
    return fit_pairs(tables, loss, counts.total, ridge=ridge, start=tables.reference).log_softmax(-1)


def fit_rebel(tables: Tables, rewards: Table, *, eta: float, beta: float, rounds: int) -> Table:
    """REBEL in the full table: rounds of its squared loss against R̂ − β ln π_t/π₀, relative to π_t (eq. 10).

    A full table reproduces every gap, whatever the pairs' weights: all pairs count the same here, where training would
    draw them from π_t.
    """
    logps = tables.reference
    weights = torch.ones_like(tables.pair_weights(logps))
    for _ in range(rounds):
        goal = tables.pair_logps(rewards - beta * (logps - tables.reference)).reshape(-1, 2)
        behavior = tables.pair_logps(logps).reshape(-1, 2)
        loss = partial(rebel_loss, behavior_logps=behavior, rewards=goal, eta=eta)
        logps = fit_pairs(tables, loss, weights, start=logps).log_softmax(-1)
    return logps


def fit_rkl(tables: Tables, rewards: Table, features: Features | None = None, *, beta: float = 0.0) -> Table:
    """RKL: ln π that minimises E[−R̂ − γ H + β KL(π ‖ π₀)], all responses enumerated: the gradient is `rkl_loss`'s.

    Steps are natural gradients: the Hessian at an optimum within the class is (γ + β) times the Fisher matrix.
    Raises RuntimeError if the search does not end.

    Source: arXiv 2506.01523v2, eq. 14.
    """
    shape, gamma, reference, table = rewards.shape, tables.gamma, tables.reference, features is None
    if features is None:
        features = torch.eye(shape[-1], dtype=torch.float64)[None, None]
        rewards, reference = rewards.flatten(0, 1)[:, None], reference.flatten(0, 1)[:, None]
    mask = torch.ones(rewards.numel(), 1, dtype=torch.bool)

    def policy(parameters: Tensor) -> Tensor:
        return (features @ parameters[:, None])[..., 0].log_softmax(-1)

    def objective(parameters: Tensor) -> Tensor:
        """Responses as one-token samples, weighted by their probability."""
        logps = policy(parameters)
        samples = Samples(
            token_logps=logps.reshape(-1, 1),
            mask=mask,
            reference_token_logps=reference.reshape(-1, 1),
            rewards=rewards.flatten(),
        )
        losses = rkl_loss(samples, gamma=gamma, beta=beta)
        return (logps.detach().exp() * losses.view_as(logps)).sum(-1).mean(-1)

    def step(parameters: Tensor, gradient: Tensor) -> Tensor:
        logps = policy(parameters)
        if table:  # the Fisher matrix is diag(π) − ππᵀ and the gradient sums to zero
            return gradient / logps.exp().mT / (gamma + beta)
        return torch.linalg.solve(pair_moment(features, features, independent(logps) / 2), gradient) / (gamma + beta)

    return policy(_minimum(objective, step, len(rewards), features)).view(shape)


def fit_pairs(
    tables: Tables,
    loss: PairLoss,
    weights: PairWeights,
    features: Features | None = None,
    *,
    ridge: float = 0.0,
    start: Table | None = None,
) -> Table:
    """Logits that minimise Σ weights · loss + ridge/2 Σ (logits − start − their mean in the context)².

    The ridge keeps the estimate finite where the pairs are separable; `start` (None: zero) is also where the search
    begins, and must lie in the class: give it only with the full table. Raises RuntimeError if the search does not end.
    """
    shape, (first, second) = tables.target.shape, tables.pairs
    if features is None:
        features = torch.eye(shape[-1], dtype=torch.float64)[None, None, :, :-1]
        weights = weights.flatten(0, 1)[:, None]
        start = None if start is None else start.flatten(0, 1)[:, None]
    centred = features - features.mean(-2, keepdim=True)
    prior = ridge * (centred.mT @ centred).sum(-3)

    def logits(parameters: Tensor) -> Tensor:
        moved = (features @ parameters[:, None])[..., 0]
        return moved if start is None else start + moved

    def gaps(parameters: Tensor) -> Tensor:
        now = logits(parameters)
        return now.index_select(-1, first) - now.index_select(-1, second)

    def losses(gap: Tensor) -> Tensor:
        """Of every pair: ln π(b) may be taken as 0, since only the gap counts."""
        return loss(torch.stack([gap, torch.zeros_like(gap)], -1).reshape(-1, 2)).view_as(gap)

    def objective(parameters: Tensor) -> Tensor:
        penalty = 0.5 * (parameters.mT @ prior @ parameters)[:, 0, 0]
        return (weights * losses(gaps(parameters))).sum((1, 2)) + penalty

    def step(parameters: Tensor, gradient: Tensor) -> Tensor:
        gap = gaps(parameters).detach().requires_grad_()
        (slope,) = torch.autograd.grad(losses(gap).sum(), gap, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), gap)
        matrix = gap.new_zeros(*gap.shape[:-1], shape[-1], shape[-1])
        matrix[..., first, second] = matrix[..., second, first] = weights * curvature
        hessian = gap.shape[-2] / 2 * pair_moment(features, features, matrix) + prior
        return torch.linalg.solve(hessian, gradient)

    return logits(_minimum(objective, step, len(weights), features)).view(shape)


def _minimum(
    objective: Callable[[Tensor], Tensor],
    newton: Callable[[Tensor, Tensor], Tensor],
    problems: int,
    features: Features,
) -> Float[Tensor, "problems features 1"]:
    """Parameters that minimise the objective of every problem: `newton` steps from zero, given point and gradient.

    A step is halved until the value has fallen as its slope promises (or rounding hides it).
    """
    centred = features - features.mean(-2, keepdim=True)
    parameters = torch.zeros(problems, features.shape[-1], 1, dtype=torch.float64)
    for _ in range(200):
        parameters.requires_grad_()
        value = objective(parameters)
        (gradient,) = torch.autograd.grad(value.sum(), parameters)
        step = newton(parameters, gradient).detach()
        value, parameters = value.detach(), parameters.detach()
        size = torch.ones(problems, 1, 1, dtype=torch.float64)
        for _ in range(60):
            trial = parameters - size * step
            promised = 1e-4 * (size * gradient * step).sum((1, 2))
            fell = objective(trial) <= value - promised + 1e-12 * (1 + value.abs())
            if bool(fell.all()):
                break
            size = torch.where(fell[:, None, None], size, size / 2)
        parameters = trial
        if float((centred @ step[:, None]).abs().max()) < _TOLERANCE:
            return parameters
    raise RuntimeError(
        "no minimum after 200 Newton steps; the pairs may be separable: give a ridge, or a larger gamma + beta"
    )
