"""Files of a run's folder, for a process that may be killed at any moment, and for two that want the same folder.

A file or a folder is written under another name and then renamed, so it is there whole or not at all. Logs are appended
to: their last line may be torn, and what a run logged after the step that it goes on from is dropped.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from safetensors import SafetensorError

from distalign.errors import DAMAGED, InputError

logger = logging.getLogger("distalign.training.run_folder")

# Locks of this process: a comparison locks its folder, and each of its methods' trainers its own.
_HELD: dict[Path, TextIO] = {}


def _let_go() -> None:
    """In a forked child, which may outlive a killed process: the locks are its parent's alone."""
    for file in _HELD.values():
        file.close()
    _HELD.clear()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_let_go)


def writable(folder: Path) -> Path:
    """Make a folder and check that files can be written in it. Raises InputError saying what to do."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Of its own name: the processes of a run look at the same time.
        with tempfile.NamedTemporaryFile(prefix=".write", dir=folder):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{str(folder)[:200]}: cannot be written ({reason}); choose another: --set output_dir=FOLDER"
        ) from None
    return folder


@contextmanager
def locked(folder: Path, name: str = ".lock") -> Iterator[None]:
    """Keep other processes out of a folder. Raises InputError at once if one is in it.

    The lock is the system's, on the file `name` in it: it ends with the process, however that ends.
    """
    import fcntl  # not on Windows

    place = folder.resolve() / name
    if place in _HELD:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("a+", encoding="utf-8") as file:
        try:
            # Unlike a record lock it is not lost where the file is read and closed: the folder may be copied.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            file.seek(0)
            raise InputError(
                f"{folder}: {file.read().strip() or 'another process'} works in this folder; wait for its end, or give "
                "another folder (--set name=…)"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()}\n")
        file.flush()
        _HELD[place] = file
        try:
            yield
        finally:
            _HELD.pop(place, None)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there; of a symbolic link the link, never what it points to."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


def check_no_links(folder: Path, above: Path) -> None:
    """Raise InputError if `folder`, or a folder between it and `above`, is a symbolic link."""
    for place in (folder, *folder.parents):
        if place == above:
            return
        if place.is_symlink():
            raise InputError(
                f"{place}: is a link to {place.resolve()}, and nothing is deleted through a link; remove the link, or "
                "give the place itself as output_dir"
            )


def check_not_read(settings: object, replaced: Sequence[Path]) -> None:
    """Raise InputError if a file or folder that `settings` name lies in what a run removes or writes anew.

    Every text of them is looked at: it may name a file, a folder or code in a file. A folder is also what its links
    point to, and of an adapter its base.
    """
    # Of a link the link goes, not what it points to.
    places = [_up_to(place) for place in replaced]
    for text in _texts(settings):
        for path in [Path(os.path.expanduser(name)) for name in (text, text.rpartition(":")[0]) if name]:
            for part in _parts(path):
                whole = Path(os.path.abspath(part))
                ways = [Path(os.path.realpath(whole)), *map(_up_to, (whole, *whole.parents))]
                place = next((place for place in places if any(way.is_relative_to(place) for way in ways)), None)
                if place is not None:
                    raise InputError(
                        f"{text}: is read by this run, and {part} lies in {place}, which it removes or writes anew; "
                        "copy it to another place, or give the run another name with --set name=…"
                    )


def _up_to(path: Path) -> Path:
    """The path without links on its way; at its end there may be one."""
    return Path(os.path.realpath(path.parent)) / path.name


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(part)


def _parts(path: Path) -> Iterator[Path]:
    """What is there under this name, with the base of an adapter, and their files that are links."""
    try:
        base = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except DAMAGED:
        # There is none; one that is damaged is refused where it is read.
        base = None
    for place in (path, *([Path(os.path.expanduser(base))] if isinstance(base, str) else [])):
        if os.path.exists(place):
            yield place
        if os.path.isdir(place) and os.access(place, os.R_OK):
            yield from (file for file in place.iterdir() if file.is_symlink())


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_text(path: Path, text: str) -> None:
    """Write a file: afterwards it is the new one, and if the process is killed on the way the old one."""
    scratch = path.with_name(f".{path.name}.new")
    with scratch.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


@contextmanager
def whole_folder(folder: Path, scratch: Path | None = None, *, ours: str | None = None) -> Iterator[Path]:
    """A folder to write into, which takes the name `folder` at the end; after an error before that nothing has changed.

    With `ours`, a pattern of names, a folder that is there stays, and files take their names one by one: the new ones,
    those that say what it is last, and then old ones of such names go. Raises InputError where the disk does not take
    it.
    """
    scratch = scratch or folder.with_name(f".{folder.name}.new")
    try:
        remove(scratch)
        scratch.mkdir(parents=True)
        yield scratch
        for path in scratch.rglob("*"):
            sync(path)
        sync(scratch)
        if ours is None or folder.is_symlink() or not folder.is_dir():
            remove(folder)
            os.replace(scratch, folder)
        else:
            _put_into(folder, scratch, ours)
        sync(folder.parent)
    except BaseException as error:
        remove(scratch)
        if reason := disk_error(error):
            raise InputError(f"{folder}: cannot be written ({reason}); make space") from error
        raise


def _put_into(folder: Path, scratch: Path, ours: str) -> None:
    """Move what is in `scratch` into `folder`, then remove what else is `ours` there."""
    new = sorted(scratch.iterdir(), key=lambda path: path.name.endswith("config.json"))
    names = {path.name for path in new}
    for path in new:
        if (folder / path.name).is_dir():
            remove(folder / path.name)
        os.replace(path, folder / path.name)
    for old in list(folder.iterdir()):
        if old.name not in names and re.fullmatch(ours, old.name):
            remove(old)
    sync(folder)
    remove(scratch)


def disk_error(error: BaseException) -> str | None:
    """Why the disk did not take what was written, if that is what the error says; else None."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
        return error.strerror
    if isinstance(error, SafetensorError):
        return str(error)
    # What torch.save raises says no more than this.
    written = re.search(r"PytorchStreamWriter|inline_container|basic_ios::clear|iostream error", str(error))
    return "the disk took a part only" if written else None


def cut_log(path: Path, last: int) -> None:
    """Drop the lines of a log of a run that goes on which came after the step `last`, and the one that ends a run.

    A torn last line, of a process that was killed while it wrote, goes with a message.
    """
    if not path.is_file():
        return
    # Not splitlines: a text may hold other ends of lines (U+2028).
    lines = path.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n")
    kept = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if row["step"] <= last and "train_runtime" not in row:
                kept.append(f"{line}\n")
        except DAMAGED:
            if number < len(lines):
                raise InputError(f"{path}:{number}: not a line of this log; remove it to go on") from None
            logger.warning("%s: the last line is torn and is dropped", path)
    write_text(path, "".join(kept))
