"""What run folders hold, read and checked, and several of them put together as one comparison."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeGuard, TypeVar

import yaml
from pydantic import BaseModel, Field, PlainValidator, ValidationError, model_validator

from distalign.errors import InputError
from distalign.settings import load_yaml

Model = TypeVar("Model", bound=BaseModel)

# The rows of metrics.jsonl by run: one list per seed.
Logs = Mapping[str, Sequence[list[dict[str, float]]]]

REMEDY = "run the comparison again"
TARGET, REFERENCE = "target", "reference"  # the two rows of a comparison that are not methods
TRAINING = "Training run"

# What HTML admits nowhere in a text: controls but white space, halves of surrogate pairs, noncharacters.
_NONCHARACTERS = "".join(chr(plane << 16 | last) for plane in range(17) for last in (0xFFFE, 0xFFFF))
_ILLEGAL = re.compile(f"[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef{_NONCHARACTERS}]")


class ReportError(InputError):
    """A file of the run folder is missing or broken; the message says where, what was found and what to do."""


def _number(value: object) -> float:
    if value is None:
        return math.nan
    if not _is_number(value):
        raise ValueError("should be a number or null")
    return float(value)


# null is a number that could not be computed.
Number = Annotated[float | int, PlainValidator(_number)]


class _Estimated(BaseModel):
    mean: float

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: object) -> object:
        """A bare number is a mean without an error; null is a number that could not be computed."""
        if isinstance(value, BaseModel):
            return value
        if isinstance(value, dict):
            named = {"mean" if key == "value" else key: part for key, part in value.items()}
            return {key: math.nan if part is None and key != "n" else part for key, part in named.items()}
        return {"mean": math.nan if value is None else value}


class Measure(_Estimated):
    """A mean with its standard error and count."""

    se: float = math.nan
    n: int | None = None


class Difference(_Estimated):
    """A mean or a paired difference with its interval (95 % unless said otherwise) and count."""

    low: float = math.nan
    high: float = math.nan
    n: int | None = None

    @property
    def clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0

    @property
    def finite(self) -> bool:
        """Whether the mean and both ends are known."""
        return all(map(math.isfinite, (self.mean, self.low, self.high)))


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

    def verdict(self, difference: Difference) -> Literal["better", "worse", ""]:
        """Whether a difference is good; "" if no direction is, or its interval has zero inside."""
        if self.better is None or not difference.clear:
            return ""
        return "better" if (difference.mean > 0) == (self.better == "higher") else "worse"


# The last values of a training run that stand in a table of several runs.
_LAST = [
    Column(key="step", label="steps", about="Optimizer steps."),
    Column(key="loss", label="last loss", about="Training loss; each method has its own."),
    Column(key="eval_loss", label="last held-out loss", about="Loss on held-out pairs; each method has its own."),
    Column(
        key="eval_rewards/accuracies",
        label="last accuracy",
        better="higher",
        about="Share of held-out pairs whose chosen response wins.",
    ),
    Column(key="objective/reward", label="last reward", about="Mean reward of the samples of the last round."),
    *(
        Column(key=key, label=label, unit="nats", about="Of the samples of the last round, per response.")
        for key, label in (("objective/kl", "last KL(π‖π₀)"), ("objective/entropy", "last entropy"))
    ),
    Column(key="completions/mean_length", label="last tokens", about="Mean length of the samples of the last round."),
]


class WinRates(BaseModel):
    """P(a preferred to b) by `matrix[a][b]`, and by whose judgement."""

    judge: str = ""
    matrix: dict[str, dict[str, Measure]] = {}


class Significance(BaseModel):
    """The p-value against the reference, corrected for their number by Holm's method, and its stars."""

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

    @model_validator(mode="after")
    def _judge_no_win_rate(self) -> Results:
        """Where the target's own win rate is known, more is not better."""
        if "win_rate" in self.methods.get(TARGET, {}):
            self.columns = [c.model_copy(update={"better": None}) if c.key == "win_rate" else c for c in self.columns]
        return self

    @classmethod
    def parse(cls, content: object) -> Results:
        """Check the content of results.json; raises ReportError with the path of the first value that is wrong."""
        return _checked(cls, _legible(content), "results", REMEDY)

    @property
    def trained(self) -> list[str]:
        """The methods, in their order: every row but the target and the reference."""
        return [name for name in self.methods if name not in (TARGET, REFERENCE)]

    @property
    def rows(self) -> list[str]:
        """Target and reference first, then the methods in their order."""
        return [name for name in (TARGET, REFERENCE) if name in self.methods] + self.trained

    @property
    def judged_rows(self) -> list[str]:
        """The rows whose responses were compared, in the order of `rows`."""
        return [name for name in self.rows if name in self.win_rates.matrix]

    @property
    def filled_columns(self) -> list[Column]:
        """The columns that at least one row has a number for."""
        return [column for column in self.columns if any(column.key in row for row in self.methods.values())]

    @property
    def starred(self) -> bool:
        """Whether a difference from the reference has a star."""
        return any(test.stars for row in self.significance.values() for test in row.values())


def display_name(name: str) -> str:
    """A method's name as the papers write it (pmle is PMLE); other names stay as they were given."""
    return name.upper() if name in ("pmle", "pd", "rkl", "dpo", "rebel", "rlhf") else name


Turns = list[tuple[str, str]]  # (role, text)


class Response(NamedTuple):
    """What a policy answered; its reward, and P(it is preferred to the reference's) as judged, where they are known."""

    name: str
    text: str
    reward: float = math.nan
    verdict: float = math.nan


class Sample(NamedTuple):
    """A conversation and how each policy goes on with it. `note` says when, for samples of a training run."""

    prompt: Turns
    responses: list[Response]
    note: str = ""

    @property
    def gain(self) -> float:
        """How far the policies' verdicts are from one half, or their rewards from the reference's; their mean."""
        policies = [one for one in self.responses if one.name not in (TARGET, REFERENCE)]
        base = next((one.reward for one in self.responses if one.name == REFERENCE), math.nan)
        verdicts = [one.verdict - 0.5 for one in policies if math.isfinite(one.verdict)]
        gains = verdicts or [one.reward - base for one in policies if math.isfinite(one.reward - base)]
        return math.fsum(gains) / len(gains) if gains else math.nan


def legible(text: str) -> str:
    """A text with U+FFFD for every character that HTML does not admit."""
    return _ILLEGAL.sub("\ufffd", text)


def _legible(value: object, levels: int = 50) -> object:
    """The content of a JSON file with legible texts.

    Raises RecursionError for more levels of nesting than a page can show.
    """
    if not levels:
        raise RecursionError("too many levels of nesting")
    if isinstance(value, str):
        return legible(value)
    if isinstance(value, list):
        return [_legible(part, levels - 1) for part in value]
    if isinstance(value, dict):
        return {legible(key): _legible(part, levels - 1) for key, part in value.items()}
    return value


def read_json(path: Path, model: type[Model], remedy: str) -> Model:
    """Read one JSON file and check it against a model. Raises ReportError with the remedy if either fails."""
    return _checked(model, _content(_text(path), path, 1, remedy), str(path), remedy)


def _content(text: str, path: Path, line: int, remedy: str) -> object:
    """The value of a JSON text that begins at a line of a file, legible. Raises ReportError with the remedy."""
    try:
        return _legible(json.loads(text))
    except json.JSONDecodeError as error:
        raise ReportError(f"{path}:{line + error.lineno - 1}: not JSON ({error.msg}); {remedy}") from None
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:100]
        raise ReportError(f"{path}:{line}: numbers too long or levels too many ({reason}); {remedy}") from None


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a file with one JSON object per line; empty lines are skipped. Raises ReportError naming the line."""
    rows = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        row = _content(line, path, number, "repair or remove the line")
        if not isinstance(row, dict):
            raise ReportError(f"{path}:{number}: found {_short(row)}, not a JSON object; repair or remove the line")
        rows.append({"_where": f"{path}:{number}", **row})
    return rows


def read_samples(path: Path) -> list[Sample]:
    """Read samples.jsonl: prompts with `responses` by name, or a list, or one `response`; [] without a file.

    `rewards` and `verdicts`, where a line has them, are numbers in the same shape as its responses.
    """
    return [_sample(row) for row in _read_rows(path)] if path.exists() else []


def _read_metrics(path: Path) -> list[dict[str, float]]:
    """Read metrics.jsonl: the numbers of every line, by name. A line without `step` belongs to the step before it."""
    rows, step = [], 0
    for row in _read_rows(path):
        numbers = {key: float(value) for key, value in row.items() if _is_number(value)}
        step = numbers.setdefault("step", step)
        rows.append(numbers)
    if not rows:
        raise ReportError(f"{path}: no lines; let the run log at least one step before it is reported")
    return rows


def _checked(model: type[Model], content: object, where: str, remedy: str) -> Model:
    """The content as the model; raises ReportError with the path of the first value that is wrong."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"]) or "the top level"
        raise ReportError(f"{where}: {path}: {first['msg']}, found {_short(first['input'])}; {remedy}") from None


def _sample(row: dict[str, Any]) -> Sample:
    prompt = row.get("prompt")
    responses = row.get("responses", row.get("response"))
    if prompt is None or responses is None:
        raise ReportError(f"{row['_where']}: found {sorted(row.keys() - {'_where'})}; give a prompt and its responses")
    if not isinstance(responses, dict):
        listed = responses if isinstance(responses, list) else [responses]
        responses = {f"response {i}" if len(listed) > 1 else "response": text for i, text in enumerate(listed, 1)}
    numbers = [_by_name(row.get(key), list(responses)) for key in ("rewards", "verdicts")]
    answers = [
        Response(str(name), _plain(text), *(n.get(name, math.nan) for n in numbers)) for name, text in responses.items()
    ]
    return Sample(_turns(prompt), answers, f"step {row['step']}" if "step" in row else "")


def _by_name(numbers: object, names: Sequence[str]) -> dict[str, float]:
    """The numbers of responses by their names, of a mapping or a list; what is none is left out."""
    named = zip(names, numbers if isinstance(numbers, list) else (), strict=False)
    pairs = numbers if isinstance(numbers, dict) else dict(named)
    return {name: float(value) for name, value in pairs.items() if _is_number(value)}


def _turns(prompt: object) -> Turns:
    """A prompt as turns: messages by their roles; a text is the user's."""
    if isinstance(prompt, list) and prompt and all(isinstance(part, dict) and "content" in part for part in prompt):
        return [(str(part.get("role", "user")), _plain(part["content"] or "")) for part in prompt]
    return [("user", _plain(prompt))]


def _plain(value: object) -> str:
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


def _is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is a number that a float can hold."""
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) <= sys.float_info.max
    return isinstance(value, float)


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:59]}…"


class Run(NamedTuple):
    """A run folder, or several merged: label, kind, results, logs, samples, settings (`recipe` as it was written).

    `date` is the day that the results were written, `card` what the card of a trained model says of its data and steps.
    """

    label: str
    kind: str
    results: Results
    logs: Logs
    samples: list[Sample]
    settings: Mapping[str, Any]
    recipe: str = ""
    date: str = ""
    card: Mapping[str, str] = {}


def read_run(folder: Path, label: str = "") -> Run:
    """Read a comparison's folder or a training run's, whose last values are its results.

    Raises ReportError, which says where and what to do, if it is neither or a file is broken.
    """
    label = legible(label or folder.resolve().name)
    if (folder / "results.json").exists():
        results = read_json(folder / "results.json", Results, REMEDY)
        logs = _read_logs(folder, results.trained)
        kind = "Comparison" if results.curves else "Evaluation"
        samples = read_samples(folder / "samples.jsonl")
        day = _day(folder / "results.json")
        return Run(label, kind, results, logs, samples, results.settings, date=day)
    if (folder / "metrics.jsonl").exists():
        rows = _read_metrics(folder / "metrics.jsonl")
        last = {key: value for row in rows for key, value in row.items()}
        columns = [column for column in _LAST if column.key in last]
        values = {column.key: last[column.key] for column in columns}
        results = Results.model_validate({"columns": columns, "methods": {label: values}})
        recipe, settings = _read_recipe(folder / "recipe.yaml")
        samples, card = read_samples(folder / "samples.jsonl"), folder / "model" / "README.md"
        lines = legible(_text(card)).split("\n") if card.exists() else []
        facts = dict(line[2:].split(": ", 1) for line in lines if line.startswith("- ") and ": " in line)
        day = _day(folder / "metrics.jsonl")
        return Run(label, TRAINING, results, {label: [rows]}, samples, settings, recipe, day, facts)
    files = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
    raise ReportError(
        f"{folder}: no results.json and no metrics.jsonl (found: {files or 'nothing'}); "
        "give the folder of a comparison, of a training run or of the lab (with lab.json)"
    )


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read several; a run is called by its folder's name, or by as much of its path as tells it from the others."""
    paths = [folder.resolve() for folder in folders]
    twice = next((folder for folder in folders if paths.count(folder.resolve()) > 1), None)
    if twice is not None:
        raise ReportError(f"{twice}: given twice; give every run folder once")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return [read_run(folder, "/".join(path.parts[-depth:])) for folder, path in zip(folders, paths, strict=True)]


def merged(runs: Sequence[Run]) -> Run:
    """All policies of several runs as the rows of one comparison; what is relative to a reference stays with its own.

    Win rates, ratings and predictions are left out: they compare within one run. Samples of one prompt (and step) stand
    side by side.
    """

    def row(run: Run, name: str) -> str:
        return run.label if name == run.label else f"{run.label}: {display_name(name)}"

    columns = {column.key: column for run in runs for column in run.results.columns}
    parts: dict[str, Any] = {
        field: {row(run, name): value for run in runs for name, value in getattr(run.results, field).items()}
        for field in ("methods", "paired", "significance", "curves", "kept_step", "calibration", "points")
    }
    parts["columns"] = list(columns.values())
    parts["seeds"] = sorted({seed for run in runs for seed in run.results.seeds})
    parts["citation"] = "\n\n".join(dict.fromkeys(run.results.citation for run in runs if run.results.citation))
    samples: dict[tuple[str, str], Sample] = {}
    for run in runs:
        for sample in run.samples:
            named = [answer._replace(name=row(run, answer.name)) for answer in sample.responses]
            together = samples.setdefault((str(sample.prompt), sample.note), sample._replace(responses=[]))
            together.responses.extend(named)
    return Run(
        label=", ".join(run.label for run in runs),
        kind="Runs",
        results=Results.model_validate(parts),
        logs={row(run, name): rows for run in runs for name, rows in run.logs.items()},
        samples=list(samples.values()),
        settings={},
    )


def _day(path: Path) -> str:
    return f"{datetime.fromtimestamp(path.stat().st_mtime):%Y-%m-%d}"


def _read_logs(folder: Path, names: Iterable[str]) -> Logs:
    """The metrics of a comparison's runs, by method: of its sub-folders, or of those of every seed."""
    seeds = sorted(folder.glob("seed-*"), key=lambda path: (len(path.name), path.name))
    logs = {}
    for name in names:
        files = [path / name / "metrics.jsonl" for path in (folder, *seeds)]
        rows = [_read_metrics(path) for path in files if path.is_file()]
        if rows:
            logs[name] = rows
    return logs


def _read_recipe(path: Path) -> tuple[str, Mapping[str, Any]]:
    """A recipe as it is written, and its settings; "" and none without a file."""
    text = _text(path) if path.exists() else ""
    try:
        settings = load_yaml(text)
    except yaml.YAMLError as error:
        message = " ".join(str(error).split())
        raise ReportError(f"{path}: not YAML ({message}); restore the file from the run") from None
    return text, settings if isinstance(settings, Mapping) else {}
