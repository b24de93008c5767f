"""What the lab's experiments have in common: settings that are a recipe, a run, and a result that is plain data."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, runtime_checkable

from distalign.errors import InputError
from distalign.lab.shown import Shown

Advance = Callable[..., None]  # (done, total, note): how much of the work is done


@runtime_checkable
class Experiment(Protocol):
    """The face of an experiment: a frozen dataclass whose fields are its settings; one of them is always `seed`.

    Settings with the same name mean the same thing everywhere: `seeds` is the number of independent repetitions (worlds
    and draws of the data), `max_n` the largest number of labelled pairs, `gamma` the sharpness of the preferences.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    name: ClassVar[str]

    def run(self, advance: Advance) -> tuple[dict[str, Any], Shown]:
        """Measure: the numbers by name (rows of plain data), and what is shown of them."""
        ...


def configure(experiment: type[Any], settings: dict[str, Any], where: str) -> Any:
    """The experiment with some settings changed. Raises InputError that says where, what was found and what to do."""
    fields = {field.name: field for field in dataclasses.fields(experiment)}
    values = {}
    for key, value in settings.items():
        if key not in fields:
            raise InputError(f'{where}: {experiment.name} has no setting "{key}"; it has {", ".join(fields)}')
        values[key] = _like(fields[key].default, value, f"{where}: {key}")
    try:
        return experiment(**values)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None


def _like(default: Any, value: Any, where: str) -> Any:
    """The value in the type of the default: a number, a text, a flag or a tuple of one of them."""
    if isinstance(default, tuple):
        if not isinstance(value, list | tuple) or not value:
            raise InputError(f"{where} is {value!r}; give a list, as [{', '.join(map(str, default))}]")
        return tuple(_like(default[0], one, where) for one in value)
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if isinstance(default, (bool, str)):
        fits = type(value) is type(default)
    else:
        fits = number and (isinstance(default, float) or value == int(value))
    if not fits:
        raise InputError(f"{where} is {value!r}; give a {type(default).__name__}, as {default!r}")
    return type(default)(value)


def at_least(experiment: object, **least: float | int) -> None:
    """Raise ValueError if a setting is below its least value; of a tuple every entry counts."""
    for name, bound in least.items():
        value = getattr(experiment, name)
        values = value if isinstance(value, tuple) else (value,)
        if any(one < bound for one in values):
            raise ValueError(f"{name} is {value}; give at least {bound:g}")


def at_most(experiment: object, **most: float | int) -> None:
    """Raise ValueError if a setting is above its largest value."""
    for name, bound in most.items():
        if getattr(experiment, name) > bound:
            raise ValueError(f"{name} is {getattr(experiment, name)}; give at most {bound:g}")


def powers(least: int, most: int, factor: int = 2) -> list[int]:
    """least, least · factor, … up to `most`, which ends the list."""
    numbers = [least]
    while numbers[-1] * factor <= most:
        numbers.append(numbers[-1] * factor)
    return numbers


def measure(experiment: Experiment, advance: Advance) -> dict[str, Any]:
    """Run an experiment: its numbers, what is shown of them, its settings and how long it took, ready for JSON."""
    start = time.monotonic()
    numbers, shown = experiment.run(advance)
    return {
        "experiment": experiment.name,
        "settings": dataclasses.asdict(experiment),  # pyright: ignore[reportArgumentType]
        **numbers,
        "shown": dataclasses.asdict(shown),
        "seconds": time.monotonic() - start,
    }
