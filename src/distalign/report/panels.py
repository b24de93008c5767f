"""Figures: curves with bands, computed bounds and points, on linear and logarithmic axes; as SVG, PNG and data."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from distalign.report.drawing import (
    COLORS,
    LINE_HEIGHT,
    MUTED,
    Draw,
    accent,
    draw_png,
    draw_svg,
    label_ends,
    label_points,
)
from distalign.report.numbers import format_number
from distalign.report.shown import Curve, Panel, Scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

__all__ = [
    "Look",
    "drawn_points",
    "left_out",
    "log_ticks",
    "looks",
    "numbered_look",
    "panel_data",
    "panel_png",
    "panel_svg",
]

_DASHED = (0, (4, 3))
_CYCLES = [("-", "o"), ((0, (1, 1.4)), "s"), ((0, (6, 1.5, 1, 1.5)), "^")]  # line and marker, a set per COLORS curves
_LABEL_WIDTH = 18  # characters, then a label goes on in its next line
_MANY = 30  # points of a series; more are drawn small


class Look(NamedTuple):
    """How a curve is told from the others: its colour, and its line and marker once the colours repeat."""

    color: str
    cycle: int = 0


def looks(panels: Sequence[Panel]) -> list[dict[str, Look]]:
    """The look of every label, a dictionary a panel: the same in all panels of an experiment if the colours suffice.

    What is computed for a line, or marks points of it, and says so in its label (`pmle limit` of `pmle`) has the
    line's colour; a bound that belongs to no line is grey.
    """
    together = _looks([curve for panel in panels for curve in panel.curves])
    if all(look.cycle == 0 for look in together.values()):
        return [together] * len(panels)
    return [_looks(panel.curves) for panel in panels]


def _looks(curves: Sequence[Curve]) -> dict[str, Look]:
    lines = list(dict.fromkeys(curve.label for curve in curves if curve.kind == "line"))
    found = {label: numbered_look(number) for number, label in enumerate(lines)}
    own = len(found)
    for curve in curves:
        if curve.label in found:
            continue
        line = max((line for line in lines if curve.label.startswith(f"{line} ")), key=len, default=None)
        if line is None and curve.kind == "points":
            found[curve.label] = numbered_look(own)
            own += 1
        else:
            found[curve.label] = Look(MUTED) if line is None else found[line]
    return found


def drawn_points(panel: Panel, curve: Curve) -> list[int]:
    """The points of a curve that its axes can hold: finite, and above zero where the axis is logarithmic."""
    return [
        i
        for i, (x, y) in enumerate(zip(curve.x, curve.y, strict=True))
        if _fits(x, panel.x_scale) and _fits(y, panel.y_scale)
    ]


def left_out(panel: Panel) -> str:
    """A sentence about the points that are not drawn; "" if all are."""
    count = sum(len(curve.x) - len(drawn_points(panel, curve)) for curve in panel.curves)
    reason = "not finite, or not above zero on a logarithmic axis" if "log" in (panel.x_scale, panel.y_scale) else ""
    return f"Not drawn: {count} point{'s' if count > 1 else ''} ({reason or 'not finite'})." if count else ""


def panel_svg(panel: Panel, look: Mapping[str, Look]) -> str:
    """The figure as inline SVG; "" if no point of it can be drawn."""
    draw, height = _drawing(panel, look)
    return draw_svg(draw, width=5.6, height=height) if _any_drawn(panel) else ""


def panel_png(panel: Panel, look: Mapping[str, Look]) -> bytes:
    """The figure under its title as a PNG file on white; b"" if no point of it can be drawn."""
    draw, height = _drawing(panel, look)
    title = textwrap.fill(panel.title, 66)
    height += LINE_HEIGHT * (title.count("\n") + 1)
    return draw_png(draw, title=title, width=6.4, height=height) if _any_drawn(panel) else b""


def panel_data(panel: Panel, look: Mapping[str, Look]) -> str:
    """The figure as JSON, for the page's script to draw: what can be drawn of each curve, and its look."""

    def rounded(values: Sequence[float]) -> list[float | None]:
        return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]

    def data(curve: Curve) -> dict[str, Any]:
        chosen = drawn_points(panel, curve)
        numbers = {name: getattr(curve, name) for name in ("x", "y", "low", "high", "x_low", "x_high")}
        parts: dict[str, Any] = {
            name: rounded([values[i] for i in chosen]) for name, values in numbers.items() if values
        }
        if curve.notes:
            parts["notes"] = [curve.notes[i] for i in chosen]
        one = look[curve.label]
        return {"label": curve.label, "kind": curve.kind, "color": one.color, "cycle": one.cycle, **parts}

    about = {"title": panel.title, "x": panel.x, "y": panel.y, "x_scale": panel.x_scale, "y_scale": panel.y_scale}
    limits = {"x_limits": panel.x_limits, "y_limits": panel.y_limits, "whole": _whole(panel), "direct": panel.direct}
    curves = [data(curve) for curve in panel.curves if drawn_points(panel, curve)]
    return json.dumps({**about, **limits, "curves": curves}, ensure_ascii=False, separators=(",", ":"))


def _whole(panel: Panel) -> bool:
    """Whether the horizontal axis counts something."""
    return all(x.is_integer() for curve in panel.curves for x in curve.x if math.isfinite(x))


def _drawing(panel: Panel, look: Mapping[str, Look]) -> tuple[Draw, float]:
    """The function that draws the panel, and the height that its labels need, in inches."""

    def draw(axes: Axes, colors: Mapping[str, str]) -> None:
        axes.set_xscale(panel.x_scale)
        axes.set_yscale(panel.y_scale)
        for curve in panel.curves:
            _draw_curve(axes, panel, curve, look[curve.label], colors)
        axes.margins(x=0.02)
        axes.autoscale_view()
        axes.grid(axis="y")
        axes.set_xlabel(panel.x)
        axes.set_title(textwrap.fill(panel.y, 62), loc="left", color=colors[MUTED], fontsize=11)
        axes.set(xlim=panel.x_limits, ylim=panel.y_limits)
        _ticks(axes.xaxis, panel.x_scale, axes.get_xlim(), whole=_whole(panel))
        _ticks(axes.yaxis, panel.y_scale, axes.get_ylim())
        ends = {}
        for curve in panel.curves:
            points = drawn_points(panel, curve)
            if points and curve.label not in ends:
                end = max(points, key=lambda i: curve.x[i])
                ends[curve.label] = (curve.x[end], curve.y[end], curve.label, colors[look[curve.label].color])
        if panel.direct:
            label_points(axes, list(ends.values()), thin=colors[MUTED])
        else:
            places = [(y, _wrapped(label), color) for _, y, label, color in ends.values()]
            label_ends(axes, places, thin=colors[MUTED])

    lines = sum(_wrapped(label).count("\n") + 1 for label in {curve.label for curve in panel.curves})
    return draw, max(3.7, 1.0 + LINE_HEIGHT * lines)


def _draw_curve(axes: Axes, panel: Panel, curve: Curve, look: Look, colors: Mapping[str, str]) -> None:
    points = drawn_points(panel, curve)
    if not points:
        return
    color, (style, marker) = colors[look.color], _CYCLES[look.cycle]
    x, y = [curve.x[i] for i in points], [curve.y[i] for i in points]
    if curve.kind == "hollow":
        axes.plot(x, y, linestyle="", marker=marker, markersize=5, color=color, fillstyle="none", alpha=0.8)
        return
    if curve.kind == "points":
        errors = _errors(curve.y, curve.low, curve.high, points), _errors(curve.x, curve.x_low, curve.x_high, points)
        many = len(points) > _MANY
        style = {"marker": marker, "markersize": 3 if many else 6, "alpha": 0.55 if many else 1.0, "markeredgewidth": 0}
        axes.errorbar(x, y, *errors, linestyle="", elinewidth=1.1, color=color, **style)
        return
    if curve.low:
        floor = min((v for v in (*curve.low, *y) if _fits(v, panel.y_scale)), default=0.0)
        band = [i for i in points if math.isfinite(curve.low[i]) and _fits(curve.high[i], panel.y_scale)]
        low = [max(curve.low[i], floor) for i in band]
        axes.fill_between(
            [curve.x[i] for i in band], low, [curve.high[i] for i in band], color=color, alpha=0.15, linewidth=0
        )
    if curve.kind == "bound" and len(x) == 1:
        axes.axhline(y[0], linestyle=_DASHED, linewidth=1.3, color=color)
    elif curve.kind == "bound":
        axes.plot(x, y, linestyle=_DASHED, linewidth=1.3, color=color)
    else:
        axes.plot(x, y, linestyle=style, marker=marker if look.cycle or len(x) == 1 else "", markersize=4, color=color)


def _errors(
    values: Sequence[float], low: Sequence[float], high: Sequence[float], points: Sequence[int]
) -> list[list[float]] | None:
    """How far the ends of the points' intervals lie below and above; 0 where an end is not finite."""
    if not low:
        return None
    reach = [[values[i] - low[i] for i in points], [high[i] - values[i] for i in points]]
    return [[max(0.0, distance) if math.isfinite(distance) else 0.0 for distance in side] for side in reach]


def _ticks(axis: Axis, scale: Scale, limits: tuple[float, float], *, whole: bool = False) -> None:
    """At most seven ticks with their numbers written out: round ones, or powers of ten."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    if scale == "linear":
        axis.set_major_locator(MaxNLocator(6, integer=whole, steps=[1, 2, 5, 10] if whole else [1, 2, 2.5, 5, 10]))
        return
    axis.set_major_locator(FixedLocator(log_ticks(*limits)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_number(float(value))))


def log_ticks(low: float, high: float) -> list[float]:
    """At most seven round numbers between two positive limits: powers of ten, or steps between them if few fit."""
    from matplotlib.ticker import MaxNLocator

    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for parts in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        ticks = [part * 10.0**k for k in range(first, last + 1) for part in parts]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            return ticks[:: math.ceil(len(ticks) / 7)]
    return [float(tick) for tick in MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high) if low <= tick <= high]


def numbered_look(number: int) -> Look:
    """The look of a series by its number from 0: a colour of its own, then the colours again with another line."""
    return Look(accent(number), number // COLORS % len(_CYCLES))


def _wrapped(label: str) -> str:
    return textwrap.fill(label, _LABEL_WIDTH) or " "


def _fits(value: float, scale: Scale) -> bool:
    return math.isfinite(value) and (scale == "linear" or value > 0)


def _any_drawn(panel: Panel) -> bool:
    return any(drawn_points(panel, curve) for curve in panel.curves)
