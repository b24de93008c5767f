"""Run folders read as one kind of thing, and several of them put together as one comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from distalign.report.logs import Logs, read_logs
from distalign.report.numbers import display_name
from distalign.report.results import ReportError, Results, Sample, legible, read_metrics, read_results, read_samples

__all__ = ["TRAINING", "Run", "merged", "merged_logs", "merged_samples", "read_run", "read_runs", "read_text"]

TRAINING = "Training run"

# What a training run's last values tell of it in a table of several runs.
_LAST = {
    "step": ("steps", None, None, "Optimizer steps."),
    "loss": ("last loss", None, None, "Training loss; each method has its own."),
    "eval_loss": ("last held-out loss", None, None, "Loss on held-out pairs; each method has its own."),
    "eval_rewards/accuracies": ("last accuracy", None, "higher", "Share of held-out pairs whose chosen response wins."),
    "objective/reward": ("last reward", None, None, "Mean reward of the samples of the last round."),
    "objective/kl": ("last KL(π‖π₀)", "nats", None, "Of the samples of the last round, per response."),
    "objective/entropy": ("last entropy", "nats", None, "Of the samples of the last round, per response."),
    "completions/mean_length": ("last tokens", None, None, "Mean length of the samples of the last round."),
}


class Run(NamedTuple):
    """A run folder: its label among the others, its kind, results, logs, samples and settings (`recipe` as written)."""

    label: str
    kind: str
    results: Results
    logs: Logs
    samples: list[Sample]
    settings: Mapping[str, Any]
    recipe: str = ""


def read_run(folder: Path, label: str = "") -> Run:
    """Read a comparison's folder or a training run's, whose last values are its results.

    Raises ReportError, which says where and what to do, if it is neither or a file is broken.
    """
    label = legible(label or folder.resolve().name)
    if (folder / "results.json").exists():
        results = read_results(folder / "results.json")
        logs = read_logs(folder, results.trained)
        kind = "Comparison" if results.curves else "Evaluation"
        return Run(label, kind, results, logs, read_samples(folder / "samples.jsonl"), results.settings)
    if (folder / "metrics.jsonl").exists():
        rows = read_metrics(folder / "metrics.jsonl")
        last = {key: value for row in rows for key, value in row.items()}
        keys = [key for key in _LAST if key in last]
        columns = [
            dict(zip(("key", "label", "unit", "better", "about"), (key, *_LAST[key]), strict=True)) for key in keys
        ]
        results = Results.parse({"columns": columns, "methods": {label: {key: last[key] for key in keys}}}, str(folder))
        recipe = read_text(folder / "recipe.yaml") if (folder / "recipe.yaml").exists() else ""
        samples = read_samples(folder / "samples.jsonl")
        return Run(label, TRAINING, results, {label: [rows]}, samples, _settings(recipe, folder), recipe)
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
    raise ReportError(
        f"{folder}: no results.json and no metrics.jsonl (found: {found or 'nothing'}); "
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


def merged(runs: Sequence[Run]) -> Results:
    """All policies of several runs as the rows of one comparison; what is relative to a reference stays with its own.

    Win rates, ratings and predictions are left out: they compare within one run.
    """

    def together(field: str) -> dict[str, Any]:
        return {row_name(run, name): value for run in runs for name, value in getattr(run.results, field).items()}

    columns = {column.key: column for run in runs for column in run.results.columns}
    fields = ("methods", "paired", "significance", "curves", "kept_step", "calibration", "points")
    seeds = sorted({seed for run in runs for seed in run.results.seeds})
    parts: dict[str, Any] = {field: together(field) for field in fields}
    citations = dict.fromkeys(run.results.citation for run in runs if run.results.citation)
    parts |= {"columns": list(columns.values()), "seeds": seeds, "citation": "\n\n".join(citations)}
    return Results.model_validate(parts)


def merged_logs(runs: Sequence[Run]) -> Logs:
    """The logs of all runs by the rows of `merged`."""
    return {row_name(run, name): rows for run in runs for name, rows in run.logs.items()}


def merged_samples(runs: Sequence[Run]) -> list[Sample]:
    """The samples of all runs, those of one prompt (and step) side by side."""
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for run in runs:
        for sample in run.samples:
            own = [(row_name(run, name), text) for name, text in sample.responses]
            found.setdefault((sample.prompt, sample.note), []).extend(own)
    return [Sample(prompt, responses, note) for (prompt, note), responses in found.items()]


def row_name(run: Run, name: str) -> str:
    """What a policy of a run is called among those of others."""
    return run.label if name == run.label else f"{run.label}: {display_name(name)}"


def read_text(path: Path) -> str:
    """A text file of a run. Raises ReportError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"{path}: cannot be read ({error}); restore the file from the run") from None


def _settings(recipe: str, folder: Path) -> Mapping[str, Any]:
    try:
        found = yaml.safe_load(recipe) if recipe else {}
    except yaml.YAMLError as error:
        told = " ".join(str(error).split())
        raise ReportError(f"{folder / 'recipe.yaml'}: not YAML ({told}); restore the file from the run") from None
    return found if isinstance(found, Mapping) else {}
