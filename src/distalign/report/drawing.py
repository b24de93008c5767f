"""Drawing with matplotlib in the page's colours: inline SVG that follows its light and dark themes, and PNG files.

A figure is a function that draws on axes and is given its colours by the name of the page's CSS variable.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from distalign.report.rendering import ASSETS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "CARD",
    "COLORS",
    "INK",
    "LINE_HEIGHT",
    "MUTED",
    "Draw",
    "accent",
    "draw_png",
    "draw_svg",
    "label_ends",
    "label_points",
]

COLORS = 8  # --c1 … --c8 of the page
INK, MUTED, GRID, CARD = (f"var(--{name})" for name in ("ink", "muted", "line", "card"))
LINE_HEIGHT = 0.236  # inches, of a line of text
_AXIS_HEIGHT = 0.55  # inches that the horizontal axis takes below a plot

Draw = Callable[["Axes", Mapping[str, str]], None]

# matplotlib draws an SVG with these stand-ins; the text gets the variable instead.
_STAND_IN = {INK: "#010100", MUTED: "#020200", GRID: "#030300", CARD: "#040400"}
_STAND_IN |= {f"var(--c{i})": f"#0505{i:02d}" for i in range(1, COLORS + 1)}


def accent(number: int) -> str:
    """The colour of a series by its number from 0; they repeat after COLORS."""
    return f"var(--c{number % COLORS + 1})"


def label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]], *, thin: str) -> None:
    """Write labels right of the plot at the heights of (value, label, colour), moved apart where they would overlap.

    On linear and logarithmic axes, whose limits must be final. A label may have several lines. Labels in the colour
    `thin` are not bold.
    """
    figure = axes.figure
    line = LINE_HEIGHT / (figure.bbox.height / figure.dpi - _AXIS_HEIGHT)  # as a share of the plot's height
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


def label_points(axes: Axes, places: Sequence[tuple[float, float, str, str]], *, thin: str) -> None:
    """Write labels beside their points (x, y, label, colour), moved up where they would overlap, as `label_ends`."""
    frame = axes.figure.bbox
    size = frame.width / axes.figure.dpi, frame.height / axes.figure.dpi
    taken: list[tuple[float, float, float]] = []
    for x, y, label, color in sorted(places, key=lambda place: place[1]):
        left, bottom = (axes.transData + axes.transAxes.inverted()).transform((x, y)) * size
        width, offset = 0.09 * len(label), 0.06
        while any(abs(bottom + offset - b) < LINE_HEIGHT * 0.8 and left < z and a < left + width for a, z, b in taken):
            offset += LINE_HEIGHT * 0.25
        taken.append((float(left), float(left + width), float(bottom + offset)))
        where = {"xy": (x, y), "xytext": (7, 72 * offset), "textcoords": "offset points"}
        weight = "normal" if color == thin else "bold"
        axes.annotate(label, color=color, weight=weight, annotation_clip=False, **where)


def draw_svg(draw: Draw, *, width: float, height: float) -> str:
    """The <svg> element of a figure in inches: no XML head, no metadata, no ids shared by two figures."""
    buffer = io.StringIO()
    with _figure(_STAND_IN, width, height) as figure:
        draw(figure.subplots(), _STAND_IN)
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'\sid="[A-Za-z0-9.]+_\d+"', "", text)
    text = re.sub(r"font(-family)?: ?([^;\"]*?)'DejaVu Sans'[^;\"]*", r"font\1: \2inherit", text)
    for variable, color in _STAND_IN.items():
        text = text.replace(color, variable)
    return text


def draw_png(draw: Draw, *, title: str, width: float, height: float) -> bytes:
    """A figure in inches under its title as a PNG file, in the colours of the light theme on white."""
    colors = _light_theme()
    buffer = io.BytesIO()
    with _figure(colors, width, height) as figure:
        draw(figure.subplots(), colors)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        figure.savefig(buffer, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


@contextmanager
def _figure(colors: Mapping[str, str], width: float, height: float) -> Iterator[Figure]:
    import matplotlib
    from matplotlib.figure import Figure

    # A glyph that the measuring font lacks is no trouble: the browser writes the text with its own fonts.
    with matplotlib.rc_context(_style(colors)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*missing")
        yield Figure(figsize=(width, height), layout="constrained")


def _light_theme() -> dict[str, str]:
    """The colours of the page's light theme, which is the first block of its style."""
    light = (ASSETS / "style.css").read_text(encoding="utf-8").split("}")[0]
    values = {f"var({name})": color for name, color in re.findall(r"(--\w+): (#\w{6})", light)}
    return {variable: values[variable] for variable in _STAND_IN}


def _style(colors: Mapping[str, str]) -> dict[Any, Any]:
    return {
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
        "lines.solid_capstyle": "round",
        "figure.facecolor": "none",
    }
