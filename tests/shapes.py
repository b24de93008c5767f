"""Shape annotations of the package are checked while the tests run, in the first calls of every test.

A test that trains calls some functions 100,000 times: checking every call was a third of the time that the tests took.
An int is a float, as everywhere in Python.
"""

import ast
import re
import sys
from collections import Counter
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder, SourceFileLoader
from typing import Any

from beartype import BeartypeConf, beartype
from jaxtyping import jaxtyped

CALLS = 8
PACKAGE = "distalign"
SHAPED = re.compile(r"\b(?:Float|Int|Integer|Bool|Num|Shaped)\[")

_checker: Any = beartype(conf=BeartypeConf(is_pep484_tower=True))
_calls: Counter[object] = Counter()


def begin() -> None:
    """A test begins: check the first calls again."""
    _calls.clear()


def checked(function: Any) -> Any:
    """The function, or the dataclass, with its shapes checked."""
    whole: Any = jaxtyped(function, typechecker=_checker)
    if isinstance(function, type):
        return whole

    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        _calls[function] += 1
        return (whole if _calls[function] <= CALLS else function)(*args, **kwargs)

    return called


class _Decorate(ast.NodeTransformer):
    """Decorates functions that have shapes in their signatures, and dataclasses that have them in their fields."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        if _shaped(node.returns, *(argument.annotation for argument in arguments)):
            node.decorator_list.append(_decorator())
        return node  # not into it: a function within would be decorated each time it is made

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        fields = [part.annotation for part in node.body if isinstance(part, ast.AnnAssign)]
        if _shaped(*fields) and any("dataclass" in ast.unparse(part) for part in node.decorator_list):
            node.decorator_list.insert(0, _decorator())
        return self.generic_visit(node)


def _shaped(*annotations: ast.expr | None) -> bool:
    return any(SHAPED.search(ast.unparse(annotation)) for annotation in annotations if annotation is not None)


def _decorator() -> ast.expr:
    return ast.parse(f"__import__({__name__!r}).checked", mode="eval").body


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> Any:
        path = self.get_filename(fullname)
        tree = ast.fix_missing_locations(_Decorate().visit(ast.parse(self.get_data(path), path)))
        return compile(tree, path, "exec", dont_inherit=True)


class _Finder(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname.split(".")[0] != PACKAGE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def install() -> None:
    """Decorate what is imported of the package from here on."""
    sys.meta_path.insert(0, _Finder())
