"""The lab's estimators: exact mean and variance by another road, what is biased and what is noisy, and errors."""

from __future__ import annotations

import json
import math
from itertools import product

import pytest
import torch

from distalign.lab import estimators
from distalign.lab.estimators import (
    OBJECTIVE,
    QUANTITIES,
    REWARD,
    Estimators,
    naive_forms,
    objective_forms,
    term_forms,
)
from distalign.lab.exact import optimum
from distalign.lab.experiment import measure
from distalign.report.shown import Measured

SMALL = Estimators(length=2, seeds=3, points=3)


def quiet(*_):
    """Progress that nobody looks at."""


def places(experiment=SMALL, seed=0):
    """A far, a near and an optimal world."""
    return experiment._places(torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def found():
    """The experiment with its default worlds, a few of them."""
    return measure(Estimators(seeds=3, points=3), quiet)


def test_all_claims_hold(found):
    """In kind what the prototypes measured, at the default settings."""
    claims = found["shown"]["claims"]
    assert len(claims) == 11
    assert [claim["promised"] for claim in claims if not claim["holds"]] == []


def test_biased_are_the_naive_forms_and_stale_clipping(found):
    """Every row of the library is right to 1e-10, no other row to better than a thousandth."""
    biases = {(row["quantity"], row["where"], row["estimator"]): [] for row in found["rows"]}
    for row in found["rows"]:
        relative = row["relative_bias"]
        biases[row["quantity"], row["where"], row["estimator"]].append(row["bias"] if relative is None else relative)
    wrong = {key[2] for key, values in biases.items() if max(values) > 1e-10}
    assert wrong == {form.name for form in naive_forms(3)} | {"clipped surrogate, stale"}
    assert min(min(values) for key, values in biases.items() if key[2] in wrong) > 1e-3
    assert len(biases) == 12 + 8 + 3 * 2


def test_the_joint_form_is_silent_at_the_optimum(found):
    """With leave-one-out below 1e-12; without it, and split, it is noise about a gradient of zero."""
    rows = [row for row in found["rows"] if row["where"] == "optimum"]
    joint = [row["variance"] for row in rows if row["estimator"] == "joint" and row["leave_one_out"]]
    others = [row["variance"] for row in rows if row["estimator"] == "split" or not row["leave_one_out"]]
    assert len(joint) == 3
    assert max(joint) < 1e-12
    assert min(others) > 0.1
    assert all(row["relative_bias"] is None and row["bias"] < 1e-12 for row in rows)


def test_noise_falls_with_the_distance_for_the_joint_form_only(found):
    """From a random policy to a thousandth of the way: the joint form by six orders, the split form hardly."""
    ends = {left: [row for row in found["path"] if row["left"] == pytest.approx(left)] for left in (1.0, 0.001)}
    for first, last in zip(*ends.values(), strict=True):
        assert last["joint"] < 1e-4 * first["joint"]
        assert last["split"] > 0.05 * first["split"]
        assert last["kl"] < 1e-4 * first["kl"]


def test_mean_and_variance_equal_a_loop_over_groups():
    """One group at a time, each with its own backward pass, added up with its probability."""
    world, _, _ = places()
    (form,) = [f for f in term_forms(0.2) if f.quantity == REWARD and f.grouped and f.name == "plain"]
    probability = world.logps(world.policy).exp()
    gradients, weights = [], []
    for a, b in product(range(len(world.rewards)), repeat=2):
        policy = world.policy.clone().requires_grad_()
        logps = world.logps(policy)
        difference = world.rewards[a] - world.rewards[b]
        surrogate = (logps[a] * difference - logps[b] * difference) / 2
        gradients.append(torch.autograd.grad(surrogate, policy)[0].flatten())
        weights.append(probability[a] * probability[b])
    gradients, weights = torch.stack(gradients), torch.stack(weights)
    mean = weights @ gradients
    found, variance = world.gradient(form.surrogate, size=2)
    torch.testing.assert_close(found, mean)
    assert variance == pytest.approx(2 * float(weights @ (gradients - mean).square().sum(1)))


@pytest.mark.parametrize("form", [f for f in term_forms(0.2) + objective_forms(0.5, 0.05) if f.grouped and not f.stale])
def test_variance_by_group_size_equals_enumeration(form):
    """A + B/(K − 1), from groups of two and three, is what all groups of five give; ∞ is less than any of them."""
    world, _, _ = places(Estimators(vocabulary=2, length=2))
    two, five, many = world.variance(form.surrogate, [2.0, 5.0, math.inf])
    assert two == pytest.approx(world.gradient(form.surrogate, size=2)[1])
    assert five == pytest.approx(world.gradient(form.surrogate, size=5)[1], rel=1e-10)
    assert many < five < two


@pytest.mark.parametrize("name", QUANTITIES)
def test_exact_gradient_is_the_slope_of_the_expectation(name):
    """By differences along a random direction."""
    world, _, _ = places()
    direction = torch.randn(world.policy.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    up, down = (world.expectation(name, world.logps(world.policy + step * direction)).item() for step in (1e-5, -1e-5))
    exact = world.exact_gradient(name) @ direction.flatten()
    assert exact.item() == pytest.approx((up - down) / 2e-5, rel=1e-6)


def test_the_optimum_is_a_policy_over_responses():
    """Token by token it gives appendix B's probabilities, and no slope is left."""
    world, _, best = places()
    wanted = optimum(world.rewards[None], world.logps(world.reference)[None], gamma=0.5, beta=0.05)[0]
    torch.testing.assert_close(best.logps(best.policy), wanted)
    assert best.exact_gradient(OBJECTIVE).norm() < 1e-12 < world.exact_gradient(OBJECTIVE).norm()


def test_an_estimator_that_lost_its_score_term_is_found(monkeypatch):
    """The claim of no bias is about the library's code: break that and it fails."""

    def broken(samples):
        return torch.where(samples.mask, samples.step_kl, 0.0).sum(-1)

    few = Estimators(length=2, seeds=2, points=2)
    assert few.show(few.run(quiet)).claims[0].holds
    monkeypatch.setattr(estimators, "kl_full", broken)
    assert not few.show(few.run(quiet)).claims[0].holds


def test_the_seed_decides_everything():
    """Twice the same numbers; other worlds from another seed."""
    first, again, other = (Estimators(length=2, seeds=1, points=2, seed=seed).run(quiet) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_the_result_is_plain_data_that_the_report_reads(found):
    """JSON without NaN, in the shape that the lab's page checks."""
    text = json.dumps(found, allow_nan=False)
    shown = Measured.model_validate_json(text).shown
    assert [len(panel.curves) for panel in shown.panels] == [3, 3]
    assert len(shown.tables[0].rows) == len({tuple(row[:4]) for row in shown.tables[0].rows}) == 37
    assert {row["quantity"] for row in found["rows"]} == set(QUANTITIES)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 1}, "length\n.*greater than or equal to 2"),
        ({"group_size": 1}, "group_size\n.*greater than or equal to 2"),
        ({"gamma": 0.0, "beta": 0.0}, "gamma and beta are both 0; RKL has an optimum if"),
        ({"vocabulary": 8, "length": 4}, r"make 2801\^3 groups and .* numbers in their gradients; give smaller ones"),
    ],
)
def test_errors_say_what_was_found(settings, message):
    """At one token the score term is zero and no error of it could be seen; too many groups are counted."""
    with pytest.raises(ValueError, match=message):
        Estimators(**settings)


def test_objective_without_entropy_or_without_kl():
    """γ = 0 is RLHF's objective, β = 0 needs no reference; both stay unbiased."""
    for settings in ({"gamma": 0.0, "beta": 0.5}, {"gamma": 0.5, "beta": 0.0}):
        rows = Estimators(length=2, seeds=1, points=2, **settings).run(quiet)["rows"]
        right = [row for row in rows if row["quantity"] == OBJECTIVE and not row["biased_by_design"]]
        assert max(row["bias"] for row in right) < 1e-12
