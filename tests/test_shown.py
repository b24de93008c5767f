"""Everything shown is run: the commands of the README and the docs, and every recipe, two steps on a tiny model."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import torch

from distalign import cli
from distalign.experiments.recipe import Recipe, load_recipe
from distalign.experiments.train import check
from distalign.lab import EXPERIMENTS
from distalign.models.targets import Target, make_pairs
from distalign.settings import RECIPES

ROOT = Path(__file__).parents[1]
NAMES = sorted(RECIPES.glob("*.yaml"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip()
    for page in PAGES
    for block in BLOCK.findall(page.read_text(encoding="utf-8"))
    for line in block.splitlines()
    if line.startswith("distalign ")
]
# What makes any run small: two steps of four pairs, responses of four tokens.
TRAINING = {"max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "eval_steps": 2}
SMALL = {
    "lora": "{r: 4, alpha: 8, layers: 1}",
    "evaluation.prompts": 4,
    "evaluation.samples": 1,
    "evaluation.max_new_tokens": 4,
    "rollout.max_completion_length": 4,
    "rollout.min_new_tokens": 0,
    "health.prompts": 2,
}
SMALL_TARGET = {
    "target.words": "[happy, kind]",
    "target.end_bonus": 0,
    "target.pairs": 8,
    "target.eval_pairs": 8,
    "target.max_new_tokens": 4,
}
# The hub is not asked, and the tiny model has 64 positions.
SMALL_DATA = {
    "data.max_length": "null",
    "data.eval": "null",
    "data.prompts": "null",
    "data.held_out": 0.2,
    "data.eval_limit": 4,
}


@pytest.fixture
def here(tmp_path, monkeypatch, tiny_folder):
    """A folder with the data and the model that the commands name."""
    tiny.write_pairs(tmp_path / "pairs.jsonl")
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    method = (ROOT / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
    (tmp_path / "my_method.py").write_text(re.findall(r"^```python\n(.*?)^```", method, re.MULTILINE | re.DOTALL)[0])
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch, arguments: list[str]) -> None:
    """Run a command as the shell would, in this process."""
    monkeypatch.setattr(sys, "argv", ["distalign", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code


def own(recipe: Recipe, section: str, values: dict[str, object]) -> dict[str, object]:
    """The same values where a method has its own: those come before the recipe's."""
    return {
        f"methods.{name}.{section}.{key}": values[key]
        for name, settings in recipe.methods.items()
        for key in settings.get(section, ())
        if key in values
    }


def small(path: str, tiny_folder: Path) -> list[str]:
    """Flags that make a recipe's run small, on the tiny model, with rewards that need no network."""
    recipe = load_recipe(path)
    settings = SMALL | {f"training.{key}": value for key, value in TRAINING.items()}
    settings |= own(recipe, "training", TRAINING) | own(
        recipe, "rollout", {"max_completion_length": 4, "min_new_tokens": 0}
    )
    settings |= SMALL_DATA if recipe.target is None else SMALL_TARGET
    if any(one.model or (one.train and one.train.backbone != "frozen") for one in recipe.reward):
        settings["reward"] = "{train: {init: scratch, backbone: frozen, epochs: 2}}"
    flags = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return ["--model", str(tiny_folder), *flags]


def test_there_are_commands_to_run():
    """The pages show commands; a change of their form must not empty the test below."""
    assert len(COMMANDS) >= 3


@pytest.mark.parametrize("command", COMMANDS)
def test_a_shown_command_runs(command, here, monkeypatch, tiny_folder):
    """Each command of the pages ends without an error (training ones with a tiny model, two steps)."""
    arguments = shlex.split(command)[1:]
    if arguments[0] in ("train", "compare", "reward"):
        given = dict(pairwise(arguments))
        recipe = "pairs" if arguments[1].startswith("--") else arguments[1]
        for option in ("--model", "--data", "--seeds"):
            if option in given:
                at = arguments.index(option)
                del arguments[at : at + 2]
        if load_recipe(recipe).target is None or "--data" in given:
            arguments += ["--data", "pairs.jsonl"]
        arguments += small(recipe, tiny_folder)
    elif arguments[0] == "report":
        arguments[1] = make_report(monkeypatch, tiny_folder)
    elif arguments[0] in ("evaluate", "frontier"):
        # Places of policies that earlier commands would have made.
        arguments = [f"{word.split('=')[0]}={tiny_folder}" if "=runs/" in word else word for word in arguments]
        fewer = ("limit=3", "max_new_tokens=4", "rows=8")
        arguments += ["--model", str(tiny_folder), *(part for one in fewer for part in ("--set", one))]
        arguments = without(arguments, "--samples", "--kl-budget")
    elif arguments[0] == "calibrate":
        arguments[1] = str(tiny_folder)
    elif arguments[0] == "lab":
        quick = {name: EXPERIMENTS[name] for name in ("gamma", "estimators")}
        monkeypatch.setattr("distalign.lab.EXPERIMENTS", quick if "all" in arguments else EXPERIMENTS)
        given = {"--seeds": "2", "--max-n": "2048"}
        arguments = without(arguments, *given) + [part for pair in given.items() for part in pair]
    run(monkeypatch, arguments)


def without(arguments: list[str], *options: str) -> list[str]:
    """The arguments without some options and their values."""
    dropped = {at + i for at, word in enumerate(arguments) if word in options for i in (0, 1)}
    return [word for at, word in enumerate(arguments) if at not in dropped]


def make_report(monkeypatch, tiny_folder: Path) -> str:
    """A run folder that a report can be drawn from."""
    flags = ["--methods", "pmle", "--data", "pairs.jsonl", *small("pairs", tiny_folder)]
    run(monkeypatch, ["compare", "pairs", *flags])
    return "runs/pairs"


@pytest.mark.parametrize("recipe", NAMES, ids=lambda path: path.stem)
def test_a_recipe_runs(recipe, here, monkeypatch, tiny_folder):
    """Each recipe compares all its methods and writes results and report."""
    path = recipe.stem
    settings = load_recipe(path)
    data = ["--data", "pairs.jsonl"] if settings.target is None else []
    run(monkeypatch, ["compare", path, "--full", *data, *small(path, tiny_folder)])
    results = json.loads((here / "runs" / recipe.stem / "results.json").read_text(encoding="utf-8"))
    assert set(settings.methods) < set(results["methods"])
    for name in settings.methods:
        log = here / "runs" / path / name / "metrics.jsonl"
        losses = [row["loss"] for row in map(json.loads, log.read_text().splitlines()) if "loss" in row]
        assert len(losses) == 2
        assert all(map(math.isfinite, losses))
    assert (here / "runs" / recipe.stem / "report.html").is_file()


@pytest.mark.parametrize("recipe", NAMES, ids=lambda path: path.stem)
def test_a_recipe_is_accepted_as_it_stands(recipe, here):
    """Each recipe passes every check that needs no model, and reads back equal as resolved."""
    settings = load_recipe(recipe)
    check(settings, list(settings.methods))
    settings.dump(here / "again.yaml")
    assert load_recipe(here / "again.yaml") == settings


def test_the_target_of_the_docs_can_label_pairs():
    """The page's own target class is a target: strength 0 is the base, 1 the tuned model, and it labels pairs."""
    (snippet,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/targets.md").read_text(), re.MULTILINE | re.DOTALL)
    names: dict = {"__name__": __name__}
    exec(snippet, names)
    base, tuned = tiny.model(), tiny.model(num_hidden_layers=2)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(1.1)
    target = names["FineTuned"](tuned)
    assert isinstance(target, Target)
    ids = torch.tensor([[2, 4, 9]])
    assert torch.equal(target.model(base, None, 0.0)(ids).logits, base(ids).logits)
    torch.testing.assert_close(target.model(base, None)(ids).logits, tuned(ids).logits)
    settings = {"gamma": 0.5, "strengths": [0.0, 1.0], "temperature": 1.0, "max_new_tokens": 4, "token_budget": 256}
    found = make_pairs(target, base, tiny.tokenizer(), [[2, 4, 9, 3], [2, 4, 7, 8, 3]], n=6, seed=0, **settings)
    assert len(found.pairs) == len(found.logit) == 6
