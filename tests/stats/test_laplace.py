"""The posterior of a head's weights: mode, covariance and evidence against direct computation."""

from __future__ import annotations

import math

import pytest
import torch

from distalign.methods.preference import preference_nll
from distalign.stats.laplace import fit_posterior


def problem(rows=60, width=4, seed=0):
    """Features, outcomes and offsets of a regression whose truth is known."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=random, dtype=torch.float64)
    offset = torch.randn(rows, generator=random, dtype=torch.float64)
    truth = torch.randn(width, generator=random, dtype=torch.float64)
    outcome = torch.bernoulli((offset + x @ truth).sigmoid(), generator=random)
    return x, outcome, offset


@pytest.mark.parametrize(("rows", "width"), [(60, 4), (5, 20)], ids=["tall", "wide"])
def test_mode_and_covariance_are_those_of_the_whole_space(rows, width):
    """The gradient at the mode is zero; variances are x H⁻¹ x and x H⁻¹ XᵀDX H⁻¹ x, wherever x lies."""
    x, y, offset = problem(rows, width)
    found = fit_posterior(x, y, offset, 0.7)
    p = (offset + x @ found.mean).sigmoid()
    torch.testing.assert_close(x.T @ (y - p), 0.7 * found.mean, rtol=0, atol=1e-6)
    data = x.T @ ((p * (1 - p))[:, None] * x)
    inverse = torch.linalg.inv(data + 0.7 * torch.eye(width, dtype=torch.float64))
    probe = torch.randn(7, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mean, noise = found.moved(probe)
    torch.testing.assert_close(mean, probe @ found.mean)
    torch.testing.assert_close(noise, (probe @ inverse @ data @ inverse * probe).sum(-1), rtol=1e-6, atol=1e-8)


def test_the_evidence_is_the_integral_over_the_prior():
    """One weight: Laplace's approximation is near the integral on a grid, for every strength of the prior."""
    x, y, offset = problem(width=1)
    grid = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    for precision in (0.1, 1.0, 10.0):
        log_prior = -precision / 2 * grid.square() + math.log(precision / (2 * math.pi)) / 2
        nll = preference_nll(offset[:, None] + x * grid, y[:, None].expand(-1, len(grid))).sum(0)
        integral = (log_prior - nll).logsumexp(0) + math.log(24 / 20000)
        assert fit_posterior(x, y, offset, precision).evidence == pytest.approx(float(integral), abs=0.05)


def test_the_prior_is_chosen_by_the_evidence():
    """Labels that the offset explains: almost no correction is allowed. Labels that it does not: a large one is."""
    x, _, offset = problem(200, 6)
    random = torch.Generator().manual_seed(5)
    nothing = torch.bernoulli(offset.sigmoid(), generator=random)
    something = torch.bernoulli((offset + 3 * x[:, 0]).sigmoid(), generator=random)
    small, large = (fit_posterior(x, y, offset) for y in (nothing, something))
    assert float(small.mean.norm()) < 0.2
    assert float((large.mean - torch.eye(6, dtype=torch.float64)[0] * 3).norm()) < 1.5
    assert small.precision > 10 * large.precision
