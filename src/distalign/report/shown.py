"""What an experiment of the lab shows, read from its lab.json and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, model_validator

from distalign.report.results import Number, read_json

__all__ = ["Claim", "Curve", "Measured", "Panel", "Shown", "Table", "read_lab"]

Scale = Literal["linear", "log"]


class Curve(BaseModel):
    """A series of a figure; "line" joined, "bound" computed and dashed, "points" markers, "hollow" doubtful ones.

    `low` and `high` are the interval of y: a band around a line, bars at points; `x_low` and `x_high` that of x, for
    points. `notes` say more about each point.
    """

    label: str
    x: list[Number]
    y: list[Number]
    low: list[Number] = []
    high: list[Number] = []
    x_low: list[Number] = []
    x_high: list[Number] = []
    notes: list[str] = []
    kind: Literal["line", "bound", "points", "hollow"] = "line"

    @model_validator(mode="after")
    def _one_length(self) -> Curve:
        lengths = {"x": len(self.x), "y": len(self.y), "low": len(self.low), "high": len(self.high)}
        lengths |= {"x_low": len(self.x_low), "x_high": len(self.x_high), "notes": len(self.notes)}
        n = lengths["x"]
        if lengths["y"] != n or any(
            {lengths[one], lengths[other]} not in ({0}, {n})
            for one, other in (("low", "high"), ("x_low", "x_high"), ("notes", "notes"))
        ):
            raise ValueError(
                f"a curve needs as many x as y, and as many low and high (of x too) and notes or none; it has {lengths}"
            )
        return self


class Panel(BaseModel):
    """A figure: its title, a sentence about it, the names of its axes, their scales and limits, its curves.

    Labels stand right of the plot, or where `direct` beside the points that they name.
    """

    title: str
    about: str
    x: str
    y: str
    curves: list[Curve]
    x_scale: Scale = "log"
    y_scale: Scale = "log"
    x_limits: tuple[float, float] | None = None
    y_limits: tuple[float, float] | None = None
    direct: bool = False


class Table(BaseModel):
    """A table: texts and numbers, a row a list."""

    title: str
    about: str
    columns: list[str] = Field(min_length=1)
    rows: list[list[str | bool | int | float | None]]

    @model_validator(mode="after")
    def _one_width(self) -> Table:
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"row {number} has {len(row)} values for {len(self.columns)} columns")
        return self


class Claim(BaseModel):
    """What was promised, what was found, and whether that agrees."""

    promised: str
    found: str
    holds: bool | None


class Shown(BaseModel):
    """Everything that an experiment shows."""

    title: str
    about: str
    claims: list[Claim] = []
    panels: list[Panel] = []
    tables: list[Table] = []


class Measured(BaseModel):
    """lab.json: an experiment, its settings, what it shows and how long it took; its numbers are not read here."""

    experiment: str
    settings: dict[str, Any]
    shown: Shown
    seconds: float


def read_lab(path: Path) -> Measured:
    """Read a lab.json. Raises ReportError if it does not parse or lacks something."""
    return read_json(path, Measured, "run the experiment again")
