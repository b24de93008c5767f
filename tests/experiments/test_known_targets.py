"""Known targets of the user's own in a recipe: a class in a file, a fine-tuned model."""

from __future__ import annotations

import pytest
import tiny

from distalign import InputError, compare, evaluate, load_recipe
from distalign.evaluation.setup import load_evaluation
from distalign.experiments.results import run_key
from distalign.models.load import Source

CLASS = """
from distalign import Tilt


class WarmTarget(Tilt):
    def __init__(self, bonus=2.0):
        super().__init__(("happy", "kind"), bonus)
"""
SHAPE = {"gamma": 0.5, "pairs": 24, "eval_pairs": 12, "max_new_tokens": 5, "prompts": tiny.prompts(40)}


@pytest.fixture
def recipe(tmp_path, tiny_folder):
    """A recipe's file with a target, beside my_target.py."""
    (tmp_path / "my_target.py").write_text(CLASS)

    def write(**target):
        text = tiny.recipe_text(tmp_path, model=str(tiny_folder), target={**SHAPE, **target}, methods={"pmle": {}})
        (tmp_path / "mine.yaml").write_text(text)
        return load_recipe(tmp_path / "mine.yaml")

    return write


def test_a_class_beside_the_recipe_is_the_target(recipe, tmp_path):
    """Its pairs are drawn and the distance to it is measured; it is found from the recipe's folder, and read back."""
    mine = recipe(**{"class": "my_target.py:WarmTarget", "settings": {"bonus": 3.0}})
    mine.dump(tmp_path / "runs" / "again.yaml")
    assert load_recipe(tmp_path / "runs" / "again.yaml") == mine
    results = compare(mine)
    start = results.methods["reference"]["forward_kl"]["mean"]
    words = compare(recipe(words=["happy", "kind"], bonus=3.0), overwrite=True)
    assert start == pytest.approx(words.methods["reference"]["forward_kl"]["mean"])
    assert results.content["pairs"]["ties_dropped"] == 0


def test_a_comparison_knows_that_the_class_changed(recipe, tmp_path):
    """The file's content counts, as a method's does."""
    mine = recipe(**{"class": "my_target.py:WarmTarget"})
    before = run_key(mine, "pmle", 0, "weights", "data")
    assert before == run_key(mine, "pmle", 0, "weights", "data")
    with (tmp_path / "my_target.py").open("a") as file:
        file.write("# changed\n")
    assert before != run_key(mine, "pmle", 0, "weights", "data")


def test_a_fine_tuned_model_is_the_target(recipe, tmp_path):
    """Pairs come from it and from the base; an evaluation measures against it, too."""
    tuned = tiny.save(tmp_path / "tuned", initializer_range=0.25)
    mine = recipe(model=str(tuned))
    assert mine.target.strengths == (0.0, 1.0)
    results = compare(mine)
    assert results.methods["target"]["forward_kl"]["mean"] == 0
    assert results.methods["reference"]["forward_kl"]["mean"] > 0.1
    settings = {
        "name": "again",
        "output_dir": str(tmp_path / "runs"),
        "model": mine.model,
        "policies": {"tuned": str(tuned)},
        "target": {"model": str(tuned), "gamma": 0.5, "prompts": tiny.prompts(20)},
        "samples": 2,
        "max_new_tokens": 5,
    }
    measured = evaluate(load_evaluation(settings)).methods
    assert 0 < measured["tuned"]["win_rate"]["mean"] < 1


def test_a_target_that_cannot_be_made_is_refused_before_a_model_is_loaded(recipe, monkeypatch, tmp_path):
    """The class is made, and the model's tokens are compared, without weights."""
    monkeypatch.setattr(Source, "model", None)
    with pytest.raises(InputError, match=r"unexpected keyword argument 'speed'; change target.settings"):
        compare(recipe(**{"class": "my_target.py:WarmTarget", "settings": {"speed": 1}}))
    (tmp_path / "strings.jsonl").write_text('{"prompt": "hello"}\n{"prompt": "good"}\n')
    with pytest.raises(InputError, match="holds strings and the model is a chat model; write messages"):
        compare(recipe(**{"class": "my_target.py:WarmTarget", "prompts": "strings.jsonl"}))
    with pytest.raises(InputError, match="there is no such folder"):
        compare(recipe(model="./nowhere"))
    message = "target names 2 of words, class and model; give one of them"
    with pytest.raises(InputError, match=message):
        recipe(model="a", words=["happy"])


@pytest.mark.parametrize("target", [{"words": ["happy"], "bonus": 0.0}, {"model": "base"}, {"class": "same.py:Same"}])
def test_a_target_that_is_the_model_itself_is_refused(recipe, tmp_path, tiny_folder, target):
    """Its labels hold no information, of which nothing can be divided."""
    code = "class Same:\n    def model(self, base, tokenizer, strength=1.0):\n        return base\n"
    (tmp_path / "same.py").write_text(code)
    if "model" in target:
        target = {"model": str(tiny_folder)}
    with pytest.raises(InputError, match=r"target: the labels hold no information about it.* a bonus other than 0"):
        compare(recipe(**target))
