"""Packaged recipes, one to edit; a run without a recipe; a method of the user's own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from refusal import refused

from distalign.cli.shared import read_recipe
from distalign.experiments.recipe import load_recipe
from distalign.settings import RECIPES

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-method.md"


@pytest.fixture
def ipo(place):
    """The method of docs/adding-a-method.md in a file of the user's."""
    (snippet,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (place / "my_method.py").write_text(snippet, encoding="utf-8")
    return "my_method.py:IPO"


def test_recipes_lists_what_is_packaged(distalign):
    """Every file, each with a line about it, which every command's name for it leads to."""
    code, out, _ = distalign("recipes", "--json", "recipes.json")
    assert code == 0
    found = json.loads(Path("recipes.json").read_text())
    assert set(found["training"]) == {path.stem for path in RECIPES.glob("*.yaml")}
    assert set(found["evaluation"]) == {path.stem for path in RECIPES.glob("evaluate/*.yaml")}
    for name, about in [*found["training"].items(), *found["evaluation"].items()]:
        assert name in out
        assert about in out
        assert 40 < len(about) <= 100
        assert about.endswith(".")


def test_init_writes_one_to_edit(distalign, place):
    """A recipe that loads, with comments; never over a file that is there."""
    code, out, _ = distalign("init")
    assert code == 0
    assert "distalign compare pairs.yaml" in out
    assert "#" in Path("pairs.yaml").read_text()
    assert load_recipe("pairs.yaml") == load_recipe("pairs")
    refused(distalign("init"), "pairs.yaml: is there already")
    refused(distalign("init", "pears"), 'no recipe "pears" is packaged; give one of chat, pairs')
    assert distalign("init", "quickstart", "--evaluation")[0] == 0
    assert Path("quickstart-evaluation.yaml").is_file()


SMALL = ("--set", "training.max_steps=2", "--set", "data.held_out=0.2", "--set", "health.prompts=2")
LENGTHS = (
    "--set",
    "data.max_length=null",
    "--set",
    "rollout.max_completion_length=4",
    "--set",
    "lora={r: 4, layers: 1}",
)


def test_train_without_a_recipe(distalign, place):
    """A model, pairs and a method: the run is named by the data, and each method has a folder of its own."""
    words = ("train", "--model", place / "model", "--data", "pairs.jsonl", "--output-dir", "out", *SMALL, *LENGTHS)
    for method in ("pmle", "dpo"):
        code, out, err = distalign(*words, "--method", method)
        assert code == 0, err
        assert f"model: out/pairs/train/{method}/model" in out
        assert Path(f"out/pairs/train/{method}/report.html").is_file()
    settings = load_recipe("out/pairs/train/pmle/recipe.yaml")
    assert settings.training["eval_steps"] == 0.1
    refused(distalign("train", "--model", "m", "--method", "pmle"), "there is no recipe and no --data; name a recipe")
    refused(distalign(*words, "--method", "pmel"), 'no method "pmel"', 'did you mean "pmle"?')


def test_own_pairs_are_not_read_by_the_split_of_the_recipes():
    """--data takes the place of a data set of several splits; --set still chooses one."""
    flags = {"model": None, "data": "pairs.jsonl", "output_dir": None}
    assert load_recipe("chat").data.split == "train_prefs"
    assert read_recipe("chat", None, **flags).data.split == "train"
    assert read_recipe("chat", ["data.split=mine"], **flags).data.split == "mine"
    # Nor are others' pairs held out, or others' prompts answered.
    for name in ("chat", "tldr"):
        data = read_recipe(name, None, **flags).data
        assert (data.eval, data.eval_split, data.prompts) == (None, None, None)
    assert read_recipe("chat", ["data.eval=mine.jsonl"], **flags).data.eval == "mine.jsonl"


def test_a_method_of_ones_own(distalign, place, ipo):
    """--method file.py:Class, and the same as a key of a recipe; it is called by its class."""
    code, out, err = distalign("train", "own.yaml", "--method", ipo, *SMALL, "--set", "methods.ipo.tau=0.5")
    assert code == 0, err
    assert "runs/own/train/ipo/model" in out
    saved = load_recipe("runs/own/train/ipo/recipe.yaml")
    assert saved.methods["ipo"]["class"] == ipo
    assert saved.method("ipo").tau == 0.5
    recipe = yaml.safe_load(Path("own.yaml").read_text())
    for entry in ({ipo: {"tau": 0.2}}, {"strong": {"class": ipo, "tau": 0.2}}):
        made = load_recipe({**recipe, "methods": entry})
        (name,) = made.methods
        assert name == ("ipo" if ipo in entry else "strong")
        assert made.method(name) == type(saved.method("ipo"))(tau=0.2)
    (place / "sub").mkdir()
    Path("my_method.py").rename("sub/my_method.py")
    Path("sub/r.yaml").write_text(json.dumps({**recipe, "methods": {ipo: None}}))
    assert load_recipe("sub/r.yaml").methods["ipo"]["class"] == "sub/my_method.py:IPO"


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("nowhere.py:IPO", ["method nowhere.py:IPO: there is no file nowhere.py"]),
        ("my_method.py:IPA", ['has no Class "IPA"; did you mean "IPO"?']),
        ("my_method.py:Needs", ["it is no dataclass that derives from distalign.methods.Method"]),
        ("my_method.py:", ["write file.py:Class or module:Class"]),
        ("broken.py:IPO", ["importing broken.py raised NameError", "fix it"]),
        ("bare.py:Bare", ["it lacks implicit_reward, loss, needs", "docs/adding-a-method.md"]),
        ("my_method.py:Reward", ["cannot be called reward; give the class another name"]),
    ],
)
def test_a_method_that_cannot_be_used_is_refused(distalign, place, ipo, method, message):
    """Where, what was found, what to do; before anything is read."""
    with (place / "my_method.py").open("a") as file:
        file.write("\n\nclass Reward(IPO):\n    pass\n")
    (place / "broken.py").write_text("no_such_name\n")
    (place / "bare.py").write_text(
        "from dataclasses import dataclass\nfrom distalign.methods import Method\n\n\n@dataclass(frozen=True)\n"
        "class Bare(Method):\n    equation = source = optimum = ''\n"
    )
    refused(distalign("train", "own.yaml", "--method", method), *message)


def test_a_misspelled_setting_of_ones_own_method(distalign, ipo):
    """As for any other."""
    result = distalign("train", "own.yaml", "--method", ipo, "--set", "methods.ipo.taw=0.5")
    refused(result, 'ipo has no setting "taw"; did you mean "tau"?')


def test_version_and_completion():
    """--version says it; the shell's completion is offered."""
    for words, told in ((["--version"], "distalign 0."), (["--help"], "--install-completion")):
        done = subprocess.run([sys.executable, "-m", "distalign", *words], capture_output=True, text=True, check=True)
        assert told in done.stdout


@pytest.mark.parametrize(
    "words", [["--help"], ["env"], ["recipes"], ["init"], ["data", "check", "pairs.jsonl"]], ids=lambda words: words[0]
)
def test_quick_commands_load_no_torch(words, place):
    """They answer in under a second: torch alone takes longer to load."""
    code = "import sys\nfrom distalign import cli\n"
    code += f"sys.argv = ['distalign', *{words!r}]\ntry:\n    cli.main()\nexcept SystemExit as end:\n"
    code += "    assert not end.code\nassert not {'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=place, capture_output=True)
