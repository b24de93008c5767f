"""The table of a comparison in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distalign.report.numbers import best_rows, display_name, format_estimate, seeds_text
from distalign.report.results import REFERENCE, TARGET, Column, Results

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["STARS", "results_table"]

STARS = (
    "one, two, three where p is below 0.05, 0.01, 0.001 for no difference from the reference: a paired bootstrap, "
    "corrected for the number of comparisons by Holm's method."
)


def results_table(results: dict[str, Any]) -> Table:
    """Mean ± standard error of every method and metric, from the content of results.json; the best means are bold.

    The title has the seeds and the counts. Raises ReportError if the content is not a comparison.
    """
    from rich.table import Table
    from rich.text import Text

    checked = Results.parse(results)
    columns = checked.filled_columns
    table = Table(title=Text(_title(checked)), title_justify="left", caption="mean ± standard error; bold: best mean")
    # However narrow the terminal, a row keeps its name.
    table.add_column("", no_wrap=True, min_width=max(len(display_name(name)) for name in checked.methods))
    for column in columns:
        table.add_column(Text(heading(column)), justify="right", no_wrap=True)
    best = {column.key: best_rows(checked, column) for column in columns}
    rows = ordered_rows(checked)
    for name in rows:
        cells = [_cell(checked, name, column, name in best[column.key]) for column in columns]
        last_apart = name in (TARGET, REFERENCE) and name != rows[-1] and rows[rows.index(name) + 1] in checked.trained
        table.add_row(
            Text(display_name(name)), *(Text(text, style) for text, style in cells), end_section=bool(last_apart)
        )
    return table


def ordered_rows(results: Results) -> list[str]:
    """Target and reference first, then the methods in their order."""
    return [name for name in (TARGET, REFERENCE) if name in results.methods] + results.trained


def judged_rows(results: Results) -> list[str]:
    """The rows that responses were compared of, in the order of the table; names that it lacks come last."""
    matrix = results.win_rates.matrix
    known = {*matrix, *(other for row in matrix.values() for other in row)}
    names = [name for name in ordered_rows(results) if name in known]
    return names + sorted(known - {*names})


def heading(column: Column) -> str:
    """A column's label with its unit and an arrow towards better."""
    arrow = {"lower": " ↓", "higher": " ↑", None: ""}[column.better]
    return f"{column.label}{f', {column.unit}' if column.unit else ''}{arrow}"


def counts_text(results: Results) -> str:
    """How many values the means are over: n = 48, or n = 48–128 when the metrics differ."""
    counts = sorted({m.n for row in results.methods.values() for m in row.values() if m.n is not None})
    if not counts:
        return ""
    return f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]}–{counts[-1]}"


def _title(results: Results) -> str:
    details = [part for part in (seeds_text(results.seeds), counts_text(results)) if part]
    name = results.title or results.name or "comparison"
    return f"{name} ({', '.join(details)})" if details else name


def _cell(results: Results, name: str, column: Column, best: bool) -> tuple[str, str]:
    measure = results.methods[name].get(column.key)
    if measure is None:
        return "–", "dim"
    return format_estimate(measure.mean, measure.se), "bold" if best else ""
