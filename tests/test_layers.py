"""Who may import whom, asserted on the source text of every file."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "distalign"

# A package imports from those above it in this list, never from below.
ORDER = (
    "methods",
    "stats",
    "data",
    "engine",
    "rollout",
    "models",
    "rewards",
    "judges",
    "training",
    "evaluation",
    "experiments",
    "report",
    "lab",
    "cli",
)
# Loose modules that every package but `methods` may import.
LOOSE = {"errors", "progress", "settings", "user_code"}

# `distalign --help` answers before any of these could be loaded.
SLOW = {"torch", "transformers", "accelerate", "peft", "datasets", "matplotlib", "pydantic"}

FILES = sorted(PACKAGE.rglob("*.py"))


def dotted(path: Path) -> str:
    """Name of a file below distalign: methods/pmle.py is methods.pmle, methods/__init__.py is methods."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports(path: Path, *, nested: bool = True) -> tuple[set[str], set[str]]:
    """Packages or loose modules of distalign, and outside packages, that a file imports; `nested`: in functions too."""
    inside, outside = set(), set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if nested else tree.body:
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.relative_to(ROOT)}:{node.lineno}: write absolute imports"
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            top, _, rest = target.partition(".")
            if top == "distalign":
                inside.add(rest.split(".")[0])
            else:
                outside.add(top)
    return inside, outside


def package_of(path: Path) -> str:
    """The package, or loose module, that a file belongs to."""
    return dotted(path).split(".")[0]


@pytest.mark.parametrize("path", [file for file in FILES if package_of(file) in ORDER], ids=dotted)
def test_a_package_imports_only_from_those_above_it(path):
    """Also within functions and under TYPE_CHECKING."""
    own = package_of(path)
    allowed = {own, *ORDER[: ORDER.index(own)], *(() if own == "methods" else LOOSE)}
    inside, outside = imports(path)
    # The command line shows the version, which is the top's own.
    wrong = sorted(inside - allowed - {"__version__"})
    assert not wrong, f"{dotted(path)} imports {wrong}, which are not above {own}"
    if own == "methods":
        assert outside <= {"torch", "jaxtyping", *sys.stdlib_module_names}


def test_few_modules_lie_loose():
    """Everything is in a package but four modules, and what `python -m distalign` runs."""
    assert {package_of(file) for file in FILES} == {*ORDER, *LOOSE, "__init__", "__main__"}


def test_the_command_line_loads_nothing_until_asked():
    """At module level the command line imports nothing slow and nothing of the library but itself."""
    for path in (file for file in FILES if package_of(file) == "cli"):
        inside, outside = imports(path, nested=False)
        assert not outside & SLOW, f"{dotted(path)} imports {sorted(outside & SLOW)}; import it in the command"
        assert inside <= {"cli"}, f"{dotted(path)} imports {sorted(inside)}; import it in the command"


def test_nothing_asks_which_method_is_running():
    """No comparison of something called `method` with a method's name, anywhere."""
    from distalign.methods import METHODS

    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare) and "method" in ast.unparse(node.left).lower():
                constants = {
                    c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)
                }
                assert not constants & set(METHODS), f"{dotted(path)}:{node.lineno}: {ast.unparse(node)}"
