"""Figures as inline SVG whose colours are the page's CSS variables, so that they follow its light and dark themes."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .numbers import display_name
from .results import REFERENCE, TARGET, Bin, Column, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Line", "calibration_figure", "color_variable", "curves_figure", "lines_figure"]

COLORS = 8  # --c1 … --c8 of the page

# matplotlib draws with these stand-ins; the SVG gets the variable instead.
_VARIABLES = {"#010100": "var(--ink)", "#020200": "var(--muted)", "#030300": "var(--line)", "#040400": "var(--card)"}
_VARIABLES |= {f"#0505{i:02d}": f"var(--c{i})" for i in range(1, COLORS + 1)}
_STAND_IN = {variable: color for color, variable in _VARIABLES.items()}
_INK, _MUTED, _GRID, _CARD = (_STAND_IN[f"var(--{name})"] for name in ("ink", "muted", "line", "card"))

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "distalign",
    "text.parse_math": False,
    "font.size": 11,
    "font.family": "DejaVu Sans",
    "text.color": _INK,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _GRID,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "none",
}


class Line(NamedTuple):
    """A curve: its label, its colour (a CSS variable of the page), its points and their standard errors."""

    label: str
    color: str
    points: Sequence[tuple[float, float]]
    se: Sequence[float] = ()
    kept: float | None = None


def color_variable(results: Results, name: str) -> str:
    """The one colour of a row, everywhere on the page: ink for the target, grey for the reference, an accent each."""
    if name in (TARGET, REFERENCE):
        return "var(--ink)" if name == TARGET else "var(--muted)"
    trained = results.trained
    return f"var(--c{trained.index(name) % COLORS + 1})" if name in trained else "var(--muted)"


def curves_figure(results: Results, column: Column) -> str:
    """A metric against optimizer steps: one line a method and seed, a band of ± 1 standard error, the kept step."""
    lines = []
    for name, rows in results.curves.items():
        for index, seed in enumerate(sorted({row["seed"].mean if "seed" in row else 0.0 for row in rows})):
            mine = [r for r in rows if (r["seed"].mean if "seed" in r else 0.0) == seed and column.key in r]
            mine = [r for r in mine if "step" in r and math.isfinite(r[column.key].mean)]
            mine.sort(key=lambda row: row["step"].mean)
            kept = results.kept_step.get(name, [])
            lines.append(
                Line(
                    "" if index else display_name(name),
                    color_variable(results, name),
                    [(row["step"].mean, row[column.key].mean) for row in mine],
                    [row[column.key].se for row in mine],
                    float(kept[index]) if index < len(kept) else None,
                )
            )
    return lines_figure(lines, xlabel="optimizer step")


def lines_figure(lines: Iterable[Line], *, xlabel: str = "step") -> str:
    """Curves with their labels at their ends."""

    from matplotlib.ticker import MaxNLocator

    def draw(axes: Axes) -> None:
        ends = []
        for line in lines:
            if not line.points:
                continue
            color = _STAND_IN[line.color]
            x, y = zip(*line.points, strict=True)
            if line.se:
                low = [value - (se if math.isfinite(se) else 0) for value, se in zip(y, line.se, strict=True)]
                high = [value + (se if math.isfinite(se) else 0) for value, se in zip(y, line.se, strict=True)]
                axes.fill_between(x, low, high, color=color, alpha=0.13, linewidth=0)
            axes.plot(x, y, color=color, marker="o" if len(x) == 1 else "", markersize=4)
            kept = [(step, value) for step, value in line.points if step == line.kept]
            if kept:
                axes.plot(*kept[0], "o", color=color, markersize=8, markeredgecolor=_CARD, markeredgewidth=1.5)
            if line.label:
                ends.append((y[-1], line.label, color))
        axes.margins(x=0.02)
        axes.grid(axis="y")
        axes.set_xlabel(xlabel)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        _label_ends(axes, ends)

    return _svg(draw, width=5.6, height=3.7)


def calibration_figure(bins: Sequence[Bin], color: str) -> str:
    """Predicted against observed preference: area by count, bars the 95 % Wilson interval, dashed the perfect judge."""
    from ..metrics import wilson_interval

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
        most = max(b.n for b in bins)
        for b in bins:
            interval = wilson_interval(b.observed, b.n)
            axes.plot(
                [b.predicted] * 2, [interval.low, interval.high], color=_STAND_IN[color], linewidth=1.2, alpha=0.5
            )
            axes.scatter(b.predicted, b.observed, s=14 + 110 * b.n / most, color=_STAND_IN[color], alpha=0.9, zorder=3)
        axes.grid()
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal", xlabel="predicted", ylabel="observed")
        axes.set_xticks([0, 0.5, 1], ["0", "½", "1"])
        axes.set_yticks([0, 0.5, 1], ["0", "½", "1"])

    return _svg(draw, width=2.9, height=2.9) if bins else ""


def _label_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Write labels right of the plot at their heights, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    gap = 0.075  # of the plot's height: one line of text
    places = sorted(((value - low) / (high - low), label, color) for value, label, color in ends)
    heights = [place[0] for place in places]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    overflow = max(0.0, heights[-1] - 1.0) if heights else 0.0
    for height, (_, label, color) in zip(heights, places, strict=True):
        weight = "normal" if color == _MUTED else "bold"
        axes.text(1.02, height - overflow, label, color=color, weight=weight, va="center", transform=axes.transAxes)


def _svg(draw: Callable[[Axes], None], *, width: float, height: float) -> str:
    """Draw on fresh axes and return the <svg> element: no XML head, no metadata, no ids shared by two figures."""
    import matplotlib
    from matplotlib.figure import Figure

    # A glyph that the measuring font lacks is no trouble: the browser writes the text with its own fonts.
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*missing")
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'\sid="[A-Za-z0-9.]+_\d+"', "", text)
    text = re.sub(r"font(-family)?: ?([^;\"]*?)'DejaVu Sans'[^;\"]*", r"font\1: \2inherit", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, variable)
    return text
