"""Figures as inline SVG whose colours are the page's CSS variables, so that they follow its light and dark themes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from .drawing import CARD, INK, MUTED, accent, draw_svg, label_ends
from .numbers import display_name
from .results import REFERENCE, TARGET, Bin, Column, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Line", "calibration_figure", "color_variable", "curves_figure", "lines_figure"]


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
        return INK if name == TARGET else MUTED
    trained = results.trained
    return accent(trained.index(name)) if name in trained else MUTED


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

    def draw(axes: Axes, colors: Mapping[str, str]) -> None:
        ends = []
        for line in lines:
            if not line.points:
                continue
            color = colors[line.color]
            x, y = zip(*line.points, strict=True)
            if line.se:
                low = [value - (se if math.isfinite(se) else 0) for value, se in zip(y, line.se, strict=True)]
                high = [value + (se if math.isfinite(se) else 0) for value, se in zip(y, line.se, strict=True)]
                axes.fill_between(x, low, high, color=color, alpha=0.13, linewidth=0)
            axes.plot(x, y, color=color, marker="o" if len(x) == 1 else "", markersize=4)
            kept = [(step, value) for step, value in line.points if step == line.kept]
            if kept:
                axes.plot(*kept[0], "o", color=color, markersize=8, markeredgecolor=colors[CARD], markeredgewidth=1.5)
            if line.label:
                ends.append((y[-1], line.label, color))
        axes.margins(x=0.02)
        axes.grid(axis="y")
        axes.set_xlabel(xlabel)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        label_ends(axes, ends, thin=colors[MUTED])

    return draw_svg(draw, width=5.6, height=3.7)


def calibration_figure(bins: Sequence[Bin], color: str) -> str:
    """Predicted against observed preference: area by count, bars the 95 % Wilson interval, dashed the perfect judge."""
    from ..metrics import wilson_interval

    def draw(axes: Axes, colors: Mapping[str, str]) -> None:
        axes.plot([0, 1], [0, 1], color=colors[MUTED], linewidth=1, linestyle=(0, (4, 3)))
        most = max(b.n for b in bins)
        for b in bins:
            interval = wilson_interval(b.observed, b.n)
            axes.plot([b.predicted] * 2, [interval.low, interval.high], color=colors[color], linewidth=1.2, alpha=0.5)
            axes.scatter(b.predicted, b.observed, s=14 + 110 * b.n / most, color=colors[color], alpha=0.9, zorder=3)
        axes.grid()
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal", xlabel="predicted", ylabel="observed")
        axes.set_xticks([0, 0.5, 1], ["0", "½", "1"])
        axes.set_yticks([0, 0.5, 1], ["0", "½", "1"])

    return draw_svg(draw, width=2.9, height=2.9) if bins else ""
