"""The public names."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import distalign


def test_every_public_name_is_there_and_known_to_type_checkers():
    """What is loaded lazily is what type checkers are told, and each of it exists."""
    tree = ast.parse(Path(distalign.__file__).read_text(encoding="utf-8"))
    told = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("distalign.")
        for alias in node.names
    }
    assert told == set(distalign._HOME_OF)
    assert all(getattr(distalign, name) is not None for name in told)
    assert told <= set(dir(distalign))


def test_a_name_that_is_not_there():
    """As for any module."""
    with pytest.raises(AttributeError, match="no attribute 'PPO'"):
        distalign.PPO  # noqa: B018


def test_import_loads_no_torch():
    """`import distalign` is quick."""
    code = "import distalign, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
