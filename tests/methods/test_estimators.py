"""Value and gradient of every estimator against exact enumeration in float64."""

from __future__ import annotations

import math

import pytest
import torch
from enumeration import Enumeration, gradient
from hypothesis import given, settings
from hypothesis import strategies as st

from distalign.methods import Samples, estimators
from distalign.methods.estimators import (
    entropy_full,
    entropy_plain,
    expected_reward,
    importance_weights,
    kl_full,
    kl_plain,
    leave_one_out,
    sequence_sum,
)
from distalign.methods.ppo import clipped_surrogate, gae

SHAPES = [(4, 1), (3, 2), (3, 3)]
EXACT = {"rtol": 0.0, "atol": 1e-10}


def _kl(world, policy, reference, rewards):
    return world.kl(policy, reference)


def _entropy(world, policy, reference, rewards):
    return world.entropy(policy)


def _reward(world, policy, reference, rewards):
    return world.reward(policy, rewards)


ESTIMATORS = {
    "kl_plain": (kl_plain, _kl),
    "kl_full": (kl_full, _kl),
    "entropy_plain": (entropy_plain, _entropy),
    "entropy_full": (entropy_full, _entropy),
    "expected_reward": (lambda s: expected_reward(s, s.rewards), _reward),
}


def _setting(shape, seed=0):
    world = Enumeration(*shape)
    policy, reference = world.parameters(seed), world.parameters(seed + 100)
    rewards = torch.linspace(-1.0, 2.0, len(world.responses), dtype=torch.float64)
    return world, policy, reference.detach(), rewards


def _expectation(world, policy, reference, rewards, estimator, *, group, behavior=None):
    """The surrogate averaged over every draw of `behavior` (None: the policy), weighted by its detached probability."""
    drawing = policy if behavior is None else behavior
    if group:
        rows, groups = world.groups_of_two()
        weights = world.group_weights(drawing)
    else:
        rows, groups = torch.arange(len(world.responses)), None
        weights = world.logps(drawing).exp().detach()
    return (weights * estimator(world.samples(policy, reference, rewards, rows, groups, behavior))).sum()


@pytest.mark.parametrize("shape", [*SHAPES, (4, 3)])
def test_enumeration_is_complete(shape):
    """The listed responses have total probability 1, and per-step values add up to sequence values."""
    world, policy, reference, _ = _setting(shape)
    p = world.logps(policy).exp()
    assert p.sum().item() == pytest.approx(1.0, abs=1e-14)
    steps = sequence_sum(world.step_kl(policy, reference), world.mask)
    torch.testing.assert_close((p * steps).sum(), world.kl(policy, reference), **EXACT)


@pytest.mark.parametrize("group", [False, True], ids=["no baseline", "leave-one-out"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_value_and_gradient_equal_enumeration(name, shape, group):
    """Averaged over all responses (all pairs of responses, with a baseline), value and gradient are the exact ones."""
    world, policy, reference, rewards = _setting(shape)
    estimator, exact = ESTIMATORS[name]
    estimate = _expectation(world, policy, reference, rewards, estimator, group=group)
    wanted = exact(world, policy, reference, rewards)
    torch.testing.assert_close(estimate, wanted, **EXACT)
    torch.testing.assert_close(gradient(estimate, policy), gradient(wanted, policy), **EXACT)


@pytest.mark.parametrize("group", [False, True], ids=["no baseline", "leave-one-out"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_stale_responses_are_weighted_without_bias(name, shape, group):
    """Drawn by another policy and weighted, value and gradient are still exact; unweighted, both are wrong."""
    world, policy, reference, rewards = _setting(shape)
    behavior = (policy + 0.5 * world.parameters(7)).detach()
    estimator, exact = ESTIMATORS[name]
    estimate = _expectation(world, policy, reference, rewards, estimator, group=group, behavior=behavior)
    wanted = exact(world, policy, reference, rewards)
    torch.testing.assert_close(estimate, wanted, **EXACT)
    torch.testing.assert_close(gradient(estimate, policy), gradient(wanted, policy), **EXACT)
    unweighted = _expectation(
        world,
        policy,
        reference,
        rewards,
        lambda s: estimator(s.replace(behavior_token_logps=s.token_logps.detach())),
        group=group,
        behavior=behavior,
    )
    # One step of known value has nothing before it to weight.
    if shape[1] > 1 or not name.endswith("full"):
        error = gradient(unweighted, policy) - gradient(wanted, policy)
        assert error.norm() > 0.02 * gradient(wanted, policy).norm()


def test_importance_weights_are_ratios_of_probabilities():
    """The last column is π(y)/π_t(y) of the whole response; without a behavior policy every weight is one."""
    world, policy, _, _ = _setting((3, 3))
    behavior = world.parameters(7)
    samples = Samples(world.token_logps(policy), world.mask)
    assert bool((importance_weights(samples) == 1).all())
    weights = importance_weights(samples.replace(behavior_token_logps=world.token_logps(behavior)))
    torch.testing.assert_close(weights[:, -1], (world.logps(policy) - world.logps(behavior)).exp().detach(), **EXACT)
    assert not weights.requires_grad
    mean = (world.logps(behavior).exp() * weights[:, -1]).sum()
    assert mean.item() == pytest.approx(1.0)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), name=st.sampled_from(sorted(ESTIMATORS)))
def test_gradient_equals_enumeration_for_any_policy(seed, name):
    """The same, for policies, references and rewards that nobody chose."""
    world, policy, reference, _ = _setting((3, 2), seed)
    rewards = 10 * torch.randn(len(world.responses), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    estimator, exact = ESTIMATORS[name]
    estimate = _expectation(world, policy, reference, rewards, estimator, group=True)
    wanted = exact(world, policy, reference, rewards)
    torch.testing.assert_close(gradient(estimate, policy), gradient(wanted, policy), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_gradient_without_the_score_term_is_wrong_from_length_two(length):
    """The naive derivative of Σ_t KL_t passes at length 1 and only there: no test at length 1 can catch its error."""
    world, policy, reference, _ = _setting((3, length))
    naive = (world.logps(policy).exp().detach() * sequence_sum(world.step_kl(policy, reference), world.mask)).sum()
    wanted = gradient(world.kl(policy, reference), policy)
    error = (gradient(naive, policy) - wanted).norm() / wanted.norm()
    assert error < 1e-12 if length == 1 else error > 0.05


@pytest.mark.parametrize("length", [1, 2, 3])
def test_naive_gradient_of_the_log_ratio_is_pure_noise(length):
    """The derivative of the sampled log-ratio has expectation zero, whatever the KL is."""
    world, policy, reference, _ = _setting((3, length))
    log_ratio = world.logps(policy) - world.logps(reference)
    naive = (world.logps(policy).exp().detach() * log_ratio).sum()
    assert gradient(naive, policy).abs().max() < 1e-12
    assert gradient(world.kl(policy, reference), policy).norm() > 0.1


def test_baseline_with_its_own_value_shrinks_the_gradient(monkeypatch):
    """A group mean that contains the row's own value gives (K − 1)/K of the gradient; leave-one-out gives all of it."""

    def group_mean(values, group):
        return values.view(-1, 2).mean(1).repeat_interleave(2)

    world, policy, reference, rewards = _setting((3, 2))
    wanted = gradient(world.reward(policy, rewards), policy)
    monkeypatch.setattr(estimators, "leave_one_out", group_mean)
    biased = _expectation(world, policy, reference, rewards, ESTIMATORS["expected_reward"][0], group=True)
    torch.testing.assert_close(gradient(biased, policy), wanted / 2, **EXACT)


def test_baseline_removes_what_the_rewards_have_in_common():
    """A constant in the rewards is pure noise without a baseline, and none at all with one."""
    world, policy, reference, rewards = _setting((3, 2))
    estimator, _ = ESTIMATORS["expected_reward"]
    rows, groups = world.groups_of_two()
    weights = 2 * world.group_weights(policy)[::2]

    def variance(group, constant):
        samples = world.samples(policy, reference, rewards + constant, rows, group)
        surrogates = estimator(samples).view(-1, 2).mean(1)
        rows_of_gradient = torch.stack([gradient(s, policy).flatten() for s in surrogates])
        mean = (weights[:, None] * rows_of_gradient).sum(0)
        return (weights[:, None] * (rows_of_gradient - mean) ** 2).sum()

    torch.testing.assert_close(variance(groups, 5.0), variance(groups, 0.0), **EXACT)
    assert variance(groups, 5.0) < 0.1 * variance(None, 5.0)


def test_leave_one_out_is_the_mean_of_the_others():
    """Per group, whatever the order of the rows and the labels; a row that is alone gets exactly 0."""
    group = torch.tensor([7, 2, 7, 2, 7, -1])
    values = torch.tensor([1.0, 10.0, 2.0, 20.0, 6.0, 5.0])
    torch.testing.assert_close(leave_one_out(values, group), torch.tensor([4.0, 20.0, 3.5, 10.0, 1.5, 0.0]))
    assert leave_one_out(values, torch.arange(6)).tolist() == [0.0] * 6


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(-100, 100)), min_size=1, max_size=12))
def test_leave_one_out_never_contains_the_own_value(rows):
    """Changing a row's value changes the baseline of its siblings and never its own."""
    group = torch.tensor([g for g, _ in rows])
    values = torch.tensor([[v, -v] for _, v in rows], dtype=torch.float64)
    for i in range(len(rows)):
        changed = values.clone()
        changed[i] += 1000.0
        before, after = leave_one_out(values, group), leave_one_out(changed, group)
        torch.testing.assert_close(after[i], before[i], rtol=0, atol=1e-9)
        siblings = (group == group[i]) & (torch.arange(len(rows)) != i)
        assert bool((after[siblings] != before[siblings]).all())


@pytest.mark.parametrize("name", ESTIMATORS)
def test_what_stands_off_the_mask_is_never_read(name):
    """Padding may hold NaN (as the enumeration's does): values and gradients stay finite."""
    world, policy, reference, rewards = _setting((3, 3))
    rows = torch.arange(len(world.responses))
    surrogate = ESTIMATORS[name][0](world.samples(policy, reference, rewards, rows, torch.zeros_like(rows)))
    assert bool(surrogate.isfinite().all())
    assert bool(gradient(surrogate.sum(), policy).isfinite().all())


def _random_tokens(samples=5, steps=6):
    lengths = torch.tensor([6, 1, 4, 2, 5])[:samples]
    mask = torch.arange(steps) < lengths[:, None]
    shape = (samples, steps)
    return mask, torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize(("discount", "gae_lambda"), [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (1.0, 1.0)])
def test_gae_is_the_discounted_sum_of_surprises(discount, gae_lambda):
    """A_t = Σ_l (discount · gae_lambda)^l δ_{t+l}, term by term; constant, and nothing after the end."""
    mask, rewards, values = _random_tokens()
    advantages = gae(rewards, values.requires_grad_(), mask, discount=discount, gae_lambda=gae_lambda)
    assert not advantages.requires_grad
    for i, length in enumerate(mask.sum(1).tolist()):
        v = [*values[i, :length].tolist(), 0.0]
        surprise = [rewards[i, t].item() + discount * v[t + 1] - v[t] for t in range(length)]
        wanted = [
            sum((discount * gae_lambda) ** (u - t) * surprise[u] for u in range(t, length)) for t in range(length)
        ]
        assert advantages[i].tolist() == pytest.approx([*wanted, *[0.0] * (6 - length)], abs=1e-12)


def test_gae_ignores_columns_before_the_response():
    """Left padding moves the advantages to the right and changes nothing else."""
    mask, rewards, values = _random_tokens()
    plain = gae(rewards, values, mask, discount=0.9, gae_lambda=0.8)
    pad = torch.full((len(mask), 2), torch.nan, dtype=torch.float64)
    padded = gae(
        torch.cat([pad, rewards], 1),
        torch.cat([pad, values], 1),
        torch.cat([torch.zeros_like(pad, dtype=torch.bool), mask], 1),
        discount=0.9,
        gae_lambda=0.8,
    )
    torch.testing.assert_close(padded, torch.cat([torch.zeros_like(pad), plain], 1))


def test_gae_at_lambda_one_is_return_minus_value():
    """Without discounting the advantage is the reward still to come minus its prediction."""
    mask, rewards, values = _random_tokens()
    to_come = (rewards * mask).flip(1).cumsum(1).flip(1)
    wanted = torch.where(mask, to_come - values, 0.0)
    torch.testing.assert_close(gae(rewards, values, mask, discount=1.0, gae_lambda=1.0), wanted)


def test_clipped_surrogate_starts_as_the_policy_gradient():
    """At π = π_t its value is the advantage and its gradient is advantage · ∇ ln π."""
    mask, token_logps, advantages = _random_tokens()
    token_logps.requires_grad_()
    surrogate = clipped_surrogate(token_logps, token_logps.detach(), advantages, mask, clip=0.2)
    wanted = torch.where(mask, advantages, 0.0)
    torch.testing.assert_close(surrogate, wanted)
    torch.testing.assert_close(gradient(surrogate.sum(), token_logps), wanted)


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "value", "moves"),
    [
        (0.5, 1.0, 1.2, False),
        (-0.5, 1.0, math.exp(-0.5), True),
        (0.5, -1.0, -math.exp(0.5), True),
        (-0.5, -1.0, -0.8, False),
    ],
)
def test_clipped_surrogate_stops_only_steps_already_taken(log_ratio, advantage, value, moves):
    """The four corners of PPO's figure 1: clipped where the ratio has moved the wanted way, free where it has not."""
    token_logps = torch.tensor([[-1.0 + log_ratio]], dtype=torch.float64, requires_grad=True)
    behavior = torch.full_like(token_logps, -1.0).detach()
    advantages = torch.tensor([[advantage]], dtype=torch.float64)
    surrogate = clipped_surrogate(token_logps, behavior, advantages, torch.tensor([[True]]), clip=0.2)
    assert surrogate.item() == pytest.approx(value)
    assert bool(gradient(surrogate.sum(), token_logps).abs().sum() > 0) == moves


def test_errors_say_what_was_found():
    """Settings outside their range are refused by name and value."""
    mask, a, b = _random_tokens()
    with pytest.raises(ValueError, match="clip is 0"):
        clipped_surrogate(a, a, b, mask, clip=0.0)
    with pytest.raises(ValueError, match=r"gae_lambda is 1\.5"):
        gae(a, b, mask, discount=1.0, gae_lambda=1.5)
