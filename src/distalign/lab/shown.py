"""What an experiment shows: figures, tables and claims, as plain data. Nothing here draws; the report does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["Claim", "Curve", "Panel", "Shown", "Table", "with_errors", "with_quartiles"]


@dataclass(frozen=True)
class Curve:
    """A series of a figure: points in order, with an optional band around them.

    kind "line": points joined, with the band (quartiles over seeds, say). "bound": a computed limit, dashed, not
    measured. "points": markers alone.
    """

    label: str
    x: Sequence[float | int]
    y: Sequence[float | int]
    low: Sequence[float | int] = ()
    high: Sequence[float | int] = ()
    kind: Literal["line", "bound", "points"] = "line"


def with_quartiles(label: str, x: Sequence[float | int], spreads: Sequence[Mapping[str, float | int]]) -> Curve:
    """Medians with the band between the quartiles, from mappings with median, q25, q75."""
    middle, low, high = ([spread[key] for spread in spreads] for key in ("median", "q25", "q75"))
    return Curve(label, x, middle, low, high)


def with_errors(label: str, x: Sequence[float | int], estimates: Sequence[Mapping[str, float | int]]) -> Curve:
    """Means with a band of one standard error either way, from mappings with mean, se."""
    low, high = ([one["mean"] + sign * one["se"] for one in estimates] for sign in (-1, 1))
    return Curve(label, x, [one["mean"] for one in estimates], low, high)


@dataclass(frozen=True)
class Panel:
    """A figure: its title, one sentence that says what it shows and what not, its axes and its curves."""

    title: str
    about: str
    x: str
    y: str
    curves: Sequence[Curve]
    x_scale: Literal["linear", "log"] = "log"
    y_scale: Literal["linear", "log"] = "log"


@dataclass(frozen=True)
class Table:
    """A table: texts and numbers, a row a list; numbers are shown with three significant digits."""

    title: str
    about: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | int | None]]


@dataclass(frozen=True)
class Claim:
    """What the theory (or an earlier measurement) promises, what was found, and whether that agrees.

    None: not judged, as the settings are outside what the promise is about.
    """

    promised: str
    found: str
    holds: bool | None


@dataclass(frozen=True)
class Shown:
    """Everything that an experiment shows."""

    title: str
    about: str
    claims: Sequence[Claim] = ()
    panels: Sequence[Panel] = ()
    tables: Sequence[Table] = ()
