"""YAML as people expect it: 1e-5 is a number, yes and no are words, a key that stands twice is an error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from distalign.errors import InputError


class RecipeError(InputError):
    """A recipe that cannot be run: where, what was found, what to do; one line a problem."""


_BOOL = re.compile(r"^(?:true|false)$")
_INT = re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$")
_FLOAT = re.compile(
    r"""^(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?
        |[-+]?[0-9]+[eE][-+]?[0-9]+
        |[-+]?\.(?:inf|Inf|INF)
        |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers and booleans; no dates."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in keys:
                raise yaml.MarkedYAMLError(None, None, f'"{key.value}" stands twice, keep one of them', key.start_mark)
            keys.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would not read back as text."""


for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in ("null", "merge")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _class.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tf"))
    _class.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    """Line breaks that are not \\n are folded into spaces by every style but double quotes."""
    style = '"' if any(mark in value for mark in "\r\x85\u2028\u2029\ufeff") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises RecipeError with the line."""
    try:
        value = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except FileNotFoundError:
        near = ", ".join(sorted(file.name for file in path.parent.glob("*.yaml"))) if path.parent.is_dir() else ""
        raise RecipeError(
            f"{path}: no such file; {f'{path.parent} has {near}' if near else 'check the path'}"
        ) from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"{path}{line}: not YAML ({error.problem}); check the indentation and quotes") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML ({error}); save it as plain text") from None
    if not isinstance(value, dict):
        raise RecipeError(f"{path}: {type(value).__name__}, not settings; write setting: value lines")
    return value


def parse_value(text: str) -> Any:
    """One YAML value, as `--set key=value` takes it."""
    return yaml.load(text, _Loader)


def dump_yaml(value: Any) -> str:
    """YAML that `read_yaml` reads back as it was."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
