"""The page: gathers what run folders hold and fills the template; tables and figures become files beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distalign.report.figures import (
    Figure,
    calibration_figures,
    learning_figures,
    length_figures,
    plane_figure,
    row_look,
)
from distalign.report.lab import file_names, is_lab, write_lab_report
from distalign.report.logs import Logs, curves_data, health_figures, training_figures
from distalign.report.numbers import display_name, findings, main_column, seeds_text, share_of_reference
from distalign.report.rendering import as_yaml, render
from distalign.report.results import ReportError, Results
from distalign.report.runs import TRAINING, Run, merged, merged_logs, merged_samples, read_run, read_runs
from distalign.report.sections import (
    difference_forest,
    estimate_rows,
    length_controlled_forest,
    paired_columns,
    paired_rows,
    rating_forest,
    row_context,
    sample_context,
    second_bars,
    settings_table,
    win_rate_table,
    written,
)
from distalign.report.spreadsheets import write_last_values, write_tables
from distalign.report.tables import STARS, counts_text

__all__ = ["write_report"]

# What a page leaves out where a run has none of it.
_NOTHING: dict[str, Any] = {
    "findings": [],
    "forest": None,
    "percent": False,
    "pairs": [],
    "runs": [],
    "columns": [],
    "rows": [],
    "stars": "",
    "paired_rows": [],
    "paired_columns": [],
    "plane": None,
    "win_rates": None,
    "ratings": None,
    "length_controlled": None,
    "figures": [],
    "health": [],
    "curves": "",
    "calibration": [],
    "lengths": [],
    "settings": "",
    "settings_table": None,
    "environment": [],
    "seconds": [],
    "citation": "",
    "last": [],
}


def write_report(
    folder: str | Path | Sequence[str | Path], out: str | Path | None = None, *, files: bool = True
) -> Path:
    """Write report.html and return its path: one page that needs nothing beside it.

    `folder` is a run folder, and the page goes into it unless `out` names another folder; or several, which become one
    page of them all in the folder `out`. A folder with results.json is a comparison or an evaluation, one with
    metrics.jsonl a training run, one with lab.json (or sub-folders that have it) the lab's. `files` also writes the
    tables as CSV (`tables/`) and the figures as PNG (`figures/`) beside the page.

    Raises ReportError, which says where and what to do, if none is there, a file is broken, or several folders come
    without `out` or twice; nothing is written then.
    """
    if not isinstance(folder, str | Path):
        return _write_set([Path(one) for one in folder], out, files)
    folder = Path(folder)
    runs = any((folder / name).exists() for name in ("results.json", "metrics.jsonl"))
    if not runs and out is None and is_lab(folder):
        return write_lab_report(folder)
    run = read_run(folder)
    context = _training(run) if run.kind == TRAINING else _comparison(run)
    return _write(context, run.results, Path(out or folder), files)


def _write_set(folders: Sequence[Path], out: str | Path | None, files: bool) -> Path:
    if not folders:
        raise ReportError("no run folder was given; give at least one")
    if out is None:
        raise ReportError("several run folders make one page; say which folder it is to be written into")
    runs = read_runs(folders)
    return _write(_set(runs), merged(runs), Path(out), files)


def _write(context: dict[str, Any], results: Results, out: Path, files: bool) -> Path:
    """Draw the figures, fill the template, and write everything."""
    context = _NOTHING | context
    drawn = [*context["figures"], *context["health"], *context["lengths"], *context["calibration"]]
    drawn += [context["plane"]] if context["plane"] else []
    context |= {name: [_figure(figure) for figure in context[name]] for name in ("figures", "health", "lengths")}
    context["calibration"] = [_figure(figure) for figure in context["calibration"]]
    context["plane"] = context["plane"] and _figure(context["plane"])
    last = context["last"]
    context["last"] = [(key, written(value), f"{step:.0f}") for key, value, step in last]
    text = render("report.html.j2", context, ["chart.js", "report.js"])
    out.mkdir(parents=True, exist_ok=True)
    path = out / "report.html"
    path.write_text(text, encoding="utf-8")
    if files:
        if last:
            write_last_values(last, out / "tables")
        else:
            write_tables(results, out / "tables")
        _write_figures(drawn, out / "figures")
    return path


def _write_figures(figures: Sequence[Figure], folder: Path) -> None:
    names = file_names([figure.full_title for figure in figures])
    for name, figure in zip(names, figures, strict=True):
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.png").write_bytes(figure.png())


def _comparison(run: Run) -> dict[str, Any]:
    results = run.results
    found = findings(results)
    main = main_column(results)
    n = results.paired[found[0].method][main.key].n if found and main else None
    count = counts_text(results) if n is None else f"n = {n}"
    methods = results.settings.get("methods")
    between = methods if isinstance(methods, dict) and all(isinstance(own, dict) for own in methods.values()) else {}
    return {
        "kind": run.kind,
        "title": results.title or results.name or run.label,
        "name": results.name or run.label,
        "findings": [
            {**row_context(results, f.method), "rest": f.sentence[len(display_name(f.method)) :]} for f in found
        ],
        "percent": share_of_reference(results),
        "facts": [seeds_text(results.seeds), count, "95 % intervals" if found else ""],
        "pairs": [(key.replace("_", " "), written(value)) for key, value in results.pairs.items()],
        **_tables(results),
        "forest": difference_forest(results),
        "win_rates": win_rate_table(results),
        "ratings": rating_forest(results),
        "length_controlled": length_controlled_forest(results),
        **_figures(results, run.logs),
        **sample_context(run.samples, results),
        "settings": as_yaml(results.settings),
        "settings_table": settings_table(between, only_different=False),
        "environment": [(key, written(value)) for key, value in results.environment.items()],
        "seconds": second_bars(results),
        "citation": results.citation,
        "source": "results.json",
    }


def _training(run: Run) -> dict[str, Any]:
    ((rows,),) = run.logs.values()
    last = {key: row["step"] for row in rows for key in row if key != "step"}
    values = {key: row[key] for row in rows for key in row}
    return {
        "kind": run.kind,
        "title": run.label,
        "name": run.label,
        "facts": [f"{rows[-1]['step']:.0f} steps", f"{len(rows)} lines of metrics"],
        "figures": training_figures(run.logs, {}),
        "health": health_figures(run.logs, {}),
        "curves": curves_data(run.logs, {}),
        "last": [(key, values[key], step) for key, step in sorted(last.items())],
        **sample_context(run.samples, None),
        "settings": run.recipe,
        "source": "metrics.jsonl",
    }


def _set(runs: Sequence[Run]) -> dict[str, Any]:
    results, logs = merged(runs), merged_logs(runs)
    recipes = {run.label: {**run.settings, "environment": run.results.environment} for run in runs}
    return {
        "kind": "Runs",
        "title": f"{len(runs)} run{'s' if len(runs) != 1 else ''} side by side",
        "name": ", ".join(run.label for run in runs),
        "facts": [seeds_text(results.seeds), counts_text(results)],
        "runs": [(run.label, run.kind.lower(), run.results.title or run.results.name) for run in runs],
        **_tables(results, bare=True),
        **_figures(results, logs),
        **sample_context(merged_samples(runs), results),
        "settings_table": settings_table(recipes, only_different=True),
        "citation": results.citation,
        "source": "results.json and metrics.jsonl",
    }


def _tables(results: Results, *, bare: bool = False) -> dict[str, Any]:
    return {
        "columns": results.filled_columns,
        "rows": estimate_rows(results, bare=bare),
        "stars": STARS if any(one.stars for row in results.significance.values() for one in row.values()) else "",
        "paired_columns": paired_columns(results),
        "paired_rows": paired_rows(results),
    }


def _figures(results: Results, logs: Logs) -> dict[str, Any]:
    look = {name: row_look(results, name) for name in logs}
    several = len(logs) > 1
    return {
        "plane": plane_figure(results),
        "figures": learning_figures(results) or (training_figures(logs, look) if several else []),
        "health": health_figures(logs, look),
        "curves": curves_data(logs, look),
        "calibration": calibration_figures(results),
        "lengths": length_figures(results),
    }


def _figure(figure: Figure) -> dict[str, str]:
    return {
        "title": figure.title,
        "about": figure.about,
        "svg": figure.svg(),
        "data": figure.data,
        "color": figure.color,
    }
