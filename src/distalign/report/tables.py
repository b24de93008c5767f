"""The tables of a comparison: in the terminal, as Markdown with what separates from what, and as CSV files."""

from __future__ import annotations

import csv
import re
import statistics
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distalign.report.numbers import (
    best_rows,
    format_estimate,
    format_interval,
    format_seconds,
    mean_interval,
    seeds_text,
)
from distalign.report.results import REFERENCE, Column, Difference, Measure, Results, display_name

if TYPE_CHECKING:
    from distalign.report.terminal import Fitting

STARS = (
    "one, two, three where p is below 0.05, 0.01, 0.001 for no difference from the reference: a paired bootstrap, "
    "corrected for the number of comparisons by Holm's method."
)

_MAIN = "forward_kl"  # the metric whose separations the Markdown states

# What is seen first: how good a policy is, how far it went for it, and how long it talks.
_FIRST = (_MAIN, "win_rate", "reward", "kl_reference", "length", "accuracy", "nll", "entropy", "reverse_kl")
MAIN_TABLE = _FIRST[:6]  # on a page; the others stand in a table below it

# What may begin markup: a bracket where it ends a link's text, a low line where it is not within a word.
_MARKUP = re.compile(r"[\\`*<>&|~#$]|\](?=[(\[])|(?<![^\W_])_|_(?![^\W_])")

_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")  # the wide ones are read as the others


def heading(column: Column) -> str:
    """A column's label with its unit and an arrow towards better."""
    return f"{column.label}{f', {column.unit}' if column.unit else ''}{_arrow(column)}"


def _arrow(column: Column) -> str:
    return {"lower": " ↓", "higher": " ↑", None: ""}[column.better]


def counts_text(results: Results, key: str = "") -> str:
    """How many values the means are over, of one metric or of all: n = 48, or n = 48–128 where they differ."""
    counts = sorted({m.n for row in results.methods.values() for name, m in row.items() if m.n and key in ("", name)})
    if not counts:
        return ""
    return f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]}–{counts[-1]}"


def _cell(results: Results, name: str, column: Column) -> str:
    measure = results.methods[name].get(column.key)
    return format_estimate(measure.mean, measure.se) if measure else "–"


def _interval(difference: Difference) -> str:
    return format_interval(difference.mean, difference.low, difference.high)


def results_table(content: dict[str, Any]) -> Fitting:
    """Mean ± standard error of every method and metric, from the content of results.json; the best means are bold.

    The title has the seeds and the counts. Raises ReportError if the content is not a comparison.
    """
    from rich.text import Text

    from distalign.report.terminal import Fitting, Texts

    results = Results.parse(content)
    details = ", ".join(part for part in (seeds_text(results.seeds), counts_text(results)) if part)
    title = results.name or "comparison"
    columns = []
    for column in sorted(results.filled_columns, key=importance):
        best = best_rows(results, column)
        cells = [Text(_cell(results, name, column), "bold" if name in best else "") for name in results.rows]
        columns.append(Texts(f"{column.label}{_arrow(column)}\n{column.unit or ''}", cells))
    apart = len(results.rows) - len(results.trained)
    return Fitting(
        Texts("", [display_name(name) for name in results.rows]),
        columns,
        title=f"{title} ({details})" if details else title,
        note="mean ± standard error; bold: best mean",
        line_after=apart - 1,
    )


def importance(column: Column) -> int:
    """Where a column stands, as there is room for a few; those that nobody ranked come last."""
    return _FIRST.index(column.key) if column.key in _FIRST else len(_FIRST)


def results_markdown(content: dict[str, Any], command: str = "") -> str:
    """The content of results.json as Markdown, in which its texts are no markup. `command` is what made it.

    Raises ReportError if it is no comparison.
    """
    results = Results.parse(content)
    parts = [f"# Results: {_plain(results.name)}", _origin(results, command), _estimates(results)]
    parts += [_win_rates(results), _ratings(results)]
    if any(_MAIN in row for row in results.paired.values()):
        parts += [_changes(results), _separations(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _origin(results: Results, command: str) -> str:
    about = results.environment
    versions = ", ".join(f"{name} {about[name]}" for name in ("distalign", "torch", "transformers") if name in about)
    work = f"{format_seconds(float(sum(results.seconds.values())))} of work" if results.seconds else ""
    facts = (seeds_text(results.seeds).capitalize(), counts_text(results), about.get("device", ""), versions, work)
    lines = [
        f"Made by {_plain(command)}." if command else "",
        f"{_plain('; '.join(str(fact) for fact in facts if fact))}.",
        "Mean ± standard error, over held-out prompts, given these runs.",
    ]
    return "\n".join(line for line in lines if line)


def _estimates(results: Results) -> str:
    columns = results.filled_columns
    rows = [["", *(heading(column) for column in columns)]]
    for name in results.rows:
        tests = results.significance.get(name, {})
        stars = [tests[column.key].stars if column.key in tests else "" for column in columns]
        cells = [_cell(results, name, column) + star for column, star in zip(columns, stars, strict=True)]
        rows.append([display_name(name), *cells])
    about = [f"* {_plain(column.label)}: {_plain(column.about)}" for column in columns if column.about]
    if results.starred:
        about.append(f"* Stars: {STARS}")
    return "\n".join([*_lines(rows), "", *about])


def _win_rates(results: Results) -> str:
    matrix, names = results.win_rates.matrix, results.judged_rows
    rows = [["P(row ≻ column)", *map(display_name, names)]]
    for first in names:
        measures = [matrix.get(first, {}).get(second) for second in names]
        rows.append([display_name(first), *("–" if m is None else format_estimate(m.mean, m.se) for m in measures)])
    judge = f"Judged by {_plain(results.win_rates.judge)}; mean" if results.win_rates.judge else "Mean"
    return _section("Win rates", rows, f"{judge} ± standard error.")


def _ratings(results: Results) -> str:
    rows = [["", "Bradley–Terry rating, nats", "win rate against π₀ at equal length"]]
    for name in dict.fromkeys([*results.ratings, *results.length_controlled]):
        rating, controlled = results.ratings.get(name), results.length_controlled.get(name)
        rate = format_interval(controlled.mean, controlled.low, controlled.high, sign="") if controlled else "–"
        rows.append([display_name(name), _interval(rating) if rating else "–", rate])
    return _section("Ratings", rows, "With 95 % intervals; the reference is at 0.")


def _changes(results: Results) -> str:
    rows = [["KL(π*‖π) against π₀, nats", "over prompts", "by seed", "over seeds", "step measured"]]
    for name in results.trained:
        difference = results.paired.get(name, {}).get(_MAIN)
        if difference is not None:
            gaps = _gaps(results, name, REFERENCE)
            by_seed = ", ".join(f"{gap:+.2f}" for gap in gaps).replace("-", "−")
            steps = ", ".join(map(str, results.kept_step.get(name, [])))
            rows.append([display_name(name), _interval(difference), by_seed, _over_seeds(gaps), steps])
    return _section("Change from the start", rows, "Differences with 95 % intervals: paired by prompt, and t.")


def _separations(results: Results) -> str:
    rows = [["difference in KL(π*‖π), nats", "over prompts", "over seeds", ""]]
    for first, second in combinations(results.trained, 2):
        difference = results.between.get(first, {}).get(second, {}).get(_MAIN)
        if difference is not None:
            gaps = _gaps(results, first, second)
            clear = difference.clear and (len(gaps) < 2 or _t_interval(gaps).clear)
            pair = f"{display_name(first)} − {display_name(second)}"
            rows.append([pair, _interval(difference), _over_seeds(gaps), "separates" if clear else "does not"])
    pairs = {verdict: "; ".join(row[0] for row in rows if row[3] == verdict) for verdict in ("separates", "does not")}
    one_seed = "its interval excludes 0 (one seed: nothing is known over seeds)"
    rule = "both intervals exclude 0" if len(results.seeds) > 1 else one_seed
    about = (
        f"A pair separates if {rule}; nothing corrects for the number of pairs.\n"
        f"Separate: {_plain(pairs['separates']) or 'none'}.\n"
        f"Not told apart by these runs: {_plain(pairs['does not']) or 'none'}."
    )
    return _section("What separates", rows, about)


def _gaps(results: Results, first: str, second: str) -> list[float]:
    """Difference of the means of each seed."""
    pairs = zip(results.by_seed.get(first, []), results.by_seed.get(second, []), strict=False)
    return [a[_MAIN].mean - b[_MAIN].mean for a, b in pairs if _MAIN in a and _MAIN in b]


def _t_interval(values: Sequence[float]) -> Difference:
    n = len(values)
    return mean_interval(Measure(mean=statistics.fmean(values), se=statistics.stdev(values) / n**0.5, n=n))


def _over_seeds(values: Sequence[float]) -> str:
    return "–" if len(values) < 2 else f"{_interval(_t_interval(values))} (n = {len(values)})"


def _section(title: str, rows: Sequence[Sequence[str]], about: str) -> str:
    """A heading, a table and a line about it; "" for a table that has only its head."""
    return "\n".join([f"## {title}", "", *_lines(rows), "", about]) if len(rows) > 1 else ""


def _lines(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = [f"| {' | '.join(map(_plain, row))} |" for row in rows]
    return [head, f"|{' --- |' * len(rows[0])}", *body]


def _plain(text: str) -> str:
    """A text in one line, with a backslash before everything that may begin markup."""
    return _MARKUP.sub(r"\\\g<0>", " ".join(text.split()))


def write_tables(results: Results, folder: Path) -> None:
    """Write one CSV file per table into the folder: estimates, differences, win_rates, ratings, length_controlled.

    Names are the rows' and columns' own; a number that is not known is nan, a count that is not known is empty.
    """
    units = {column.key: column.unit or "" for column in results.columns}
    estimates, differences = [], []
    for name, row in results.methods.items():
        for key, m in row.items():
            test = results.significance.get(name, {}).get(key)
            estimates.append((name, key, units.get(key), m.mean, m.se, m.n, test.holm if test else None))
    for name, row in results.paired.items():
        differences += [(name, key, units.get(key), d.mean, d.low, d.high, d.n) for key, d in row.items()]
    wins = [(a, b, m.mean, m.se, m.n) for a, row in results.win_rates.matrix.items() for b, m in row.items()]
    metric, interval = ["policy", "metric", "unit", "mean"], ["policy", "mean", "low", "high"]
    write_csv(folder / "estimates.csv", [*metric, "se", "n", "p_holm"], [row for row in estimates if row[1] in units])
    write_csv(
        folder / "differences.csv", [*metric, "low", "high", "n"], [row for row in differences if row[1] in units]
    )
    write_csv(folder / "win_rates.csv", ["policy", "against", "mean", "se", "n"], wins)
    for table in ("ratings", "length_controlled"):
        rows = [(name, r.mean, r.low, r.high) for name, r in getattr(results, table).items()]
        write_csv(folder / f"{table}.csv", interval, rows)


def write_csv(path: Path, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write a table of texts and numbers, one line per row; None is empty. A table without rows is not written.

    A text that a spreadsheet would take for a formula has an apostrophe before it.
    """
    if rows:
        path.parent.mkdir(exist_ok=True)
        with path.open("w", encoding="utf-8", newline="") as file:
            # Quoted, a text cannot end its cell where a spreadsheet takes another character for the separator.
            writer = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
            writer.writerows([[_inert(value) for value in row] for row in (head, *rows)])


def _inert(value: object) -> object:
    """A text that begins as a formula does, behind an apostrophe; anything else as it is."""
    if value is None:
        return ""
    return f"'{value}" if isinstance(value, str) and value.lstrip().startswith(_FORMULA) else value
