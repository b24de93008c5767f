"""Pure numbers with their error: win rates, paired differences, calibration, diversity.

A mean comes as an `Estimate` (with its standard error and count) or as an `Interval` (95 %); nothing here knows where
its numbers came from. Fractions lie between 0 and 1, not in per cent.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = [
    "Bin",
    "Estimate",
    "Interval",
    "accuracy",
    "correlation",
    "distinct_n",
    "expected_calibration_error",
    "holm",
    "jackknife",
    "jackknife_distinct_n",
    "jackknife_self_bleu",
    "mean_and_se",
    "paired_bootstrap",
    "paired_difference",
    "paired_p_value",
    "reliability_table",
    "repeated_ngram_rate",
    "self_bleu",
    "significance_mark",
    "student_quantile",
    "wilson_interval",
    "win_rate",
]

T = TypeVar("T")

_NORMAL_QUANTILE = 1.959963984540054  # 97.5 % of the standard normal distribution
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


class Bin(NamedTuple):
    """One row of a reliability table: mean predicted probability, observed frequency, number of values."""

    predicted: float
    observed: float
    n: int


def mean_and_se(values: Float[Tensor, "n"]) -> Estimate:
    """Mean and standard error of independent values, in their unit. The spread is the sample's, with n − 1 below.

    Raises ValueError on an empty tensor.
    """
    values = _float64(values)
    n = len(values)
    se = float(values.std()) / math.sqrt(n) if n > 1 else math.nan
    return Estimate(float(values.mean()), se, n)


def paired_difference(values: Float[Tensor, "n"], baseline: Float[Tensor, "n"]) -> Interval:
    """Mean of values − baseline with its 95 % Student t interval, in their unit; row i of both is the same prompt.

    Pairing removes what the prompts have in common. The interval is exact for normal differences and good for n above
    about 30; for few or skewed differences use `paired_bootstrap`. Raises ValueError for fewer than two pairs.
    """
    difference = _differences(values, baseline)
    mean, se, n = mean_and_se(difference)
    half_width = student_quantile(n - 1) * se
    return Interval(mean, mean - half_width, mean + half_width)


def paired_bootstrap(
    values: Float[Tensor, "n"], baseline: Float[Tensor, "n"], *, seed: int, resamples: int = 2000
) -> Interval:
    """Mean of values − baseline with its 95 % percentile bootstrap interval, in their unit; pairs are drawn whole.

    The same seed gives the same interval. Raises ValueError for fewer than two pairs.
    """
    difference = _differences(values, baseline).numpy()
    generator = np.random.default_rng(seed)
    # One resample at a time: [resamples, n] at once would be gigabytes for a large evaluation.
    means = [difference[generator.integers(len(difference), size=len(difference))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(difference.mean()), float(low), float(high))


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
    for _ in range(resamples):
        extreme += abs(difference[generator.integers(n, size=n)].mean() - mean) >= abs(mean)
    return (1 + int(extreme)) / (1 + resamples)


def holm(p_values: Float[Tensor, "tests"]) -> Float[Tensor, "tests"]:
    """p-values adjusted for their number, probabilities: those below α are significant together at level α.

        sorted ascending, the k-th of m becomes max over j ≤ k of min(1, (m − j + 1) p_j)

    The probability of even one false finding among all the tests is then at most α, whatever their dependence. Raises
    ValueError if a p-value lies outside [0, 1].

    Source: Holm 1979, Scandinavian Journal of Statistics 6, 65-70.
    """
    values, order = _float64(p_values).sort()
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
    items = _two_or_more(items)
    return _delete_one(statistic(items), [statistic(items[:i] + items[i + 1 :]) for i in range(len(items))])


def accuracy(logit: Float[Tensor, "n"]) -> Estimate:
    """Fraction of labelled pairs whose preference log-odds (nats) are positive; exactly 0 counts one half."""
    return mean_and_se((logit.sign().to(torch.float64) + 1) / 2)


def win_rate(scores: Float[Tensor, "n"], baseline_scores: Float[Tensor, "n"]) -> Estimate:
    """Fraction of prompts on which `scores` beat `baseline_scores`; a tie counts one half.

    The standard error is over prompts and is 0 when every prompt agrees: `wilson_interval` is honest there.
    """
    return accuracy(scores - baseline_scores)


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


def reliability_table(probability: Float[Tensor, "n"], outcome: Float[Tensor, "n"], *, bins: int = 10) -> list[Bin]:
    """What was predicted against what was observed, in equally wide bins of predicted probability.

    Empty bins are left out. `outcome` is 1 where the event happened, 0 where it did not, or the frequency with which
    it did. Raises ValueError if a probability lies outside [0, 1].
    """
    probability, outcome = _float64(probability), _float64(outcome)
    if bool(((probability < 0) | (probability > 1)).any()):
        raise ValueError("a predicted probability lies outside [0, 1]; pass probabilities, not log-odds")
    index = (probability * bins).long().clamp(max=bins - 1)
    chosen = [index == b for b in range(bins)]
    return [Bin(float(probability[c].mean()), float(outcome[c].mean()), int(c.sum())) for c in chosen if c.any()]


def expected_calibration_error(
    probability: Float[Tensor, "n"], outcome: Float[Tensor, "n"], *, bins: int = 10
) -> float:
    """Gap between predicted probability and observed frequency, averaged over the values; 0 is perfect, 1 the worst.

        Σ_bins (n_bin / n) |predicted_bin − observed_bin|

    Biased upwards by sampling noise, about √(bins / n) / 2 even for a perfect predictor: compare at equal n and bins
    only.

    Source: arXiv 1706.04599, eq. 3.
    """
    table = reliability_table(probability, outcome, bins=bins)
    return sum(row.n * abs(row.predicted - row.observed) for row in table) / sum(row.n for row in table)


def correlation(first: Float[Tensor, "n"], second: Float[Tensor, "n"]) -> float:
    """Pearson correlation, between −1 and 1; NaN when one side is constant or there are fewer than two values."""
    first, second = _float64(first), _float64(second)
    first, second = first - first.mean(), second - second.mean()
    scale = float(first.norm() * second.norm())
    return float(first @ second) / scale if scale > 0 else math.nan


def distinct_n(sequences: Sequence[Sequence[int]], *, n: int) -> float:
    """Different n-grams over all n-grams, across all token sequences: 1 all different, near 0 degenerate.

    It falls with the amount of text, so compare equal numbers of sequences of similar length only. NaN when no sequence
    has n tokens.

    Source: arXiv 1510.03055 (distinct-1, distinct-2).
    """
    grams = [gram for sequence in sequences for gram in _ngrams(sequence, n)]
    return len(set(grams)) / len(grams) if grams else math.nan


def jackknife_distinct_n(items: Sequence[Sequence[Sequence[int]]], *, n: int) -> Estimate:
    """`distinct_n` of all items' token sequences together, and its error by `jackknife` over the items.

    One count serves all: leaving an item out takes away its n-grams, and those kinds that no other item has. The
    fraction is NaN as `distinct_n` is, the error also where one item alone has n tokens. Raises ValueError for fewer
    than two items.
    """
    counts = [Counter(gram for text in item for gram in _ngrams(text, n)) for item in _two_or_more(items)]
    holders = Counter(gram for own in counts for gram in own)
    total = sum(own.total() for own in counts)

    def distinct(own: Counter[tuple[int, ...]]) -> float:
        left = total - own.total()
        return (len(holders) - sum(holders[gram] == 1 for gram in own)) / left if left else math.nan

    return _delete_one(distinct(Counter()), [distinct(own) for own in counts])


def repeated_ngram_rate(sequences: Sequence[Sequence[int]], *, n: int) -> Estimate:
    """Fraction of a sequence's n-grams that have occurred before in the same sequence, averaged over sequences.

    Sequences shorter than n have nothing to repeat and are left out; with none left the mean is NaN and n is 0.
    """
    grams = [_ngrams(sequence, n) for sequence in sequences if len(sequence) >= n]
    if not grams:
        return Estimate(math.nan, math.nan, 0)
    return mean_and_se(torch.tensor([1 - len(set(g)) / len(g) for g in grams], dtype=torch.float64))


def self_bleu(sequences: Sequence[Sequence[int]], *, n: int = 4) -> float:
    """BLEU of each token sequence with all the others as its references, averaged: 1 all alike, near 0 all different.

        brevity · exp( mean over k = 1 … n of ln precision_k )
        precision_k = (k-grams also in a reference, each at most as often as in the one that has it most) / (k-grams)
        brevity = min(1, exp(1 − r / length)),  r the length of the reference nearest in length, the shorter of two

    A precision of zero counts as 0.1 k-grams (smoothing of the usual implementations, Chen and Cherry 2014, method 1).
    Sequences with fewer than n tokens are references only. It rises with the number of sequences, so compare equal
    numbers: the samples of one prompt, then averaged over prompts. NaN when none has n tokens.

    Raises ValueError for fewer than two sequences. Source: arXiv 1802.01886.
    """
    return _self_bleu(_grams(sequences, n), [len(sequence) for sequence in sequences], range(len(sequences)), n)


def jackknife_self_bleu(items: Sequence[Sequence[Sequence[int]]], *, n: int = 4) -> Estimate:
    """`self_bleu` of all items' token sequences together, and its error by `jackknife` over the items; one count.

    Raises ValueError for fewer than two items, or if fewer than two sequences are left without one of them.
    """
    sequences = [sequence for item in items for sequence in item]
    grams, lengths = _grams(sequences, n), [len(sequence) for sequence in sequences]
    places = iter(range(len(sequences)))
    numbers = [[next(places) for _ in item] for item in items]
    return jackknife(lambda some: _self_bleu(grams, lengths, [i for own in some for i in own], n), numbers)


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


def _ngrams(sequence: Sequence[int], n: int) -> list[tuple[int, ...]]:
    if n < 1:
        raise ValueError(f"n is {n}; an n-gram has at least one token")
    return list(zip(*(sequence[start:] for start in range(n)), strict=False))


def _grams(sequences: Sequence[Sequence[int]], n: int) -> Int[np.ndarray, "rows 4"]:
    """Number of a sequence, number of a k-gram in it (k = 1 … n), k, and how often; sorted by k-gram and frequency."""
    numbers: dict[tuple[int, ...], int] = {}
    rows = [
        (index, numbers.setdefault(gram, len(numbers)), k, count)
        for index, sequence in enumerate(sequences)
        for k in range(1, n + 1)
        for gram, count in Counter(_ngrams(sequence, k)).items()
    ]
    found = np.array(rows, dtype=np.int64).reshape(-1, 4)
    return found[np.lexsort((found[:, 3], found[:, 1]))]


def _self_bleu(grams: Int[np.ndarray, "rows 4"], lengths: Sequence[int], chosen: Sequence[int], n: int) -> float:
    """`self_bleu` of those sequences, by number, given the `_grams` and lengths of all."""
    if len(chosen) < 2:
        raise ValueError(f"{len(chosen)} sequences; self-BLEU compares each with the others and needs two")
    here = np.zeros(len(lengths), dtype=bool)
    here[list(chosen)] = True
    owner, gram, k, count = grams[here[grams[:, 0]]].T
    # The sequence that has a gram most often meets the second most; any other meets one that has it at least as often.
    first, last = np.diff(gram, prepend=-1) != 0, np.diff(gram, append=-1) != 0
    second = np.where(first, 0, np.roll(count, 1))[last]
    met = np.minimum(count, second[np.cumsum(first) - 1])
    matched = np.bincount(owner * n + k - 1, weights=met, minlength=len(lengths) * n).reshape(-1, n).tolist()
    present = Counter(lengths[i] for i in chosen)
    nearest = {
        length: min((o for o, c in present.items() if c > (o == length)), key=lambda o: (abs(o - length), o))
        for length in present
    }
    scores = []
    for i in chosen:
        if (length := lengths[i]) >= n:
            log = 0.0
            for order, hits in enumerate(matched[i]):
                log += math.log((hits or 0.1) / (length - order)) / n
            scores.append(math.exp(log + min(0.0, 1 - nearest[length] / length)))
    return math.fsum(scores) / len(scores) if scores else math.nan


def _two_or_more(items: Sequence[T]) -> list[T]:
    if len(items) < 2:
        raise ValueError(f"{len(items)} items; the jackknife leaves one out and needs at least two")
    return list(items)


def _delete_one(value: float, without: Sequence[float]) -> Estimate:
    """A statistic and its jackknife error, from its values without each item."""
    values, n = torch.tensor(without, dtype=torch.float64), len(without)
    return Estimate(value, math.sqrt((n - 1) / n * float(((values - values.mean()) ** 2).sum())), n)


def _float64(values: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    if len(values) == 0:
        raise ValueError("no values; a mean needs at least one")
    return values.detach().to("cpu", torch.float64)


def _differences(values: Float[Tensor, "n"], baseline: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    if len(values) < 2:
        raise ValueError(f"{len(values)} pairs; an interval needs at least two")
    return _float64(values) - _float64(baseline)
