"""The page: gathers what a run folder holds and fills the template; everything from files is escaped by Jinja."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .figures import Line, calibration_figure, color_variable, curves_figure, lines_figure
from .lab import is_lab, write_lab_report
from .numbers import (
    best_rows,
    display_name,
    findings,
    format_estimate,
    format_interval,
    format_seconds,
    main_column,
    seeds_text,
    share_of_reference,
)
from .rendering import as_yaml, render
from .results import (
    REFERENCE,
    TARGET,
    Bin,
    Column,
    ReportError,
    Results,
    Sample,
    read_metrics,
    read_results,
    read_samples,
    series,
)
from .tables import counts_text, ordered_rows

__all__ = ["write_report"]

_MOST_SAMPLES = 200  # on a page; more would make it slow to open, and nobody reads them

# What a page leaves out where a run has none of it.
_NOTHING: dict[str, Any] = {
    "findings": [],
    "forest": None,
    "percent": False,
    "pairs": [],
    "columns": [],
    "rows": [],
    "paired_rows": [],
    "paired_columns": [],
    "calibration": [],
    "environment": [],
    "seconds": [],
    "citation": "",
    "last": [],
}

# What a training run logs: the figure's title, the sentence below it, and the numbers drawn in it with their labels.
_TRAINING = [
    (
        "Loss",
        "Training loss, and the loss on held-out pairs: when only the first still falls, the model memorises.",
        {"loss": "train", "eval_loss": "held out"},
    ),
    (
        "Preference accuracy",
        "Share of pairs whose chosen response gets the larger implied reward; one half is chance.",
        {"rewards/accuracies": "train", "eval_rewards/accuracies": "held out"},
    ),
    (
        "ln π of the responses",
        "Nats per response. Both falling together is likelihood displacement.",
        {"logps/chosen": "chosen", "logps/rejected": "rejected"},
    ),
    (
        "Margin",
        "Implied reward of the chosen response minus that of the rejected one.",
        {"rewards/margins": "train", "eval_rewards/margins": "held out"},
    ),
    ("KL from the reference", "Nats per response, on samples of the policy.", {"objective/kl": "KL"}),
    ("Entropy", "Nats per response; a fall towards 0 is collapse.", {"objective/entropy": "entropy"}),
    ("Reward", "Mean reward of the policy's samples.", {"objective/reward": "reward"}),
    ("Gradient norm", "Before clipping.", {"grad_norm": "norm"}),
]


def write_report(folder: str | Path) -> Path:
    """Write report.html into a run folder and return its path: one page that needs nothing beside it.

    A folder with results.json is a comparison, one with metrics.jsonl a training run, one with lab.json (or
    sub-folders that have it) the lab's. Raises ReportError, which says where and what to do, if none is there or a
    file is broken.
    """
    folder = Path(folder)
    if (folder / "results.json").exists():
        context = _comparison(folder)
    elif (folder / "metrics.jsonl").exists():
        context = _training(folder)
    elif is_lab(folder):
        return write_lab_report(folder)
    else:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
        raise ReportError(
            f"{folder}: no results.json and no metrics.jsonl (found: {found or 'nothing'}); "
            "give the folder of a comparison, of a training run or of the lab (with lab.json)"
        )
    path = folder / "report.html"
    path.write_text(render("report.html.j2", _NOTHING | context), encoding="utf-8")
    return path


def _comparison(folder: Path) -> dict[str, Any]:
    results = read_results(folder / "results.json")
    found = findings(results)
    main = main_column(results)
    n = results.paired[found[0].method][main.key].n if found and main else None
    count = counts_text(results) if n is None else f"n = {n}"
    return {
        "kind": "Comparison",
        "title": results.title or results.name or folder.resolve().name,
        "name": results.name or folder.resolve().name,
        "findings": [{**_row(results, f.method), "rest": f.sentence[len(display_name(f.method)) :]} for f in found],
        "percent": share_of_reference(results),
        "facts": [seeds_text(results.seeds), count, "95 % intervals" if found else ""],
        "pairs": [(key.replace("_", " "), _number(value)) for key, value in results.pairs.items()],
        "columns": results.filled_columns,
        "rows": _estimate_rows(results),
        "paired_columns": _paired_columns(results),
        "paired_rows": _paired_rows(results),
        "forest": _forest(results),
        "figures": _comparison_figures(results),
        "calibration": [_calibration(results, name, bins) for name, bins in results.calibration.items() if bins],
        **_samples(read_samples(folder / "samples.jsonl"), lambda name: color_variable(results, name)),
        "settings": as_yaml(results.settings),
        "environment": [(key, _number(value)) for key, value in results.environment.items()],
        "seconds": _seconds(results),
        "citation": results.citation,
        "source": "results.json",
    }


def _training(folder: Path) -> dict[str, Any]:
    rows = read_metrics(folder / "metrics.jsonl")
    last = {key: row["step"] for row in rows for key in row if key != "step"}
    values = {key: row[key] for row in rows for key in row}
    recipe = folder / "recipe.yaml"
    try:
        settings = recipe.read_text(encoding="utf-8") if recipe.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"{recipe}: cannot be read ({error}); restore the file from the run") from None
    steps = f"{rows[-1]['step']:.0f} steps"
    return {
        "kind": "Training run",
        "title": folder.resolve().name,
        "name": folder.resolve().name,
        "facts": [steps, f"{len(rows)} lines of metrics"],
        "figures": [figure for figure in (_training_figure(rows, *row) for row in _TRAINING) if figure],
        "last": [(key, _number(values[key]), f"{step:.0f}") for key, step in sorted(last.items())],
        **_samples(read_samples(folder / "samples.jsonl"), lambda name: "var(--c1)"),
        "settings": settings,
        "source": "metrics.jsonl",
    }


def _row(results: Results, name: str) -> dict[str, Any]:
    return {
        "name": display_name(name),
        "color": color_variable(results, name),
        "apart": name in (TARGET, REFERENCE),
    }


def _estimate_rows(results: Results) -> list[dict[str, Any]]:
    """One row a policy; a cell is (text, n, whether it is the best mean of its column), or None without a number."""
    best = {column.key: best_rows(results, column) for column in results.filled_columns}

    def cell(name: str, column: Column) -> tuple[str, int | None, bool] | None:
        measure = results.methods[name].get(column.key)
        return measure and (format_estimate(measure.mean, measure.se), measure.n, name in best[column.key])

    return [
        {**_row(results, name), "cells": [cell(name, column) for column in results.filled_columns]}
        for name in ordered_rows(results)
    ]


def _paired_rows(results: Results) -> list[dict[str, Any]]:
    """One row a method; a cell is (text, n, better | worse | ""), or None without a difference."""

    def cell(name: str, column: Column) -> tuple[str, int | None, str] | None:
        d = results.paired[name].get(column.key)
        if d is None:
            return None
        verdict = "better" if (d.mean > 0) == (column.better == "higher") else "worse"
        verdict = verdict if column.better and d.clear else ""
        return format_interval(d.mean, d.low, d.high), d.n, verdict

    names = [name for name in results.trained if results.paired.get(name)]
    return [{**_row(results, name), "cells": [cell(name, c) for c in _paired_columns(results)]} for name in names]


def _paired_columns(results: Results) -> list[Column]:
    return [c for c in results.columns if any(c.key in results.paired.get(name, {}) for name in results.trained)]


def _forest(results: Results) -> dict[str, Any] | None:
    """The main metric's differences as bars: ends, mean and zero in per cent of the width that holds them all."""
    column = main_column(results)
    found = findings(results)
    if column is None or not found:
        return None
    differences = {finding.method: results.paired[finding.method][column.key] for finding in found}
    low = min(0.0, *(d.low for d in differences.values()))
    high = max(0.0, *(d.high for d in differences.values()))

    def place(value: float) -> float:
        return round(2 + 96 * (value - low) / ((high - low) or 1.0), 2)

    rows = [
        {
            **_row(results, name),
            "text": format_interval(d.mean, d.low, d.high),
            "low": place(d.low),
            "mean": place(d.mean),
            "width": round(place(d.high) - place(d.low), 2),
        }
        for name, d in differences.items()
    ]
    return {"column": column, "rows": rows, "zero": place(0.0)}


def _comparison_figures(results: Results) -> list[dict[str, str]]:
    figures = []
    logged = {key for rows in results.curves.values() for row in rows for key in row}
    main = main_column(results)
    for c in [c for c in results.columns if c.key in logged and (c.key == "forward_kl" or c == main)][:1]:
        svg = curves_figure(results, c)
        about = (
            "On some of the held-out prompts, from the reference (step 0) on; ± 1 standard error; a dot: the kept step."
        )
        figures.append(_figure(f"{c.label}{f', {c.unit}' if c.unit else ''}", about, svg))
    if "eval_loss" in logged:
        about = "A dot marks the kept step. Each method has its own loss: compare the shapes, not the heights."
        svg = curves_figure(results, Column(key="eval_loss", label="loss"))
        figures.append(_figure("Loss on held-out pairs", about, svg))
    return figures


def _training_figure(rows: list[dict[str, float]], title: str, about: str, keys: dict[str, str]) -> dict[str, str]:
    logged = {label: series(rows, key) for key, label in keys.items()}
    colors = {label: f"var(--c{number})" for number, label in enumerate(logged, start=1)}
    lines = [Line(label, colors[label], points) for label, points in logged.items() if points]
    return _figure(title, about, lines_figure(lines)) if lines else {}


def _figure(title: str, about: str, svg: str) -> dict[str, str]:
    return {"title": title, "about": about, "svg": svg}


def _calibration(results: Results, name: str, bins: list[Bin]) -> dict[str, Any]:
    """A method's calibration plot and its expected calibration error, which is taken over these bins."""
    n = sum(b.n for b in bins)
    gap = sum(b.n * abs(b.predicted - b.observed) for b in bins) / n
    return {
        **_row(results, name),
        "gap": f"{gap:.3f}",
        "n": n,
        "svg": calibration_figure(bins, _row(results, name)["color"]),
    }


def _samples(samples: list[Sample], color: Any) -> dict[str, Any]:
    shown = [
        {
            "prompt": sample.prompt,
            "note": sample.note,
            "responses": [(display_name(name), color(name), text) for name, text in sample.responses],
        }
        for sample in samples[:_MOST_SAMPLES]
    ]
    return {"samples": shown, "samples_total": len(samples)}


def _seconds(results: Results) -> list[tuple[str, str, float, str]]:
    """Every part of the run with its duration, the per cent of the longest one, and its colour."""
    longest = max(results.seconds.values(), default=0.0) or 1.0
    return [
        (display_name(name), format_seconds(seconds), round(100 * seconds / longest, 1), color_variable(results, name))
        for name, seconds in results.seconds.items()
    ]


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", "−")
    if isinstance(value, dict | list):
        return as_yaml(value).strip()
    return str(value)
