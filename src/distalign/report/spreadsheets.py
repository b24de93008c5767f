"""The tables of a report as CSV files: numbers as they are, a line a number."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from distalign.report.results import Results

__all__ = ["write_last_values", "write_tables"]

_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")  # the wide ones are read as the others


def write_tables(results: Results, folder: Path) -> None:
    """Write a CSV file a table into the folder: estimates, differences, win_rates, ratings, length_controlled.

    Names are the rows' and columns' own; a number that is not known is nan. A table without lines is not written. A
    text that a spreadsheet would take for a formula has an apostrophe before it.
    """
    units = {column.key: column.unit or "" for column in results.columns}
    policy = ["policy", "metric", "unit"]
    tables: dict[str, tuple[list[str], Iterable[Sequence[object]]]] = {
        "estimates": (
            [*policy, "mean", "se", "n", "p_holm"],
            (
                (name, key, units[key], m.mean, m.se, _written(m.n), _holm(results, name, key))
                for name, row in results.methods.items()
                for key, m in row.items()
                if key in units
            ),
        ),
        "differences": (
            [*policy, "mean", "low", "high", "n"],
            (
                (name, key, units[key], d.mean, d.low, d.high, _written(d.n))
                for name, row in results.paired.items()
                for key, d in row.items()
                if key in units
            ),
        ),
        "win_rates": (
            ["policy", "against", "mean", "se", "n"],
            (
                (one, other, m.mean, m.se, _written(m.n))
                for one, row in results.win_rates.matrix.items()
                for other, m in row.items()
            ),
        ),
        "ratings": (
            ["policy", "mean", "low", "high"],
            ((name, r.mean, r.low, r.high) for name, r in results.ratings.items()),
        ),
        "length_controlled": (
            ["policy", "mean", "low", "high"],
            ((name, r.mean, r.low, r.high) for name, r in results.length_controlled.items()),
        ),
    }
    for name, (head, lines) in tables.items():
        _write(folder / f"{name}.csv", head, list(lines))


def write_last_values(last: Sequence[tuple[str, float, float]], folder: Path) -> None:
    """Write last.csv into the folder: the last value of everything that a training run logged, and its step."""
    _write(folder / "last.csv", ["metric", "value", "step"], last)


def _write(path: Path, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    if rows:
        path.parent.mkdir(exist_ok=True)
        with path.open("w", encoding="utf-8", newline="") as file:
            # Quoted, a text cannot end its cell where a spreadsheet takes another character for the separator.
            writer = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
            writer.writerows([[_inert(value) for value in row] for row in (head, *rows)])


def _inert(value: object) -> object:
    """A text that begins as a formula does, behind an apostrophe; anything else as it is."""
    return f"'{value}" if isinstance(value, str) and value.lstrip().startswith(_FORMULA) else value


def _written(n: int | None) -> object:
    return "" if n is None else n


def _holm(results: Results, name: str, key: str) -> object:
    found = results.significance.get(name, {}).get(key)
    return "" if found is None else found.holm
