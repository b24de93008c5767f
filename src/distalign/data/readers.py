"""Rows from files, `datasets` folders, the hub or memory, each with its place, so that an error can name it."""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distalign.errors import InputError

Record = Mapping[str, Any]
Source = str | Path | Iterable[Record]

SHOWN_PROBLEMS = 10
NUMBERS = ("p_chosen", "chosen_reward", "rejected_reward")
# A longer line is no row: a few kilobytes of gzip can hold gigabytes.
LONGEST_LINE = 1 << 28
_SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".parquet")


class Problem(NamedTuple):
    """One thing that is wrong: where (`file:line`), and what was found with what to do about it."""

    where: str
    what: str


class DataError(InputError):
    """Data that cannot be used. `problems` holds everything that is wrong, the message shows the first ten kinds."""

    def __init__(self, problems: Sequence[Problem]):
        super().__init__(problems)
        self.problems = tuple(problems)

    def __str__(self) -> str:
        places: dict[str, list[str]] = {}
        for where, what in self.problems:
            places.setdefault(what, []).append(where)
        lines = [
            f"{first}: {what}" + (f" (the same in {len(more)} more rows)" if more else "")
            for what, (first, *more) in places.items()
        ]
        if len(lines) == 1:
            return lines[0]
        shown = "\n  ".join(lines[:SHOWN_PROBLEMS])
        rest = len(lines) - SHOWN_PROBLEMS
        return f"{len(self.problems)} problems:\n  {shown}" + (f"\n  … and {rest} more" if rest > 0 else "")


def describe(source: Source, split: str | None = None) -> str:
    """The source's name in messages: its path, hub id, or "rows" for rows in memory."""
    name = str(source) if isinstance(source, str | Path) else "rows"
    return f"{name}[{split}]" if split else name


def read_records(source: Source, problems: list[Problem], *, split: str | None = None) -> Iterator[tuple[str, Record]]:
    """(place, row) of every row that can be read; what cannot be is appended to `problems`.

    A place is `name:number`, counted from 1: the line of a text file, the row of anything else. `split` chooses from a
    `datasets` folder or a hub id; a file is all "train". Raises DataError if the source as a whole cannot be read.
    """
    if not isinstance(source, str | Path):
        yield from _table(source, split, "rows")
        return
    path = Path(source)
    # Of os.path: a name that no system takes (too long, with a zero in it) is no file either.
    if os.path.isdir(path):
        yield from _table(_load_folder(path), split, str(source))
    elif os.path.isfile(path):
        _check_split(split, "train", str(source))
        yield from _read_file(path, problems)
    elif (
        isinstance(source, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", source) and path.suffix not in (*_SUFFIXES, ".gz")
    ):
        yield from _table(_load_hub(source), split, source)
    else:
        raise DataError([Problem(str(source), f"no such file; looked from {Path.cwd().name}/, check the path")])


def _check_split(split: str | None, only: str, name: str) -> None:
    """Refuse a split of what is not split; the name that `datasets` gives to all of it chooses nothing either."""
    if split not in (None, "train", only):
        raise DataError([Problem(name, f'no split "{split}": these rows are not split; leave split out')])


def _read_file(path: Path, problems: list[Problem]) -> Iterator[tuple[str, Record]]:
    suffix = (Path(path.stem).suffix if path.suffix.lower() == ".gz" else path.suffix).lower()
    if suffix == ".parquet":
        yield from _read_parquet(path)
    elif suffix == ".csv":
        yield from _read_csv(path, problems)
    elif suffix in _SUFFIXES:
        yield from _read_json(path, problems)
    else:
        known = ", ".join(_SUFFIXES)
        raise DataError(
            [Problem(str(path), f'cannot tell the format of "{suffix}" files; name it {known} or .jsonl.gz')]
        )


def _read_lines(path: Path, problems: list[Problem]) -> Iterator[tuple[int, str]]:
    """(number, text) of every line, gzip recognised by its content, a byte order mark removed."""
    try:
        with open(path, "rb") as file:
            head = file.read(2)
    except OSError as error:
        raise DataError([Problem(str(path), f"cannot be read ({error.strerror}); check its permissions")]) from None
    if head in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise DataError([Problem(str(path), "UTF-16 text; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)")])
    number = 0
    try:
        with gzip.open(path) if head == b"\x1f\x8b" else open(path, "rb") as file:
            for number, raw in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 1):
                if len(raw) == LONGEST_LINE:
                    what = f"a line of more than {LONGEST_LINE >> 20} MB; write one row per line"
                    problems.append(Problem(f"{path}:{number}", what))
                    return
                line = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
                try:
                    yield number, line.decode()
                except UnicodeDecodeError as error:
                    byte = f"byte 0x{line[error.start]:02x} at position {error.start + 1}"
                    problems.append(Problem(f"{path}:{number}", f"not UTF-8 ({byte}); save the file as UTF-8"))
                    yield number, line.decode(errors="replace")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        reason = f"the gzip stream is cut off or damaged here ({error}); copy or download the file again"
        problems.append(Problem(f"{path}:{number + 1}", reason))


def _read_json(path: Path, problems: list[Problem]) -> Iterator[tuple[str, Record]]:
    """One object per line, or one array of objects."""
    may_be_array = path.name.lower().removesuffix(".gz").endswith(".json")
    lines = _read_lines(path, problems)
    for number, text in lines:
        if not text.strip():
            continue
        if may_be_array and text.lstrip().startswith("["):
            text += "".join(more for _, more in lines)
        try:
            value = decode_json(text.rstrip())
        except json.JSONDecodeError as error:
            where = f"{path}:{number + error.lineno - 1}"
            problems.append(
                Problem(where, f"not JSON ({error.msg} at column {error.colno}); write one object per line")
            )
            continue
        except LookupError as error:
            problems.append(Problem(f"{path}:{number}", str(error)))
            continue
        except (ValueError, RecursionError) as error:
            what = f"not a row ({' '.join(str(error).split())[:100]}); write plain numbers, and few levels of nesting"
            problems.append(Problem(f"{path}:{number}", what))
            continue
        rows = enumerate(value, 1) if may_be_array and isinstance(value, list) else [(number, value)]
        for place, row in rows:
            if isinstance(row, dict):
                yield f"{path}:{place}", row
            else:
                what = f'{type(row).__name__}, not an object; write {{"prompt": …, "chosen": …, "rejected": …}}'
                problems.append(Problem(f"{path}:{place}", what))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises LookupError for a key that stands more than once."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise LookupError(_stands_twice("key", _repeated(name for name, _ in pairs)))
    return value


# Raises LookupError for a key that stands more than once; ValueError and RecursionError for what is no JSON.
decode_json = json.JSONDecoder(object_pairs_hook=_object).decode


def _repeated(names: Iterable[str]) -> list[str]:
    return [name for name, times in Counter(names).items() if times > 1]


def _stands_twice(what: str, names: Sequence[str]) -> str:
    listed = ", ".join(f'"{name[:100]}"' for name in names[:SHOWN_PROBLEMS])
    return f"the {what} {listed} stands more than once, and only the last would be read; keep one"


def _read_csv(path: Path, problems: list[Problem]) -> Iterator[tuple[str, Record]]:
    csv.field_size_limit(sys.maxsize)
    lines: list[str] = []  # of one row
    reader = csv.reader((lines.append(text) or text for _, text in _read_lines(path, problems)), strict=True)
    header: list[str] = []
    while True:
        where = f"{path}:{reader.line_num + 1}"
        lines.clear()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problems.append(Problem(where, f"not CSV ({error}); check the quotes, double those inside a field"))
            continue
        if not cells:
            continue
        if any(cell.lstrip().startswith('"') != cell.startswith('"') for cell in cells):
            meant = next(csv.reader(lines, skipinitialspace=True))
            if [cell.lstrip() for cell in meant] != [cell.lstrip() for cell in cells]:
                what = "a space between a comma and a quote, which makes the quote a part of the text; take it out"
                problems.append(Problem(where, what))
                continue
        if not header:
            header = [name.strip() for name in cells]
            # Spreadsheets write columns without a name, which nothing reads.
            if twice := _repeated(name for name in header if name):
                raise DataError([Problem(where, _stands_twice("column", twice))])
            continue
        if len(cells) != len(header):
            what = f"{len(cells)} fields where the header names {len(header)}"
            problems.append(Problem(where, f"{what}; quote the fields that hold commas or line breaks"))
            continue
        try:
            row = {name: _cell(name, cell) for name, cell in zip(header, cells, strict=True)}
        except LookupError as error:
            problems.append(Problem(where, str(error)))
            continue
        yield where, row


def _cell(name: str, cell: str) -> object:
    """A CSV cell: numbers in the columns that hold numbers, message lists where the text is one in JSON.

    Raises LookupError for such a list in which a key stands more than once.
    """
    if name in NUMBERS:
        try:
            # Python's underscores between digits are no number elsewhere.
            return cell if "_" in cell else float(cell) if cell.strip() else None
        except ValueError:
            return cell
    if cell.startswith("["):
        try:
            value = json.loads(cell)
        except (ValueError, RecursionError):
            return cell
        return decode_json(cell) if isinstance(value, list) and value and isinstance(value[0], dict) else cell
    return cell


def _read_parquet(path: Path) -> Iterator[tuple[str, Record]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            if twice := _repeated(file.schema_arrow.names):
                raise DataError([Problem(str(path), _stands_twice("column", twice))])
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", without_nulls(row)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        reason = (
            f"not a Parquet file, or a damaged one ({' '.join(str(error).split())[:200]}); copy or download it again"
        )
        raise DataError([Problem(f"{path}:{number + 1}" if number else str(path), reason)]) from None


def without_nulls(value: Any) -> Any:
    """A value of an Arrow table without the fields that are null: a column of structures fills in what a row lacks."""
    if isinstance(value, Mapping):
        return {name: without_nulls(part) for name, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def _load_folder(path: Path) -> Iterable[object]:
    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        files = sorted(file.name for file in path.iterdir() if file.suffix in (*_SUFFIXES, ".gz"))
        listed = ", ".join(files) or "none found"
        reason = f"a folder that datasets' save_to_disk did not write; name a file in it ({listed})"
        raise DataError([Problem(str(path), reason)])
    from datasets import load_from_disk

    return load_from_disk(str(path))


def _load_hub(name: str) -> Iterable[object]:
    from datasets import load_dataset

    try:
        return load_dataset(name)
    except (OSError, ValueError) as error:
        unset = os.environ.get("HF_HUB_OFFLINE", "0") == "0"
        offline = "" if unset else " (HF_HUB_OFFLINE is set: unset it to download)"
        reason = f"no such file or folder, and the hub gave no data set of this name: {error}; check the name{offline}"
        raise DataError([Problem(name, reason)]) from None


def _table(table: Iterable[object], split: str | None, name: str) -> Iterator[tuple[str, Record]]:
    """The rows of a `datasets` object or of any iterable of dicts; of a DatasetDict, one split."""
    if isinstance(table, Mapping):
        chosen = split or ("train" if "train" in table else next(iter(table)) if len(table) == 1 else None)
        if chosen not in table:
            what = f'no split "{chosen}"' if chosen else "several splits"
            raise DataError([Problem(name, f"{what}; choose one of {', '.join(map(str, table))}")])
        table, name = table[chosen], f"{name}[{chosen}]"
    else:
        _check_split(split, str(getattr(table, "split", None) or "train"), name)
    shown = getattr(table, "format", None)
    if isinstance(shown, Mapping) and shown.get("type") not in (None, "custom"):
        # As tensors or arrays: what is in the table is wanted.
        table = table.with_format(None, columns=shown["columns"])  # pyright: ignore[reportAttributeAccessIssue]
    of_arrow = hasattr(table, "features")
    for number, row in enumerate(table, 1):
        if not isinstance(row, Mapping):
            what = f"{type(row).__name__}, not a row; give a list of dicts, or a datasets.Dataset (Dataset.from_pandas)"
            raise DataError([Problem(f"{name}:{number}", what)])
        yield f"{name}:{number}", without_nulls(row) if of_arrow else row
