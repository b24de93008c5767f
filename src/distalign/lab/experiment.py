"""What the lab's experiments have in common: settings, a run, what is shown of it, and a result that is plain data."""

from __future__ import annotations

import dataclasses
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, ValidationError
from torch import Tensor

from distalign.errors import InputError
from distalign.progress import Advance
from distalign.report.shown import Curve, Shown
from distalign.settings import Count, Section, explain, unknown_setting

Row = dict[str, Any]  # one measurement, or all of them: plain data by name, ready for JSON

Scale = Annotated[float, Field(ge=1e-6, allow_inf_nan=False)]  # of logits, or a sharpness
Pairs = Annotated[int, Field(ge=1, le=10**12)]  # a number of labelled pairs


class Experiment(Section, ABC):
    """An experiment of the lab: its fields are its settings, which `--set` changes and a recipe (.yaml) holds.

    Settings with the same name mean the same thing everywhere: `seeds` is the number of independent repetitions (worlds
    and draws of the data), `seed` what all randomness follows from, `max_n` the largest number of labelled pairs,
    `gamma` the sharpness of the preferences.
    """

    name: ClassVar[str]

    seed: Annotated[int, Field(ge=0)] = 0

    @abstractmethod
    def run(self, advance: Advance) -> Row:
        """Measure: the numbers by name."""

    @abstractmethod
    def show(self, numbers: Row) -> Shown:
        """The claims, figures and tables of what `run` measured."""


class TableExperiment(Experiment):
    """An experiment on tables, whose responses are single tokens: `seeds` worlds of `contexts` prompts each.

    `ridge`: see `lab.fit`.
    """

    contexts: Count = 10
    gamma: Scale = 0.5
    seeds: Annotated[int, Field(ge=2)] = 40
    ridge: Annotated[float, Field(ge=1e-12, allow_inf_nan=False)] = 1e-3


def configure(experiment: type[Experiment], settings: Mapping[str, object], where: str) -> Experiment:
    """The experiment with some settings changed. Raises InputError that says where, what was found and what to do."""
    names = list(experiment.model_fields)
    lines = [unknown_setting(experiment.name, key, names) for key in settings if key not in names]
    lines += [f"{key} is {value}; give a number" for key, value in settings.items() if isinstance(value, bool)]
    if not lines:
        try:
            return experiment.model_validate(dict(settings))
        except ValidationError as error:
            lines = [line for problem in error.errors() for line in explain(problem, experiment)]
    raise InputError("\n".join(f"{where}: {line}" for line in lines))


def measure(experiment: Experiment, advance: Advance) -> Row:
    """Run an experiment: its numbers, what is shown of them, its settings and how long it took, ready for JSON."""
    start = time.monotonic()
    numbers = experiment.run(advance)
    shown = experiment.show(numbers)
    return {
        "experiment": experiment.name,
        "settings": experiment.model_dump(),
        **numbers,
        "shown": dataclasses.asdict(shown),
        "seconds": time.monotonic() - start,
    }


def powers(least: int, most: int, factor: int = 2) -> list[int]:
    """least, least · factor, … up to `most`."""
    numbers = [least]
    while numbers[-1] * factor <= most:
        numbers.append(numbers[-1] * factor)
    return numbers


def generator(*key: int | str) -> torch.Generator:
    """Random numbers of one purpose, named by numbers and words, which share nothing with those of another."""
    words = [part if isinstance(part, int) else int.from_bytes(part.encode(), "little") for part in key]
    return torch.Generator().manual_seed(int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1))


def spread(values: Float[Tensor, "seeds"] | Sequence[float]) -> dict[str, float]:
    """Median and quartiles over seeds."""
    values = torch.as_tensor(values, dtype=torch.float64)
    low, middle, high = torch.quantile(values, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return {"median": middle, "q25": low, "q75": high}


def mean_text(estimate: Mapping[str, float]) -> str:
    """A mean with its standard error, as tables show it."""
    return f"{estimate['mean']:.3g} ± {estimate['se']:.2g}"


def select(rows: Sequence[Row], **values: object) -> list[Row]:
    """The rows that have these values, in order."""
    return [row for row in rows if all(row[key] == value for key, value in values.items())]


def pick(rows: Sequence[Row], **values: object) -> Row:
    """The first row that has these values."""
    return select(rows, **values)[0]


def curve(label: str, rows: Sequence[Row], x: str, y: str, kind: Literal["line", "bound"] = "line") -> Curve:
    """A number of the rows against another. A `spread` is a median with a band between the quartiles, a mean with its
    error a band of one standard error either way.
    """
    values = [row[y] for row in rows]
    bands = [_band(value) for value in values if isinstance(value, dict)]
    middle, low, high = zip(*bands, strict=True) if bands else (values, (), ())
    return Curve(label, [row[x] for row in rows], middle, low, high, kind)


def level(label: str, x: Sequence[float | int], value: float) -> Curve:
    """A computed limit: a dashed line across the figure."""
    return Curve(label, [x[0], x[-1]], [value, value], kind="bound")


def _band(value: Mapping[str, float]) -> tuple[float, float, float]:
    if "se" in value:
        return value["mean"], value["mean"] - value["se"], value["mean"] + value["se"]
    return value["median"], value["q25"], value["q75"]
