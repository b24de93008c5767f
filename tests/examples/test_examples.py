"""The examples run as their first lines say, on the tiny model; nothing in them is out of step with docs and TRL."""

from __future__ import annotations

import ast
import inspect
import json
import math
import re
import runpy
import sys
from pathlib import Path

import pytest
import test_shown
import tiny

from distalign import AlignmentConfig, load_recipe, train

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
WAS = re.compile(r"^(?P<indent> *)(?P<now>\S.*?)  # TRL: (?P<was>.*)$", re.MULTILINE)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with pairs; runs are two steps."""
    tiny.write_pairs(tmp_path / "pairs.jsonl")
    monkeypatch.chdir(tmp_path)
    test_shown.make_small(monkeypatch, tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "folder"),
    [("custom_method", "out-ipo"), ("custom_reward", "out-rkl"), ("from_trl", "out-dpo")],
)
def test_an_example_runs(name, folder, here, monkeypatch, tiny_folder):
    """`python examples/NAME.py MODEL pairs.jsonl` trains two steps and saves an adapter and its card."""
    path = EXAMPLES / f"{name}.py"
    assert f"python examples/{name}.py MODEL pairs.jsonl" in path.read_text(encoding="utf-8")
    monkeypatch.setattr(sys, "argv", [str(path), str(tiny_folder), "pairs.jsonl"])
    runpy.run_path(str(path), run_name="__main__")
    assert {"adapter_model.safetensors", "README.md"} <= {file.name for file in (here / folder).iterdir()}
    lines = [json.loads(line) for line in (here / folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))


def test_every_example_is_run():
    """A new example needs a line above, or a test of its own."""
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {"custom_method", "custom_reward", "from_trl", "from_scratch"}


def test_the_custom_reward_works_in_a_recipe(here, tiny_folder):
    """The other door: the line of its docstring in a recipe."""
    (here / "model").symlink_to(tiny_folder)
    reward = {"function": f"{EXAMPLES}/custom_reward.py:brief_and_on_topic"}
    settings = {"methods": {"rkl": {"gamma": 0.5}}, "reward": reward}
    (here / "tiny.yaml").write_text(tiny.recipe_text(here, **settings))
    recipe = load_recipe(here / "tiny.yaml", ["training.max_steps=2"])
    train(recipe, "rkl")
    lines = [json.loads(line) for line in (recipe.train_dir / "rkl" / "metrics.jsonl").read_text().splitlines()]
    assert any("objective/reward" in line for line in lines)


def test_the_custom_method_is_that_of_the_docs():
    """The class of examples/custom_method.py is the one that docs/adding-a-method.md shows, docstrings aside."""
    (block,) = test_shown.python_blocks(ROOT / "docs" / "adding-a-method.md")
    assert classes(block) == classes((EXAMPLES / "custom_method.py").read_text(encoding="utf-8"))


def classes(text: str) -> list[str]:
    """The classes of a module, without the docstrings of their functions."""
    found = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    for function in (node for each in found for node in each.body if isinstance(node, ast.FunctionDef)):
        if ast.get_docstring(function) is not None:
            del function.body[0]
    return [ast.dump(node) for node in found]


def test_the_trl_script_of_the_example_is_one():
    """With its marked lines put back it names TRL's classes, and only settings that these have."""
    trl = pytest.importorskip("trl")
    text = (EXAMPLES / "from_trl.py").read_text(encoding="utf-8")
    marked = list(WAS.finditer(text))
    assert len(marked) == 4
    old = WAS.sub(r"\g<indent>\g<was>", text).replace("        beta=0.1, in DPOConfig\n", "")
    calls = {
        node.func.id: {keyword.arg for keyword in node.keywords}
        for node in ast.walk(ast.parse(old))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert calls["DPOTrainer"] <= inspect.signature(trl.DPOTrainer).parameters.keys()
    fields = inspect.signature(trl.DPOConfig).parameters.keys()
    assert {*calls["DPOConfig"], "beta"} <= fields
    assert calls["DPOConfig"] <= inspect.signature(AlignmentConfig).parameters.keys()
