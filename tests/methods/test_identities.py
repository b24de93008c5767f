"""Identities between the methods, at known points and for whole families of inputs."""

from __future__ import annotations

import pytest
import torch
from enumeration import Enumeration, gradient
from hypothesis import given, settings
from hypothesis import strategies as st

from distalign.methods import DPO, METHODS, PD, PMLE, REBEL, RKL, RLHF, Pairs
from distalign.methods.dpo import dpo_loss
from distalign.methods.estimators import expected_reward
from distalign.methods.pd import pd_loss
from distalign.methods.pmle import pmle_loss
from distalign.methods.rebel import rebel_loss
from distalign.methods.rkl import rkl_loss

EXACT = {"rtol": 0.0, "atol": 1e-10}
GAMMA, BETA, ETA = 0.7, 0.4, 1.3


class Setting:
    """An enumerable policy over responses of up to three tokens, its reference, and a reward for every response."""

    def __init__(self):
        self.world = Enumeration(3, 3)
        self.policy = self.world.parameters(0)
        self.reference = self.world.parameters(100).detach()
        generator = torch.Generator().manual_seed(0)
        self.rewards = torch.randn(len(self.world.responses), generator=generator, dtype=torch.float64)


def test_pd_with_certain_preferences_is_pmle():
    """KL(Bern(1) ‖ Bern(q)) = −ln q, in value and gradient."""
    logps = (10 * torch.randn(50, 2, dtype=torch.float64)).requires_grad_()
    pd, pmle = (
        pd_loss(logps, torch.ones(50, dtype=torch.float64), gamma=0.3),
        pmle_loss(logps, torch.ones(50, dtype=torch.float64), gamma=0.3),
    )
    torch.testing.assert_close(pd, pmle, rtol=0, atol=0)
    torch.testing.assert_close(gradient(pd.sum(), logps), gradient(pmle.sum(), logps), rtol=0, atol=1e-15)


def test_dpo_without_a_reference_gap_is_pmle():
    """If π₀ gives both responses the same probability it cancels."""
    logps = 10 * torch.randn(50, 2, dtype=torch.float64)
    reference = torch.randn(50, 1, dtype=torch.float64).expand(50, 2)
    certain = torch.ones(50, dtype=torch.float64)
    torch.testing.assert_close(
        dpo_loss(logps, reference, certain, gamma=0.3), pmle_loss(logps, torch.ones(50, dtype=torch.float64), gamma=0.3)
    )


def test_rlhf_is_rkl_at_gamma_zero():
    """Value and gradient are those of the KL-penalised reward."""
    s = Setting()
    rows, group = torch.tensor([0, 4, 9, 2]), torch.tensor([0, 0, 1, 1])
    samples = s.world.samples(s.policy, s.reference, s.rewards, rows, group)
    rlhf, rkl = (method.loss(Pairs(), samples) for method in (RLHF(beta=BETA), RKL(gamma=0.0, beta=BETA)))
    penalised = s.rewards - BETA * (s.world.logps(s.policy) - s.world.logps(s.reference)).detach()
    wanted = -expected_reward(samples, penalised[rows]).mean()
    for loss in (rlhf, rkl):
        torch.testing.assert_close(loss, wanted, **EXACT)
        torch.testing.assert_close(gradient(loss, s.policy), gradient(wanted, s.policy), **EXACT)
    assert RLHF().gamma == 0


def test_rkl_at_beta_zero_is_the_divergence_from_the_induced_model():
    """−E[R] − γH = γ KL(π ‖ π̃) − γ ln Σ exp(R/γ), π̃ ∝ exp(R/γ): eq. 14 is a reverse KL."""
    s = Setting()
    logps, target = s.world.logps(s.policy), (s.rewards / GAMMA).log_softmax(0)
    divergence = GAMMA * (logps.exp() * (logps - target)).sum() - GAMMA * (s.rewards / GAMMA).logsumexp(0)
    rows, group = s.world.groups_of_two()
    samples = s.world.samples(s.policy, s.reference, s.rewards, rows, group)
    losses = rkl_loss(samples, gamma=GAMMA, beta=0.0)
    expected = (s.world.group_weights(s.policy) * losses).sum()
    torch.testing.assert_close(expected, divergence, **EXACT)
    torch.testing.assert_close(gradient(expected, s.policy), gradient(divergence, s.policy), **EXACT)


def test_rkl_gradient_is_zero_draw_by_draw_at_the_optimum():
    """At π ∝ π₀^{β/(β+γ)} exp(R/(β+γ)) every single draw has gradient zero: the estimator has no noise there."""
    s = Setting()
    reference = s.world.logps(s.reference)
    optimum = ((BETA * reference + s.rewards) / (BETA + GAMMA)).log_softmax(0)
    # The table whose policy is the optimum: for each prefix, the log-mass of the responses through each next token.
    mass = torch.full(s.policy.shape, -torch.inf, dtype=torch.float64)
    for logp, prefixes, tokens, mask in zip(optimum, s.world.prefix, s.world.tokens, s.world.mask, strict=True):
        for p, t in zip(prefixes[mask], tokens[mask], strict=True):
            mass[p, t] = torch.logaddexp(mass[p, t], logp)
    s.policy = mass.requires_grad_()
    torch.testing.assert_close(s.world.logps(s.policy), optimum, **EXACT)
    rows, group = s.world.groups_of_two()
    samples = s.world.samples(s.policy, s.reference, s.rewards, rows, group)
    method = RKL(gamma=GAMMA, beta=BETA)
    implied = method.implicit_reward(s.world.logps(s.policy), reference)
    torch.testing.assert_close(implied - implied.mean(), s.rewards - s.rewards.mean(), **EXACT)
    losses = rkl_loss(samples, gamma=GAMMA, beta=BETA)
    for draw in losses.view(-1, 2)[::7]:
        assert gradient(draw.sum(), s.policy).abs().max() < 1e-12


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.0, 1.0))
def test_swapping_a_pair_and_its_label_changes_nothing(seed, p):
    """Every loss over pairs treats the two responses alike."""
    g = torch.Generator().manual_seed(seed)
    logps, reference, rewards = (10 * torch.randn(3, 4, 2, dtype=torch.float64, generator=g)).unbind()
    probability = torch.full((4,), p, dtype=torch.float64)
    for loss in (pmle_loss, pd_loss):
        swapped = loss(logps.flip(1), 1 - probability, gamma=0.3)
        torch.testing.assert_close(loss(logps, probability, gamma=0.3), swapped)
    swapped = dpo_loss(logps.flip(1), reference.flip(1), 1 - probability, gamma=0.3)
    torch.testing.assert_close(dpo_loss(logps, reference, probability, gamma=0.3), swapped)
    swapped = rebel_loss(logps.flip(1), reference.flip(1), rewards.flip(1), eta=0.3)
    torch.testing.assert_close(rebel_loss(logps, reference, rewards, eta=0.3), swapped)


def test_implicit_rewards():
    """What each policy says about rewards; only their differences within a prompt mean anything."""
    logps, reference = torch.randn(2, 5, dtype=torch.float64).unbind()
    ratio = logps - reference
    wanted = {
        "pmle": GAMMA * logps,
        "pd": GAMMA * logps,
        "rkl": GAMMA * logps + BETA * ratio,
        "dpo": GAMMA * ratio,
        "rebel": BETA * ratio,
        "rlhf": BETA * ratio,
    }
    built = [PMLE(GAMMA, BETA), PD(GAMMA, BETA), RKL(GAMMA, BETA), DPO(GAMMA), REBEL(ETA, BETA), RLHF(BETA)]
    for name, method in zip(wanted, built, strict=True):
        assert type(method) is METHODS[name]
        torch.testing.assert_close(method.implicit_reward(logps, reference), wanted[name])
    for method in (PMLE(GAMMA, BETA), PD(GAMMA, BETA), RKL(GAMMA, 0.0)):
        torch.testing.assert_close(method.implicit_reward(logps, None), GAMMA * logps)
    torch.testing.assert_close(REBEL(ETA, 0.0).implicit_reward(logps, reference), ratio / ETA)
    assert bool((RLHF(beta=0.0).implicit_reward(logps, None) == 0).all())
    with pytest.raises(ValueError, match="reference_logps is missing"):
        DPO().implicit_reward(logps, None)


def test_rebel_is_zero_where_the_log_ratio_reproduces_the_rewards():
    """The minimum of one round is π_t exp(η R)."""
    behavior, rewards = torch.randn(2, 8, 2, dtype=torch.float64).unbind()
    logps = behavior + 0.3 * rewards + 5.0
    torch.testing.assert_close(rebel_loss(logps, behavior, rewards, eta=0.3), torch.zeros(8, dtype=torch.float64))
    with pytest.raises(ValueError, match="eta is 0"):
        rebel_loss(logps, behavior, rewards, eta=0.0)


def test_no_gradient_enters_what_is_constant():
    """Rewards, soft labels, behavior and reference log-probabilities are data, even if a graph hangs on them."""
    logps = torch.randn(4, 2, requires_grad=True)
    constant = torch.randn(4, 2, requires_grad=True)
    probability = torch.rand(4, requires_grad=True)
    total = pd_loss(logps, probability, gamma=1.0) + dpo_loss(logps, constant, torch.ones(4), gamma=1.0)
    (total + rebel_loss(logps, constant, constant, eta=1.0)).sum().backward()
    assert constant.grad is None
    assert probability.grad is None
    assert logps.grad is not None


def test_a_column_of_labels_is_refused():
    """A label [pairs, 1] would broadcast against [pairs] to [pairs, pairs]; the shape annotation stops it."""
    with pytest.raises(Exception, match="probability"):
        pmle_loss(torch.zeros(3, 2), torch.ones(3, 1), gamma=1.0)
