"""`distalign lab`: its recipes, its settings, what it refuses, and what it writes."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from distalign import cli
from distalign.errors import InputError
from distalign.lab import EXPERIMENTS, Experiment, configure
from distalign.settings import RECIPES, read_yaml

ROOT = Path(__file__).parents[2]


def run(monkeypatch, *words) -> int:
    """Run the command as the shell would, in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["distalign", "lab", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_is_a_recipe_too(name):
    """recipes/lab/<name>.yaml holds every setting, and the defaults."""
    settings = read_yaml(RECIPES / "lab" / f"{name}.yaml")
    assert settings.pop("experiment") == name
    experiment = EXPERIMENTS[name]
    assert isinstance(experiment(), Experiment)
    assert set(settings) == {field.name for field in dataclasses.fields(experiment)}
    assert configure(experiment, settings, "here") == experiment()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sedes": 3}, 'figure1 has no setting "sedes"; it has scales'),
        ({"seeds": 2.5}, "seeds is 2.5; give a int, as 40"),
        ({"seeds": True}, "seeds is True"),
        ({"gamma": "half"}, "gamma is 'half'; give a float"),
        ({"gamma": float("nan")}, "gamma is nan"),
        ({"scales": []}, "give a list"),
        ({"scales": 0.1}, "give a list"),
        ({"max_n": 3}, "max_n is 3; give at least 64"),
        ({"seeds": 1}, "seeds is 1; give at least 2"),
    ],
)
def test_settings_that_cannot_be_run_are_refused(settings, message):
    """Each with where, what was found and what to do."""
    with pytest.raises(InputError, match="my") as error:
        configure(EXPERIMENTS["figure1"], settings, "my.yaml")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("figure2",), 'there is no experiment "figure2"; choose figure1'),
        (("nowhere.yaml",), "nowhere.yaml: no such file"),
        (("figure1", "--set", "gamma"), "write key=value"),
        (("all", "--set", "gamma=1"), "goes with one experiment"),
        (("figure1", "--json", "nowhere/x.json"), "--json nowhere/x.json: cannot be written"),
        (("degeneracy", "--max-n", "64"), 'degeneracy has no setting "max_n"'),
    ],
)
def test_a_command_that_cannot_be_run_is_refused(words, message, monkeypatch, tmp_path, capsys):
    """Exit code 2 and one message, before anything is measured."""
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *words) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "runs").exists()


def test_figure1_writes_its_numbers_its_figures_and_a_page(monkeypatch, tmp_path, capsys):
    """The JSON that is promised: rows, slopes, constant, floors; scales as texts; every method; PNGs and the page."""
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "figure1", "--seeds", 4, "--max-n", 2**13, "--seed", 3, "--json", "f.json") == 0
    found = json.loads((tmp_path / "f.json").read_text(encoding="utf-8"))
    assert found["settings"]["seed"] == 3
    methods = {row["method"] for row in found["rows"]}
    assert {"reference", "pmle", "pd", "rkl", "rkl_tuned", "rlhf", "dpo", "rebel"} <= methods
    assert {row["n"] for row in found["rows"]} == {2**k for k in range(5, 14)}
    assert set(found["rows"][0]["forward_kl"]) == {"median", "q25", "q75"}
    assert set(found["slopes"][0]) == {"scale", "method", "from", "to", "slope", "low", "high"}
    assert set(found["constant"]) == {"0.1", "1.0"}
    assert {(row["scale"], row["method"]) for row in found["floors"]} >= {("0.1", "rlhf"), ("1.0", "dpo")}
    folder = tmp_path / "runs" / "lab" / "figure1"
    assert json.loads((folder / "lab.json").read_text(encoding="utf-8")) == found
    assert (folder / "report.html").stat().st_size > 10_000
    assert len(list(folder.glob("*.png"))) == 2
    assert "PMLE, PD and RKL are one estimator" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_numbers(monkeypatch, tmp_path):
    """A recipe with changes, run twice."""
    monkeypatch.chdir(tmp_path)
    words = (
        RECIPES / "lab" / "gamma.yaml",
        "--seeds",
        3,
        "--max-n",
        4096,
        "--set",
        "samples=[10]",
    )
    for name in ("a.json", "b.json"):
        assert run(monkeypatch, *words, "--json", name) == 0
    first, second = (json.loads((tmp_path / name).read_text(encoding="utf-8")) for name in ("a.json", "b.json"))
    assert first.pop("seconds") > 0
    assert second.pop("seconds") > 0
    assert first == second
    assert [row["samples"] for row in first["identified"]] == [10]
