"""The lab's page: what its experiments promise and found, with figures on the page and beside their numbers."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from typing import Any

from distalign.report.numbers import format_number, format_seconds
from distalign.report.panels import left_out, looks, panel_png, panel_svg
from distalign.report.rendering import as_yaml, render
from distalign.report.results import ReportError
from distalign.report.shown import Measured, Table, read_lab

__all__ = ["file_names", "is_lab", "write_lab_report"]

_SHORT = 42  # characters of a cell that stay in one line


def is_lab(folder: Path) -> bool:
    """Whether the folder has an experiment's lab.json, or sub-folders that have one."""
    return bool(_files(folder))


def write_lab_report(folder: str | Path) -> Path:
    """Write report.html into a folder of the lab and return its path; every figure also becomes a PNG file.

    The folder has lab.json itself (one experiment) or sub-folders that have it (all of them). The PNG files are
    written beside each lab.json, named after the figure. Raises ReportError, which says where and what to do, if there
    is no lab.json or one is broken; nothing is written then.
    """
    folder = Path(folder)
    files = _files(folder)
    if not files:
        raise ReportError(f"{folder}: no lab.json here or in a sub-folder; give the folder that an experiment wrote")
    measured = [(path, read_lab(path)) for path in files]
    experiments = [_experiment(path, one) for path, one in measured]
    claims = [claim for experiment in experiments for claim in experiment["claims"]]
    alone = experiments[0] if len(experiments) == 1 else None
    judged = [claim.holds for claim in claims if claim.holds is not None]
    held = sum(judged)
    context = {
        "kind": "Lab",
        "title": alone["title"] if alone else "What the theory promises, measured",
        "name": folder.resolve().name,
        "held": held,
        "broken": len(judged) - held,
        "alone": alone is not None,
        "experiments": experiments,
        "time": format_seconds(sum(one.seconds for _, one in measured)),
        "source": "lab.json",
    }
    page = folder / "report.html"
    page.write_text(render("lab.html.j2", context), encoding="utf-8")
    return page


def _files(folder: Path) -> list[Path]:
    own = folder / "lab.json"
    return [own] if own.is_file() else sorted(folder.glob("*/lab.json"))


def _experiment(path: Path, measured: Measured) -> dict[str, Any]:
    """What the page shows of an experiment; its PNG files are written on the way."""
    shown = measured.shown
    names = file_names([panel.title for panel in shown.panels])
    figures = []
    for name, panel, look in zip(names, shown.panels, looks(shown.panels), strict=True):
        if png := panel_png(panel, look):
            (path.parent / f"{name}.png").write_bytes(png)
        note = left_out(panel)
        figures.append({"title": panel.title, "about": panel.about, "note": note, "svg": panel_svg(panel, look)})
    return {
        "name": measured.experiment,
        "anchor": _slug(measured.experiment),
        "title": shown.title,
        "about": shown.about,
        "claims": shown.claims,
        "held": sum(claim.holds is True for claim in shown.claims),
        "judged": sum(claim.holds is not None for claim in shown.claims),
        "figures": figures,
        "tables": [_table(table) for table in shown.tables],
        "settings": as_yaml(measured.settings),
        "time": format_seconds(measured.seconds),
    }


def _table(table: Table) -> dict[str, Any]:
    """Cells as (text, CSS classes: words or nothing); a number that is missing is a dash."""

    def cell(value: str | bool | int | float | None) -> tuple[str, str]:
        if value is None:
            return "–", ""
        if isinstance(value, bool):
            return "yes" if value else "no", ""
        if isinstance(value, str):
            return value, "words" if len(value) <= _SHORT else "words long"
        return format_number(value), ""

    return {
        "title": table.title,
        "about": table.about,
        "columns": [
            (name, "words" if any(isinstance(row[i], str) for row in table.rows) else "")
            for i, name in enumerate(table.columns)
        ],
        "rows": [[cell(value) for value in row] for row in table.rows],
    }


def _slug(text: str) -> str:
    """Lower-case ASCII words with hyphens between them; a Greek letter is written by its name."""
    spelled = re.sub("[α-ω]", lambda letter: f" {unicodedata.name(letter[0]).split()[-1]} ", text.lower())
    return re.sub(r"[^a-z0-9]+", "-", re.sub("['’]", "", spelled.lower())).strip("-") or "figure"


def file_names(titles: list[str]) -> list[str]:
    """A file name for each title; a title that comes again gets its number."""
    slugs: list[str] = []
    for title in titles:
        slug, number = _slug(title), 2
        while slug in slugs:
            slug, number = f"{_slug(title)}-{number}", number + 1
        slugs.append(slug)
    return slugs
