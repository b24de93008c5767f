"""What an experiment of the lab shows, as plain data: figures, tables and claims. The report reads what the lab makes.

The fields of these classes are the format of `shown` in lab.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, FiniteFloat

from distalign.report.results import Number, read_json

Scale = Literal["linear", "log"]


@dataclass(frozen=True)
class Curve:
    """A series of a figure: points in order, with the intervals of their values where these are known.

    kind "line": the points are joined. "bound": a computed limit, dashed, not measured. "points": markers alone.
    "hollow": markers of values that cannot be trusted. `low` and `high` are the interval of y (a band around a line,
    bars at points), `x_low` and `x_high` the interval of x at points.
    """

    label: str
    x: Sequence[Number]
    y: Sequence[Number]
    low: Sequence[Number] = ()
    high: Sequence[Number] = ()
    kind: Literal["line", "bound", "points", "hollow"] = "line"
    x_low: Sequence[Number] = ()
    x_high: Sequence[Number] = ()

    def __post_init__(self) -> None:
        """Raise ValueError if the lengths do not fit."""
        lengths = {name: len(getattr(self, name)) for name in ("x", "y", "low", "high", "x_low", "x_high")}
        n = lengths["x"]
        intervals = (lengths["low"], lengths["high"]), (lengths["x_low"], lengths["x_high"])
        if lengths["y"] != n or any(ends not in ((0, 0), (n, n)) for ends in intervals):
            raise ValueError(
                f"a curve needs as many x as y, and as many low and high (of x too) or none; it has {lengths}"
            )


@dataclass(frozen=True)
class Panel:
    """A figure: its title, one sentence that says what it shows and what not, its axes and its curves.

    Labels stand right of the plot, or where `direct` beside the points that they name.
    """

    title: str
    about: str
    x: str
    y: str
    curves: Sequence[Curve]
    x_scale: Scale = "log"
    y_scale: Scale = "log"
    x_limits: tuple[FiniteFloat, FiniteFloat] | None = None
    y_limits: tuple[FiniteFloat, FiniteFloat] | None = None
    direct: bool = False


@dataclass(frozen=True)
class Table:
    """A table of texts and numbers, one list per row; numbers are shown with three significant digits."""

    title: str
    about: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | bool | int | float | None]]


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


class Measured(BaseModel):
    """lab.json: an experiment, its settings, what it shows and how long it took. Its other numbers are not read."""

    experiment: str
    settings: dict[str, object]
    shown: Shown
    seconds: float


def read_lab(path: Path) -> Measured:
    """Read a lab.json. Raises ReportError if it does not parse or something in it is missing or wrong."""
    return read_json(path, Measured, "run the experiment again")
