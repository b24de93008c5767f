"""The method of docs/adding-a-method.md is a whole method: it is checked, trained, and right."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import tiny
import torch
from enumeration import Enumeration
from test_trainer import metrics, trainer

from distalign.methods import METHODS, Pairs, Samples
from distalign.methods.base import Method, NotCollected

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-method.md"


@pytest.fixture(scope="module")
def ipo(tmp_path_factory):
    """The class that the page defines, in a file of its own."""
    (snippet,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    path = tmp_path_factory.mktemp("method") / "ipo.py"
    path.write_text(snippet, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("ipo_of_the_page", path)
    module = sys.modules["ipo_of_the_page"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.IPO


def test_it_is_trained_by_the_trainer(ipo, tmp_path):
    """On labelled pairs, with the reference it asks for; its loss falls."""
    made = trainer(tmp_path, ipo(tau=0.5), tiny.encoded_pairs(8), max_steps=4, learning_rate=1e-4)
    made.train()
    losses = [row["loss"] for row in metrics(tmp_path) if "loss" in row]
    assert losses[0] == pytest.approx(1.0, rel=1e-3), "at π = π₀ the gap is 0 and the loss (1/(2τ))²"
    assert losses[-1] < losses[0]


def test_it_keeps_the_contract(ipo):
    """Settings are checked, what is not collected raises, and the minimum is where the gap is 1/(2τ)."""
    assert issubclass(ipo, Method)
    with pytest.raises(ValueError, match="IPO: tau is -1"):
        ipo(tau=-1.0)
    world = Enumeration(3, 2)
    logps = world.logps(world.parameters(0)).detach()[:2][None]
    with pytest.raises(NotCollected, match="reference_logps"):
        ipo().loss(Pairs(logps), Samples())
    reference = logps - torch.tensor([[0.5, -0.5]])
    assert float(ipo(tau=0.5).loss(Pairs(logps, reference_logps=reference), Samples())) == pytest.approx(0.0, abs=1e-12)


def test_a_registered_method_is_a_setting_of_recipes(ipo, monkeypatch, tmp_path):
    """One line in the registry and recipes know it, misspelled settings included."""
    from distalign.experiments.recipe import load_recipe
    from distalign.settings import RecipeError

    monkeypatch.setitem(METHODS, "ipo", ipo)
    path = tmp_path / "r.yaml"
    path.write_text(tiny.recipe_text(tmp_path, methods={"ipo": {"tau": 0.2}}))
    assert load_recipe(path).method("ipo") == ipo(tau=0.2)
    path.write_text(tiny.recipe_text(tmp_path, methods={"ipo": {"taw": 0.2}}))
    with pytest.raises(RecipeError, match='did you mean "tau"'):
        load_recipe(path)
