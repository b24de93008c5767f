"""Numbers as people read them, and the sentences that say what was found."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from distalign.report.results import REFERENCE, TARGET, Column, Results

__all__ = [
    "Finding",
    "display_name",
    "findings",
    "format_band",
    "format_estimate",
    "format_interval",
    "format_number",
    "format_seconds",
]

_SUPERSCRIPTS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")

_WORDS = {
    "forward_kl": "the forward KL to the target",
    "reverse_kl": "the reverse KL to the target",
    "accuracy": "the preference accuracy",
}


class Finding(NamedTuple):
    """What one method did to the main metric: a sentence about it, and whether that is good."""

    method: str
    sentence: str
    verdict: Literal["better", "worse", "unchanged", "undecided"]


def format_estimate(mean: float, se: float) -> str:
    """Mean ± standard error, to the digits that the error leaves: 10.9 ± 0.9, 0.758 ± 0.012.

    The error keeps two digits when it starts with 1 or 2 and one otherwise. An unknown error (NaN) is shown as "?".
    """
    if not math.isfinite(mean):
        return _not_finite(mean)
    if not math.isfinite(se):
        return f"{_minus(f'{mean:.3g}')} ± ?"
    decimals = _decimals(se)
    if se < 1e-12:
        return f"{_minus(f'{mean:.3g}')} ± 0"
    if decimals > 6:
        return f"{_minus(f'{mean:.3g}')} ± {se:.1g}"
    return f"{_minus(f'{mean:.{decimals}f}')} ± {se:.{decimals}f}"


def format_number(value: int | float) -> str:
    """Three significant digits: 0.0123, 65,500, 1.2·10⁻⁷; a whole number keeps all of its digits."""
    if not math.isfinite(value):
        return _not_finite(value)
    if isinstance(value, int) or value == 0:
        return _minus(f"{value:,.0f}")
    rounded = float(f"{value:.3g}")
    if 1e-3 <= abs(rounded) < 1e5:
        return _minus(f"{rounded:,.0f}" if abs(rounded) >= 1000 else f"{rounded:g}")
    digits, exponent = f"{value:.2e}".split("e")
    power = f"10{str(int(exponent)).translate(_SUPERSCRIPTS)}"
    digits = digits.rstrip("0").rstrip(".")
    return _minus({"1": power, "-1": f"-{power}"}.get(digits, f"{digits}·{power}"))


def format_interval(mean: float, low: float, high: float) -> str:
    """A difference with its 95 % interval, signed, to the digits that the interval leaves: −4.9 [−6.2, −3.6].

    One that is 0 without doubt, such as the rating that the others are measured against, is shown as 0.
    """
    if mean == low == high == 0:
        return "0"
    if not all(map(math.isfinite, (mean, low, high))):
        return f"{_not_finite(mean) if not math.isfinite(mean) else _minus(f'{mean:+.3g}')} [?, ?]"
    decimals = _decimals((high - low) / (2 * 1.96))
    mean_text, *ends = (_minus(f"{value:+.{min(decimals, 6)}f}") for value in (mean, low, high))
    return f"{mean_text} [{', '.join(ends)}]"


def format_band(mean: float, low: float, high: float) -> str:
    """A number with its 95 % interval, unsigned, to the digits that the interval leaves: 0.62 [0.55, 0.69]."""
    if not all(map(math.isfinite, (mean, low, high))):
        return f"{_not_finite(mean) if not math.isfinite(mean) else _minus(f'{mean:.3g}')} [?, ?]"
    decimals = min(_decimals((high - low) / (2 * 1.96)), 6)
    mean_text, *ends = (_minus(f"{value:.{decimals}f}") for value in (mean, low, high))
    return f"{mean_text} [{', '.join(ends)}]"


def format_seconds(seconds: float) -> str:
    """A duration in the two units that matter: 41 s, 2 min 30 s, 3 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s" if seconds >= 1 else f"{seconds:.2g} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def display_name(name: str) -> str:
    """A method's name as the papers write it: short lower-case names are acronyms (pmle is PMLE), others stay."""
    return name.upper() if name.isalpha() and name.islower() and len(name) <= 5 else name


def main_column(results: Results) -> Column | None:
    """The metric that the headline is about: the forward KL, or the first one with a better side and differences."""
    known = {key for row in results.paired.values() for key in row}
    judged = [column for column in results.columns if column.better and column.key in known]
    return next((c for c in judged if c.key == "forward_kl"), judged[0] if judged else None)


def findings(results: Results) -> list[Finding]:
    """What every method did to the main metric, the largest improvement first; empty without finite differences."""
    column = main_column(results)
    if column is None:
        return []
    names = [name for name in results.trained if _known(results, name, column)]
    sign = 1 if column.better == "lower" else -1
    names.sort(key=lambda name: sign * results.paired[name][column.key].mean)
    return [_finding(results, name, column) for name in names]


def best_rows(results: Results, column: Column) -> set[str]:
    """The rows with the best mean of a column, the target left out; empty if no direction is better."""
    rows = {name: row[column.key].mean for name, row in results.methods.items() if column.key in row}
    rows = {name: mean for name, mean in rows.items() if name != TARGET and not math.isnan(mean)}
    if column.better is None or len(rows) < 2:
        return set()
    best = min(rows.values()) if column.better == "lower" else max(rows.values())
    return {name for name, mean in rows.items() if mean == best}


def share_of_reference(results: Results) -> bool:
    """Whether the findings are in per cent of the reference's mean: where less of the metric is better."""
    column = main_column(results)
    if column is None or column.better != "lower":
        return False
    reference = results.methods.get(REFERENCE, {}).get(column.key)
    return reference is not None and 0 < reference.mean < math.inf


def seeds_text(seeds: list[int]) -> str:
    """Which seeds were run: seed 0, seeds 0, 1, 2."""
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}" if seeds else ""


def _known(results: Results, name: str, column: Column) -> bool:
    """Whether there is a difference with finite ends."""
    d = results.paired.get(name, {}).get(column.key)
    return d is not None and all(map(math.isfinite, (d.mean, d.low, d.high)))


def _finding(results: Results, name: str, column: Column) -> Finding:
    difference = results.paired[name][column.key]
    what = _WORDS.get(column.key, column.label)
    who = display_name(name)
    kept = results.kept_step.get(name, [])
    if kept and not any(kept):
        seeds = " in every seed" if len(kept) > 1 else ""
        return Finding(name, f"{who} is the reference that it started from: step 0 was kept{seeds}", "unchanged")
    if difference.mean == difference.low == difference.high == 0:
        return Finding(name, f"{who} does not differ from the reference in {what}: every difference is 0", "unchanged")
    amount, interval = _amount(results, name, column)
    if difference.clear:
        verb = "raises" if difference.mean > 0 else "lowers"
        better = (difference.mean > 0) == (column.better == "higher")
        return Finding(name, f"{who} {verb} {what} by {amount} {interval}", "better" if better else "worse")
    return Finding(
        name, f"{who} shows no clear change in {what}: {amount} {interval}, an interval with zero inside", "undecided"
    )


def _amount(results: Results, name: str, column: Column) -> tuple[str, str]:
    """Size of a change and its interval; a share of the reference's mean where less of the metric is better.

    A clear change is given without its sign, which the verb has; the interval of an unclear one keeps both signs.
    """
    difference = results.paired[name][column.key]
    clear = difference.clear
    flip = -1 if clear and difference.mean < 0 else 1
    ends = sorted((flip * difference.low, flip * difference.high))
    values = (flip * difference.mean, *ends)
    if share_of_reference(results):
        reference = results.methods[REFERENCE][column.key].mean
        texts = [f"{100 * value / reference:{'.0f' if clear else '+.0f'}} %" for value in values]
    else:
        decimals = min(_decimals((difference.high - difference.low) / (2 * 1.96)), 6)
        texts = [f"{value:{'' if clear else '+'}.{decimals}f}" for value in values]
    mean, low, high = map(_minus, texts)
    unit = f" {column.unit}" if column.unit and "%" not in mean else ""
    return f"{mean}{unit}", f"[{low}, {high}]"


def _decimals(se: float) -> int:
    """Digits after the point that a standard error leaves meaningful."""
    if se <= 0:
        return 3
    exponent = math.floor(math.log10(se))
    digits = 2 if se / 10**exponent < 3 else 1
    return max(0, digits - 1 - exponent)


def _not_finite(value: float) -> str:
    return "n/a" if math.isnan(value) else ("∞" if value > 0 else "−∞")


def _minus(text: str) -> str:
    """With the typographic minus sign; a rounded −0.0 loses its sign."""
    if text.startswith("-") and not any(digit in text for digit in "123456789"):
        text = text[1:]
    return text.replace("-", "−")
