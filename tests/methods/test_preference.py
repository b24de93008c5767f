"""The preference model: its equations, its limits, and its numbers at the edges."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distalign.methods.preference import (
    bernoulli_kl,
    bradley_terry_nll,
    induced_logps,
    induced_reward,
    preference_logit,
    preference_nll,
)

LOGPS = st.floats(-500, 0)
LOGIT = st.floats(-300, 300)
PROBABILITY = st.floats(0, 1)


def f64(*values):
    """A float64 vector."""
    return torch.tensor(values, dtype=torch.float64)


@given(LOGPS, LOGPS, st.floats(1e-3, 10))
def test_preference_is_the_ratio_of_powers(a, b, gamma):
    """σ(logit) = π(a)^γ / (π(a)^γ + π(b)^γ), eq. 2; swapping the pair flips the sign."""
    logit = preference_logit(f64(a, b), gamma=gamma)
    powers = (gamma * f64(a, b)).softmax(0)
    assert torch.sigmoid(logit).item() == pytest.approx(powers[0].item(), rel=1e-9, abs=1e-300)
    assert preference_logit(f64(b, a), gamma=gamma) == -logit


@given(st.floats(-50, 50), PROBABILITY)
def test_nll_is_the_cross_entropy(logit, p):
    """−p ln q − (1 − p) ln(1 − q), where the naive formula can be trusted."""
    q = 1 / (1 + math.exp(-logit)) if abs(logit) < 30 else None
    found = preference_nll(f64(logit), f64(p)).item()
    if q is not None:
        assert found == pytest.approx(-p * math.log(q) - (1 - p) * math.log1p(-q), rel=1e-3, abs=1e-12)
    assert preference_nll(f64(logit), f64(1.0)).item() == preference_nll(f64(logit)).item()
    assert found == pytest.approx(preference_nll(f64(-logit), f64(1 - p)).item(), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("logit", [0.0, 1.0, 19.9, 20.1, 37.0, 300.0, 700.0])
def test_nll_is_exact_in_both_tails(logit):
    """ln(1 + e^{−x}) to full precision, also where the sigmoid rounds to 1 and where softplus turns into a line."""
    assert preference_nll(f64(logit)).item() == pytest.approx(math.log1p(math.exp(-logit)), rel=1e-14)
    assert preference_nll(f64(-logit)).item() == pytest.approx(logit + math.log1p(math.exp(-logit)), rel=1e-14)


@given(LOGIT, PROBABILITY)
def test_bernoulli_kl_is_a_divergence(logit, p):
    """Never negative (to rounding), finite, with gradient σ(logit) − p, at p = 0 and 1 too."""
    x = f64(logit).requires_grad_()
    kl = bernoulli_kl(f64(p), x)
    kl.sum().backward()
    assert math.isfinite(kl.item())
    assert kl.item() >= -1e-15 * max(1.0, abs(logit))
    assert x.grad.item() == pytest.approx(torch.sigmoid(x.detach()).item() - p, abs=1e-15)


def test_bernoulli_kl_known_values():
    """Zero where both agree; −ln σ at the certain ends; KL(Bern(3/4) ‖ Bern(1/2)) = ln 2 − H(1/4)."""
    p = f64(0.0, 0.1, 0.5, 0.999, 1.0)
    agree = bernoulli_kl(p, torch.logit(p).clamp(-800, 800))
    torch.testing.assert_close(agree, torch.zeros_like(p), rtol=0, atol=1e-15)
    x = f64(-700.0, -3.0, 0.0, 3.0, 700.0)
    torch.testing.assert_close(bernoulli_kl(torch.ones_like(x), x), preference_nll(x), rtol=0, atol=0)
    torch.testing.assert_close(bernoulli_kl(torch.zeros_like(x), x), preference_nll(-x), rtol=0, atol=0)
    wanted = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert bernoulli_kl(f64(0.75), f64(0.0)).item() == pytest.approx(wanted, rel=1e-14)


@given(LOGIT, LOGIT, PROBABILITY, st.floats(-1000, 1000))
def test_bradley_terry_ignores_a_constant(a, b, p, constant):
    """The likelihood of a reward depends on its differences only."""
    plain = bradley_terry_nll(f64(a, b), f64(p).squeeze())
    moved = bradley_terry_nll(f64(a + constant, b + constant), f64(p).squeeze())
    assert plain.item() == pytest.approx(moved.item(), abs=1e-9)


def test_policy_and_reward_induce_each_other():
    """ln π → R_π → the same ln π (eq. 8); the reward's Bradley-Terry model is the policy's preference model."""
    logps = torch.randn(4, 7, dtype=torch.float64).log_softmax(-1)
    rewards = induced_reward(logps, gamma=0.05)
    torch.testing.assert_close(induced_logps(rewards + 3.0, gamma=0.05), logps)
    pair = logps[:, :2]
    torch.testing.assert_close(bradley_terry_nll(rewards[:, :2]), preference_nll(preference_logit(pair, gamma=0.05)))


def test_smaller_gamma_sharpens_the_induced_model():
    """γ → 0 puts all mass on the best response, γ → ∞ spreads it evenly."""
    rewards = f64(0.0, 1.0, 2.0)
    assert induced_logps(rewards, gamma=0.01)[-1].exp().item() == pytest.approx(1.0)
    torch.testing.assert_close(induced_logps(rewards, gamma=1e9).exp(), f64(1 / 3, 1 / 3, 1 / 3))


@pytest.mark.parametrize("gamma", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("function", [preference_logit, induced_reward, induced_logps])
def test_gamma_must_be_positive(function, gamma):
    """The error names the value found."""
    with pytest.raises(ValueError, match=f"gamma is {gamma}; the preference sharpness must be a positive"):
        function(torch.zeros(3, 2), gamma=gamma)


def test_shapes_are_checked():
    """Three responses are no pair, and a column of labels is no vector: the annotations refuse both in tests."""
    with pytest.raises(Exception, match="logps"):
        preference_logit(torch.zeros(3, 3), gamma=1.0)
    with pytest.raises(Exception, match="probability"):
        preference_nll(torch.zeros(3), torch.ones(3, 1))
