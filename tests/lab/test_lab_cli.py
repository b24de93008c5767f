"""`distalign lab`: its settings, what it refuses, and what it writes."""

from __future__ import annotations

import errno
import json
import os
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from distalign import cli
from distalign.errors import InputError
from distalign.lab import EXPERIMENTS, configure


def run(monkeypatch, *words) -> int:
    """Run the command as the shell would, in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["distalign", "lab", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sedes": 3}, 'my.yaml: figure1 has no setting "sedes"; did you mean "seeds"?'),
        ({"seeds": 2.5}, "my.yaml: seeds is 2.5; input should be a valid integer"),
        ({"seeds": True}, "my.yaml: seeds is True; give a number"),
        ({"gamma": "half"}, "my.yaml: gamma is 'half'; input should be a valid number"),
        ({"gamma": float("nan")}, "my.yaml: gamma is nan; input should be"),
        ({"scales": []}, "my.yaml: scales is []; tuple should have at least 1 item"),
        ({"scales": 0.1}, "my.yaml: scales is 0.1; input should be a valid tuple"),
        ({"max_n": 3}, "my.yaml: max_n is 3; give at least 64"),
        ({"seeds": 1}, "my.yaml: seeds is 1; input should be greater than or equal to 2"),
    ],
)
def test_settings_that_cannot_be_run_are_refused(settings, message):
    """Each with where, what was found and what to do."""
    with pytest.raises(InputError) as error:
        configure(EXPERIMENTS["figure1"], settings, "my.yaml")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("figure2",), 'there is no experiment "figure2"; choose figure1'),
        (("nowhere.yaml",), "nowhere.yaml: cannot be read (No such file"),
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


def test_settings_at_which_nothing_can_be_solved_are_named(monkeypatch, tmp_path, capsys):
    """Exit code 2, the setting, and what to do."""
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "figure1", "--seeds", 2, "--set", "gamma=1e-6") == 2
    assert "cannot be measured at gamma 1e-06" in capsys.readouterr().err


def test_figure1_writes_its_numbers_its_figures_and_a_page(monkeypatch, tmp_path, capsys):
    """The JSON that is promised: rows, slopes, constant, floors; scales as texts; every method; PNGs and the page."""
    monkeypatch.chdir(tmp_path)
    words = ("figure1", "--seeds", 3, "--max-n", 2**13, "--seed", 3, "--set", f"min_n={2**11}", "--json", "f.json")
    assert run(monkeypatch, *words) == 0
    found = json.loads((tmp_path / "f.json").read_text(encoding="utf-8"))
    assert found["settings"]["seed"] == 3
    methods = {row["method"] for row in found["rows"]}
    assert {"reference", "pmle", "pd", "rkl", "rkl_tuned", "rlhf", "dpo", "rebel"} <= methods
    assert {row["n"] for row in found["rows"]} == {2**k for k in range(11, 14)}
    assert set(found["rows"][0]["forward_kl"]) == {"median", "q25", "q75"}
    assert set(found["slopes"][0]) == {"scale", "method", "from", "to", "slope", "low", "high"}
    assert set(found["constant"]) == {"0.1", "1.0"}
    assert {(row["scale"], row["method"]) for row in found["floors"]} >= {("0.1", "rlhf"), ("1.0", "dpo")}
    folder = tmp_path / "runs" / "lab" / "figure1"
    assert json.loads((folder / "lab.json").read_text(encoding="utf-8")) == found
    assert len(list(folder.glob("*.png"))) == 2
    page, out = (folder / "report.html").read_text(encoding="utf-8"), capsys.readouterr().out
    for shown in ("PMLE, PD and RKL are one estimator", "not judged"):
        assert shown in page
        assert shown in out


def test_a_recipe_with_changes_run_twice_gives_the_same_numbers(monkeypatch, tmp_path):
    """Settings of a file, of --set and of flags; the seed decides everything."""
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text("experiment: gamma\nscale: 0.5\ntrained: [0.25, 1]\n", encoding="utf-8")
    words = ("my.yaml", "--seeds", 3, "--max-n", 4096, "--set", "samples=[10]")
    for name in ("a.json", "b.json"):
        assert run(monkeypatch, *words, "--json", name) == 0
    first, second = (json.loads((tmp_path / name).read_text(encoding="utf-8")) for name in ("a.json", "b.json"))
    assert first.pop("seconds") > 0
    assert second.pop("seconds") > 0
    assert first == second
    assert [row["samples"] for row in first["identified"]] == [10]
    changed = {"scale": 0.5, "trained": [0.25, 1.0], "seeds": 3, "max_n": 4096, "samples": [10]}
    assert first["settings"] == json.loads(EXPERIMENTS["gamma"]().model_dump_json()) | changed


def test_what_is_done_has_its_page_when_the_rest_is_stopped(monkeypatch, tmp_path, capsys):
    """Ctrl-C in the second experiment of all."""
    monkeypatch.chdir(tmp_path)

    def stop(*_, **__):
        raise KeyboardInterrupt

    quick = {name: EXPERIMENTS[name] for name in ("gamma", "classes")}
    monkeypatch.setattr("distalign.lab.EXPERIMENTS", quick)
    monkeypatch.setattr(quick["classes"], "run", stop)
    with suppress(KeyboardInterrupt):
        run(monkeypatch, "all", "--seeds", 2, "--max-n", 4096)
    assert Path("runs/lab/gamma/lab.json").is_file()
    assert Path("runs/lab/report.html").is_file()
    assert "report: " in capsys.readouterr().out


def test_a_full_disk_is_what_is_said(monkeypatch, tmp_path, capsys):
    """And no part of the numbers is there."""
    monkeypatch.chdir(tmp_path)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device", "lab.json")

    monkeypatch.setattr(os, "fsync", full)
    assert run(monkeypatch, "gamma", "--seeds", 2, "--max-n", 4096) == 2
    message = capsys.readouterr().err
    assert "No space left on device" in message
    assert not list(tmp_path.rglob("lab.json"))
