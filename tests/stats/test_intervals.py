"""Intervals and tests: known answers, coverage, and the edges."""

from __future__ import annotations

import math

import pytest
import torch
from statsmodels.stats.multitest import multipletests

from distalign.stats.intervals import (
    by_cluster,
    clusters_of,
    holm,
    jackknife,
    mean_and_se,
    paired_difference,
    paired_p_value,
    significance_mark,
    student_quantile,
    wilson_interval,
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
    hits = 0
    for _ in range(400):
        prompt = 10 * torch.randn(60, generator=generator)
        noise = torch.randn(2, 60, generator=generator)
        values, baseline = prompt + 0.5 + noise[0], prompt + noise[1]
        _, low, high = paired_difference(values, baseline)
        hits += low < 0.5 < high
    assert 380 - 18 <= hits <= 380 + 18
    with pytest.raises(ValueError, match="1 pairs; an interval needs at least two"):
        paired_difference(torch.zeros(1), torch.zeros(1))


def test_values_that_hang_together_count_as_one():
    """The mean is that of all values; its error is the cluster-robust one of a regression on a constant."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(40, (300,), generator=generator).tolist()
    values = torch.randn(40, generator=generator, dtype=torch.float64)[keys] + 0.1 * torch.randn(300)
    clusters = clusters_of(keys)
    mean, se, n = mean_and_se(by_cluster(values, clusters))
    assert mean == pytest.approx(float(values.mean()))
    assert n == len(set(keys))
    sums = [float((values[torch.tensor(places)] - values.mean()).sum()) for places in clusters]
    assert se == pytest.approx(math.sqrt(sum(s * s for s in sums) * n / (n - 1)) / 300)
    assert se > 2 * mean_and_se(values).se
    alone = by_cluster(values, clusters_of(range(300)))
    assert torch.allclose(alone, values, atol=1e-14)


def test_wilson_interval():
    """Known value (Brown, Cai and DasGupta); not empty when everything was won, and inside [0, 1]."""
    assert wilson_interval(0.5, 10) == pytest.approx((0.5, 0.236593, 0.763407), abs=1e-6)
    assert wilson_interval(1.0, 10) == pytest.approx((1.0, 0.722467, 1.0), abs=1e-6)
    assert wilson_interval(0.0, 10).low == 0.0
    with pytest.raises(ValueError, match=r"fraction 1\.5 of 10"):
        wilson_interval(1.5, 10)


def test_jackknife_of_a_mean_is_its_standard_error():
    """Values that are independent, one item each."""
    values = torch.randn(12, dtype=torch.float64)
    found = jackknife(lambda items: sum(items) / len(items), values.tolist())
    assert found == pytest.approx(mean_and_se(values))


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
