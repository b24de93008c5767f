"""Who may import whom, asserted on the source text of every file: the house keeps its floors apart."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "distalign"

MATHEMATICS = {"preference", "estimators", "metrics", "logistic", "ratings"}
MACHINERY = {"engine", "data", "recipe", "recipe_yaml", "recipe_sections", "methods"}
MODELS = {"policy", "reward"}
ACTING = {"rollout", "targets"}
DISPLAY = {"progress"}
BELOW_DOING = DISPLAY | MATHEMATICS | MACHINERY | MODELS | ACTING

# A module or package of distalign, and the others that it may import. "methods.base" admits that file alone.
MAY_IMPORT: dict[str, set[str]] = {
    # 0 mathematics; and a progress bar, which everything that takes long may show, the mathematics never
    "progress": set(),
    "errors": set(),
    "card": set(),
    "facts": set(),
    "preference": set(),
    "estimators": set(),
    "metrics": set(),
    "logistic": {"preference"},
    "ratings": {"logistic", "metrics"},
    # 1 methods and machinery
    "methods": MATHEMATICS,
    "engine": MATHEMATICS,
    "data": DISPLAY | MATHEMATICS,
    "recipe_yaml": set(),
    "recipe_sections": set(),
    "recipe": MATHEMATICS | {"methods", "data", "recipe_yaml", "recipe_sections"},
    # 2 models
    "policy": DISPLAY | MATHEMATICS | {"engine"},
    "reward": DISPLAY | MATHEMATICS | {"engine", "data", "policy"},
    # 3 acting
    "rollout": DISPLAY | MATHEMATICS | {"engine", "policy", "methods.base"},
    "targets": DISPLAY | MATHEMATICS | {"engine", "policy", "rollout", "data"},
    # 4 doing
    "health": DISPLAY | MATHEMATICS,
    "collected": BELOW_DOING,
    "rounds": BELOW_DOING,
    "room": BELOW_DOING | {"rounds"},
    "actor": BELOW_DOING | {"rounds", "collected", "health"},
    "trainer": BELOW_DOING | {"rounds", "room", "collected", "actor", "health"},
    "measure": BELOW_DOING | {"health"},
    "bench": BELOW_DOING | {"measure", "rounds"},
    "experiment": BELOW_DOING | {"facts", "trainer", "rounds", "measure", "bench", "card", "health"},
    "finished": BELOW_DOING | {"measure"},
    "comparison": BELOW_DOING | {"finished", "facts", "trainer", "measure", "bench", "card", "experiment", "health"},
    "judge": BELOW_DOING,
    "evaluate": BELOW_DOING
    | {"facts", "judge", "health", "measure", "bench", "card", "comparison", "calibrate", "frontier"},
    "calibrate": MATHEMATICS,
    "frontier": MATHEMATICS,
    "lab": DISPLAY | MATHEMATICS | {"methods"},
    # 5 telling
    "report": {"metrics"},
    # 6 the door, and the list of public names
    "cli": BELOW_DOING
    | {
        "bench",
        "trainer",
        "judge",
        "evaluate",
        "measure",
        "facts",
        "calibrate",
        "frontier",
        "lab",
        "report",
        "experiment",
        "comparison",
        "health",
    },
    "__init__": BELOW_DOING
    | {"rounds", "trainer", "judge", "evaluate", "frontier", "lab", "report", "experiment", "comparison"},
}

# Within a package: the file, and the siblings that it may import. Files that are not named are free.
SIBLINGS: dict[str, set[str]] = {
    "methods.base": set(),
    "methods.policy_gradient": {"methods.base"},
    "methods.rkl": {"methods.base", "methods.policy_gradient"},
    "methods.rlhf": {"methods.base", "methods.policy_gradient", "methods.rkl"},
    "lab.world": set(),
    "lab.exact": {"lab.world"},
}

# What may be imported from outside, apart from the standard library. Modules that are not named are free.
OUTSIDE: dict[str, set[str]] = {name: {"torch", "numpy", "jaxtyping"} for name in (*MATHEMATICS, "methods")}

# `distalign --help` answers before any of these could be loaded.
SLOW = {"torch", "transformers", "accelerate", "peft", "datasets", "matplotlib", "pydantic"}

FILES = sorted(PACKAGE.rglob("*.py"))


def dotted(path: Path) -> str:
    """Name of a file below distalign: methods/pmle.py is methods.pmle, methods/__init__.py is methods."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


KNOWN = {dotted(path) for path in FILES}


def imports(path: Path, *, nested: bool = True) -> tuple[set[str], set[str]]:
    """Files of distalign and outside packages that a file imports: in functions and under TYPE_CHECKING too."""
    inside, outside = set(), set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if nested else tree.body:
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = ["distalign", *path.relative_to(PACKAGE).parts[:-1]]
                base = ".".join([*here[: len(here) - node.level + 1], *([base] if base else [])])
            targets = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            top, _, rest = target.partition(".")
            if top != "distalign":
                outside.add(top)
                continue
            # The longest prefix that is a file: distalign.methods.pmle.PMLE is methods.pmle.
            parts = rest.split(".") if rest else []
            while parts and ".".join(parts) not in KNOWN:
                parts.pop()
            inside.add(".".join(parts) or "__init__")
    return inside, outside


def component(name: str) -> str:
    """The module or package that a file belongs to."""
    return name.split(".")[0]


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_imports_only_what_its_layer_allows(path):
    """Every file is in the table and keeps to it; a new module needs a row, and the row is the design decision."""
    name = dotted(path)
    own = component(name)
    assert own in MAY_IMPORT, f"{path.relative_to(ROOT)} is not in the import table; decide on its layer and add a row"
    inside, outside = imports(path)
    allowed = MAY_IMPORT[own]
    others = {i for i in inside if component(i) != own and i != "__init__"}
    allowed = allowed | {"errors"} if own not in MATHEMATICS else allowed
    wrong = sorted(i for i in others if component(i) not in allowed and i not in allowed)
    assert not wrong, f"{name} may import {sorted(allowed) or 'nothing'} of distalign, not {wrong}"
    if own in OUTSIDE:
        foreign = outside - OUTSIDE[own] - set(sys.stdlib_module_names)
        assert not foreign, f"{name} may import {sorted(OUTSIDE[own])}, not {sorted(foreign)}"


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_siblings_stay_apart(path):
    """A method imports no other method (RLHF is RKL at γ = 0, so it may import that one)."""
    name = dotted(path)
    default = {"methods.base"} if component(name) == "methods" and name != "methods" else None
    allowed = SIBLINGS.get(name, default)
    if allowed is None:
        return
    siblings = {i for i in imports(path)[0] if component(i) == component(name) and i != name}
    assert siblings <= allowed, f"{name} may import {sorted(allowed) or 'no sibling'}, not {sorted(siblings - allowed)}"


def test_the_door_loads_nothing_until_asked():
    """At module level the command line imports nothing slow and nothing of the library but itself."""
    for path in (p for p in FILES if component(dotted(p)) == "cli"):
        inside, outside = imports(path, nested=False)
        assert not outside & SLOW, f"{dotted(path)} imports {sorted(outside & SLOW)}; import it in the command"
        loaded = {i for i in inside if component(i) not in ("cli", "__init__")}
        assert not loaded, f"{dotted(path)} imports {sorted(loaded)}; import it in the command"


def test_nothing_asks_which_method_is_running():
    """No comparison of something called `method` with a method's name, anywhere."""
    names = {"pmle", "pd", "rkl", "dpo", "rebel", "rlhf"}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare) and "method" in ast.unparse(node.left).lower():
                constants = {
                    c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)
                }
                assert not constants & names, f"{dotted(path)}:{node.lineno}: {ast.unparse(node)}"


def test_no_file_is_longer_than_400_lines():
    """A file that does not fit in one sitting wants to be two."""
    folders = [ROOT / name for name in ("src", "tests", "scripts", "examples", "benchmarks")]
    lengths = {p: len(p.read_text(encoding="utf-8").splitlines()) for f in folders for p in f.rglob("*.py")}
    long = {str(p.relative_to(ROOT)): n for p, n in lengths.items() if n > 400}
    assert not long, f"split {long}"
