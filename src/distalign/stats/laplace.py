"""Logistic regression with a Gaussian prior whose strength the data choose: the weights of a reward's head.

    w ~ N(0, I/λ),   P(first preferred) = σ(offset + x·w)

λ has the largest evidence by the Laplace approximation (MacKay, Neural Computation 4, 1992, 448-472). Held-out label
likelihood hardly sees an error that γ then divides; the posterior does: its covariance says how far R̂/γ may be off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from distalign.methods.preference import preference_nll

# Prior precisions tried, in units of the mean squared length of a row: from a prior that allows anything to one that
# allows nothing.
_GRID = [10.0**k for k in torch.arange(-3.0, 4.01, 0.5).tolist()]
_STEPS, _STILL = 50, 1e-8


@dataclass(frozen=True)
class Posterior:
    """N(mean, H⁻¹) of the weights, H = XᵀDX + λI with D the labels' information; `evidence` in nats.

    Kept in the space that the rows span: `basis` takes it to the features. Beyond it the weights are 0 ± 1/√λ.
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

    def variance(self, features: Float[Tensor, "rows features"]) -> Float[Tensor, "rows"]:
        """Posterior variance xᵀ H⁻¹ x of the values of rows of features, what no label speaks about included."""
        features = features.double()
        inside = features @ self.basis
        outside = (features.square().sum(-1) - inside.square().sum(-1)).clamp(min=0) / self.precision
        return outside + (inside * torch.cholesky_solve(inside.T, self.factor).T).sum(-1)


def fit_posterior(
    features: Float[Tensor, "rows features"],
    outcome: Float[Tensor, "rows"],
    offset: Float[Tensor, "rows"],
    precision: float | None = None,
) -> Posterior:
    """The posterior of the weights; `precision` λ is that of the largest evidence if it is None.

    `features` are differences of the two responses' and `outcome` the probability that the first is preferred. Rows
    that are all zero say nothing; of features that are all zero the posterior is the prior.
    """
    features, outcome, offset = (values.detach().to("cpu", torch.float64) for values in (features, outcome, offset))
    basis, rows = _span(features)
    unit = float(rows.square().sum(-1).mean()) or 1.0
    start = rows.new_zeros(rows.shape[1])
    best: tuple[float, float, Tensor, Tensor] | None = None
    for value in [scale * unit for scale in reversed(_GRID)] if precision is None else [precision]:
        start, factor = _mode(rows, outcome, offset, value, start)
        penalty = value / 2 * float(start.square().sum())
        nll = float(preference_nll(offset + rows @ start, outcome).sum())
        log_det = 2 * float(factor.diagonal().log().sum())
        evidence = -nll - penalty + (len(start) * math.log(value) - log_det) / 2
        if best is None or evidence > best[0]:
            best = evidence, value, start, factor
    assert best is not None
    evidence, precision, mode, factor = best
    return Posterior(basis @ mode, precision, evidence, basis, factor)


def _span(features: Float[Tensor, "rows features"]) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of the rows' span, and the rows in it."""
    wide = features.shape[1] > features.shape[0]
    values, vectors = torch.linalg.eigh(features @ features.T if wide else features.T @ features)
    kept = values > 1e-12 * values[-1].clamp(min=1e-300)
    basis = features.T @ (vectors[:, kept] / values[kept].sqrt()) if wide else vectors[:, kept]
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
        hessian = rows.T @ ((p * (1 - p))[:, None] * rows)
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
