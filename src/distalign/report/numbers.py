"""Numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import yaml

from distalign.report.results import TARGET, Column, Difference, Measure, Results

_SUPERSCRIPTS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def format_estimate(mean: float, se: float) -> str:
    """Mean ± standard error, to the digits that the error leaves: 10.9 ± 0.9, 0.758 ± 0.012.

    The error keeps two digits when it starts with 1 or 2 and one otherwise. An unknown error (NaN) is shown as "?".
    """
    if not math.isfinite(mean):
        return _not_finite(mean)
    decimals = _decimals(se) if math.isfinite(se) else 0
    if not math.isfinite(se) or se < 1e-12 or decimals > 6:
        error = "?" if not math.isfinite(se) else ("0" if se < 1e-12 else f"{se:.1g}")
        # What is left of a zero after rounding is zero.
        return f"{minus(f'{mean:.3g}') if abs(mean) > 1e-12 else 0} ± {error}"
    return f"{minus(f'{mean:.{decimals}f}')} ± {se:.{decimals}f}"


def format_number(value: int | float) -> str:
    """Three significant digits: 0.0123, 65,500, 1.2·10⁻⁷; a whole number keeps all of its digits."""
    if isinstance(value, int):
        return minus(f"{value:,}")
    if not math.isfinite(value):
        return _not_finite(value)
    if value == 0:
        return "0"
    rounded = float(f"{value:.3g}")
    if 1e-3 <= abs(rounded) < 1e5:
        return minus(f"{rounded:,.0f}" if abs(rounded) >= 1000 else f"{rounded:g}")
    digits, exponent = f"{value:.2e}".split("e")
    power = f"10{str(int(exponent)).translate(_SUPERSCRIPTS)}"
    digits = digits.rstrip("0").rstrip(".")
    return minus({"1": power, "-1": f"-{power}"}.get(digits, f"{digits}·{power}"))


def format_interval(mean: float, low: float, high: float, *, sign: str = "+") -> str:
    """A difference with its 95 % interval, signed, to the digits that the interval leaves: −4.9 [−6.2, −3.6].

    A number that is no difference is written with `sign=""`: 0.62 [0.55, 0.69]. One that is 0 without doubt, such as
    the rating that the others are measured against, is shown as 0.
    """
    if mean == low == high == 0:
        return "0"
    if not all(map(math.isfinite, (mean, low, high))):
        return f"{minus(f'{mean:{sign}.3g}') if math.isfinite(mean) else _not_finite(mean)} [?, ?]"
    texts = interval_texts((mean, low, high), sign)
    return f"{texts[0]} [{texts[1]}, {texts[2]}]"


def format_seconds(seconds: float) -> str:
    """A duration in the two units that matter: 41 s, 2 min 30 s, 3 h 5 min."""
    if not math.isfinite(seconds):
        return _not_finite(seconds)
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s" if seconds >= 1 else f"{seconds:.2g} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def format_setting(value: object) -> str:
    """A setting, or another value of any kind, as text; lists and mappings as a recipe writes them."""
    if isinstance(value, float):
        return minus(f"{value:.4g}")
    if isinstance(value, dict | list):
        return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100).strip() if value else ""
    return str(value)


def seeds_text(seeds: Sequence[int]) -> str:
    """Which seeds were run: seed 0, seeds 0, 1, 2."""
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}" if seeds else ""


def best_rows(results: Results, column: Column) -> set[str]:
    """The rows with the best mean of a column, the target left out; empty if no direction is better."""
    rows = {name: row[column.key].mean for name, row in results.methods.items() if column.key in row}
    rows = {name: mean for name, mean in rows.items() if name != TARGET and not math.isnan(mean)}
    if column.better is None or len(rows) < 2:
        return set()
    best = min(rows.values()) if column.better == "lower" else max(rows.values())
    return {name for name, mean in rows.items() if mean == best}


def mean_interval(measure: Measure, *, is_share: bool = False) -> Difference:
    """A mean with Student's 95 % interval; a share stays within 0 and 1, and has Wilson's where it has no spread."""
    from distalign.stats.intervals import student_quantile, wilson_interval

    mean, se, n = measure.mean, measure.se, measure.n
    if is_share and se == 0 and n:
        return Difference(**wilson_interval(mean, n)._asdict())
    if n is None or n < 2 or not math.isfinite(se):
        return Difference(mean=mean)
    half, (least, most) = student_quantile(n - 1) * se, (0.0, 1.0) if is_share else (-math.inf, math.inf)
    return Difference(mean=mean, low=max(least, mean - half), high=min(most, mean + half))


def interval_texts(values: Sequence[float], sign: str) -> list[str]:
    """A mean and the ends of its interval, to the digits that the interval leaves."""
    decimals = min(_decimals((values[2] - values[1]) / (2 * 1.96)), 6)
    return [minus(f"{value:{sign}.{decimals}f}") for value in values]


def _decimals(se: float) -> int:
    """Digits after the point that a standard error leaves meaningful."""
    if se < 1e-300:
        return 3
    exponent = math.floor(math.log10(se))
    digits = 2 if se / 10**exponent < 3 else 1
    return max(0, digits - 1 - exponent)


def _not_finite(value: float) -> str:
    return "n/a" if math.isnan(value) else ("∞" if value > 0 else "−∞")


def minus(text: str) -> str:
    """With the typographic minus sign; a rounded −0.0 loses its sign."""
    if text.startswith("-") and not any(digit in text for digit in "123456789"):
        text = text[1:]
    return text.replace("-", "−")
