"""docs/equations.md names functions and tests: all exist, and every public function says what it takes."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

from distalign.methods import METHODS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "equations.md").read_text(encoding="utf-8")
ROWS = [line.strip("| ").split(" | ") for line in TEXT.splitlines() if line.startswith("| ") and "`" in line]
PURE = [
    "methods.preference",
    "methods.estimators",
    "methods.ppo",
    "stats.intervals",
    "stats.text",
    "stats.logistic",
    "stats.ratings",
    "stats.calibration",
    *(method.__module__.removeprefix("distalign.") for method in METHODS.values()),
]
# Modules whose every public function has a row.
LISTED = {*PURE} - {"stats.intervals", "stats.text", "stats.calibration"}
TESTS = {
    node.name
    for file in (ROOT / "tests").rglob("test_*.py")
    for node in ast.parse(file.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef)
}
UNITS = re.compile(
    r"nats|unit of|their unit|fraction|probability|probabilities|between|n-gram|over the values", re.IGNORECASE
)


def resolve(name):
    """The object that `module.attribute` below distalign names."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(f"distalign.{module}"), attribute)


def public_functions(module_name):
    """Functions that a module defines itself and shows to others."""
    module = importlib.import_module(f"distalign.{module_name}")
    for name, value in vars(module).items():
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_"):
            yield name, value


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_function_and_test_exist(row):
    """Every row names at least one function and one test, by their real names."""
    assert len(row) == 3, row
    functions, tests = (re.findall(r"`([^`]+)`", cell) for cell in row[1:])
    assert functions
    assert tests
    for name in functions:
        assert callable(resolve(name)), name
    assert set(tests) <= TESTS


def test_every_method_and_every_loss_has_a_row():
    """The table is complete: each registered method, its pure function, each public name of the mathematics."""
    named = {name for row in ROWS for name in re.findall(r"`([^`]+)`", row[1])}
    wanted = {f"{method.__module__.removeprefix('distalign.')}.{method.__name__}" for method in METHODS.values()}
    wanted |= {f"{module}.{name}" for module in LISTED for name, _ in public_functions(module)}
    helpers = {f"methods.estimators.{name}" for name in ("sequence_sum", "penalised_rewards", "masked")}
    assert wanted - named - helpers == set()


@pytest.mark.parametrize("module", PURE)
def test_public_functions_state_shapes_and_units(module):
    """A tensor argument carries its shape in the annotation and its unit in the docstring."""
    for name, function in public_functions(module):
        documentation = inspect.getdoc(function) or ""
        assert documentation, f"{module}.{name} has no docstring"
        annotations = [str(p.annotation) for p in inspect.signature(function).parameters.values()]
        tensors = [a for a in annotations if "Tensor" in a]
        assert all(re.search(r"(Float|Int|Bool)\[Tensor, ['\"]", a) for a in tensors), (name, tensors)
        if tensors:
            assert UNITS.search(documentation), f"{module}.{name} does not say in which unit"
        if module in LISTED and module.startswith("methods.") and module != "methods.estimators":
            assert "arXiv" in documentation, f"{module}.{name} cites no source"


@pytest.mark.parametrize("module", PURE)
def test_coefficients_are_keyword_only_and_have_no_default(module):
    """γ, β, η, clip, discount, λ: named at every call, defaulted once, in the method's dataclass."""
    for name, function in public_functions(module):
        for parameter in inspect.signature(function).parameters.values():
            if parameter.name in {"gamma", "beta", "eta", "clip", "discount", "gae_lambda"}:
                assert parameter.kind is inspect.Parameter.KEYWORD_ONLY, (name, parameter.name)
                assert parameter.default is inspect.Parameter.empty, (name, parameter.name)
