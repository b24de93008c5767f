"""The page: gathers what run folders hold and fills a template; tables and figures become files beside it."""

from __future__ import annotations

import base64
import hashlib
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from distalign.report import figures as draw
from distalign.report.drawing import TEMPLATES, Figure, looks, panel_figure, points_left_out
from distalign.report.first import (
    FirstScreen,
    change_text,
    collapse,
    comparison_screen,
    forest,
    told_by_win_rate,
    training_screen,
)
from distalign.report.numbers import format_estimate, format_interval, format_number, format_seconds, format_setting
from distalign.report.results import (
    TRAINING,
    Measure,
    ReportError,
    Results,
    Run,
    display_name,
    legible,
    merged,
    read_run,
    read_runs,
)
from distalign.report.shown import Measured, Panel, read_lab
from distalign.report.tables import MAIN_TABLE, STARS, counts_text, importance, write_csv, write_tables

T = TypeVar("T")

_FIGURES = ("plane", "learning", "health", "length", "calibration")  # sections that hold figures alone
_MOST_SAMPLES = 200  # on a page; more would make it slow to open, and nobody reads them

Context = dict[str, Any]  # what a template shows


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
    try:
        return _report(folder, out, files)
    except OSError as error:
        place = str(error.filename or out or folder)[:200]
        reason = error.strerror or error
        raise ReportError(f"{place}: {reason}; check the path, or write the page elsewhere with --out") from None


def _report(folder: str | Path | Sequence[str | Path], out: str | Path | None, files: bool) -> Path:
    if not isinstance(folder, str | Path):
        if not folder:
            raise ReportError("no run folder was given; give at least one")
        if out is None:
            raise ReportError("several run folders make one page; say with --out which folder it is written into")
        runs = read_runs([Path(path) for path in folder])
        together = merged(runs)
        return _write(_comparison(together, runs), together.results, Path(out), files)
    folder = Path(folder)
    is_run = any((folder / name).exists() for name in ("results.json", "metrics.jsonl"))
    lab_files = [path for path in [folder / "lab.json"] if path.is_file()] or sorted(folder.glob("*/lab.json"))
    if not is_run and out is None and lab_files:
        return _write_lab_report(folder, lab_files)
    run = read_run(folder)
    return _write(_training(run) if run.kind == TRAINING else _comparison(run), run.results, Path(out or folder), files)


def _write(page: Context, results: Results, out: Path, files: bool) -> Path:
    text = _render("report.html.j2", page, (TEMPLATES / "search.js").read_text(encoding="utf-8"))
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.html").write_text(text, encoding="utf-8")
    if files:
        if page["last"]:
            write_csv(out / "tables" / "last.csv", ["metric", "value", "step"], page["last"])
        else:
            write_tables(results, out / "tables")
        figures = [figure for part in ("picture", *_FIGURES) for figure in page[part]]
        for name, figure in _file_names([(figure.file_title or figure.title, figure) for figure in figures]):
            (out / "figures").mkdir(exist_ok=True)
            (out / "figures" / f"{name}.png").write_bytes(figure.png)
    return out / "report.html"


def _comparison(run: Run, runs: Sequence[Run] = ()) -> Context:
    """The page of a comparison or an evaluation, or of several runs that were merged into one.

    No policy of several runs is called the best or the headline, as the runs need not have the same prompts.
    """
    results, columns = run.results, run.results.filled_columns
    main = sorted((column for column in columns if column.key in MAIN_TABLE), key=importance)
    main = main or columns[: len(MAIN_TABLE)]
    ratings = [(name, format_interval(d.mean, d.low, d.high), d) for name, d in results.ratings.items()]
    equal = [(n, format_interval(d.mean, d.low, d.high, sign=""), d) for n, d in results.length_controlled.items()]
    count = f"{len(runs)} run{'s' if len(runs) != 1 else ''} side by side"
    kinds = [(f"{one.kind} {one.results.name}".strip(), one.label) for one in runs]
    return _page(
        run,
        FirstScreen(kinds, [("", count)], "") if runs else comparison_screen(run),
        runs,
        source="results.json and metrics.jsonl" if runs else "results.json",
        results=results,
        tables=[main, [column for column in columns if column not in main]],
        counts={column.key: counts_text(results, column.key) for column in columns},
        forests=[
            forest("Bradley–Terry rating, nats", ratings, {0.0: "the reference"}),
            forest("Win rate against the reference at equal length", equal, {0.5: "as often as the reference"}),
        ],
        plane=[figure for figure in [draw.plane_figure(results)] if figure],
        collapse=collapse(results),
        told=told_by_win_rate(results),
        learning=draw.learning_figures(results)
        or (draw.topic_figures(draw.TRAINING, results, run.logs) if len(run.logs) > 1 else []),
        health=draw.topic_figures(draw.HEALTH, results, run.logs),
        calibration=draw.calibration_figures(results),
        length=[figure for figure in [draw.length_figure(results)] if figure],
    )


def _training(run: Run) -> Context:
    ((rows,),) = run.logs.values()
    last = {key: (row[key], row["step"]) for row in rows for key in row if key != "step"}
    changes = []
    for column in run.results.columns:
        values = [row[column.key] for row in rows if column.key in row]
        ends = values[:: max(1, len(values) - 1)][:2] if column.key != "step" else []
        unit = f" {column.unit}" if column.unit else ""
        changes += [(column.label.removeprefix("last "), " → ".join(map(format_number, ends)) + unit)] if ends else []
    return _page(
        run,
        training_screen(run),
        source="metrics.jsonl",
        changes=changes,
        learning=draw.topic_figures(draw.TRAINING, None, run.logs),
        health=draw.topic_figures(draw.HEALTH, None, run.logs),
        last=[(key, *last[key]) for key in sorted(last)],
    )


def _page(
    run: Run, first: FirstScreen, runs: Sequence[Run] = (), *, learning: Sequence[Figure], **parts: object
) -> Context:
    """What the template shows; a section without content is left out. One figure of `learning` may be on top."""
    size = {"width": 6.4, "height": 3.6} if first.forest else {"width": 11.5, "height": 3.0}
    ranked = sorted((one for one in run.samples if math.isfinite(one.gain)), key=lambda one: -one.gain)
    samples, half = ranked or (run.samples[::-1] if run.kind == TRAINING else run.samples), _MOST_SAMPLES // 2
    if len(samples) > _MOST_SAMPLES:
        samples = [*samples[:half], *samples[-half:]] if ranked else samples[:_MOST_SAMPLES]
    answers = run.settings.get("samples")
    return {
        **dict.fromkeys(("changes", "last", "forests", "collapse", "told", *_FIGURES), ()),
        "picture": [replace(figure, **size) for figure in learning if figure.title == first.figure],
        "learning": [figure for figure in learning if figure.title != first.figure],
        "runs": runs,
        "results": None,
        "kind": run.kind,
        "title": run.results.name or run.label,
        "name": run.results.name or run.label,
        "first": first,
        "change": lambda name, column: change_text(run.results, name, column),
        "color": lambda name: draw.row_look(None if run.kind == TRAINING else run.results, name).color,
        "samples": samples,
        "sample_count": len(run.samples),
        "ranked": bool(ranked),
        "answers": answers if isinstance(answers, int) else 1,
        "stars": STARS,
        "texts": [(heading, text) for one in runs or [run] for heading, text in _texts(one, many=bool(runs)) if text],
        **parts,
    }


def _texts(run: Run, *, many: bool) -> list[tuple[str, str]]:
    """The recipe of a run, what it counted, and where it was made, under headings that name the run among several."""
    seconds = {name: format_seconds(value) for name, value in run.results.seconds.items()}
    parts = {"Recipe as it was run": run.recipe or run.settings, "Data": run.results.pairs, "Time": seconds}
    parts |= {"Environment": run.results.environment, "Citation": run.results.citation}
    return [(f"{run.label}: {heading}" if many else heading, format_setting(part)) for heading, part in parts.items()]


def _write_lab_report(folder: Path, files: Sequence[Path]) -> Path:
    """Write the page of one or more experiments; every figure also becomes a PNG file beside its lab.json."""
    experiments = [read_lab(path) for path in files]
    claims = [claim.holds for one in experiments for claim in one.shown.claims if claim.holds is not None]
    alone = len(experiments) == 1
    context = {
        "kind": "Lab",
        "title": experiments[0].shown.title if alone else "What the theory promises, measured",
        "name": folder.resolve().name,
        "held": sum(claims),
        "broken": len(claims) - sum(claims),
        "alone": alone,
        "experiments": [(one, _lab_figures(one, path.parent)) for one, path in zip(experiments, files, strict=True)],
        "seconds": sum(one.seconds for one in experiments),
        "source": "lab.json",
    }
    path = folder / "report.html"
    path.write_text(_render("lab.html.j2", context), encoding="utf-8")
    return path


def _lab_figures(measured: Measured, folder: Path) -> list[tuple[Panel, Figure | None, str]]:
    """Every panel, its figure where it has points, and what of it was left out; writes the PNG files."""
    panels = measured.shown.panels
    look = looks(panels)
    figures = [panel_figure(panel, look) for panel in panels]
    for name, figure in _file_names([(p.title, figure) for p, figure in zip(panels, figures, strict=True)]):
        if figure is not None:
            (folder / f"{name}.png").write_bytes(figure.png)
    return [(panel, figure, points_left_out(panel)) for panel, figure in zip(panels, figures, strict=True)]


def _slug(text: str) -> str:
    """Lower-case ASCII words with hyphens between them; a Greek letter is written by its name."""
    spelled = re.sub("[α-ω]", lambda letter: f" {unicodedata.name(letter[0]).split()[-1]} ", text.lower())
    return re.sub(r"[^a-z0-9]+", "-", re.sub("['’]", "", spelled.lower())).strip("-") or "figure"


def _file_names(titled: Sequence[tuple[str, T]]) -> list[tuple[str, T]]:
    """A file name for every title; a title that comes again gets its number."""
    named: dict[str, T] = {}
    for title, figure in titled:
        slug, number = _slug(title), 2
        while slug in named:
            slug, number = f"{_slug(title)}-{number}", number + 1
        named[slug] = figure
    return list(named.items())


def _render(template: str, context: Context, script: str = "") -> str:
    """The page that a template makes of the context. The content security policy lets no other script run.

    Jinja escapes what comes from files, a missing name is an error, and what HTML does not admit becomes U+FFFD.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "name": display_name,
        "estimate": _estimate,
        "number": format_number,
        "signed": lambda value: ("+" if value > 0 else "") + format_number(value),
        "p_value": lambda p: f"p = {p:.2g}" if p >= 0.001 else ("p < 0.001" if math.isfinite(p) else ""),
        "seconds": format_seconds,
        "setting": format_setting,
        "cell": _cell,
        "slug": _slug,
    }
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"'sha256-{digest}'" if script else "'none'"
    return legible(environment.get_template(template).render(**context, script=script, script_source=policy))


def _estimate(measure: Measure, bare: bool = False) -> str:
    """`bare` is for rows of several runs, where a number that has no error stands alone."""
    lone = bare and not math.isfinite(measure.se)
    return format_number(measure.mean) if lone else format_estimate(measure.mean, measure.se)


def _cell(value: str | bool | int | float | None) -> str:
    """A cell of a lab's table; a number that is missing is a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else format_number(value)
