"""The lab's enumeration: what is computed about a world, against brute force and against what theory says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from distalign.lab.exact import (
    asymptotic_constant,
    coverage,
    divergence,
    dpo_limit,
    entropy,
    independent,
    information_weights,
    optimum,
    pair_moment,
    rlhf_limit,
    table_features,
)
from distalign.lab.tables import draw, linear_tables, random_tables

GAMMA = 0.5


@pytest.fixture(scope="module")
def tables():
    """Six small worlds whose behaviour leans away from the target."""
    return random_tables(6, 3, 5, scale=1.0, gamma=GAMMA, seed=0, skew=0.7)


def test_divergence_and_entropy_are_sums_over_responses(tables):
    """Against a loop over responses; a response of probability zero counts nothing."""
    p, q = tables.target[2].exp(), tables.reference[2].exp()
    by_hand = sum(float(a * math.log(a / b)) for a, b in zip(p.flatten(), q.flatten(), strict=True)) / 3
    assert float(divergence(tables.target, tables.reference)[2]) == pytest.approx(by_hand, rel=1e-12)
    own = -sum(float(a * math.log(a)) for a in p.flatten()) / 3
    assert float(entropy(tables.target)[2]) == pytest.approx(own, rel=1e-12)
    certain = torch.tensor([[0.0, -math.inf]], dtype=torch.float64)
    assert float(entropy(certain)) == 0
    assert float(divergence(certain, torch.tensor([[0.5, 0.5]], dtype=torch.float64).log())) == pytest.approx(
        math.log(2)
    )


@pytest.mark.parametrize(("gamma", "beta"), [(0.5, 0.0), (0.5, 0.2), (0.0, 0.3)])
def test_the_optimum_is_not_beaten(tables, gamma, beta):
    """No small change of the optimum lowers −E[R] − γH + β KL, and the change is quadratic."""
    rewards = torch.randn(tables.target.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    best = optimum(rewards, tables.reference, gamma=gamma, beta=beta)

    def objective(logps):
        return (
            -(logps.exp() * rewards).sum(-1).mean(-1)
            - gamma * entropy(logps)
            + beta * divergence(logps, tables.reference)
        )

    noise = torch.randn(best.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for size in (1e-2, -1e-2, 1.0, -1.0):
        assert bool((objective((best + size * noise).log_softmax(-1)) > objective(best)).all())
    small = objective((best + 1e-4 * noise).log_softmax(-1)) - objective(best)
    assert float(small.abs().max()) < 1e-7


@pytest.mark.parametrize(("gamma", "beta"), [(0.0, 0.0), (-0.1, 1.0), (1.0, -0.1)])
def test_an_optimum_that_does_not_exist_is_refused(gamma, beta):
    """Negative weights, or none at all."""
    with pytest.raises(ValueError, match="neither may be negative"):
        optimum(torch.zeros(1, 2), torch.zeros(1, 2), gamma=gamma, beta=beta)


def test_pair_moment_is_a_sum_over_ordered_pairs(tables):
    """Against a loop; with w = π(a)π(b)/2 it is a covariance."""
    features = table_features(3, 5)
    weights = independent(tables.target) / 2
    found = pair_moment(features, features, weights)[1]
    loop = torch.zeros(12, 12, dtype=torch.float64)
    for x in range(3):
        for a in range(5):
            for b in range(5):
                gap = features[0, x, a] - features[0, x, b]
                loop += weights[1, x, a, b] * torch.outer(gap, gap) / 3
    torch.testing.assert_close(found, loop, rtol=1e-12, atol=1e-14)
    phi = features[0, 2]
    policy = tables.target[1, 2].exp()
    covariance = phi.mT @ (policy[:, None] * phi) - torch.outer(policy @ phi, policy @ phi)
    torch.testing.assert_close(3 * found[8:, 8:], covariance[8:, 8:], rtol=1e-12, atol=1e-14)


def test_the_constant_is_the_curvature_of_the_divergence_times_the_inverse_information(tables):
    """C by finite differences of KL(π* ‖ π) and of the expected log-likelihood of a label, in one world."""
    target, behavior = tables.target[:1], tables.behavior[:1]
    features = table_features(3, 5)

    def kl(weights):
        return divergence(target, (target + features[0] @ weights).log_softmax(-1)).sum()

    def loss(weights):
        logit = GAMMA * (target + features[0] @ weights)
        gap = logit[..., :, None] - logit[..., None, :]
        truth = (GAMMA * (target[..., :, None] - target[..., None, :])).sigmoid()
        each = -truth * torch.nn.functional.logsigmoid(gap)
        return (independent(behavior) * each).sum((-2, -1)).mean()

    zero = torch.zeros(12, dtype=torch.float64)
    fisher, information = torch.func.hessian(kl)(zero), 2 * torch.func.hessian(loss)(zero)
    by_hand = float(torch.trace(fisher @ torch.linalg.inv(information))) / 2
    assert float(asymptotic_constant(target, behavior, features, gamma=GAMMA)) == pytest.approx(by_hand, rel=1e-9)


def test_constants_through_a_reward(tables):
    """A reward class equal to the policy class costs nothing; a smaller one is cheaper, in proportion to its size."""
    features = table_features(3, 5)
    target, behavior = tables.target, tables.behavior
    direct = asymptotic_constant(target, behavior, features, gamma=GAMMA)
    through = asymptotic_constant(target, behavior, features, features, gamma=GAMMA)
    torch.testing.assert_close(direct, through, rtol=1e-9, atol=0)
    worlds, phi = linear_tables((4, 20, 30, 12), relevant=3, scale=0.1, gamma=GAMMA, seed=0)
    small = asymptotic_constant(worlds.target, worlds.behavior, phi[..., :3], gamma=GAMMA)
    large = asymptotic_constant(worlds.target, worlds.behavior, phi, gamma=GAMMA)
    # Pairs near the target, as here, give d/γ²: see test_the_paper_toy_has_constant_360.
    torch.testing.assert_close(large / small, torch.full((4,), 4.0, dtype=torch.float64), rtol=0.05, atol=0)
    projected = asymptotic_constant(worlds.target, worlds.behavior, phi, phi[..., :3], gamma=GAMMA)
    torch.testing.assert_close(projected, small, rtol=1e-9, atol=0)


def test_the_paper_toy_has_constant_360():
    """C = d/γ² with d = 90 free logits where all responses are about equally likely."""
    toy = random_tables(20, 10, 10, scale=0.1, gamma=0.5, seed=3)
    constant = asymptotic_constant(toy.target, toy.behavior, table_features(10, 10), gamma=0.5)
    assert float(constant.median()) == pytest.approx(360, rel=0.01)


def test_coverage_is_the_worst_ratio_of_second_moments(tables):
    """No direction has a larger ratio, one has it, and a behaviour equal to the target has 1."""
    _, phi = linear_tables((6, 3, 5, 4), relevant=2, scale=1.0, gamma=GAMMA, seed=5)
    found = coverage(phi, tables.target, tables.behavior)
    centred = phi - (tables.behavior.exp()[..., None] * phi).sum(-2, keepdim=True)
    directions = torch.randn((6, 4, 20_000), generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def moment(policy):
        return (policy.exp()[..., None] * (centred @ directions[:, None]).square()).sum(-2).mean(1)

    ratio = (moment(tables.target) / moment(tables.behavior)).amax(-1)
    assert bool((ratio <= found * (1 + 1e-9)).all())
    assert bool((ratio > 0.97 * found).all())
    torch.testing.assert_close(coverage(phi, tables.target, tables.target), torch.ones(6, dtype=torch.float64))


def test_limits_are_where_infinitely_many_pairs_lead(tables):
    """RLHF's limit is the least over β by brute force; DPO's is its optimum with the true reward; neither is zero."""

    def trained(beta):
        return divergence(tables.target, optimum(GAMMA * tables.target, tables.reference, gamma=0.0, beta=beta))

    limit = rlhf_limit(tables.target, tables.reference, gamma=GAMMA)
    brute = torch.stack([trained(float(beta)) for beta in np.geomspace(1e-2, 1e2, 4000)]).amin(0)
    torch.testing.assert_close(limit, brute, rtol=1e-5, atol=0)
    assert bool((limit <= brute + 1e-12).all())
    dpo = trained(GAMMA)
    torch.testing.assert_close(dpo_limit(tables.target, tables.reference), dpo)
    assert bool((limit > 0.05).all())
    assert bool((dpo >= limit).all())


def test_counts_have_the_frequencies_of_the_world(tables):
    """Pairs as often as μ draws them, first responses winning as often as P says (binomial, five standard errors)."""
    n = 1_000_000
    counts = draw(tables, n, seed=0)
    expected = n * tables.pair_weights(tables.behavior)
    assert bool(((counts.total - expected).abs() < 5 * expected.sqrt() + 5).all())
    gap = tables.pair_logps(tables.target)
    p = (GAMMA * (gap[..., 0] - gap[..., 1])).sigmoid()
    error = (p * (1 - p) / counts.total.clamp(min=1)).sqrt()
    assert bool(((counts.frequency - p).abs() < 5 * error + 1e-12).all())
    wasted = n - counts.total.sum((1, 2))
    same = n * tables.behavior.exp().square().sum(-1).mean(-1)
    assert bool(((wasted - same).abs() < 5 * same.sqrt()).all())


def test_draws_do_not_depend_on_each_other_but_on_the_seed(tables):
    """The same seed and n give the same counts; another seed, n or stream others; splitting loses nothing."""
    first, again = draw(tables, 1000, seed=0), draw(tables, 1000, seed=0)
    assert torch.equal(first.wins, again.wins)
    for other in (draw(tables, 1000, seed=1), draw(tables, 1001, seed=0), draw(tables, 1000, seed=0, stream=1)):
        assert not torch.equal(first.total, other.total)
    rest, held = first.split(0.2, seed=0)
    assert torch.equal(rest.total + held.total, first.total)
    assert torch.equal(rest.wins + held.wins, first.wins)
    assert 0.15 < float(held.total.sum() / first.total.sum()) < 0.25
    assert bool((held.wins <= held.total).all())


def test_information_weights_are_of_the_labels_that_are_drawn(tables):
    """μ(a) μ(b) P(1 − P): symmetric, largest where the label is a coin."""
    weights = information_weights(tables.behavior, tables.target, gamma=GAMMA)
    torch.testing.assert_close(weights, weights.mT)
    flat = information_weights(tables.behavior, torch.zeros_like(tables.target), gamma=GAMMA)
    assert bool((weights <= flat + 1e-15).all())
