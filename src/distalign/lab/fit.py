"""The methods on tables, solved to the end: each method's own loss under Newton's method, many worlds at once.

A policy class is linear in its logits, ln π = φ·w + constant: `features` φ are shared by all contexts, and None is the
full table, whose contexts are separate problems. A pair loss is a convex function of the gap ln π(a) − ln π(b) alone
(the constant cancels), so its derivatives in the gap, from autograd, give the exact gradient and Hessian in w.

`ridge` is always on the reward that the estimate stands for (½ ridge Σ of its squares, centred in each context, against
the summed loss), so that methods which agree without it agree with it. Policies come back as normalised ln π.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

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
    frequency = counts.frequency.flatten()
    return fit_pairs(tables, lambda rewards: bradley_terry_nll(rewards, frequency), counts.total, features, ridge=ridge)


def fit_pmle(tables: Tables, counts: Counts, features: Features | None = None, *, ridge: float) -> Table:
    """PMLE at β = 0: ln π by maximum likelihood of the labels (eq. 4)."""
    gamma, frequency = tables.gamma, counts.frequency.flatten()

    def loss(logps: Tensor) -> Tensor:
        return pmle_loss(logps, frequency, gamma=gamma)

    return fit_pairs(tables, loss, counts.total, features, ridge=ridge * gamma**2).log_softmax(-1)


def fit_pd(tables: Tables, rewards: Table, weights: PairWeights, features: Features | None = None) -> Table:
    """PD at β = 0: ln π distilled from σ(ΔR̂), soft labels, on all pairs with these weights (eq. 11)."""
    gap = tables.pair_logps(rewards)
    return _distil(tables, (gap[..., 0] - gap[..., 1]).sigmoid(), weights, features, ridge=_CERTAIN)


def fit_pd_hard(tables: Tables, labelled: Counts, features: Features | None = None, *, ridge: float) -> Table:
    """PD at β = 0 from labels that were drawn from σ(ΔR̂) instead of expected: what theorem 14 counts."""
    return _distil(tables, labelled.frequency, labelled.total, features, ridge=ridge * tables.gamma**2)


def _distil(
    tables: Tables, probability: PairWeights, weights: PairWeights, features: Features | None, *, ridge: float
) -> Table:
    probability = probability.flatten()

    def loss(logps: Tensor) -> Tensor:
        return pd_loss(logps, probability, gamma=tables.gamma)

    return fit_pairs(tables, loss, weights, features, ridge=ridge).log_softmax(-1)


def fit_dpo(tables: Tables, counts: Counts, *, ridge: float) -> Table:
    """DPO with its β = γ, in the full table."""
    gamma, frequency = tables.gamma, counts.frequency.flatten()
    reference = tables.pair_logps(tables.reference).reshape(-1, 2)

    def loss(logps: Tensor) -> Tensor:
        return dpo_loss(logps, reference, frequency, gamma=gamma)

    return fit_pairs(tables, loss, counts.total, ridge=ridge * gamma**2, start=tables.reference).log_softmax(-1)


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

        def loss(now: Tensor, goal: Tensor = goal, behavior: Tensor = behavior) -> Tensor:
            return rebel_loss(now, behavior, goal, eta=eta)

        logps = fit_pairs(tables, loss, weights, start=logps).log_softmax(-1)
    return logps


def fit_rkl(tables: Tables, rewards: Table, features: Features | None = None, *, beta: float = 0.0) -> Table:
    """RKL: ln π that minimises E[−R̂ − γ H + β KL(π ‖ π₀)], all responses enumerated: the gradient is `rkl_loss`'s.

    Steps are natural gradients: the Hessian at an optimum within the class is (γ + β) times the Fisher matrix.
    Raises RuntimeError if the search does not end.

    Source: arXiv 2506.01523v2, eq. 14.
    """
    shape, table = rewards.shape, features is None
    gamma, reference = tables.gamma, tables.reference
    if features is None:
        features = torch.eye(shape[-1], dtype=torch.float64)[None, None]
        rewards, reference = rewards.flatten(0, 1)[:, None], reference.flatten(0, 1)[:, None]
    mask = torch.ones(rewards.numel(), 1, dtype=torch.bool)

    def objective(parameters: Tensor) -> tuple[Tensor, Tensor]:
        """(value, ln π) of every problem: responses as one-token samples, weighted by their probability."""
        logps = (features @ parameters[:, None])[..., 0].log_softmax(-1)
        samples = Samples(
            token_logps=logps.reshape(-1, 1),
            mask=mask,
            reference_token_logps=reference.reshape(-1, 1),
            rewards=rewards.flatten(),
        )
        losses = rkl_loss(samples, gamma=gamma, beta=beta)
        return (logps.detach().exp() * losses.view_as(logps)).sum(-1).mean(-1), logps

    parameters = torch.zeros(len(rewards), features.shape[-1], 1, dtype=torch.float64, requires_grad=True)
    for _ in range(200):
        value, logps = objective(parameters)
        (gradient,) = torch.autograd.grad(value.sum(), parameters)
        policy = logps.detach().exp()
        if table:  # the Fisher matrix is diag(π) − ππᵀ and the gradient sums to zero
            natural = gradient / policy[:, 0, :, None]
        else:
            mean = policy[..., None, :] @ features
            fisher = (features.mT @ (policy[..., None] * features) - mean.mT @ mean).mean(-3)
            natural = torch.linalg.solve(fisher, gradient)
        step = natural / (gamma + beta)
        with torch.no_grad():
            parameters = _descend(lambda w: objective(w)[0], value.detach(), parameters, step, gradient)
        change = (features @ step[:, None])[..., 0]
        if float((change - change.mean(-1, keepdim=True)).abs().max()) < _TOLERANCE:
            return (features @ parameters[:, None])[..., 0].reshape(shape).log_softmax(-1)
        parameters.requires_grad_()
    raise RuntimeError("fit_rkl: no minimum after 200 natural-gradient steps; take a larger gamma + beta")


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
    shape, pairs, responses = tables.target.shape, tables.pairs, tables.target.shape[-1]
    if features is None:
        features = torch.eye(responses, dtype=torch.float64)[None, None, :, :-1]
        weights = weights.flatten(0, 1)[:, None]
        start = None if start is None else start.flatten(0, 1)[:, None]
    base = torch.zeros(()) if start is None else start
    centred = features - features.mean(-2, keepdim=True)
    prior = ridge * (centred.mT @ centred).sum(-3)

    def objective(parameters: Tensor) -> tuple[Tensor, Tensor]:
        """(value of every problem, gap of every pair)."""
        logits = base + (features @ parameters[:, None])[..., 0]
        gap = logits[..., pairs[0]] - logits[..., pairs[1]]
        value = (weights * _values(loss, gap)).sum((1, 2))
        return value + 0.5 * (parameters.mT @ prior @ parameters)[:, 0, 0], gap

    parameters = torch.zeros(len(weights), features.shape[-1], 1, dtype=torch.float64)
    for _ in range(100):
        value, gap = objective(parameters)
        slope, curvature = _derivatives(loss, gap)
        slopes = _matrix(weights * slope, pairs, responses)
        gradient = (features.mT @ (slopes.sum(-1) - slopes.sum(-2))[..., None]).sum(-3) + prior @ parameters
        weighted = _matrix(weights * curvature, pairs, responses)
        weighted = weighted + weighted.mT
        laplacian = torch.diag_embed(weighted.sum(-1)) - weighted
        step = torch.linalg.solve((features.mT @ laplacian @ features).sum(-3) + prior, gradient)
        parameters = _descend(lambda w: objective(w)[0], value, parameters, step, gradient)
        if float((centred @ step[:, None]).abs().max()) < _TOLERANCE:
            return (base + (features @ parameters[:, None])[..., 0]).reshape(shape)
    raise RuntimeError("fit_pairs: no minimum after 100 Newton steps; the pairs may be separable, give a ridge")


def _values(loss: PairLoss, gap: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The loss of every pair: ln π(b) may be taken as 0, since only the gap counts."""
    logps = torch.stack([gap, torch.zeros_like(gap)], -1)
    return loss(logps.reshape(-1, 2)).view_as(gap)


def _derivatives(
    loss: PairLoss, gap: Float[Tensor, "*shape"]
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """First and second derivative of every pair's loss in its gap."""
    gap = gap.detach().requires_grad_()
    (slope,) = torch.autograd.grad(_values(loss, gap).sum(), gap, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), gap)
    return slope.detach(), curvature


def _matrix(
    values: Float[Tensor, "*batch pairs"], pairs: Int[Tensor, "2 pairs"], responses: int
) -> Float[Tensor, "*batch responses responses"]:
    """The values of pairs (a, b) at row a, column b; zero elsewhere."""
    matrix = values.new_zeros(*values.shape[:-1], responses, responses)
    matrix[..., pairs[0], pairs[1]] = values
    return matrix


def _descend(
    objective: Callable[[Tensor], Tensor], value: Tensor, parameters: Tensor, step: Tensor, gradient: Tensor
) -> Tensor:
    """Each problem goes its step, halved until its value has fallen as its slope promises (or rounding hides it)."""
    size = torch.ones(len(parameters), 1, 1, dtype=torch.float64)
    decrement = (gradient * step).sum((1, 2))
    slack = 1e-12 * (1 + value.abs())
    for _ in range(60):
        trial = parameters - size * step
        fell = objective(trial) <= value - 1e-4 * size[:, 0, 0] * decrement + slack
        if bool(fell.all()):
            break
        size = torch.where(fell[:, None, None], size, size / 2)
    return trial
