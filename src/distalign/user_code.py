"""Code of the user's own, named `file.py:name` or `module:name`: a reward's or judge's function, a method's class."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
import zlib
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from distalign.errors import InputError

# Modules of files, by path, each with the time of the file's last change: a file is run again only if it has changed.
_LOADED: dict[Path, tuple[int, ModuleType]] = {}


def load_named(
    name: str, kind: str, is_kind: Callable[[object], bool], *, label: str, error: type[InputError]
) -> Callable[..., Any]:
    """What `file.py:name` or `module:name` names, imported.

    `kind` is what it should be ("function"), `is_kind` tells which of the module's names are meant by a misspelled one,
    and `label` begins every message. A module must be importable as it stands; a path is relative to the working
    directory. Raises `error`.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise error(f"{label}: write file.py:{kind} or module:{kind}")
    if place.endswith(".py") and not os.path.isfile(os.path.expanduser(place)):
        raise error(f"{label}: there is no file {place}; paths start at the working directory")
    try:
        module = _module(place)
    except (Exception, SystemExit) as reason:
        if isinstance(reason, SystemExit) and reason.code == 143:
            raise  # SIGTERM
        raise error(
            f"{label}: importing {place} raised {type(reason).__name__}: {reason}; fix it, or install what it needs"
        ) from reason
    value = getattr(module, attribute, None)
    if not callable(value):
        names = [key for key, other in vars(module).items() if is_kind(other)]
        near = (get_close_matches(attribute, names, 1) or names or ["none"])[0]
        raise error(f'{label}: {place} has no {kind} "{attribute}"; did you mean "{near}"?')
    return value


def source_file(name: str) -> str | None:
    """The file that `file.py:name` or `module:name` is in; a module is found, not run. None for one without a file."""
    place = name.rpartition(":")[0]
    if place.endswith(".py"):
        return place
    if place in sys.modules:
        return getattr(sys.modules[place], "__file__", None)
    spec = importlib.util.find_spec(place)
    return None if spec is None else spec.origin


def _module(place: str) -> ModuleType:
    """The module at a path or of a name."""
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = Path(os.path.expanduser(place)).resolve()
    changed = path.stat().st_mtime_ns
    if path in _LOADED and _LOADED[path][0] == changed:
        return _LOADED[path][1]
    # Two files of one name are two modules.
    key = f"distalign_user_{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    spec = importlib.util.spec_from_file_location(key, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module
    spec.loader.exec_module(module)
    _LOADED[path] = changed, module
    return module


def files_digests(code: Iterable[str | None], places: Iterable[str | None]) -> list[str]:
    """Hashes of the user's own files that decide a run: of code that is named so, and of models in folders."""
    # A known method under another name has no file.
    named = [*(source_file(name) for name in code if name and ":" in name), *places]
    files: list[Path] = []
    for path in (Path(os.path.expanduser(place)) for place in named if place):
        if os.path.isfile(path):
            files.append(path)
        elif os.path.isdir(path):
            files += sorted(file for file in path.rglob("*") if file.suffix in (".safetensors", ".json"))
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
