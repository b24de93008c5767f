"""Metrics: known answers, coverage of the intervals, and the edges."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.multitest import multipletests

from distalign.stats.metrics import (
    Estimate,
    accuracy,
    correlation,
    distinct_n,
    expected_calibration_error,
    holm,
    jackknife,
    jackknife_distinct_n,
    jackknife_self_bleu,
    mean_and_se,
    paired_bootstrap,
    paired_difference,
    paired_p_value,
    reliability_table,
    repeated_ngram_rate,
    self_bleu,
    significance_mark,
    student_quantile,
    wilson_interval,
    win_rate,
)


def test_mean_and_se():
    """s/√n with n − 1 in s; one value has a mean and no error."""
    assert mean_and_se(torch.tensor([1.0, 2.0, 3.0, 4.0])) == pytest.approx((2.5, math.sqrt(5 / 3) / 2, 4))
    single = mean_and_se(torch.tensor([3.0]))
    assert (single.mean, single.n) == (3.0, 1)
    assert math.isnan(single.se)
    with pytest.raises(ValueError, match="no values"):
        mean_and_se(torch.tensor([]))


@pytest.mark.parametrize(
    ("n", "quantile"),
    [(2, 12.706205), (3, 4.302653), (6, 2.570582), (31, 2.042272), (601, 1.963920), (20_000, 1.959964)],
)
def test_paired_difference_uses_student_t(n, quantile):
    """The half-width is the tabulated 97.5 % quantile at n − 1 degrees of freedom times the standard error."""
    values = torch.randn(n, dtype=torch.float64)
    baseline = torch.randn(n, dtype=torch.float64)
    mean, low, high = paired_difference(values, baseline)
    estimate = mean_and_se(values - baseline)
    assert mean == pytest.approx(estimate.mean)
    assert high - mean == pytest.approx(quantile * estimate.se, rel=3e-6 if n < 20_000 else 1e-4)
    assert mean - low == pytest.approx(high - mean)


def test_intervals_cover_95_percent():
    """Of 400 experiments with a known difference about 380 intervals contain it (binomial limits, 4 sd)."""
    generator = torch.Generator().manual_seed(0)
    hits = {"t": 0, "bootstrap": 0}
    for seed in range(400):
        prompt = 10 * torch.randn(60, generator=generator)
        noise = torch.randn(2, 60, generator=generator)
        values, baseline = prompt + 0.5 + noise[0], prompt + noise[1]
        _, low, high = paired_difference(values, baseline)
        hits["t"] += low < 0.5 < high
        _, low, high = paired_bootstrap(values, baseline, seed=seed, resamples=300)
        hits["bootstrap"] += low < 0.5 < high
    assert 380 - 18 <= hits["t"] <= 380 + 18
    assert 380 - 26 <= hits["bootstrap"] <= 380 + 18


def test_bootstrap_is_seeded():
    """The same seed gives the same interval, another seed another one."""
    values, baseline = torch.randn(2, 50).unbind()
    assert paired_bootstrap(values, baseline, seed=1) == paired_bootstrap(values, baseline, seed=1)
    assert paired_bootstrap(values, baseline, seed=1) != paired_bootstrap(values, baseline, seed=2)
    with pytest.raises(ValueError, match="1 pairs; an interval needs at least two"):
        paired_difference(torch.zeros(1), torch.zeros(1))


def test_accuracy_and_win_rate_count_ties_half():
    """Two wins, one loss, one tie: 62.5 %."""
    assert accuracy(torch.tensor([3.0, 0.1, -2.0, 0.0])).mean == 0.625
    assert win_rate(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 2.0, 4.0])) == Estimate(
        0.5, pytest.approx(math.sqrt(0.25 / 3)), 3
    )


def test_wilson_interval():
    """Known value (Brown, Cai and DasGupta); not empty when everything was won, and inside [0, 1]."""
    assert wilson_interval(0.5, 10) == pytest.approx((0.5, 0.236593, 0.763407), abs=1e-6)
    assert wilson_interval(1.0, 10) == pytest.approx((1.0, 0.722467, 1.0), abs=1e-6)
    assert wilson_interval(0.0, 10).low == 0.0
    with pytest.raises(ValueError, match=r"fraction 1\.5 of 10"):
        wilson_interval(1.5, 10)


def test_calibration_of_a_calibrated_and_an_overconfident_predictor():
    """The error is small when outcomes follow the probabilities and about 0.3 when 0.9 is right 60 % of the time."""
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(20_000, generator=generator)
    assert expected_calibration_error(p, torch.bernoulli(p, generator=generator)) < 0.02
    sure, outcome = torch.full((1000,), 0.9), (torch.arange(1000) < 600).float()
    assert expected_calibration_error(sure, outcome) == pytest.approx(0.3, abs=1e-6)


def test_reliability_table():
    """A row per filled bin, with means and counts; probability 1 belongs to the last bin."""
    table = reliability_table(torch.tensor([0.1, 0.2, 1.0]), torch.tensor([0.0, 1.0, 1.0]), bins=2)
    assert [tuple(row) for row in table] == [pytest.approx((0.15, 0.5, 2)), pytest.approx((1.0, 1.0, 1))]
    with pytest.raises(ValueError, match="not log-odds"):
        reliability_table(torch.tensor([1.2]), torch.tensor([1.0]))


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 1)), min_size=1, max_size=40), st.integers(1, 12))
def test_reliability_table_keeps_every_value(rows, bins):
    """Counts add up, and the count-weighted means are the overall means."""
    p = torch.tensor([r[0] for r in rows], dtype=torch.float64)
    y = torch.tensor([float(r[1]) for r in rows], dtype=torch.float64)
    table = reliability_table(p, y, bins=bins)
    assert sum(row.n for row in table) == len(rows)
    assert sum(row.n * row.predicted for row in table) == pytest.approx(p.sum().item())
    assert sum(row.n * row.observed for row in table) == pytest.approx(y.sum().item())
    assert 0 <= expected_calibration_error(p, y, bins=bins) <= 1


def test_correlation():
    """numpy's number; NaN, not an error or a warning, when one side does not vary."""
    a, b = torch.randn(2, 30, dtype=torch.float64).unbind()
    assert correlation(a, b) == pytest.approx(np.corrcoef(a.numpy(), b.numpy())[0, 1])
    assert correlation(a, 2 * a + 1) == pytest.approx(1.0)
    assert math.isnan(correlation(a, torch.ones(30)))


def test_diversity_of_varied_and_degenerate_text():
    """'a b a b a b' has two different bigrams in five; varied text repeats nothing."""
    assert distinct_n([[1, 2, 1, 2, 1, 2]], n=2) == pytest.approx(2 / 5)
    assert distinct_n([[1, 2, 3], [1, 2, 3]], n=1) == pytest.approx(0.5)
    assert repeated_ngram_rate([[1, 2, 1, 2, 1, 2], [1, 2, 3, 4]], n=2).mean == pytest.approx((3 / 5 + 0) / 2)
    assert repeated_ngram_rate([[1, 2, 3], [1, 2, 3]], n=1).mean == 0.0


def test_diversity_without_enough_tokens():
    """Too short for one n-gram: NaN and a count of 0, not a perfect score."""
    assert math.isnan(distinct_n([[1], []], n=2))
    assert repeated_ngram_rate([[1], []], n=2).n == 0
    with pytest.raises(ValueError, match="n is 0"):
        distinct_n([[1, 2]], n=0)


def test_student_quantile_of_other_levels():
    """Tabulated 95 % quantiles (a central 90 %), whole and fractional degrees of freedom, and the normal's."""
    for freedom, quantile in ((1, 6.313752), (1.5, 3.705181), (7, 1.894579), (120, 1.657651), (math.inf, 1.644854)):
        assert student_quantile(freedom, level=0.9) == pytest.approx(quantile, rel=2e-6)


def test_holm_is_statsmodels():
    """Adjusted p-values equal statsmodels' to rounding, in the order given, equal ones included."""
    generator = torch.Generator().manual_seed(0)
    for tests in (1, 2, 3, 8, 30):
        p_values = torch.rand(tests, generator=generator, dtype=torch.float64).pow(3).mul(50).round() / 50
        theirs = multipletests(p_values.numpy(), method="holm")[1]
        assert holm(p_values).numpy() == pytest.approx(theirs, abs=1e-12)


def test_holm_refuses_what_is_no_probability():
    """A p-value outside [0, 1] is refused; stars follow the level."""
    with pytest.raises(ValueError, match="outside"):
        holm(torch.tensor([0.1, math.nan]))
    assert [significance_mark(p) for p in (0.2, 0.04, 0.009, 0.0001)] == ["", "*", "**", "***"]


def test_paired_p_value_keeps_its_level():
    """Where the truth is 0 a p-value below 0.05 comes in 5 % of experiments (4 sd); where it is not, nearly always."""
    generator = torch.Generator().manual_seed(0)
    prompt = 10 * torch.randn(600, 80, generator=generator)
    noise = torch.randn(2, 600, 80, generator=generator)
    values, baseline = prompt + noise[0], prompt + noise[1]
    found = sum(paired_p_value(values[i], baseline[i], seed=i, resamples=300) <= 0.05 for i in range(600))
    assert 30 - 21 <= found <= 30 + 21
    shifted = [paired_p_value(values[i] + 1, baseline[i], seed=i, resamples=300) for i in range(20)]
    assert max(shifted) <= 0.05
    assert paired_p_value(values[0], values[0], seed=0, resamples=100) == 1.0


def test_self_bleu_by_hand():
    """Two sequences and bigrams: precisions 3/4 and 1/3, 3/3 and 1/2; the shorter one pays exp(1 − 4/3)."""
    first, second = [1, 2, 3, 4], [2, 3, 1]
    by_hand = (math.sqrt(3 / 4 * 1 / 3) + math.exp(1 - 4 / 3) * math.sqrt(3 / 3 * 1 / 2)) / 2
    assert self_bleu([first, second], n=2) == pytest.approx(by_hand)
    assert self_bleu([first, first], n=4) == pytest.approx(1)
    # Nothing shared: a precision of zero counts 0.1 grams, of 4, 3, 2 and 1.
    assert self_bleu([first, [5, 6, 7, 8]]) == pytest.approx((0.1**4 / 24) ** 0.25)
    assert self_bleu([[1, 2], [1, 2]], n=2) == pytest.approx(1)
    assert math.isnan(self_bleu([[1], [1]], n=2))
    with pytest.raises(ValueError, match="needs two"):
        self_bleu([first])


@given(st.lists(st.lists(st.integers(0, 3), max_size=7), min_size=2, max_size=5), st.integers(1, 3))
def test_self_bleu_is_its_definition(sequences, n):
    """Equal to BLEU written out against each list of references."""

    def grams(sequence, k):
        return Counter(tuple(sequence[i : i + k]) for i in range(len(sequence) - k + 1))

    scores = []
    for i, own in enumerate(sequences):
        if len(own) < n:
            continue
        others = sequences[:i] + sequences[i + 1 :]
        log = 0.0
        for k in range(1, n + 1):
            hits = sum(min(c, max(grams(o, k)[g] for o in others)) for g, c in grams(own, k).items())
            log += math.log((hits or 0.1) / (len(own) - k + 1)) / n
        nearest = min((abs(len(o) - len(own)), len(o)) for o in others)[1]
        scores.append(math.exp(log + min(0, 1 - nearest / len(own))))
    value = self_bleu(sequences, n=n)
    assert math.isnan(value) if not scores else value == pytest.approx(sum(scores) / len(scores))


TEXTS = st.lists(st.lists(st.integers(0, 3), max_size=7), max_size=3)  # an item: some share n-grams, some are empty


@given(st.lists(TEXTS, min_size=2, max_size=6), st.integers(1, 3))
def test_jackknife_of_distinct_n_is_its_definition(items, n):
    """Counted once, leaving out what an item alone has: equal to `distinct_n` of the rest, item by item, NaN too."""
    found = jackknife_distinct_n(items, n=n)
    each = jackknife(lambda some: distinct_n([text for item in some for text in item], n=n), items)
    assert found == pytest.approx(each, abs=1e-12, nan_ok=True)


@given(st.lists(TEXTS.filter(lambda item: item != []), min_size=3, max_size=5), st.integers(1, 4))
def test_jackknife_of_self_bleu_is_its_definition(items, n):
    """Counted once: equal to `self_bleu` of the rest, item by item, NaN too."""
    found = jackknife_self_bleu(items, n=n)
    each = jackknife(lambda some: self_bleu([text for item in some for text in item], n=n), items)
    assert found == pytest.approx(each, abs=1e-12, nan_ok=True)


def test_a_jackknife_needs_two_items():
    """One left out leaves none; self-BLEU of what is left needs two sequences."""
    for items in ([], [[[1, 2, 3]]]):
        with pytest.raises(ValueError, match="needs at least two"):
            jackknife_distinct_n(items, n=2)
        with pytest.raises(ValueError, match="needs at least two"):
            jackknife_self_bleu(items)
    with pytest.raises(ValueError, match="needs two"):
        jackknife_self_bleu([[[1, 2, 3]], [[1, 2, 3]]])
