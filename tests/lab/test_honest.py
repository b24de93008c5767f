"""The lab shows what its labels say: each row from its own loss, nothing held out is read, no claim without ground."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from distalign import cli
from distalign.lab import classes, degeneracy, figure1, gamma
from distalign.lab.classes import Classes
from distalign.lab.exact import asymptotic_constant, divergence, information_weights
from distalign.lab.figure1 import Figure1
from distalign.lab.gamma import Gamma
from distalign.lab.rates import tune
from distalign.lab.tabular import fit_pd, fit_reward
from distalign.lab.world import draw, linear_tables, random_tables
from distalign.methods.preference import preference_logit, preference_nll


def nothing(*_, **__):
    """No progress is shown."""


@pytest.fixture(scope="module")
def tables():
    """Small worlds like the paper's."""
    return random_tables(worlds=6, contexts=4, responses=6, scale=1.0, gamma=0.5, seed=0)


@pytest.mark.parametrize(
    ("row", "function"),
    [("pmle", "fit_pmle"), ("pd", "fit_pd"), ("rkl", "fit_rkl"), ("dpo", "fit_dpo"), ("rebel", "fit_rebel")],
)
def test_every_row_of_figure_1_is_made_by_its_own_loss(row, function, tables, monkeypatch):
    """What stands in a row is what the method's own fit returned, and nobody else's."""
    real, made = getattr(figure1, function), []

    def keep(*arguments, **more):
        made.append(real(*arguments, **more))
        return made[-1]

    monkeypatch.setattr(figure1, function, keep)
    policies = Figure1(seeds=6)._estimates(tables, 4096)
    assert [name for name, logps in policies.items() if any(logps is one for one in made)] == [row]


def test_held_out_rows_of_figure_1_are_tuned_by_held_out_pairs(tables, monkeypatch):
    """The four tuned rows: by the oracle or by pairs, with the entropy term or without."""
    real, asked = figure1.tune, []

    def note(tables, rewards, betas, *, gamma, held_out=None, refit=None):
        asked.append((gamma, held_out is not None, refit is not None))
        return real(tables, rewards, betas, gamma=gamma, held_out=held_out, refit=refit)

    monkeypatch.setattr(figure1, "tune", note)
    Figure1(seeds=6)._estimates(tables, 4096)
    assert asked == [(0.5, False, False), (0.5, True, True), (0.0, False, False), (0.0, True, True)]


def test_held_out_tuning_reads_the_refitted_rewards_alone(tables):
    """Rewards that saw the held-out pairs do not choose β."""
    counts = draw(tables, 4096, seed=0)
    rest, held_out = counts.split(0.2, seed=0)
    refit = fit_reward(tables, rest, ridge=1e-3)
    betas = torch.logspace(-2, 2, 9, dtype=torch.float64)
    found = [
        tune(tables, rewards, betas, gamma=0.5, held_out=held_out, refit=refit).beta
        for rewards in (fit_reward(tables, counts, ridge=1e-3), torch.randn_like(refit))
    ]
    assert torch.equal(*found)


def test_held_out_pairs_differ_with_n():
    """The split of one draw says nothing about that of another."""
    tables = random_tables(worlds=2, contexts=2, responses=3, scale=1.0, gamma=0.5, seed=0)
    counts = draw(tables, 4096, seed=0)
    more = draw(tables, 4097, seed=0)
    shares = [one.split(0.5, seed=0)[1].total / one.total for one in (counts, more)]
    assert not torch.equal(*shares)


def test_hard_labels_are_the_rewards_and_not_the_truths(monkeypatch):
    """PD with hard labels draws them from σ(ΔR̂)."""
    real, teachers = classes.draw, []

    def keep(tables, n, seed, *, stream=0):
        teachers.append((tables, stream))
        return real(tables, n, seed, stream=stream)

    monkeypatch.setattr(classes, "draw", keep)
    experiment = Classes(seeds=2)
    tables, features = linear_tables(
        worlds=2, contexts=3, responses=6, features=4, relevant=2, scale=1.0, gamma=0.5, seed=0, skew=1.0
    )
    experiment._estimates(tables, features, features[..., :2], 4096)
    rewards = fit_reward(tables, real(tables, 4096, 0), features[..., :2], ridge=experiment.ridge)
    (_, first), *hard = teachers
    assert first == 0
    assert len(hard) == 2
    for teacher, stream in hard:
        assert stream != 0
        gap, wanted = teacher.pair_logps(teacher.target), tables.pair_logps(rewards)
        torch.testing.assert_close(0.5 * (gap[..., 0] - gap[..., 1]), wanted[..., 0] - wanted[..., 1])
    sources = [teacher.behavior for teacher, _ in hard]
    assert torch.equal(sources[0], tables.behavior)
    assert torch.equal(sources[1], tables.reference)
    assert not torch.equal(*sources)


def test_on_policy_pd_has_settled_and_has_its_own_constant():
    """One more round moves nothing that is shown; its constant is not that of the pairs from μ."""
    experiment = Classes(seeds=3)
    tables, features = linear_tables(
        worlds=3, contexts=10, responses=40, features=40, relevant=4, scale=1.0, gamma=0.5, seed=0, skew=1.0
    )
    rewards = fit_reward(tables, draw(tables, 2**14, 0), features, ridge=1e-3)
    settled = experiment._on_policy(tables, rewards, features[..., :4])
    again = fit_pd(tables, rewards, tables.pair_weights(settled), features[..., :4])
    first = fit_pd(tables, rewards, tables.pair_weights(tables.reference), features[..., :4])
    moved = divergence(settled, again)
    assert bool((moved < 1e-3 * divergence(tables.target, settled)).all())
    assert bool((divergence(settled, first) > 30 * moved).all())
    own, seen = (
        asymptotic_constant(
            tables.target,
            tables.behavior,
            features[..., :4],
            features,
            information_weights(source, tables.target, gamma=0.5),
            gamma=0.5,
        )
        for source in (tables.target, tables.behavior)
    )
    found = experiment._constants(tables, features[..., :4], features)
    torch.testing.assert_close(found["pd_policy"], own)
    torch.testing.assert_close(found["pd"], seen)
    assert bool((own > 1.05 * seen).all())


def test_gamma_is_judged_on_fresh_labels_and_its_error_is_right():
    """The NLL is of pairs that were not trained on; the predicted error is that of many worlds, without noise in R."""
    experiment = Gamma(seeds=8, max_n=2**13)
    tables = experiment._tables(0.5)
    row = experiment._misspecified(tables, 0.5)
    fresh, trained = draw(tables, 2**13, 0, stream=1), draw(tables, 2**13, 0)
    logps = gamma.fit_pmle(tables, trained, ridge=experiment.ridge)

    def nll(counts):
        loss = preference_nll(preference_logit(tables.pair_logps(logps), gamma=0.5), counts.frequency)
        return float(((counts.total * loss).sum((-2, -1)) / counts.total.sum((-2, -1))).mean())

    assert row["fresh_nll"] == pytest.approx(nll(fresh), abs=1e-9)
    assert abs(nll(fresh) - nll(trained)) > 1e-4
    many = Gamma(seeds=400)
    worlds = many._tables(0.5)
    found = many._identified(worlds, 0.5 * worlds.target, 1000)
    width = (found["gamma"]["q75"] - found["gamma"]["q25"]) / 1.349
    assert width == pytest.approx(found["predicted_se"], rel=0.2)
    assert found["gamma"]["median"] == pytest.approx(0.5, rel=0.02)


def test_sampled_labels_follow_the_target_and_share_nothing_with_its_logits():
    """Labels come up as often as P says, and their noise is independent of the numbers that made the world."""
    tables = random_tables(worlds=200, contexts=4, responses=8, scale=1.0, gamma=0.5, seed=0)
    labels = degeneracy._once(tables, 0).wins
    both = tables.pair_logps(tables.target)
    p = (0.5 * (both[..., 0] - both[..., 1])).sigmoid()
    for low, high in ((0.0, 0.4), (0.4, 0.6), (0.6, 1.0)):
        inside = (p > low) & (p <= high)
        assert float(labels[inside].mean()) == pytest.approx(float(p[inside].mean()), abs=0.03)
    noise = (labels - p).flatten()
    logits = tables.target.flatten()
    n = min(len(noise), len(logits))
    assert abs(float(torch.corrcoef(torch.stack([noise[:n], logits[:n]]))[0, 1])) < 4 / n**0.5


@pytest.mark.parametrize("most", [64, 4096])
def test_what_cannot_be_judged_is_not(most, monkeypatch, tmp_path, capsys):
    """Few pairs: numbers, a page, and claims that say so; JSON without NaN."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["distalign", "lab", "figure1", "--seeds", "3", "--max-n", str(most)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    found = json.loads(Path("runs/lab/figure1/lab.json").read_text(encoding="utf-8"))
    verdicts = {claim["holds"] for claim in found["shown"]["claims"] if "rate" in claim["promised"]}
    assert verdicts == {None}
    assert "not judged" in capsys.readouterr().out
    assert "not judged" in Path("runs/lab/figure1/report.html").read_text(encoding="utf-8")


def test_what_is_done_has_its_page_when_the_rest_is_stopped(monkeypatch, tmp_path, capsys):
    """Ctrl-C in the second experiment of all."""
    monkeypatch.chdir(tmp_path)

    def stop(*_, **__):
        raise KeyboardInterrupt

    quick = {"gamma": Gamma, "classes": Classes}
    monkeypatch.setattr("distalign.lab.EXPERIMENTS", quick)
    monkeypatch.setattr(Classes, "run", stop)
    monkeypatch.setattr(sys, "argv", ["distalign", "lab", "all", "--seeds", "2", "--max-n", "4096"])
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        cli.main()
    assert Path("runs/lab/gamma/lab.json").is_file()
    assert Path("runs/lab/report.html").is_file()
    assert "report: " in capsys.readouterr().out


def test_settings_at_which_nothing_can_be_solved_are_named(monkeypatch, tmp_path, capsys):
    """Exit code 2, the setting, and what to do."""
    monkeypatch.chdir(tmp_path)
    words = ["distalign", "lab", "figure1", "--seeds", "2", "--set", "gamma=1e-6"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "cannot be measured at {'gamma': 1e-06" in capsys.readouterr().err
