"""How fast: the KL weight that is best for each n, slopes with their intervals, and the verdict on a declared rate."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from distalign.lab.exact import divergence, optimum
from distalign.lab.world import Counts, Tables
from distalign.methods.preference import preference_logit, preference_nll


class Slope(NamedTuple):
    """Slope of ln(median) against ln n between two n, and its 95 % bootstrap interval over seeds."""

    slope: float
    low: float
    high: float


class Spread(NamedTuple):
    """Median and quartiles over seeds."""

    median: float
    q25: float
    q75: float


def spread(values: Float[Tensor, "seeds"]) -> Spread:
    """Median and quartiles."""
    low, middle, high = torch.quantile(values, torch.tensor([0.25, 0.5, 0.75], dtype=values.dtype)).tolist()
    return Spread(middle, low, high)


def fit_slope(n: list[int], values: Float[Tensor, "sizes seeds"], *, seed: int, resamples: int = 2000) -> Slope:
    """Least squares of ln(median over seeds) on ln n, with a percentile bootstrap over seeds (each with all its n).

    Raises ValueError for fewer than two sizes, and for values that are not above zero, which have no logarithm.
    """
    if len(n) < 2 or not bool((values > 0).all()):
        raise ValueError(f"sizes {n}, least value {float(values.min())}: a slope takes two sizes and values above zero")
    random = np.random.default_rng(seed)
    x = np.log(np.array(n, dtype=float))
    x = x - x.mean()
    rows = values.numpy()
    index = random.integers(rows.shape[1], size=(resamples, rows.shape[1]))
    medians = np.log(np.median(rows[:, index], axis=-1))
    slopes = (x @ medians) / (x @ x)
    low, high = np.quantile(slopes, [0.025, 0.975])
    return Slope(float(x @ np.log(np.median(rows, axis=1)) / (x @ x)), float(low), float(high))


class Tuned(NamedTuple):
    """The best KL weight of every world and the policy that it gives."""

    beta: Float[Tensor, "worlds"]
    logps: Float[Tensor, "worlds contexts responses"]


def tune(
    tables: Tables,
    rewards: Float[Tensor, "worlds contexts responses"],
    betas: Float[Tensor, "betas"],
    *,
    gamma: float,
    held_out: Counts | None = None,
    refit: Float[Tensor, "worlds contexts responses"] | None = None,
) -> Tuned:
    """The optimum of appendix B at the best of `betas`, world by world; γ = 0 is RLHF.

    By the oracle: the least forward KL to the target, which nobody has. With `held_out` pairs: the least negative
    log-likelihood of their labels under the policy's own preference model (eq. 3), from the rewards `refit` without
    them; the policy that is returned has all the pairs' rewards.
    """
    trial = rewards if refit is None else refit

    def score(beta: float) -> Tensor:
        logps = optimum(trial, tables.reference, gamma=gamma, beta=beta)
        if held_out is None:
            return divergence(tables.target, logps)
        logit = preference_logit(tables.pair_logps(logps), gamma=tables.gamma)
        return (held_out.total * preference_nll(logit, held_out.frequency)).sum((-2, -1))

    scores = torch.stack([score(beta) for beta in betas.tolist()])
    best = betas[scores.argmin(0)]
    return Tuned(best, optimum(rewards, tables.reference, gamma=gamma, beta=best[:, None, None]))


def falls_like_one_over_n(slope: Slope, ratio: tuple[float, float]) -> bool:
    """Whether a slope's interval is within 0.1 of −1, and n·KL/C (`ratio`: least and largest) within 0.1 of 1.

    The slope alone does not tell: in the paper's window DPO's is near −0.9.
    """
    return slope.low >= -1.1 and slope.high <= -0.9 and ratio[0] >= 0.9 and ratio[1] <= 1.1
