"""Logistic regression by maximum likelihood, without a penalty: ratings, length control and calibration are all this.

    minimise  Σ_i w_i [ −y_i ln σ(x_i·θ) − (1 − y_i) ln σ(−x_i·θ) ]

Outcomes may be soft: y = 0.5 is a tie, y = 0.7 a judge who says "70 %". Newton's method in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distalign.methods.preference import preference_nll

_STEPS = 100
_NOTHING = 1e-12
_STILL = 1e-10  # nats of log-odds: a Newton step that moves no row by more has arrived


class Separable(ValueError):
    """The likelihood has no finite maximum: a combination of the features predicts the outcomes without error."""


@dataclass(frozen=True)
class LogisticFit:
    """A fitted regression: `coefficients` θ, and the inverse of the observed information as `covariance`.

    `scores` are the rows' gradients w_i (y_i − p_i) x_i, which sum to zero.
    """

    coefficients: Float[Tensor, "features"]
    covariance: Float[Tensor, "features features"]
    scores: Float[Tensor, "rows features"]

    def clustered_covariance(self, cluster: Int[Tensor, "rows"]) -> Float[Tensor, "features features"]:
        """Covariance of θ where rows of one cluster (a prompt) depend on each other and clusters do not.

            H⁻¹ (Σ_c s_c s_cᵀ) H⁻¹ · C/(C − 1),  s_c the sum of the scores of cluster c, H the information

        It needs no model of the noise: soft outcomes are less noisy than coins, repeated ones more. Raises ValueError
        for fewer than two clusters.
        """
        _, index = cluster.unique(return_inverse=True)
        count = int(index.max()) + 1
        if count < 2:
            raise ValueError("one cluster; an error over clusters (prompts) needs at least two")
        sums = self.scores.new_zeros(count, self.scores.shape[1]).index_add_(0, index, self.scores)
        return self.covariance @ (sums.T @ sums) @ self.covariance * count / (count - 1)


def fit_logistic(
    features: Float[Tensor, "rows features"],
    outcome: Float[Tensor, "rows"],
    weights: Float[Tensor, "rows"] | None = None,
) -> LogisticFit:
    """Coefficients of the log-odds (nats per unit of the feature) that make the outcomes, in [0, 1], most probable.

    A constant has to be a feature of its own. Raises ValueError if the features are collinear, and `Separable` if the
    maximum lies at infinity.
    """
    features, outcome = features.detach().to("cpu", torch.float64), outcome.detach().to("cpu", torch.float64)
    weights = torch.ones_like(outcome) if weights is None else weights.detach().to("cpu", torch.float64)

    def nll(theta: Tensor) -> Tensor:
        return (weights * preference_nll(features @ theta, outcome)).sum()

    theta = features.new_zeros(features.shape[1])
    for count in range(_STEPS):
        first, second = (features @ theta).sigmoid(), (-features @ theta).sigmoid()
        # Not y − p, which is 0 from log-odds of 37 on and would call a maximum at infinity reached.
        scores = (weights * (outcome * second - (1 - outcome) * first))[:, None] * features
        information = features.T @ ((weights * first * second)[:, None] * features)
        if _singular(information):
            if count == 0:
                raise ValueError("the features are collinear where there are observations; drop one that follows")
            break
        factor = torch.linalg.cholesky(information)
        step = torch.cholesky_solve(scores.sum(0)[:, None], factor)[:, 0]
        if float((features @ step).abs().max()) < _STILL:
            return LogisticFit(theta, torch.cholesky_inverse(factor), scores)
        before = nll(theta)
        for _ in range(30):  # halved until it does not climb; at the end of the road rounding alone climbs
            if nll(theta + step) <= before * (1 + 1e-14):
                break
            step = step / 2
        theta = theta + step
    raise Separable(
        "the likelihood has no finite maximum: a combination of the features predicts the outcomes without error; "
        "give more observations or fewer features"
    )


def _singular(information: Float[Tensor, "features features"]) -> bool:
    """Whether a direction carries, next to the others, no information that float64 can tell from rounding."""
    scale = information.diagonal().sqrt()
    if not bool((scale > 0).all()):
        return True
    return float(torch.linalg.eigvalsh(information / (scale[:, None] * scale))[0]) < _NOTHING
