"""Distances to a known target against exact enumeration and plain Monte Carlo; numbers with their errors."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import tiny
import torch

from distalign.data import EncodedPair
from distalign.engine import Group, score
from distalign.evaluation.metrics import (
    Measured,
    Task,
    calibration,
    differences,
    forward_kl,
    measure_pairs,
    measure_samples,
    significance,
    summarise,
    win_probability,
)
from distalign.models.targets import with_logit_bias
from distalign.rollout.sample import sample
from distalign.stats.intervals import holm, paired_p_value, significance_mark

VOCABULARY, END = 8, 7
PROMPTS = [[1, 2, 3], [4], [5, 6]]


def base_model():
    """Eight words, so that every response of two tokens can be written down."""
    return tiny.model(vocab_size=VOCABULARY, eos_token_id=END)


def make_task(samples=400, temperature=1.0, pairs=(), **more):
    """A tilt of the base as target, and responses drawn from it."""
    base = base_model()
    target = with_logit_bias(base, torch.tensor([1.0, 0.0, 0.0, -1.0, 0.0, 0.5, 0.0, 0.8]))
    settings = {"n": samples, "max_new_tokens": 2, "temperature": temperature, "end_id": END, "rows": 400}
    responses = sample(target, PROMPTS, seed=5, **settings)
    groups = [Group(prompt, own) for prompt, own in zip(PROMPTS, responses, strict=True)]
    return Task(
        base=base,
        prompts=PROMPTS,
        pairs=list(pairs),
        end_id=END,
        seed=1,
        samples=samples,
        max_new_tokens=2,
        temperature=temperature,
        token_budget=4096,
        gamma=0.7,
        target=target,
        target_groups=groups,
        **more,
    )


def every_response():
    """All responses of at most two tokens."""
    rest = [token for token in range(VOCABULARY) if token != END]
    return [[END], *([a, b] for a, b in itertools.product(rest, range(VOCABULARY)))]


def exact_kl(p, q, temperature=1.0):
    """KL(p ‖ q) of a response in nats, a number a prompt, by enumeration."""
    found = []
    for prompt in PROMPTS:
        with torch.no_grad():
            a, b = (score(m, [Group(prompt, every_response())], temperature=temperature).logps for m in (p, q))
        assert float(a.exp().sum()) == pytest.approx(1, abs=1e-5)
        found.append(float((a.exp() * (a - b)).sum()))
    return torch.tensor(found)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_divergences_are_those_of_enumeration(temperature):
    """Forward, reverse and reference KL and entropy of 400 responses a prompt, within 5 % of all responses' value."""
    task = make_task(temperature=temperature)
    found = measure_samples(task.base, task, reference=None)
    for key, (p, q) in {"forward_kl": (task.target, task.base), "reverse_kl": (task.base, task.target)}.items():
        exact = exact_kl(p, q, temperature)
        torch.testing.assert_close(found.values[key].float(), exact, rtol=0.1, atol=0.02)
        assert float(found.values[key].mean()) == pytest.approx(float(exact.mean()), rel=0.05)
    assert float(found.values["kl_reference"].abs().max()) == 0
    of_target = measure_samples(task.target, task, reference=task.base)
    assert float(of_target.values["forward_kl"].abs().max()) == 0
    assert float(of_target.values["reverse_kl"].abs().max()) < 1e-5
    exact = exact_kl(task.target, task.base, temperature)
    torch.testing.assert_close(of_target.values["kl_reference"].float(), exact, rtol=0.1, atol=0.02)


def test_divergences_are_the_mean_log_ratio_of_the_same_responses():
    """The full-vocabulary sum and ln π(y)/π*(y) of the same samples have one mean (four standard errors)."""
    task = make_task()
    found = measure_samples(task.base, task, reference=None)
    for prompt, own, value in zip(PROMPTS, found.responses, found.values["reverse_kl"], strict=True):
        group = [Group(prompt, own)]
        with torch.no_grad():
            ratio = score(task.base, group).logps - score(task.target, group).logps
        assert abs(float(ratio.mean() - value)) < 4 * float(ratio.std()) / len(own) ** 0.5


def test_entropy_length_and_ends_are_those_of_the_responses():
    """Entropy against enumeration; a response without its end token counts as open."""
    task = make_task()
    found = measure_samples(task.base, task, reference=None)
    for index, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            logps = score(task.base, [Group(prompt, every_response())]).logps
        exact = -float((logps.exp() * logps).sum())
        assert float(found.values["entropy"][index]) == pytest.approx(exact, rel=0.05)
        own = found.responses[index]
        assert float(found.values["length"][index]) == sum(map(len, own)) / len(own)
        assert float(found.values["missing_end"][index]) == sum(r[-1] != END for r in own) / len(own)


def test_the_followed_forward_kl_is_that_of_the_first_prompts():
    """A number a prompt, as in the whole measurement."""
    task = make_task(samples=4)
    whole = measure_samples(task.base, task, reference=None).values["forward_kl"]
    first = forward_kl(task.base, task, 2)
    assert first.n == 2
    assert first.mean == pytest.approx(float(whole[:2].mean()), rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_win_rate_is_the_targets_own_preference(temperature):
    """σ(γ Δ ln π*), with the target's probabilities at temperature 1, response by response."""
    task = make_task(samples=3, temperature=temperature)
    ours, theirs = (measure_samples(m, task, reference=task.base) for m in (task.target, task.base))
    wins = win_probability(ours, theirs, task)
    for index, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            a, b = (score(task.target, [Group(prompt, own.responses[index])]).logps for own in (ours, theirs))
        assert float(wins[index]) == pytest.approx(float((0.7 * (a - b)).sigmoid().mean()), rel=1e-5)
    even = win_probability(theirs, theirs, task)
    torch.testing.assert_close(even, torch.full_like(even, 0.5))


def pair(probability=None, where="a"):
    """Any pair."""
    return EncodedPair([1], [2], [3], probability, where)


def test_pairs_are_measured_against_labels_or_the_targets_probabilities():
    """Labels: 0 or 1, or p_chosen; a known target: the chance that the preferred response is labelled so."""
    logps = torch.tensor([[-1.0, -3.0], [-3.0, -1.0], [-2.0, -2.0]])
    task = replace(make_task(samples=1), target=None, pairs=[pair(), pair(0.25), pair()])
    measured = Measured({}, [])
    measure_pairs(measured, logps, task.pairs, lambda x: 0.5 * x, task.target_logit)
    chance = torch.tensor([1.0, -1.0, 0.0]).double().sigmoid()
    torch.testing.assert_close(measured.values["accuracy"], torch.tensor([1.0, 0.75, 0.5]).double())
    truth = torch.tensor([1.0, 0.25, 1.0]).double()
    expected = -(truth * chance.log() + (1 - truth) * (1 - chance).log())
    torch.testing.assert_close(measured.values["nll"], expected)
    torch.testing.assert_close(measured.confidence, torch.maximum(chance, 1 - chance))
    known = replace(task, target_logit=torch.tensor([2.0, 2.0, -1.0]))
    measure_pairs(measured, logps, known.pairs, lambda x: 0.5 * x, known.target_logit)
    wanted = torch.tensor([2.0, -2.0]).double().sigmoid()
    torch.testing.assert_close(measured.values["accuracy"][:2], wanted)


def test_a_perfect_preference_is_calibrated():
    """A policy with the target's own logits has no calibration error."""
    logit = torch.linspace(-3, 3, 40)
    logps = torch.stack([logit, torch.zeros(40)], 1)
    task = replace(make_task(samples=1), pairs=[pair(where=str(i)) for i in range(40)], target_logit=logit)
    measured = Measured({"length": torch.rand(2).double()}, [[[1, 2, 3]], [[1, 2, 4]]])
    measure_pairs(measured, logps, task.pairs, lambda x: x, task.target_logit)
    assert summarise([measured])["ece"].mean < 1e-6
    assert all(abs(row.predicted - row.observed) < 1e-6 for row in calibration([measured]))


def run_of(task, shift, pairs):
    """One seed's numbers on two prompts and two pairs."""
    measured = Measured({"length": torch.tensor([1.0, 3.0]).double() + shift}, [[[1, 2, 3]], [[1, 2, 4]]])
    measure_pairs(measured, torch.tensor([[-1.0, -2.0 - shift], [-2.0, -1.0]]), pairs, lambda x: x)
    return measured


def test_seeds_on_the_same_pairs_are_no_more_pairs():
    """Prompts are averaged over seeds; pairs too where seeds share them, and are added up where each has its own."""
    task = replace(make_task(samples=1), target=None)
    same = [run_of(task, shift, [pair(where="a"), pair(where="b")]) for shift in (0.0, 1.0)]
    own = [run_of(task, shift, [pair(where=f"{shift}"), pair(where=f"{shift}b")]) for shift in (0.0, 1.0)]
    for runs, n in ((same, 2), (own, 4)):
        found = summarise(runs)
        assert found["length"].n == 2
        assert found["length"].mean == 2.5
        assert found["accuracy"].n == found["nll"].n == found["ece"].n == n
        assert found["nll"].mean == pytest.approx(float(torch.cat([run.values["nll"] for run in runs]).mean()))
        assert differences(runs, runs)["nll"].mean == 0
    assert summarise(same)["ece"].mean == pytest.approx(summarise(own)["ece"].mean)


def test_a_policy_and_its_reference_draw_with_their_own_random_numbers():
    """The same weights give other responses as the reference: a win rate compares independent ones."""
    task = make_task(samples=20)
    own, start = (measure_samples(task.base, task, reference=one).responses for one in (task.base, None))
    assert own != start
    assert start == measure_samples(task.base, task, reference=None).responses


def test_marks_are_against_the_baseline_and_one_half_adjusted_together():
    """Win rates against one half, the rest against the baseline where it has it; Holm over all policies at once."""
    generator = torch.Generator().manual_seed(0)

    def policy(**shift):
        values = {key: torch.randn(30, generator=generator).double() + by for key, by in shift.items()}
        return [Measured(values, [])]

    start = policy(entropy=2.0, length=0.0, repetition=0.0)
    runs = {
        "a": policy(entropy=2.2, win_rate=0.9, reward=5.0, repetition=9.0),
        "b": policy(entropy=3.0, length=0.3, win_rate=0.5),
    }
    p = {}
    for name, (one,) in runs.items():
        for key in ("win_rate", "entropy", "length"):
            if key in one.values:
                half = torch.full((30,), 0.5).double()
                against = half if key == "win_rate" else start[0].values[key]
                p[name, key] = paired_p_value(one.values[key], against, seed=3, resamples=4000)
    adjusted = dict(zip(p, holm(torch.tensor(list(p.values())).double()).tolist(), strict=True))
    found = significance(runs, start, seed=3)
    assert {(name, key) for name, row in found.items() for key in row} == set(p)
    for (name, key), value in p.items():
        mark = found[name][key]
        assert (mark["p"], mark["holm"]) == pytest.approx((value, adjusted[name, key]))
        assert mark["stars"] == significance_mark(adjusted[name, key])
    assert any(mark["stars"] for mark in found["b"].values())
    assert any(found[name][key]["holm"] > value for (name, key), value in p.items())
    assert significance({}, start, seed=3) == {}
