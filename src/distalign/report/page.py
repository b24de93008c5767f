"""The page: gathers what run folders hold and fills a template; tables and figures become files beside it."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from distalign.report.drawing import TEMPLATES, Figure, looks, panel_figure, points_left_out
from distalign.report.figures import (
    calibration_figures,
    health_figures,
    learning_figures,
    length_figures,
    plane_figure,
    row_look,
    training_figures,
)
from distalign.report.numbers import (
    Finding,
    best_rows,
    findings,
    format_estimate,
    format_interval,
    format_number,
    format_seconds,
    format_setting,
    main_column,
    seeds_text,
    share_of_reference,
)
from distalign.report.results import (
    TRAINING,
    Difference,
    Measure,
    ReportError,
    Results,
    Run,
    Sample,
    display_name,
    legible,
    merged,
    read_run,
    read_runs,
)
from distalign.report.shown import Measured, Panel, read_lab
from distalign.report.tables import STARS, counts_text, write_csv, write_tables

T = TypeVar("T")

_MOST_SAMPLES = 200  # on a page; more would make it slow to open, and nobody reads them


class Forest(NamedTuple):
    """Numbers as bars with their intervals: (row, text, ends and mean in per cent of the width), and where zero is."""

    title: str
    rows: list[tuple[str, str, float, float, float]]
    zero: float
    zero_text: str


class SettingsTable(NamedTuple):
    """Settings side by side, one column per name: (setting, values) pairs; `same` more are the same for all."""

    columns: list[str]
    rows: list[tuple[str, list[str]]]
    same: int


@dataclass(frozen=True)
class Page:
    """What report.html.j2 shows; a section without content is left out. `runs` are those that were merged."""

    kind: str
    title: str
    name: str
    source: str
    facts: list[str]
    samples: list[Sample]
    recipe: str
    results: Results | None = None
    runs: Sequence[Run] = ()
    findings: list[Finding] = field(default_factory=list)
    best: dict[str, set[str]] = field(default_factory=dict)
    difference_forest: Forest | None = None
    rating_forest: Forest | None = None
    length_controlled_forest: Forest | None = None
    plane: Figure | None = None
    learning: list[Figure] = field(default_factory=list)
    health: list[Figure] = field(default_factory=list)
    calibration: list[Figure] = field(default_factory=list)
    lengths: list[Figure] = field(default_factory=list)
    settings_table: SettingsTable | None = None
    last: list[tuple[str, float, float]] = field(default_factory=list)
    stars: str = STARS
    most_samples: int = _MOST_SAMPLES

    @property
    def figures(self) -> list[Figure]:
        """Every figure of the page."""
        plane = [self.plane] if self.plane else []
        return [*self.learning, *self.health, *self.lengths, *self.calibration, *plane]


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
        if not folder:
            raise ReportError("no run folder was given; give at least one")
        if out is None:
            raise ReportError("several run folders make one page; say which folder it is to be written into")
        runs = read_runs([Path(path) for path in folder])
        together = merged(runs)
        return _write(_comparison(together, runs), together.results, Path(out), files)
    folder = Path(folder)
    is_run = any((folder / name).exists() for name in ("results.json", "metrics.jsonl"))
    if not is_run and out is None and (lab_files := _lab_files(folder)):
        return _write_lab_report(folder, lab_files)
    run = read_run(folder)
    page = _training(run) if run.kind == TRAINING else _comparison(run)
    return _write(page, run.results, Path(out or folder), files)


def _write(page: Page, results: Results, out: Path, files: bool) -> Path:
    script = (TEMPLATES / "search.js").read_text(encoding="utf-8")
    text = _render("report.html.j2", {**vars(page), "color": lambda name: row_look(page.results, name).color}, script)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.html").write_text(text, encoding="utf-8")
    if files:
        if page.last:
            write_csv(out / "tables" / "last.csv", ["metric", "value", "step"], page.last)
        else:
            write_tables(results, out / "tables")
        for name, figure in _file_names([(figure.file_title or figure.title, figure) for figure in page.figures]):
            (out / "figures").mkdir(exist_ok=True)
            (out / "figures" / f"{name}.png").write_bytes(figure.png)
    return out / "report.html"


def _comparison(run: Run, runs: Sequence[Run] = ()) -> Page:
    """The page of a comparison or an evaluation, or of several runs that were merged into one.

    No policy of several runs is called the best or the headline, as the runs need not have the same prompts.
    """
    results, main = run.results, main_column(run.results)
    headline = [] if runs else findings(results)
    n = results.paired[headline[0].method][main.key].n if headline and main else None
    facts = [seeds_text(results.seeds), counts_text(results) if n is None else f"n = {n}"]
    facts += ["95 % intervals"] if headline else []
    facts += ["per cent of the reference's mean"] if not runs and share_of_reference(results) else []
    settings = run.settings if runs else results.settings.get("methods")
    differences = {f.method: results.paired[f.method][main.key] for f in headline} if main else {}
    unit = f", {main.unit}" if main and main.unit else ""
    controlled = "Win rate against the reference at equal length"
    return Page(
        kind=run.kind,
        title=f"{len(runs)} run{'s' if len(runs) != 1 else ''} side by side"
        if runs
        else results.title or results.name or run.label,
        name=results.name or run.label,
        source="results.json and metrics.jsonl" if runs else "results.json",
        facts=facts,
        samples=run.samples,
        recipe="" if runs else format_setting(results.settings),
        results=results,
        runs=runs,
        findings=headline,
        best={} if runs else {column.key: best_rows(results, column) for column in results.filled_columns},
        difference_forest=_forest(f"{main.label if main else ''}{unit}", differences, 0.0, "as the reference"),
        rating_forest=_forest("Bradley–Terry rating, nats", results.ratings, 0.0, "the reference"),
        length_controlled_forest=_forest(controlled, results.length_controlled, 0.5, "as often as the reference", ""),
        plane=plane_figure(results),
        learning=learning_figures(results) or (training_figures(results, run.logs) if len(run.logs) > 1 else []),
        health=health_figures(results, run.logs),
        calibration=calibration_figures(results),
        lengths=length_figures(results),
        settings_table=_settings_table(settings, only_different=bool(runs)),
    )


def _training(run: Run) -> Page:
    ((rows,),) = run.logs.values()
    last = {key: (row[key], row["step"]) for row in rows for key in row if key != "step"}
    return Page(
        kind=run.kind,
        title=run.label,
        name=run.label,
        source="metrics.jsonl",
        facts=[f"{rows[-1]['step']:.0f} steps", f"{len(rows)} lines of metrics"],
        samples=run.samples,
        recipe=run.recipe,
        learning=training_figures(None, run.logs),
        health=health_figures(None, run.logs),
        last=[(key, *last[key]) for key in sorted(last)],
    )


def _forest(
    title: str, differences: Mapping[str, Difference], zero: float, zero_text: str, sign: str = "+"
) -> Forest | None:
    """Intervals as bars, placed in per cent of the width that holds them all; None without any."""
    ends = [zero, *(v for d in differences.values() for v in (d.low, d.mean, d.high) if math.isfinite(v))]
    low, high = min(ends), max(ends)

    def place(value: float, unknown: float) -> float:
        return round(2 + 96 * ((value if math.isfinite(value) else unknown) - low) / ((high - low) or 1.0), 2)

    rows = []
    for name, d in differences.items():
        text = format_interval(d.mean, d.low, d.high, sign=sign)
        rows.append((name, text, place(d.low, d.mean), place(d.high, d.mean), place(d.mean, zero)))
    return Forest(title, rows, place(zero, zero), zero_text) if rows else None


def _settings_table(settings: object, *, only_different: bool) -> SettingsTable | None:
    """Settings by name side by side; None where there are no two to compare. A setting that one lacks is ""."""
    if not isinstance(settings, Mapping) or not all(isinstance(values, Mapping) for values in settings.values()):
        return None
    flat = {name: dict(_flattened(values)) for name, values in settings.items()}
    keys = list(dict.fromkeys(key for values in flat.values() for key in values))
    rows = [(key, [values.get(key, "") for values in flat.values()]) for key in keys]
    shown = [(key, values) for key, values in rows if not only_different or len(set(values)) > 1]
    if len(flat) < 2 or not shown:
        return None
    return SettingsTable([display_name(name) for name in flat], shown, len(rows) - len(shown))


def _flattened(value: object, path: str = "") -> Iterable[tuple[str, str]]:
    """Every setting by its dotted path, as text."""
    if isinstance(value, Mapping) and value:
        for key, part in value.items():
            yield from _flattened(part, f"{path}.{key}" if path else str(key))
    else:
        yield path, json.dumps(value, ensure_ascii=False, default=str).strip('"') if value is not None else "none"


def _lab_files(folder: Path) -> list[Path]:
    """lab.json of the folder itself (one experiment), or those of its sub-folders (all of them)."""
    path = folder / "lab.json"
    return [path] if path.is_file() else sorted(folder.glob("*/lab.json"))


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
    figures = [panel_figure(panel, look) for panel, look in zip(panels, looks(panels), strict=True)]
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


def _render(template: str, context: dict[str, Any], script: str = "") -> str:
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
        "interval": lambda d: format_interval(d.mean, d.low, d.high),
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
