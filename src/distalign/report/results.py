"""The files of a run folder, read and checked: results.json, metrics.jsonl, samples.jsonl."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from distalign.errors import InputError

__all__ = [
    "REFERENCE",
    "TARGET",
    "Bin",
    "Column",
    "Difference",
    "Frontier",
    "Measure",
    "Number",
    "ReportError",
    "Results",
    "Sample",
    "legible",
]

Model = TypeVar("Model", bound=BaseModel)

REMEDY = "run the comparison again"
TARGET, REFERENCE = "target", "reference"  # the two rows of a comparison that are not methods

# What HTML admits nowhere in a text: controls but white space, halves of surrogate pairs, noncharacters.
_NONCHARACTERS = "".join(chr(plane << 16 | last) for plane in range(17) for last in (0xFFFE, 0xFFFF))
_ILLEGAL = re.compile(f"[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef{_NONCHARACTERS}]")


class ReportError(InputError):
    """A file of the run folder is missing or broken; the message says where, what was found and what to do."""


class _Measure(BaseModel):
    mean: float
    se: float = math.nan
    n: int | None = None


def _measure(value: Any) -> Any:
    """A bare number is a mean without an error; null is a number that could not be computed."""
    if isinstance(value, BaseModel):
        return value
    if isinstance(value, dict):
        named = {"mean" if key == "value" else key: part for key, part in value.items()}
        return {key: math.nan if part is None and key != "n" else part for key, part in named.items()}
    return {"mean": math.nan if value is None else value}


class _Difference(BaseModel):
    mean: float
    low: float = math.nan
    high: float = math.nan
    n: int | None = None

    @property
    def clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


# null is a number that could not be computed.
# A mean with its standard error and count (metrics.Estimate), and a paired difference against the reference with its
# 95 % interval (metrics.Interval) and count.
Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
Measure = Annotated[_Measure, BeforeValidator(_measure)]
Difference = Annotated[_Difference, BeforeValidator(_measure)]


class Bin(BaseModel):
    """One point of a calibration plot: mean predicted probability, observed frequency, number of pairs."""

    predicted: float = Field(ge=0, le=1)
    observed: float = Field(ge=0, le=1)
    n: int = Field(ge=1)


class Column(BaseModel):
    """A metric: its key in `methods`, how it is written, its unit, which direction is better, one sentence about it."""

    key: str
    label: str
    unit: str | None = None
    better: Literal["lower", "higher"] | None = None
    about: str = ""


class WinRates(BaseModel):
    """P(a preferred to b) by `matrix[a][b]`, and by whose judgement."""

    judge: str = ""
    matrix: dict[str, dict[str, Measure]] = {}


class Significance(BaseModel):
    """p-values against the reference, as found and corrected for their number by Holm's method, and their stars."""

    p: Number = math.nan
    holm: Number = math.nan
    stars: str = ""


class Answer(BaseModel):
    """Length and reward of one response."""

    length: float
    reward: Number


class Predicted(BaseModel):
    """What an optimum will have, predicted from samples of the reference: reward and KL with their bands."""

    beta: float
    gamma: float
    reward: Difference
    kl: Difference
    ess: Number = math.nan
    trusted: bool = True


class BestOf(BaseModel):
    """The best of n responses of the reference: its reward, and at most how far its policy is."""

    n: int
    reward: Difference
    kl_bound: float


class Frontier(BaseModel):
    """Predicted optima and best-of-n."""

    points: list[Predicted] = []
    best_of: list[BestOf] = []


class Results(BaseModel):
    """results.json of a comparison or an evaluation; everything but the columns and the methods may be missing."""

    name: str = ""
    title: str = ""
    seeds: list[int] = []
    columns: list[Column] = Field(min_length=1)
    methods: dict[str, dict[str, Measure]] = Field(min_length=1)
    paired: dict[str, dict[str, Difference]] = {}
    between: dict[str, dict[str, dict[str, Difference]]] = {}
    by_seed: dict[str, list[dict[str, Measure]]] = {}
    curves: dict[str, list[dict[str, Measure]]] = {}
    kept_step: dict[str, list[int]] = {}
    calibration: dict[str, list[Bin]] = {}
    significance: dict[str, dict[str, Significance]] = {}
    win_rates: WinRates = WinRates()
    ratings: dict[str, Difference] = {}
    length_controlled: dict[str, Difference] = {}
    points: dict[str, list[Answer]] = {}
    frontier: Frontier = Frontier()
    pairs: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    environment: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    citation: str = ""

    @classmethod
    def parse(cls, content: Any, where: str = "results") -> Results:
        """Check the content of results.json; raises ReportError with the path of the first value that is wrong."""
        return _checked(cls, content, where, REMEDY)

    @property
    def trained(self) -> list[str]:
        """The methods, in their order: every row but the target and the reference."""
        return [name for name in self.methods if name not in (TARGET, REFERENCE)]

    @property
    def filled_columns(self) -> list[Column]:
        """The columns that at least one row has a number for."""
        return [column for column in self.columns if any(column.key in row for row in self.methods.values())]


class Sample(NamedTuple):
    """One prompt and what each policy answered: (name, text) pairs. `note` says when, for samples of a training run."""

    prompt: str
    responses: list[tuple[str, str]]
    note: str = ""


def legible(value: Any) -> Any:
    """The content of a JSON file, its texts with U+FFFD for every character that HTML does not admit."""
    if isinstance(value, str):
        return _ILLEGAL.sub("\ufffd", value)
    if isinstance(value, list):
        return [legible(part) for part in value]
    if isinstance(value, dict):
        return {legible(key): legible(part) for key, part in value.items()}
    return value


def read_results(path: Path) -> Results:
    """Read results.json. Raises ReportError if it does not parse or lacks something."""
    return read_json(path, Results, REMEDY)


def read_json(path: Path, model: type[Model], remedy: str) -> Model:
    """Read one JSON file and check it against a model. Raises ReportError with the remedy if either fails."""
    try:
        content = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ReportError(f"{path}:{error.lineno}: not JSON ({error.msg}); {remedy}") from None
    return _checked(model, content, str(path), remedy)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a file with one JSON object a line; empty lines are skipped. Raises ReportError naming the line."""
    rows = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ReportError(f"{path}:{number}: not JSON ({error.msg}); repair or remove the line") from None
        if not isinstance(row, dict):
            raise ReportError(f"{path}:{number}: found {_short(row)}, not a JSON object; repair or remove the line")
        rows.append({"_where": f"{path}:{number}", **legible(row)})
    return rows


def read_samples(path: Path) -> list[Sample]:
    """Read samples.jsonl: prompts with `responses` by name, or a list, or one `response`; [] without a file."""
    return [_sample(row) for row in read_rows(path)] if path.exists() else []


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read metrics.jsonl: the numbers of every line, by name. A line without `step` belongs to the step before it."""
    rows, step = [], 0
    for row in read_rows(path):
        numbers = {key: float(value) for key, value in row.items() if _is_number(value)}
        step = numbers.setdefault("step", step)
        rows.append(numbers)
    if not rows:
        raise ReportError(f"{path}: no lines; let the run log at least one step before it is reported")
    return rows


def series(rows: Sequence[dict[str, float]], key: str) -> list[tuple[float, float]]:
    """(step, value) of one logged number, in the order of the file; a number that is not finite is left out."""
    return [(row["step"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]


def _checked(model: type[Model], content: Any, where: str, remedy: str) -> Model:
    """The content as the model; raises ReportError with the path of the first value that is wrong."""
    try:
        return model.model_validate(legible(content))
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"]) or "the top level"
        raise ReportError(f"{where}: {path}: {first['msg']}, found {_short(first['input'])}; {remedy}") from None


def _sample(row: dict[str, Any]) -> Sample:
    prompt = row.get("prompt")
    responses = row.get("responses", row.get("response"))
    if prompt is None or responses is None:
        raise ReportError(f"{row['_where']}: found {sorted(row.keys() - {'_where'})}; give a prompt and its responses")
    if isinstance(responses, dict):
        named = [(str(name), _plain(text)) for name, text in responses.items()]
    else:
        listed = responses if isinstance(responses, list) else [responses]
        named = [(f"response {i}" if len(listed) > 1 else "response", _plain(t)) for i, t in enumerate(listed, 1)]
    return Sample(_plain(prompt), named, f"step {row['step']}" if "step" in row else "")


def _plain(value: Any) -> str:
    """Text as it is; chat messages as their contents; anything else as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, dict) and "content" in part for part in value):
        return "\n\n".join(str(part["content"]) for part in value)
    return json.dumps(value, ensure_ascii=False)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"{path}: cannot be read ({error}); restore the file from the run") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:59]}…"
