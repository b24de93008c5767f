"""The methods on tables: each minimises its own loss on the counts of the pairs, or on a reward fitted to them.

`ridge` is always on the reward that the estimate stands for (½ ridge Σ of its squares, centred in each context, against
the summed loss), so that methods which agree without it agree with it. Policies come back as normalised ln π.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from distalign.lab.fit import PairLoss, fit_pairs
from distalign.lab.fit import fit_rkl as _fit_rkl
from distalign.lab.world import Counts, Tables
from distalign.methods.dpo import dpo_loss
from distalign.methods.pd import pd_loss
from distalign.methods.pmle import pmle_loss
from distalign.methods.preference import bradley_terry_nll
from distalign.methods.rebel import rebel_loss

Table = Float[Tensor, "worlds contexts responses"]
Features = Float[Tensor, "_ contexts responses features"]

# A preference that rounds to certainty asks for an infinite gap; this keeps it finite and moves nothing else.
_CERTAIN = 1e-12


def fit_reward(tables: Tables, counts: Counts, features: Features | None = None, *, ridge: float) -> Table:
    """The Bradley-Terry maximum likelihood reward R̂, in nats (eq. 9)."""
    frequency = counts.frequency.flatten()

    def loss(rewards: Tensor) -> Tensor:
        return bradley_terry_nll(rewards, frequency)

    return _solve(tables, loss, counts.total, features, ridge)


def fit_pmle(tables: Tables, counts: Counts, features: Features | None = None, *, ridge: float) -> Table:
    """PMLE at β = 0: ln π by maximum likelihood of the labels (eq. 4)."""
    frequency = counts.frequency.flatten()

    def loss(logps: Tensor) -> Tensor:
        return pmle_loss(logps, frequency, gamma=tables.gamma)

    return _solve(tables, loss, counts.total, features, ridge * tables.gamma**2).log_softmax(-1)


def fit_pd(
    tables: Tables,
    rewards: Table,
    weights: Float[Tensor, "worlds contexts pairs"],
    features: Features | None = None,
) -> Table:
    """PD at β = 0: ln π distilled from σ(ΔR̂), soft labels, on all pairs with these weights (eq. 11)."""
    gap = tables.pair_logps(rewards)
    return _distil(tables, (gap[..., 0] - gap[..., 1]).sigmoid(), weights, features, ridge=_CERTAIN)


def fit_pd_hard(tables: Tables, labelled: Counts, features: Features | None = None, *, ridge: float) -> Table:
    """PD at β = 0 from labels that were drawn from σ(ΔR̂) instead of expected: what theorem 14 counts."""
    return _distil(tables, labelled.frequency, labelled.total, features, ridge=ridge * tables.gamma**2)


def fit_rkl(tables: Tables, rewards: Table, features: Features | None = None, *, beta: float = 0.0) -> Table:
    """RKL: ln π that minimises E[−R̂ − γ H + β KL(π ‖ π₀)] (eq. 14)."""
    return _fit_rkl(rewards, tables.reference, features, gamma=tables.gamma, beta=beta).log_softmax(-1)


def fit_dpo(tables: Tables, counts: Counts, *, ridge: float) -> Table:
    """DPO with its β = γ, in the full table."""
    frequency = counts.frequency.flatten()
    reference = tables.pair_logps(tables.reference).reshape(-1, 2)
    start = tables.reference

    def loss(logps: Tensor) -> Tensor:
        return dpo_loss(logps, _gap_only(reference), frequency, gamma=tables.gamma)

    weights, pairs, responses = counts.total, tables.pairs, start.shape[-1]
    return fit_pairs(loss, weights, pairs, responses, ridge=ridge * tables.gamma**2, start=start).log_softmax(-1)


def fit_rebel(tables: Tables, rewards: Table, *, eta: float, beta: float, rounds: int) -> Table:
    """REBEL in the full table: rounds of its squared loss against R̂ − β ln π_t/π₀, relative to π_t (eq. 10).

    A full table reproduces every gap, whatever the pairs' weights: all pairs count the same here, where training would
    draw them from π_t.
    """
    logps = tables.reference
    weights = torch.ones_like(tables.pair_weights(logps))
    for _ in range(rounds):
        target = tables.pair_logps(rewards - beta * (logps - tables.reference)).reshape(-1, 2)
        behavior = _gap_only(tables.pair_logps(logps).reshape(-1, 2))

        def loss(now: Tensor, target: Tensor = target, behavior: Tensor = behavior) -> Tensor:
            return rebel_loss(now, behavior, target, eta=eta)

        logps = fit_pairs(loss, weights, tables.pairs, logps.shape[-1], start=logps).log_softmax(-1)
    return logps


def _distil(tables: Tables, probability: Tensor, weights: Tensor, features: Features | None, *, ridge: float) -> Tensor:
    flat = probability.flatten()

    def loss(logps: Tensor) -> Tensor:
        return pd_loss(logps, flat, gamma=tables.gamma)

    return _solve(tables, loss, weights, features, ridge).log_softmax(-1)


def _solve(tables: Tables, loss: PairLoss, weights: Tensor, features: Features | None, ridge: float) -> Tensor:
    return fit_pairs(loss, weights, tables.pairs, tables.target.shape[-1], features, ridge=ridge)


def _gap_only(logps: Float[Tensor, "all 2"]) -> Float[Tensor, "all 2"]:
    """The same gaps with the second response at 0, as `fit_pairs` lays them out."""
    return torch.stack([logps[:, 0] - logps[:, 1], torch.zeros_like(logps[:, 0])], -1)
