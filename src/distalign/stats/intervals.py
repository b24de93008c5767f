"""Means with their error: intervals, paired differences, tests, the jackknife.

A mean comes as an `Estimate` (with its standard error and count) or as an `Interval` (95 %); nothing here knows where
its numbers came from. Fractions lie between 0 and 1, not in per cent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

T = TypeVar("T")

_NORMAL_QUANTILE = 1.959963984540054  # 97.5 % of the standard normal distribution
_AT_ONCE = 2**20  # values that the bootstrap draws at once
_GAUSS_LEGENDRE = np.polynomial.legendre.leggauss(64)


class Estimate(NamedTuple):
    """A mean, its standard error (one standard deviation; NaN for a single value) and the number of values."""

    mean: float
    se: float
    n: int


class Interval(NamedTuple):
    """A mean and the ends of its 95 % confidence interval, in the unit of the values."""

    mean: float
    low: float
    high: float


def mean_and_se(values: Float[Tensor, "n"]) -> Estimate:
    """Mean and standard error of independent values, in their unit. The spread is the sample's, with n − 1 below.

    Raises ValueError on an empty tensor.
    """
    values = float64(values)
    n = len(values)
    se = float(values.std()) / math.sqrt(n) if n > 1 else math.nan
    return Estimate(float(values.mean()), se, n)


def clusters_of(keys: Iterable[Hashable]) -> list[list[int]]:
    """The places of equal keys together, in the order in which the keys come first."""
    places: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    return list(places.values())


def by_cluster(values: Float[Tensor, "n"], clusters: Sequence[Sequence[int]]) -> Float[Tensor, "clusters"]:
    """One number for each cluster of values that hang together: their mean is the values', and so is its error.

        m + G/n Σ_{i in the cluster} (x_i − m),  m the mean of all n values, G the number of clusters

    In the unit of the values; where every cluster has one value, the values.
    """
    values = float64(values)
    mean, share = values.mean(), len(clusters) / len(values)
    return torch.stack([mean + share * (values[list(places)] - mean).sum() for places in clusters])


def paired_difference(values: Float[Tensor, "n"], baseline: Float[Tensor, "n"]) -> Interval:
    """Mean of values − baseline with its 95 % Student t interval, in their unit; row i of both is the same prompt.

    Pairing removes what the prompts have in common. The interval is exact for normal differences and good for n above
    about 30. Raises ValueError for fewer than two pairs.
    """
    difference = _differences(values, baseline)
    mean, se, n = mean_and_se(difference)
    half_width = student_quantile(n - 1) * se
    return Interval(mean, mean - half_width, mean + half_width)


def paired_p_value(
    values: Float[Tensor, "n"], baseline: Float[Tensor, "n"], *, seed: int, resamples: int = 10_000
) -> float:
    """Two-sided bootstrap p-value, a probability, of a mean of values − baseline this far from 0 if the truth were 0.

        (1 + number of resamples with |mean* − mean| ≥ |mean|) / (1 + resamples)

    Pairs are drawn whole, so row i of both is the same prompt. Never below 1 / (1 + resamples); 1 where every
    difference is 0. The same seed gives the same value. Raises ValueError for fewer than two pairs.
    """
    difference = _differences(values, baseline).numpy()
    mean = difference.mean()
    generator = np.random.default_rng(seed)
    n, extreme = len(difference), 0
    block = max(1, _AT_ONCE // n)
    for start in range(0, resamples, block):
        drawn = generator.integers(n, size=(min(block, resamples - start), n))
        extreme += np.count_nonzero(np.abs(difference[drawn].mean(1) - mean) >= abs(mean))
    return (1 + int(extreme)) / (1 + resamples)


def holm(p_values: Float[Tensor, "tests"]) -> Float[Tensor, "tests"]:
    """p-values adjusted for their number, probabilities: those below α are significant together at level α.

        sorted ascending, the k-th of m becomes max over j ≤ k of min(1, (m − j + 1) p_j)

    The probability of even one false finding among all the tests is then at most α, whatever their dependence. Raises
    ValueError if a p-value lies outside [0, 1].

    Source: Holm 1979, Scandinavian Journal of Statistics 6, 65-70.
    """
    values, order = float64(p_values).sort()
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError("a p-value lies outside [0, 1] or is not a number; pass probabilities")
    factor = torch.arange(len(values), 0, -1, dtype=torch.float64)
    adjusted = (factor * values).clamp(max=1).cummax(0).values
    return torch.empty_like(adjusted).scatter_(0, order, adjusted)


def significance_mark(p_value: float) -> str:
    """Stars for a table: * below 0.05, ** below 0.01, *** below 0.001; adjust with `holm` where there are several."""
    return "*" * sum(p_value < level for level in (0.05, 0.01, 0.001))


def jackknife(statistic: Callable[[list[T]], float], items: Sequence[T]) -> Estimate:
    """A statistic of all items together (distinct-n, a calibration error) and its delete-one jackknife error.

        se² = (n − 1)/n Σ_i (s₋ᵢ − mean s₋)²,  s₋ᵢ the statistic without item i

    In the unit of the statistic. Raises ValueError for fewer than two items.
    """
    items = two_or_more(items)
    return delete_one(statistic(items), [statistic(items[:i] + items[i + 1 :]) for i in range(len(items))])


def wilson_interval(fraction: float, n: int) -> Interval:
    """95 % Wilson score interval of a fraction (accuracy, win rate) observed on n trials; it stays within [0, 1].

    Raises ValueError if `fraction` is outside [0, 1] or there are no trials.
    """
    if n < 1 or not 0 <= fraction <= 1:
        raise ValueError(f"fraction {fraction} of {n} trials; give a fraction between 0 and 1 and at least one trial")
    z2 = _NORMAL_QUANTILE**2
    centre = (fraction + z2 / (2 * n)) / (1 + z2 / n)
    half_width = math.sqrt(fraction * (1 - fraction) / n + z2 / (4 * n * n)) * _NORMAL_QUANTILE / (1 + z2 / n)
    return Interval(fraction, max(0.0, centre - half_width), min(1.0, centre + half_width))


@lru_cache(maxsize=4096)
def student_quantile(freedom: int | float, *, level: float = 0.95) -> float:
    """Half-width, in standard errors, of the central interval that holds a probability of `level` under Student's t.

    At least one degree of freedom, infinity for the normal; to 1e-6. With t = √ν tan θ the density is cos^{ν−1} θ,
    smooth and falling, so Newton's method from 0 climbs to the quantile.
    """
    if freedom > 1e7:
        return NormalDist().inv_cdf((1 + level) / 2)
    nodes, weights = _GAUSS_LEGENDRE
    mass = level * math.sqrt(math.pi) / 2 * math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom + 1) / 2))
    angle, step = 0.0, 1.0
    while step > 1e-14:
        below = angle / 2 * float(weights @ np.cos(angle / 2 * (nodes + 1)) ** (freedom - 1))
        step = (mass - below) / math.cos(angle) ** (freedom - 1)
        angle += step
    return math.sqrt(freedom) * math.tan(angle)


def delete_one(value: float, without: Sequence[float]) -> Estimate:
    """A statistic and its jackknife error, from its values without each item."""
    values, n = torch.tensor(without, dtype=torch.float64), len(without)
    return Estimate(value, math.sqrt((n - 1) / n * float(((values - values.mean()) ** 2).sum())), n)


def two_or_more(items: Sequence[T]) -> list[T]:
    """The items as a list. Raises ValueError for fewer than two, of which the jackknife cannot leave one out."""
    if len(items) < 2:
        raise ValueError(f"{len(items)} items; the jackknife leaves one out and needs at least two")
    return list(items)


def float64(values: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """The values in their unit, as constants in float64 on the CPU. Raises ValueError on an empty tensor."""
    if len(values) == 0:
        raise ValueError("no values; a mean needs at least one")
    return values.detach().to("cpu", torch.float64)


def _differences(values: Float[Tensor, "n"], baseline: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    if len(values) < 2:
        raise ValueError(f"{len(values)} pairs; an interval needs at least two")
    return float64(values) - float64(baseline)
