"""What the page's tables and bars show of a comparison: names, colours, written numbers; nothing is markup here."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from distalign.report.figures import row_look
from distalign.report.numbers import (
    best_rows,
    display_name,
    findings,
    format_band,
    format_estimate,
    format_interval,
    format_number,
    format_seconds,
    main_column,
)
from distalign.report.rendering import as_yaml
from distalign.report.results import REFERENCE, TARGET, Column, Difference, Measure, Results, Sample
from distalign.report.tables import judged_rows, ordered_rows

__all__ = [
    "difference_forest",
    "estimate_rows",
    "length_controlled_forest",
    "paired_columns",
    "paired_rows",
    "rating_forest",
    "sample_context",
    "second_bars",
    "settings_table",
    "win_rate_table",
    "written",
]

_MOST_SAMPLES = 200  # on a page; more would make it slow to open, and nobody reads them


def row_context(results: Results, name: str) -> dict[str, Any]:
    """Name, colour, and whether a row is the target or the reference."""
    return {
        "name": display_name(name),
        "color": row_look(results, name).color,
        "apart": name in (TARGET, REFERENCE),
    }


def estimate_rows(results: Results, *, bare: bool = False) -> list[dict[str, Any]]:
    """One row a policy; a cell is (text, n, whether it is the best mean of its column, stars, p), or None.

    `bare` is for rows of several runs: a number that has no error stands alone, and none is called the best, as they
    need not have the same prompts.
    """
    best = {column.key: set() if bare else best_rows(results, column) for column in results.filled_columns}

    def cell(name: str, column: Column) -> tuple[str, int | None, bool, str, str] | None:
        measure = results.methods[name].get(column.key)
        if measure is None:
            return None
        lone = bare and not math.isfinite(measure.se)
        text = format_number(measure.mean) if lone else format_estimate(measure.mean, measure.se)
        found = results.significance.get(name, {}).get(column.key)
        stars, p = (found.stars, _p_text(found.holm)) if found else ("", "")
        return text, measure.n, name in best[column.key], stars, p

    return [
        {**row_context(results, name), "cells": [cell(name, column) for column in results.filled_columns]}
        for name in ordered_rows(results)
    ]


def paired_columns(results: Results) -> list[Column]:
    """The columns that a method has a difference in."""
    return [c for c in results.columns if any(c.key in results.paired.get(name, {}) for name in results.trained)]


def paired_rows(results: Results) -> list[dict[str, Any]]:
    """One row a method; a cell is (text, n, better | worse | "", corrected p), or None without a difference."""

    def cell(name: str, column: Column) -> tuple[str, int | None, str, str] | None:
        d = results.paired[name].get(column.key)
        if d is None:
            return None
        verdict = "better" if (d.mean > 0) == (column.better == "higher") else "worse"
        verdict = verdict if column.better and d.clear else ""
        found = results.significance.get(name, {}).get(column.key)
        return format_interval(d.mean, d.low, d.high), d.n, verdict, _p_text(found.holm) if found else ""

    names = [name for name in results.trained if results.paired.get(name)]
    columns = paired_columns(results)
    return [{**row_context(results, name), "cells": [cell(name, c) for c in columns]} for name in names]


def difference_forest(results: Results) -> dict[str, Any] | None:
    """The main metric's differences from the reference as bars."""
    column = main_column(results)
    found = findings(results)
    if column is None or not found:
        return None
    differences = {finding.method: results.paired[finding.method][column.key] for finding in found}
    texts = {name: format_interval(d.mean, d.low, d.high) for name, d in differences.items()}
    title = f"{column.label}{f', {column.unit}' if column.unit else ''}"
    return {"title": title, **_forest(results, differences, texts, 0.0, "as the reference")}


def rating_forest(results: Results) -> dict[str, Any] | None:
    """Bradley–Terry ratings with their intervals as bars, the best first."""
    texts = {name: format_interval(r.mean, r.low, r.high) for name, r in results.ratings.items()}
    return _forest(results, results.ratings, texts, 0.0, "the reference") if texts else None


def length_controlled_forest(results: Results) -> dict[str, Any] | None:
    """Win rates against the reference at equal length with their intervals as bars, the best first."""
    found = results.length_controlled
    texts = {name: format_band(r.mean, r.low, r.high) for name, r in found.items()}
    return _forest(results, found, texts, 0.5, "as often as the reference") if texts else None


def win_rate_table(results: Results) -> dict[str, Any] | None:
    """P(row preferred to column) with its error; a tint says how far from one half, and to which side."""
    matrix = results.win_rates.matrix
    if not matrix:
        return None
    names = judged_rows(results)

    def cell(measure: Measure | None) -> tuple[str, int | None, float] | None:
        if measure is None:
            return None
        tint = round(100 * (measure.mean - 0.5), 1) if math.isfinite(measure.mean) else 0.0
        return format_estimate(measure.mean, measure.se), measure.n, tint

    rows = [
        {**row_context(results, one), "cells": [cell(matrix.get(one, {}).get(other)) for other in names]}
        for one in names
    ]
    return {"judge": results.win_rates.judge, "columns": [display_name(name) for name in names], "rows": rows}


def settings_table(settings: Mapping[str, Mapping[str, Any]], *, only_different: bool) -> dict[str, Any] | None:
    """Settings side by side, a column a name; None where nothing is to be shown. A setting that one lacks is ""."""
    flat = {name: dict(_flattened(own)) for name, own in settings.items()}
    keys = list(dict.fromkeys(key for own in flat.values() for key in own))
    rows = [(key, [own.get(key, "") for own in flat.values()]) for key in keys]
    shown = [(key, values) for key, values in rows if not only_different or len(set(values)) > 1]
    if len(flat) < 2 or not shown:
        return None
    return {"columns": [display_name(name) for name in flat], "rows": shown, "same": len(rows) - len(shown)}


def sample_context(samples: Sequence[Sample], results: Results | None) -> dict[str, Any]:
    """The samples that the page shows, the number of all, and the policies to choose from: (name, colour)."""
    names = list(dict.fromkeys(name for sample in samples[:_MOST_SAMPLES] for name, _ in sample.responses))
    colors = {name: row_look(results, name).color if results else "var(--c1)" for name in names}
    numbers = {name: number for number, name in enumerate(names)}
    shown = [
        {
            "prompt": sample.prompt,
            "note": sample.note,
            "responses": [(display_name(name), colors[name], text, numbers[name]) for name, text in sample.responses],
        }
        for sample in samples[:_MOST_SAMPLES]
    ]
    policies = [(display_name(name), colors[name]) for name in names] if results and len(names) > 1 else []
    return {"samples": shown, "samples_total": len(samples), "policies": policies}


def second_bars(results: Results) -> list[tuple[str, str, float, str]]:
    """Every part of the run with its duration, the per cent of the longest one, and its colour."""
    longest = max(results.seconds.values(), default=0.0) or 1.0
    return [
        (display_name(name), format_seconds(seconds), round(100 * seconds / longest, 1), row_look(results, name).color)
        for name, seconds in results.seconds.items()
    ]


def written(value: Any) -> str:
    """A value of any kind as text."""
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", "−")
    if isinstance(value, dict | list):
        return as_yaml(value).strip()
    return str(value)


def _forest(
    results: Results, intervals: Mapping[str, Difference], texts: Mapping[str, str], zero: float, zero_text: str
) -> dict[str, Any]:
    """Intervals as bars: ends, mean and zero in per cent of the width that holds them all."""
    ends = [zero, *(v for d in intervals.values() for v in (d.low, d.mean, d.high) if math.isfinite(v))]
    low, high = min(ends), max(ends)

    def place(value: float, unknown: float) -> float:
        return round(2 + 96 * ((value if math.isfinite(value) else unknown) - low) / ((high - low) or 1.0), 2)

    rows = []
    for name, d in intervals.items():
        left, right = place(d.low, d.mean), place(d.high, d.mean)
        where = {"low": left, "mean": place(d.mean, zero), "width": round(right - left, 2)}
        rows.append({**row_context(results, name), "text": texts[name], **where})
    return {"rows": rows, "zero": place(zero, zero), "zero_text": zero_text}


def _flattened(value: Any, path: str = "") -> Iterable[tuple[str, str]]:
    """Every setting by its dotted path, as text."""
    if isinstance(value, Mapping) and value:
        for key, part in value.items():
            yield from _flattened(part, f"{path}.{key}" if path else str(key))
    else:
        yield path, json.dumps(value, ensure_ascii=False, default=str).strip('"') if value is not None else "none"


def _p_text(p: float) -> str:
    return f"p = {p:.2g}" if p >= 0.001 else ("p < 0.001" if math.isfinite(p) else "")
