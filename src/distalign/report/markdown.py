"""A comparison as Markdown: the table, and what separates from what, with the intervals that say so."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from distalign.report.numbers import (
    display_name,
    format_band,
    format_estimate,
    format_interval,
    format_seconds,
    seeds_text,
)
from distalign.report.results import REFERENCE, Column, Difference, Results
from distalign.report.tables import STARS, counts_text, heading, judged_rows, ordered_rows

__all__ = ["results_markdown"]

# Two-sided 95 % quantile of Student's t by degrees of freedom: few seeds need it, many get the last one.
_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
MAIN = "forward_kl"

# What may begin markup: a bracket where it ends a link's text, a low line where it is not within a word.
_MARKUP = re.compile(r"[\\`*<>&|~#$]|\](?=[(\[])|(?<![^\W_])_|_(?![^\W_])")


def results_markdown(content: dict[str, Any], command: str = "") -> str:
    """The content of results.json as Markdown, in which its texts are no markup. `command` is what made it.

    Raises ReportError if it is no comparison.
    """
    results = Results.parse(content)
    parts = [f"# Results: {_plain(results.name)}", _origin(results, command), _table(results)]
    parts += [_win_rates(results), _standings(results)]
    if any(MAIN in row for row in results.paired.values()):
        parts += [_changes(results), _separations(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _origin(results: Results, command: str) -> str:
    about = results.environment
    versions = ", ".join(f"{name} {about[name]}" for name in ("distalign", "torch", "transformers") if name in about)
    work = f"{format_seconds(float(sum(results.seconds.values())))} of work" if results.seconds else ""
    facts = (seeds_text(results.seeds).capitalize(), counts_text(results), about.get("device", ""), versions, work)
    lines = [
        f"Made by {_code(command)}." if command else "",
        f"{_plain('; '.join(str(fact) for fact in facts if fact))}.",
        "Mean ± standard error, over held-out prompts (over pairs for accuracy, NLL and ECE), given these runs.",
    ]
    return "\n".join(line for line in lines if line)


def _table(results: Results) -> str:
    columns = results.filled_columns
    rows = [["", *(heading(column) for column in columns)]]
    for name in ordered_rows(results):
        rows.append([display_name(name), *(_cell(results, name, column) for column in columns)])
    about = [f"* {_plain(column.label)}: {_plain(column.about)}" for column in columns if column.about]
    if any(one.stars for row in results.significance.values() for one in row.values()):
        about.append(f"* Stars: {STARS}")
    return "\n".join([*_lines(rows), "", *about])


def _cell(results: Results, name: str, column: Column) -> str:
    measure = results.methods[name].get(column.key)
    if measure is None:
        return "–"
    found = results.significance.get(name, {}).get(column.key)
    stars = found.stars if found else ""
    return f"{format_estimate(measure.mean, measure.se)}{stars}"


def _win_rates(results: Results) -> str:
    matrix = results.win_rates.matrix
    if not matrix:
        return ""
    names = judged_rows(results)
    rows = [["P(row ≻ column)", *map(display_name, names)]]
    for one in names:
        found = [matrix.get(one, {}).get(other) for other in names]
        rows.append([display_name(one), *("–" if m is None else format_estimate(m.mean, m.se) for m in found)])
    judge = f"Judged by {_plain(results.win_rates.judge)}; mean" if results.win_rates.judge else "Mean"
    return "\n".join(["## Win rates", "", *_lines(rows), "", f"{judge} ± standard error."])


def _standings(results: Results) -> str:
    names = list(dict.fromkeys([*results.ratings, *results.length_controlled]))
    if not names:
        return ""
    rows = [["", "Bradley–Terry rating, nats", "win rate against π₀ at equal length"]]
    for name in names:
        rating, controlled = results.ratings.get(name), results.length_controlled.get(name)
        rows.append(
            [
                display_name(name),
                _written(rating) if rating else "–",
                format_band(controlled.mean, controlled.low, controlled.high) if controlled else "–",
            ]
        )
    return "\n".join(["## Ratings", "", *_lines(rows), "", "With 95 % intervals; the reference is at 0."])


def _changes(results: Results) -> str:
    rows = [["KL(π*‖π) against π₀, nats", "over prompts", "by seed", "over seeds", "kept steps"]]
    for name in results.trained:
        own = results.paired.get(name, {}).get(MAIN)
        if own is None:
            continue
        gaps = _gaps(results, name, REFERENCE)
        kept = ", ".join(map(str, results.kept_step.get(name, [])))
        told = ", ".join(f"{gap:+.2f}" for gap in gaps).replace("-", "−")
        rows.append([display_name(name), _written(own), told, _over_seeds(gaps), kept])
    return "\n".join(
        ["## Change from the start", "", *_lines(rows), "", "Differences with 95 % intervals: paired by prompt, and t."]
    )


def _separations(results: Results) -> str:
    rows = [["difference in KL(π*‖π), nats", "over prompts", "over seeds", ""]]
    apart, together = [], []
    for one, other in combinations(results.trained, 2):
        found = results.between.get(one, {}).get(other, {}).get(MAIN)
        if found is None:
            continue
        gaps = _gaps(results, one, other)
        name = f"{display_name(one)} − {display_name(other)}"
        clear = found.clear and (len(gaps) < 2 or _clear(gaps))
        (apart if clear else together).append(name)
        rows.append([name, _written(found), _over_seeds(gaps), "separates" if clear else "does not"])
    if len(rows) == 1:
        return ""
    seeds = len(results.seeds)
    rule = (
        "both intervals exclude 0" if seeds > 1 else "its interval excludes 0 (one seed: nothing is known over seeds)"
    )
    return "\n".join(
        [
            "## What separates",
            "",
            *_lines(rows),
            "",
            f"A pair separates if {rule}; nothing corrects for the number of pairs.",
            f"Separate: {_plain('; '.join(apart)) or 'none'}.",
            f"Not told apart by these runs: {_plain('; '.join(together)) or 'none'}.",
        ]
    )


def _gaps(results: Results, one: str, other: str) -> list[float]:
    """Difference of the means of each seed."""
    pairs = zip(results.by_seed.get(one, []), results.by_seed.get(other, []), strict=False)
    return [a[MAIN].mean - b[MAIN].mean for a, b in pairs if MAIN in a and MAIN in b]


def _t_interval(values: Sequence[float]) -> tuple[float, float, float]:
    n, mean = len(values), sum(values) / len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
    half = _T[min(n - 2, len(_T) - 1)] * spread
    return mean, mean - half, mean + half


def _clear(values: Sequence[float]) -> bool:
    _, low, high = _t_interval(values)
    return low > 0 or high < 0


def _over_seeds(values: Sequence[float]) -> str:
    return "–" if len(values) < 2 else f"{format_interval(*_t_interval(values))} (n = {len(values)})"


def _written(found: Difference) -> str:
    return format_interval(found.mean, found.low, found.high)


def _lines(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = [f"| {' | '.join(map(_plain, row))} |" for row in rows]
    return [head, f"|{' --- |' * len(rows[0])}", *body]


def _plain(text: str) -> str:
    """A text in one line, with a backslash before everything that may begin markup."""
    return _MARKUP.sub(r"\\\g<0>", " ".join(text.split()))


def _code(text: str) -> str:
    """A text in one line as code, between more backticks than it has in a row."""
    text = " ".join(text.split())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{text}{fence}" if len(fence) == 1 else f"{fence} {text} {fence}"
