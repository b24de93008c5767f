"""The command line, run in this process in a folder with recipes, pairs and a tiny model."""

from __future__ import annotations

import logging
import sys

import pytest
import tiny

from distalign import cli


@pytest.fixture
def place(tmp_path, tiny_folder, monkeypatch):
    """The working directory: a recipe with a known target, a recipe for the user's pairs, and 40 pairs."""
    (tmp_path / "model").symlink_to(tiny_folder)
    tiny.write_pairs(tmp_path / "pairs.jsonl")
    (tmp_path / "tiny.yaml").write_text(tiny.recipe_text(tmp_path))
    own = tiny.recipe_text(tmp_path, name="own", target=None, data={"train": "pairs.jsonl", "held_out": 0.3})
    (tmp_path / "own.yaml").write_text(own)
    monkeypatch.chdir(tmp_path)
    ours = logging.getLogger("distalign")
    handlers, level = ours.handlers[:], ours.level
    yield tmp_path
    ours.handlers[:], ours.level = handlers, level


@pytest.fixture
def distalign(place, monkeypatch, capsys):
    """Run the command line in this process: (exit code, standard output, standard error)."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["distalign", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run
