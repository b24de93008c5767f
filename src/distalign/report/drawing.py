"""Drawing with matplotlib in the page's colours: inline SVG that follows its light and dark themes, and PNG files.

A drawing is a function that draws on axes and is given its colours by the name of the page's CSS variable.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from distalign.report.numbers import format_number
from distalign.report.shown import Curve, Panel, Scale

if TYPE_CHECKING:
    import matplotlib.figure
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

TEMPLATES = Path(__file__).parent / "templates"

_COLORS = 8  # --c1 … --c8 of the page
INK, MUTED, GRID = (f"var(--{name})" for name in ("ink", "muted", "line"))
_LINE_HEIGHT = 0.236  # inches, of a line of text
_AXIS_HEIGHT = 0.55  # inches that the horizontal axis takes below a plot
_DASHED = (0, (4, 3))
_CYCLES = [("-", "o"), ((0, (1, 1.4)), "s"), ((0, (6, 1.5, 1, 1.5)), "^")]  # line and marker, a set per _COLORS curves
_LABEL_WIDTH = 18  # characters, then a label goes on in its next line
_MANY = 30  # points of a series; more are drawn small

Draw = Callable[["Axes", Mapping[str, str]], None]

# matplotlib draws an SVG with these stand-ins; the text gets the variable instead.
_STAND_IN = {INK: "#010100", MUTED: "#020200", GRID: "#030300"}
_STAND_IN |= {f"var(--c{i})": f"#0505{i:02d}" for i in range(1, _COLORS + 1)}


class Look(NamedTuple):
    """How a curve is told from the others: its colour, and its line and marker once the colours repeat."""

    color: str
    cycle: int = 0


@dataclass(frozen=True)
class Figure:
    """A drawing of a size in inches with its heading and a sentence about it.

    `file_title` is its title where it stands alone, `color` that of the row it is about.
    """

    title: str
    about: str
    draw: Draw
    width: float
    height: float
    file_title: str = ""
    color: str = "inherit"

    @property
    def svg(self) -> str:
        """The <svg> element: no XML head, no metadata, no ids shared by two figures."""
        buffer = io.StringIO()
        with _canvas(_STAND_IN, self.width, self.height) as canvas:
            self.draw(canvas.subplots(), _STAND_IN)
            canvas.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        text = buffer.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
        text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
        text = re.sub(r'\sid="[A-Za-z0-9.]+_\d+"', "", text)
        text = re.sub(r"font(-family)?: ?([^;\"]*?)'DejaVu Sans'[^;\"]*", r"font\1: \2inherit", text)
        for variable, color in _STAND_IN.items():
            text = text.replace(color, variable)
        return text

    @property
    def png(self) -> bytes:
        """A PNG file of the figure under its title, in the colours of the light theme on white."""
        light = (TEMPLATES / "style.css").read_text(encoding="utf-8").split("}")[0]
        colors = {f"var({name})": color for name, color in re.findall(r"(--\w+): (#\w{6})", light)}
        width = self.width + 0.8
        title = textwrap.fill(self.file_title or self.title, round(10.3 * width))
        buffer = io.BytesIO()
        with _canvas(colors, width, self.height + _LINE_HEIGHT * (title.count("\n") + 1)) as canvas:
            self.draw(canvas.subplots(), colors)
            canvas.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
            canvas.savefig(buffer, format="png", dpi=160, facecolor="white", metadata={"Software": None})
        return buffer.getvalue()


def panel_figure(panel: Panel, look: Mapping[str, Look], *, width: float = 5.6, height: float = 3.7) -> Figure | None:
    """A panel as a figure, higher where its labels need it; None if no point of it can be drawn."""
    labels = {curve.label for curve in panel.curves if _drawn_points(panel, curve)}
    if not labels:
        return None
    lines = sum(_wrapped(label).count("\n") + 1 for label in labels)

    def draw(axes: Axes, colors: Mapping[str, str]) -> None:
        axes.set_xscale(panel.x_scale)
        axes.set_yscale(panel.y_scale)
        for curve in panel.curves:
            _draw_curve(axes, panel, curve, look[curve.label], colors)
        axes.margins(x=0.02)
        axes.autoscale_view()
        axes.grid(axis="y")
        axes.set_xlabel(panel.x)
        axes.set_title(textwrap.fill(panel.y, round(11 * width)), loc="left", color=colors[MUTED], fontsize=11)
        axes.set(xlim=panel.x_limits, ylim=panel.y_limits)
        whole = all(float(x).is_integer() for curve in panel.curves for x in curve.x if math.isfinite(x))
        _set_ticks(axes.xaxis, panel.x_scale, axes.get_xlim(), whole=whole)
        _set_ticks(axes.yaxis, panel.y_scale, axes.get_ylim())
        ends = {}
        for curve in panel.curves:
            points = _drawn_points(panel, curve)
            if points and curve.label not in ends:
                end = max(points, key=lambda i: curve.x[i])
                ends[curve.label] = (curve.x[end], curve.y[end], curve.label, colors[look[curve.label].color])
        if panel.direct:
            _label_points(axes, list(ends.values()), thin=colors[MUTED])
        else:
            places = [(y, _wrapped(label), color) for _, y, label, color in ends.values()]
            label_ends(axes, places, thin=colors[MUTED])

    return Figure(panel.title, panel.about, draw, width, max(height, 1.0 + _LINE_HEIGHT * lines))


def points_left_out(panel: Panel) -> str:
    """A sentence about the points that are not drawn; "" if all are."""
    count = sum(len(curve.x) - len(_drawn_points(panel, curve)) for curve in panel.curves)
    reason = "not finite, or not above zero on a logarithmic axis" if "log" in (panel.x_scale, panel.y_scale) else ""
    return f"Not drawn: {count} point{'s' if count > 1 else ''} ({reason or 'not finite'})." if count else ""


def numbered_look(number: int) -> Look:
    """The look of a series by its number from 0: a colour of its own, then the colours again with another line."""
    return Look(f"var(--c{number % _COLORS + 1})", number // _COLORS % len(_CYCLES))


def looks(panels: Sequence[Panel]) -> dict[str, Look]:
    """The look of every label, the same in all panels.

    What is computed for a line, or marks points of it, and says so in its label (`pmle limit` of `pmle`) has the
    line's colour; a bound that belongs to no line is grey.
    """
    curves = [curve for panel in panels for curve in panel.curves]
    lines = list(dict.fromkeys(curve.label for curve in curves if curve.kind == "line"))
    by_label = {label: numbered_look(number) for number, label in enumerate(lines)}
    numbered = len(by_label)
    for curve in curves:
        if curve.label in by_label:
            continue
        line = max((line for line in lines if curve.label.startswith(f"{line} ")), key=len, default=None)
        if line is None and curve.kind == "points":
            by_label[curve.label] = numbered_look(numbered)
            numbered += 1
        else:
            by_label[curve.label] = Look(MUTED) if line is None else by_label[line]
    return by_label


def _draw_curve(axes: Axes, panel: Panel, curve: Curve, look: Look, colors: Mapping[str, str]) -> None:
    points = _drawn_points(panel, curve)
    if not points:
        return
    color, (style, marker) = colors[look.color], _CYCLES[look.cycle]
    x, y = [curve.x[i] for i in points], [curve.y[i] for i in points]
    if curve.kind == "hollow":
        axes.plot(x, y, linestyle="", marker=marker, markersize=5, color=color, fillstyle="none", alpha=0.8)
        return
    if curve.kind == "points":
        errors = _errors(curve.y, curve.low, curve.high, points), _errors(curve.x, curve.x_low, curve.x_high, points)
        size, alpha = (3, 0.55) if len(points) > _MANY else (6, 1.0)
        dots = {"marker": marker, "markersize": size, "alpha": alpha, "markeredgewidth": 0}
        axes.errorbar(x, y, *errors, linestyle="", elinewidth=1.1, color=color, **dots)
        return
    if curve.low:
        floor = min((v for v in (*curve.low, *y) if _fits(v, panel.y_scale)), default=0.0)
        band = [i for i in points if _fits(curve.low[i]) and _fits(curve.high[i], panel.y_scale)]
        low, high = [max(curve.low[i], floor) for i in band], [curve.high[i] for i in band]
        axes.fill_between([curve.x[i] for i in band], low, high, color=color, alpha=0.15, linewidth=0)
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
    return [[max(0.0, distance) if _fits(distance) else 0.0 for distance in side] for side in reach]


def label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]], *, thin: str) -> None:
    """Write labels right of the plot at the heights of (value, label, colour), moved apart where they would overlap.

    On linear and logarithmic axes, whose limits must be final. A label may have several lines. Labels in the colour
    `thin` are not bold.
    """
    figure = axes.figure
    line = _LINE_HEIGHT / (figure.bbox.height / figure.dpi - _AXIS_HEIGHT)  # as a share of the plot's height
    x = axes.get_xlim()[0]
    to_axes = axes.transData + axes.transAxes.inverted()
    places = sorted((float(to_axes.transform((x, value))[1]), label, color) for value, label, color in ends)
    heights = [place[0] for place in places]
    half = [line * (label.count("\n") + 1) / 2 for _, label, _ in places]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + half[i - 1] + half[i])
    top = 1.0
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], top)
        top = heights[i] - half[i] - (half[i - 1] if i else 0.0)
    for height, (_, label, color) in zip(heights, places, strict=True):
        weight = "normal" if color == thin else "bold"
        axes.text(1.02, height, label, color=color, weight=weight, va="center", transform=axes.transAxes)


def _label_points(axes: Axes, places: Sequence[tuple[float, float, str, str]], *, thin: str) -> None:
    """Write labels beside their points (x, y, label, colour), moved up where they would overlap, as `label_ends`."""
    frame = axes.figure.bbox
    size = frame.width / axes.figure.dpi, frame.height / axes.figure.dpi
    taken: list[tuple[float, float, float]] = []
    for x, y, label, color in sorted(places, key=lambda place: place[1]):
        left, bottom = (axes.transData + axes.transAxes.inverted()).transform((x, y)) * size
        width, offset = 0.09 * len(label), 0.06
        while any(abs(bottom + offset - b) < _LINE_HEIGHT * 0.8 and left < z and a < left + width for a, z, b in taken):
            offset += _LINE_HEIGHT * 0.25
        taken.append((float(left), float(left + width), float(bottom + offset)))
        where = {"xy": (x, y), "xytext": (7, 72 * offset), "textcoords": "offset points"}
        weight = "normal" if color == thin else "bold"
        axes.annotate(label, color=color, weight=weight, annotation_clip=False, **where)


def _set_ticks(axis: Axis, scale: Scale, limits: tuple[float, float], *, whole: bool = False) -> None:
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


def _drawn_points(panel: Panel, curve: Curve) -> list[int]:
    """The points of a curve that its axes can hold: finite, and above zero where the axis is logarithmic."""
    pairs = zip(curve.x, curve.y, strict=True)
    return [i for i, (x, y) in enumerate(pairs) if _fits(x, panel.x_scale) and _fits(y, panel.y_scale)]


def _fits(value: float, scale: Scale = "linear") -> bool:
    """Whether an axis holds it: finite, and so are sums and squares; above zero where it is logarithmic."""
    return abs(value) < 1e150 and (scale == "linear" or value > 1e-150)


def _wrapped(label: str) -> str:
    return textwrap.fill(label, _LABEL_WIDTH) or " "


@contextmanager
def _canvas(colors: Mapping[str, str], width: float, height: float) -> Iterator[matplotlib.figure.Figure]:
    """An empty figure of matplotlib in the page's style, in inches."""
    import matplotlib.figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "distalign",
        "text.parse_math": False,
        "font.size": 11,
        "font.family": "DejaVu Sans",
        "text.color": colors[INK],
        "axes.labelcolor": colors[MUTED],
        "axes.edgecolor": colors[GRID],
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.axisbelow": True,
        "axes.unicode_minus": True,
        "grid.color": colors[GRID],
        "grid.linewidth": 0.7,
        "xtick.color": colors[MUTED],
        "ytick.color": colors[MUTED],
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "lines.linewidth": 1.8,
        # A line of many points is drawn by those that a screen can tell apart.
        "path.simplify_threshold": 1.0,
        "lines.solid_capstyle": "round",
        "figure.facecolor": "none",
    }
    # A glyph that the measuring font lacks is no trouble: the browser writes the text with its own fonts.
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*missing")
        yield matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
