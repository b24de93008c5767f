"""Logistic regression with a Gaussian prior whose strength the data choose: the weights of a reward's head.

    w ~ N(0, I/λ),   P(first preferred) = σ(offset + x·w)

λ has the largest evidence by the Laplace approximation (MacKay, Neural Computation 4, 1992, 448-472). Held-out label
likelihood hardly sees an error that γ then divides; the posterior does: its covariance says how far R̂/γ may be off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from distalign.methods.preference import preference_nll

_STEPS, _STILL = 50, 1e-8  # nats that a further Newton step would gain
_STEP = 10**0.25  # between two strengths of the prior
_NOTHING = 1e-4  # p(1 − p) of a row that says nothing about its weights next to the others


@dataclass(frozen=True)
class Posterior:
    """N(mean, H⁻¹) of the weights, H = XᵀDX + λI with D the labels' information; `evidence` in nats.

    Kept in a space that holds the rows: `basis` takes it to the features.
    """

    mean: Float[Tensor, "features"]
    precision: float
    evidence: float
    basis: Float[Tensor, "features rank"]
    factor: Float[Tensor, "rank rank"]

    def moved(self, features: Float[Tensor, "rows features"]) -> tuple[Tensor, Tensor]:
        """Of rows of features: the mean of their values, and the variance that the labels' noise alone gives it.

        Var[x·ŵ] = xᵀ H⁻¹ (XᵀDX) H⁻¹ x = xᵀH⁻¹x − λ |H⁻¹x|²
        """
        inside = features.double() @ self.basis
        solved = torch.cholesky_solve(inside.T, self.factor).T
        return features.double() @ self.mean, (inside * solved).sum(-1) - self.precision * solved.square().sum(-1)

    def repeated(self, times: float) -> Posterior:
        """The same mode with the covariance of `times` as many such rows."""
        prior = self.precision * torch.eye(len(self.factor), dtype=self.factor.dtype)
        data = self.factor @ self.factor.T - prior
        return replace(self, factor=torch.linalg.cholesky(times * data + prior))


def fit_posterior(
    features: Float[Tensor, "rows features"],
    outcome: Float[Tensor, "rows"],
    offset: Float[Tensor, "rows"],
    precision: float | None = None,
    *,
    near: float | None = None,
) -> Posterior:
    """The posterior of the weights; `precision` λ is that of the largest evidence if it is None.

    λ is looked for from a prior that allows nothing, or from 30 times `near`, towards weaker ones as long as that gains
    evidence. `features` are differences of the two responses' and `outcome` the probability that the first is
    preferred.
    """
    features, outcome, offset = (values.detach().to("cpu", torch.float64) for values in (features, outcome, offset))
    basis, rows = _span(features)
    unit = float(rows.square().sum(-1).mean()) or 1.0
    mode = rows.new_zeros(rows.shape[1])

    def at(value: float) -> Posterior:
        nonlocal mode
        mode, factor = _mode(rows, outcome, offset, value, mode)
        nll = float(preference_nll(offset + rows @ mode, outcome).sum())
        log_det = 2 * float(factor.diagonal().log().sum())
        evidence = (len(mode) * math.log(value) - log_det - value * float(mode.square().sum())) / 2 - nll
        return Posterior(basis @ mode, value, evidence, basis, factor)

    if precision is not None:
        return at(precision)
    best = at(1e2 * unit if near is None else 30 * near)
    for _ in range(12):
        weaker = at(best.precision / _STEP**2)
        if weaker.evidence < best.evidence:
            break
        best = weaker
    # Between the best and its stronger neighbour; of two that the evidence hardly tells apart, the stronger.
    between = at(best.precision * _STEP)
    return between if between.evidence > best.evidence - 2 else best


def _span(features: Float[Tensor, "rows features"]) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of a space that holds the rows, and the rows in it."""
    if features.shape[1] <= features.shape[0]:
        return torch.eye(features.shape[1], dtype=features.dtype), features
    values, vectors = torch.linalg.eigh(features @ features.T)
    kept = values > 1e-12 * values[-1].clamp(min=1e-300)
    basis = features.T @ (vectors[:, kept] / values[kept].sqrt())
    return basis, features @ basis


def _mode(
    rows: Float[Tensor, "rows rank"], outcome: Tensor, offset: Tensor, precision: float, start: Float[Tensor, "rank"]
) -> tuple[Float[Tensor, "rank"], Float[Tensor, "rank rank"]]:
    """The most probable weights, by Newton's method with halving, and the Cholesky factor of H there."""
    weights = start

    def objective(weights: Tensor) -> Tensor:
        return preference_nll(offset + rows @ weights, outcome).sum() + precision / 2 * weights.square().sum()

    for _ in range(_STEPS):
        p = (offset + rows @ weights).sigmoid()
        information = p * (1 - p)
        open_ = information > _NOTHING
        hessian = rows[open_].T @ (information[open_, None] * rows[open_])
        hessian.diagonal().add_(precision)
        factor = torch.linalg.cholesky(hessian)
        gradient = rows.T @ (outcome - p) - precision * weights
        step = torch.cholesky_solve(gradient[:, None], factor)[:, 0]
        if float(gradient @ step) < _STILL:
            break
        before = objective(weights)
        while objective(weights + step) > before + 1e-9 * before.abs():
            step = step / 2
        weights = weights + step
    return weights, factor
