"""Settings: sections that refuse what they do not know, read from YAML and `--set` flags.

YAML as people expect it: 1e-5 is a number, yes and no are words, a key that stands twice is an error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from distalign.errors import InputError

Settings = TypeVar("Settings", bound=BaseModel)

# What a tensor's size, and a seed of numpy, can be.
Count = Annotated[int, Field(gt=0, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A part of a recipe: unknown settings are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def switch(value: object) -> object:
    """True and false for a section: its defaults, or none of it."""
    return {True: {}, False: None}[value] if isinstance(value, bool) else value


# How a model's weights are put into fewer bits as they are loaded: bitsandbytes NF4.
Quantization = Literal["4bit"] | None


def several(value: object) -> object:
    """One section for a list of one."""
    return [value] if isinstance(value, dict) else ([] if value is None else value)


class RecipeError(InputError):
    """A recipe that cannot be run: where, what was found, what to do; one line per problem."""


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

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Hashable, object]:
        keys = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in keys:
                raise yaml.MarkedYAMLError(None, None, f'"{key.value}" stands twice, keep one of them', key.start_mark)
            keys.add(key.value)
        return super().construct_mapping(node, deep)  # pyright: ignore[reportArgumentType]  # a tag may lie

    def compose_document(self) -> yaml.Node | None:
        """The document's node, refused where aliases make it too large for settings: one may double what it names."""
        node = super().compose_document()
        if node is not None:
            _size(node, {})
        return node


# Nodes that settings may have, an alias counted as all that it names.
_LARGEST = 100_000


def _size(node: yaml.Node, sizes: dict[yaml.Node, int]) -> int:
    """How many nodes a node is, written out. Raises MarkedYAMLError above `_LARGEST`, or if it contains itself."""
    if node in sizes:
        size, problem = sizes[node], "an alias of what it stands in"
    else:
        sizes[node], problem = 0, "aliases that make it too large"
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        size = 1 + sum(_size(one, sizes) for part in parts for one in (part if isinstance(part, tuple) else (part,)))
        sizes[node] = size
    if not 0 < size <= _LARGEST:
        raise yaml.MarkedYAMLError(None, None, f"{problem}, which no settings need", node.start_mark)
    return size


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
    if os.path.exists(path) and not os.path.isfile(path):
        raise RecipeError(f"{path}: is no file; give a recipe's file, or the name of a packaged recipe")
    try:
        value = load_yaml(path.read_text(encoding="utf-8-sig"))
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"{path}{line}: not YAML ({error.problem}); check the indentation and quotes") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML ({error}); save it as plain text") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(f"{str(path)[:200]}: cannot be read ({reason}); give a recipe's file, in UTF-8") from None
    if not isinstance(value, dict):
        raise RecipeError(f"{path}: {type(value).__name__}, not settings; write setting: value lines")
    return value


def load_yaml(text: str) -> object:
    """The value of a YAML text as recipes are read. Raises yaml.YAMLError, also where a tag does not fit."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise yaml.YAMLError("too many levels of nesting") from None
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise yaml.YAMLError(f"a value is not of its kind: {' '.join(str(error).split())[:80]}") from None


def parse_value(text: str, override: str) -> object:
    """The YAML value of an `override`, as `--set key=value` takes it. Raises RecipeError."""
    try:
        return load_yaml(text)
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise RecipeError(f"--set {masked_word(override)[:200]}: the value is not YAML ({reason}); quote it") from None


def dump_yaml(value: object) -> str:
    """YAML that `read_yaml` reads back as it was, but for secrets."""
    return yaml.dump(masked(value), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


# Settings whose values are secrets, and what tokens of the hub, of judges and of loggers look like wherever they stand.
_SECRET = re.compile(
    r"(?:^|_)(?:(?:hub|hf|access|auth|api|bearer|refresh|github|wandb|secret)_?(?:token|key)s?|secrets?|password|passwd"
    r"|credentials?)$|^(?:token|authorization)$",
    re.IGNORECASE,
)
_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}"
    r"|glpat-[\w-]{12,}|xox[a-z]-[\w-]{10,}|AKIA[0-9A-Z]{16}|AIza[\w-]{30,}|nvapi-[\w-]{16,}"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,})|(?<=://)[^/\s@]+(?=@)|(?<=Bearer )\S{8,}"
    r"|(?<=[?&]api_key=)[^&\s]+|(?<=[?&]token=)[^&\s]+"
)
HIDDEN = "<hidden>"


def masked(value: Any, name: str = "") -> Any:
    """A value as it may be written: no secret-named setting, nothing that looks like a token."""
    if value and not isinstance(value, bool) and _SECRET.search(name.replace("-", "_")):
        return HIDDEN
    if isinstance(value, Mapping):
        return {key: masked(part, str(key)) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [masked(part) for part in value]
    return _TOKEN.sub(HIDDEN, value) if isinstance(value, str) else value


# A setting within a value of YAML, as in {hub_token: …}.
_NESTED = re.compile(r"""([\w-]+)(["']?\s*:\s*)("[^"]*"|'[^']*'|[^\s,{}]+)""")


def masked_word(word: str) -> str:
    """A word of a command as it may be shown: the value in `training.hub_token=…` as that of the setting."""
    name, equals, value = masked(word).partition("=")
    if not equals:
        return name
    hidden = masked(value, name.rpartition(".")[2])
    if hidden != HIDDEN:
        hidden = _NESTED.sub(lambda part: part[1] + part[2] + masked(part[3], part[1]), masked_word(value))
    return f"{name}={hidden}"


RECIPES = Path(__file__).parent / "experiments" / "recipes"


def find_recipe(name: str | Path, kind: str = "") -> Path:
    """A recipe's file: the path that is given, or the packaged recipe of that name; `kind` is the folder of its kind.

    Raises RecipeError if there is neither.
    """
    path, folder = Path(name), RECIPES / kind
    if path.suffix or os.path.isfile(path) or "/" in str(name):
        return path
    packaged = list(packaged_recipes(kind))
    if path.name in packaged:
        return folder / f"{path.name}.yaml"
    near = get_close_matches(path.name, packaged, 1)
    hint = f'; did you mean "{near[0]}"?' if near else ""
    raise RecipeError(f'there is no recipe "{name}"; give a .yaml file or one of {", ".join(packaged)}{hint}')


def packaged_recipes(kind: str = "") -> dict[str, str]:
    """The packaged recipes of a kind, by name, each with what its first line says of it."""
    files = sorted((RECIPES / kind).glob("*.yaml"))
    return {file.stem: file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for file in files}


def read_settings(
    kind: type[Settings],
    source: Path | Mapping[str, Any],
    overrides: Sequence[str],
    *,
    files: Mapping[str, Sequence[str]],
    change: Callable[[dict[str, Any], str, Path], None],
) -> Settings:
    """Settings of some kind from a YAML file, or as a mapping, and overrides; a file's name is theirs by default.

    `files` are the keys that name files, by section ("": the top); they count from the working directory, or else from
    the file's folder. `change(raw, where, folder)` may alter what was read. Raises RecipeError, every line of which
    says where, what was found and what to do.
    """
    if isinstance(source, Path):
        raw, place, folder = read_yaml(source), str(source), source.parent
        raw.setdefault("name", source.stem)
    else:
        raw, place, folder = deepcopy(dict(source)), "recipe", Path()
    for override in overrides:
        _override(raw, override)
    where = " ".join([place, *(f"--set {masked_word(override)}" for override in overrides)])
    change(raw, where, folder)
    for section, keys in files.items():
        _find_files(raw.get(section) if section else raw, keys, folder)
    try:
        return kind.model_validate(raw)
    except UnicodeEncodeError as error:
        half = error.object[error.start : error.end].encode("ascii", "backslashreplace").decode()
        raise RecipeError(f"{where}: a text holds {half}, half a character; write it whole") from None
    except ValidationError as error:
        lines = [line for found in error.errors() for line in explain(found, kind)]
        raise RecipeError("\n".join(f"{where}: {line}" for line in dict.fromkeys(lines))) from None


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    *sections, last = key.strip().split(".")
    if not equals or not all([*sections, last]):
        raise RecipeError(f"--set {masked_word(override)}: no setting and value; write section.key=value")
    for depth, section in enumerate(sections, 1):
        if raw.get(section) in (None, True, False):
            raw[section] = {}
        raw = raw[section]
        if not isinstance(raw, dict):
            place = ".".join(sections[:depth])
            raise RecipeError(f"--set {masked_word(override)}: {place} is no section; set it as a whole")
    raw[last] = parse_value(value, override)


def _find_files(section: object, keys: Iterable[str], folder: Path) -> None:
    if not isinstance(section, dict):
        return
    for key in keys:
        value = section.get(key)
        if isinstance(value, str):
            section[key] = find_file(value, folder)


def find_file(name: str, folder: Path) -> str:
    """The name of a file, or of code in it (`file.py:name`), from its recipe's folder where only that has it."""
    stem, mark, code = name.partition(".py:")
    file = f"{stem}.py" if mark else name
    place = str(folder / file) if not os.path.exists(file) and os.path.exists(folder / file) else file
    return f"{place}:{code}" if mark else place


def unknown_setting(section: str, key: str, names: Sequence[str], elsewhere: str | None = None) -> str:
    """The message for a setting that a section does not have; `elsewhere` says where to set it instead."""
    near = get_close_matches(key, names, 1, 0.65)
    if elsewhere:
        hint = elsewhere
    elif near:
        hint = f'did you mean "{near[0]}"?'
    else:
        hint = f"it has {', '.join(names)}" if len(names) <= 24 else "see its documentation for the settings it has"
    return f'{section} has no setting "{key}"; {hint}'


def explain(error: Mapping[str, Any], kind: type[BaseModel]) -> list[str]:
    """One line a problem: what was found, what to do."""
    *sections, key = error["loc"] or ("",)
    section = ".".join(map(str, sections)) or "recipe"
    if error["type"] == "extra_forbidden":
        model = _section_at(sections, kind)
        names = [field.alias or name for name, field in model.model_fields.items()]
        return [unknown_setting(section, str(key), names)]
    if error["type"] == "missing":
        return [f'{section} has no "{key}"; add it']
    if error["type"] == "value_error":
        return str(error["ctx"]["error"]).splitlines()
    return [
        f"{'.'.join(map(str, error['loc']))} is {shown(masked(error['input'], str(key)))}; {lower_first(error['msg'])}"
    ]


def shown(value: object) -> str:
    """A value in a message, shortened, without secrets."""
    text = repr(masked(value))
    return text if len(text) <= 200 else f"{text[:199]}…"


def _section_at(sections: Iterable[Any], model: type[BaseModel]) -> type[BaseModel]:
    for section in sections:
        if isinstance(section, int):
            continue
        annotation = model.model_fields[section].annotation
        options = [annotation, *get_args(annotation), *(o for a in get_args(annotation) for o in get_args(a))]
        model = next(option for option in options if isinstance(option, type) and issubclass(option, BaseModel))
    return model


def lower_first(text: str) -> str:
    """The text with a small first letter: a library's message in the middle of ours."""
    return text[:1].lower() + text[1:]
