"""What an experiment of the lab shows, read from its lab.json and checked."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from .results import read_json

__all__ = ["Claim", "Curve", "Measured", "Panel", "Shown", "Table", "read_lab"]

Scale = Literal["linear", "log"]
# null is a number that could not be computed.
Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]


class Curve(BaseModel):
    """A series of a figure; "line" joined, "bound" computed and dashed, "points" markers alone."""

    label: str
    x: list[Number]
    y: list[Number]
    low: list[Number] = []
    high: list[Number] = []
    kind: Literal["line", "bound", "points"] = "line"

    @model_validator(mode="after")
    def _one_length(self) -> Curve:
        lengths = {"x": len(self.x), "y": len(self.y), "low": len(self.low), "high": len(self.high)}
        if lengths["x"] != lengths["y"] or {lengths["low"], lengths["high"]} not in ({0}, {lengths["x"]}):
            raise ValueError(f"a curve needs as many x as y, and as many low and high or none; it has {lengths}")
        return self


class Panel(BaseModel):
    """A figure: its title, a sentence about it, the names of its axes and their scales, its curves."""

    title: str
    about: str
    x: str
    y: str
    curves: list[Curve]
    x_scale: Scale = "log"
    y_scale: Scale = "log"


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
    holds: bool


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
