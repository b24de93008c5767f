"""A study: a grid of comparisons that goes on where it was stopped, its figures and its exponents."""

from __future__ import annotations

import json

import pytest
import tiny

from distalign import InputError, load_recipe
from distalign.lab.study import KEYS, PAIRS, fit_slope, show, slopes, study
from distalign.report import write_report

TARGET = {
    "words": ["happy", "kind"],
    "gamma": 0.5,
    "pairs": 8,
    "eval_pairs": 8,
    "max_new_tokens": 4,
    "prompts": tiny.prompts(20),
}
GRID = {PAIRS: [8, 16], "reward.train.weight_decay": [1.0, 10.0]}


def test_a_grid_of_comparisons(tmp_path, tiny_folder):
    """A row per policy, size, reward and seed; what reads no reward is trained once; nothing is trained twice."""
    path = tmp_path / "grid.yaml"
    methods = {"pmle": {}, "mine": {"class": "pd", "pairs": "data", "beta": 0.0}}
    path.write_text(tiny.recipe_text(tmp_path, model=str(tiny_folder), target=TARGET, methods=methods))
    recipe = load_recipe(path, ["reward={train: {head: counts}}", f"study={json.dumps({'grid': GRID, 'seeds': [1]})}"])
    result = study(recipe)
    runs = [(row["method"], row["cell"][PAIRS], row["seed"]) for row in result["rows"]]
    assert runs.count(("mine", 16, 1)) == 2
    assert runs.count(("pmle", 16, 1)) == 1
    # Two runs have no error: with those of another seed there is a slope for each method and reward.
    assert not result["slopes"]
    both = [*result["rows"], *({**row, "seed": 0} for row in result["rows"])]
    assert set(slopes(both)) >= {"pmle", "mine (weight_decay 10.0)"}
    shown = json.loads((recipe.run_dir / "lab.json").read_text())["shown"]
    assert len(shown["panels"]) == 4
    plane = {curve["label"]: (curve["x"], curve["y"]) for curve in shown["panels"][3]["curves"]}
    assert plane["reference"][0] == [0.0]
    # E[ln π*] of the target's own responses is minus its entropy.
    entropies = [row["entropy"]["mean"] for row in result["rows"] if row["method"] == "target"]
    assert plane["target"][1] == pytest.approx([-sum(entropies) / len(entropies)])
    assert len(plane["mine (weight_decay 1.0)"][0]) == 2
    assert "Distance against the number of pairs" in write_report(recipe.run_dir).read_text()
    made = {file: file.stat().st_mtime_ns for file in recipe.run_dir.rglob("finished.json")}
    again = study(recipe)
    assert {file: file.stat().st_mtime_ns for file in recipe.run_dir.rglob("finished.json")} == made
    assert again["rows"] == result["rows"]


def test_the_exponent_of_a_power_law():
    """Exact: −1 with no width. With noise the interval holds it."""
    exact = fit_slope([(n, 30 / n) for n in (10, 100, 1000)])
    assert exact.mean == pytest.approx(-1)
    assert exact.high - exact.low < 1e-6
    noisy = fit_slope([(n, 30 / n * factor) for n in (10, 100, 1000) for factor in (0.8, 1.0, 1.25)])
    assert noisy.low < -1 < noisy.high


def test_differences_are_paired_by_seed():
    """Two methods on the same pairs, one of them with two rewards; the one without is trained for the first alone."""

    def row(method, head, seed, kl):
        curve = [[0, 2.0, 0.7], [4, kl - 0.5, 0.6], [6, kl - 0.1, 0.5], [8, kl, 0.6]] if method != "reference" else []
        cell = {PAIRS: 8, "reward.train.head": head}
        numbers = {key: {"mean": kl, "se": 0.1} for key in KEYS}
        return {"cell": cell, "method": method, "seed": seed, **numbers, "curve": curve}

    rows = [row("reference", head, seed, 2.0) for head in ("tilt", "hidden") for seed in (0, 1)]
    rows += [row("pmle", "tilt", seed, kl) for seed, kl in enumerate((1.0, 1.2))]
    rows += [row("rkl", head, seed, kl) for head in ("tilt", "hidden") for seed, kl in enumerate((0.4, 0.8))]
    _, differences, during, _ = show(rows).tables
    # The interval by hand: t of one degree of freedom is 12.706, the standard errors are 0.1, 0.2 and 0.1.
    assert differences.rows == [
        ["pmle", 8, "-0.90 [-2.17, +0.37]", "–"],
        ["rkl (head tilt)", 8, "-1.40 [-3.94, +1.14]", "-0.50 [-1.77, +0.77]"],
        ["rkl (head hidden)", 8, "-1.40 [-3.94, +1.14]", "-0.50 [-1.77, +0.77]"],
    ]
    assert during.rows[0][2:] == ["2.00 ± 0.00", "0.60 ± 0.10", 4, "1.00 ± 0.10", 6, "1.10 ± 0.10", 8]


def test_differences_are_of_one_reward_where_the_first_method_reads_it():
    """And curves need not be of one length."""

    def row(method, head, seed, kl, steps=3):
        numbers = {key: {"mean": kl, "se": 0.1} for key in KEYS}
        curve = [[step, kl, 0.5] for step in range(steps)]
        cell = {PAIRS: 8, "reward.train.head": head}
        return {"cell": cell, "method": method, "seed": seed, **numbers, "curve": curve}

    rows = [
        row(method, head, seed, start + more + 0.01 * seed, steps=3 - seed)
        for head, start in (("tilt", 1.0), ("hidden", 3.0))
        for seed in (0, 1)
        for method, more in (("reference", 0.0), ("rkl", 0.0), ("pd", 0.1))
    ]
    shown = show(rows)
    assert [line[3] for line in shown.tables[1].rows] == ["–", "+0.10 [+0.10, +0.10]", "–", "+0.10 [+0.10, +0.10]"]
    assert shown.panels[1].curves[0].x == [0, 1]


def test_a_grid_need_not_have_numbers_of_pairs(tmp_path, tiny_folder):
    """Nor numbers: values are lists, too."""
    path = tmp_path / "words.yaml"
    path.write_text(tiny.recipe_text(tmp_path, model=str(tiny_folder), target=TARGET, methods={"pmle": {}}))
    grid = {"target.words": [["happy"], ["happy", "kind"]]}
    recipe = load_recipe(path, [f"study={json.dumps({'grid': grid, 'seeds': [1]})}"])
    rows = study(recipe)["rows"]
    assert [row["cell"] for row in rows if row["method"] == "pmle"] == [
        {PAIRS: 8, "target.words": ["happy"]},
        {PAIRS: 8, "target.words": ["happy", "kind"]},
    ]
    assert (recipe.run_dir / "words-happy-kind" / "results.json").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, "has no study; add study"),
        (
            {"data": {"train": "x.jsonl"}, "study": {"grid": {"training.max_steps": [1]}}},
            "measures the distance to a known target; add target",
        ),
        ({"study": {"grid": {PAIRS: [8, 8]}}}, "two cells or two seeds are the same"),
        ({"study": {"grid": {PAIRS: [8, 8.0]}}}, "two cells or two seeds are the same"),
        ({"study": {"grid": {"seed": [1, 2]}}}, "two cells or two seeds are the same"),
        ({"study": {"grid": {PAIRS: [8, 16]}, "seeds": [0, 0]}}, "two cells or two seeds are the same"),
        ({"study": {"grid": {PAIRS: [8, 0]}}}, "target.pairs"),
    ],
)
def test_a_study_that_cannot_be_is_refused_before_it_trains(tmp_path, tiny_folder, more, message):
    """With what to do."""
    path = tmp_path / "tiny.yaml"
    target = None if "data" in more else TARGET
    path.write_text(tiny.recipe_text(tmp_path, model=str(tiny_folder), **{"target": target, **more}))
    with pytest.raises(InputError, match=message):
        study(load_recipe(path))
    assert not (tmp_path / "runs").exists()
