"""The figures of a comparison, each drawn as inline SVG, as a PNG file, and given to the page's script as numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from distalign.report.drawing import INK, MUTED, Draw, draw_png, draw_svg
from distalign.report.numbers import display_name, format_number, main_column
from distalign.report.panels import Look, numbered_look, panel_data, panel_png, panel_svg
from distalign.report.results import REFERENCE, TARGET, Answer, Bin, Column, Difference, Predicted, Results
from distalign.report.shown import Curve, Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Figure", "calibration_figures", "learning_figures", "length_figures", "plane_figure", "row_look"]

BEST_OF_N = "best of n"
KL, REWARD = "kl_reference", "reward"  # the columns that the reward-KL plane has as its axes


class Figure(NamedTuple):
    """A figure of the page: its heading, a sentence, its title where it stands alone, and what draws it.

    `data` is for the page's script, "" for a figure that it leaves as it is; `color` that of the row it is about.
    """

    title: str
    about: str
    full_title: str
    svg: Callable[[], str]
    png: Callable[[], bytes]
    data: str = ""
    color: str = "inherit"

    @classmethod
    def of(cls, panel: Panel, look: Mapping[str, Look], full_title: str = "", color: str = "inherit") -> Figure:
        """A panel as a figure; it must have a point that can be drawn."""
        alone = panel.model_copy(update={"title": full_title or panel.title})
        svg, png = partial(panel_svg, panel, look), partial(panel_png, alone, look)
        return cls(panel.title, panel.about, alone.title, svg, png, panel_data(panel, look), color)


def row_look(results: Results, name: str) -> Look:
    """The one look of a row, everywhere on the page: ink for the target, grey for the reference, an accent each."""
    if name in (TARGET, REFERENCE):
        return Look(INK if name == TARGET else MUTED)
    trained = results.trained
    return numbered_look(trained.index(name)) if name in trained else Look(MUTED)


def learning_figures(results: Results) -> list[Figure]:
    """The main metric and the held-out loss against optimizer steps."""
    logged = {key for rows in results.curves.values() for row in rows for key in row}
    main = main_column(results)
    figures = []
    for c in [c for c in results.columns if c.key in logged and (c.key == "forward_kl" or c == main)][:1]:
        about = (
            "On some of the held-out prompts, from the reference (step 0) on; ± 1 standard error; a dot: the kept step."
        )
        figures.append(_against_steps(results, c, about))
    if "eval_loss" in logged:
        about = "A dot marks the kept step. Each method has its own loss: compare the shapes, not the heights."
        figures.append(_against_steps(results, Column(key="eval_loss", label="Loss on held-out pairs"), about))
    return [figure for figure in figures if figure]


def plane_figure(results: Results) -> Figure | None:
    """Reward against KL(π‖π₀): every policy with its errors, the predicted optima, best-of-n; None without a policy."""
    curves, look = _predicted_curves(results), {}
    look |= {curve.label: Look(MUTED, int(curve.label == BEST_OF_N)) for curve in curves}
    placed = 0
    for name, row in results.methods.items():
        reward = row.get(REWARD)
        kl = row.get(KL) or (
            row[REWARD].model_copy(update={"mean": 0.0, "se": 0.0}) if name == REFERENCE and reward else None
        )
        if reward is None or kl is None or not (math.isfinite(reward.mean) and math.isfinite(kl.mean)):
            continue
        placed += 1
        label = display_name(name)
        look[label] = row_look(results, name)
        at = Curve(label=label, x=[kl.mean], y=[reward.mean], kind="points")
        at.low, at.high = [reward.mean - reward.se], [reward.mean + reward.se]
        at.x_low, at.x_high = [kl.mean - kl.se], [kl.mean + kl.se]
        curves.append(at)
    if not placed:
        return None
    about = "Every policy as it was measured, with bars of ± 1 standard error."
    if results.frontier.points:
        about += (
            " Dashed: what the best policy of each γ was predicted to have before any training, with its 90 % band;"
            " hollow: predictions from too few effective samples to trust."
        )
    if results.frontier.best_of:
        about += " Squares: best of n, at the most KL that it can have."
    unit = next((c.unit for c in results.columns if c.key == REWARD and c.unit), None)
    panel = Panel(
        title="Reward against KL",
        about=about,
        x="KL(π‖π₀), nats per response",
        y=f"reward, {unit}" if unit else "reward",
        curves=curves,
        x_scale="linear",
        y_scale="linear",
        direct=True,
    )
    return Figure.of(panel, look)


def length_figures(results: Results) -> list[Figure]:
    """Reward against length, a figure a policy on the same axes, the reference behind it in grey."""
    own = {name: [a for a in answers if math.isfinite(a.reward)] for name, answers in results.points.items()}
    own = {name: answers for name, answers in own.items() if answers}
    everything = [answer for answers in own.values() for answer in answers]
    if not everything:
        return []
    x_limits, y_limits = _padded([a.length for a in everything]), _padded([a.reward for a in everything])
    behind = own.get(REFERENCE, [])
    figures = []
    for name in [name for name in own if name != REFERENCE] or list(own):
        shown = [(REFERENCE, behind)] if behind and name != REFERENCE else []
        shown.append((name, own[name]))
        panel = Panel(
            title=display_name(name),
            about=_correlation_text(own[name]),
            x="tokens",
            y="reward",
            curves=[
                Curve(label=display_name(who), x=[a.length for a in some], y=[a.reward for a in some], kind="points")
                for who, some in shown
            ],
            x_scale="linear",
            y_scale="linear",
            x_limits=x_limits,
            y_limits=y_limits,
        )
        look = {display_name(who): row_look(results, who) for who, _ in shown}
        title = f"Reward against length: {display_name(name)}"
        figures.append(Figure.of(panel, look, title, row_look(results, name).color))
    return figures


def calibration_figures(results: Results) -> list[Figure]:
    """A method's calibration plot and its expected calibration error, which is taken over these bins."""
    figures = []
    for name, bins in results.calibration.items():
        if not bins:
            continue
        n = sum(b.n for b in bins)
        gap = sum(b.n * abs(b.predicted - b.observed) for b in bins) / n
        color = row_look(results, name).color
        draw = _calibration_drawing(bins, color)
        title, full_title = display_name(name), f"Calibration: {display_name(name)}"
        about = f"expected calibration error {gap:.3f} (n = {n})"
        svg = partial(draw_svg, draw, width=2.9, height=2.9)
        png = partial(draw_png, draw, title=full_title, width=4.2, height=4.4)
        figures.append(Figure(title, about, full_title, svg, png, color=color))
    return figures


def _against_steps(results: Results, column: Column, about: str) -> Figure | None:
    """A metric against optimizer steps: one line a method and seed, a band of ± 1 standard error, the kept step."""
    curves, look = [], {}
    for name, rows in results.curves.items():
        label = display_name(name)
        for index, seed in enumerate(sorted({row["seed"].mean if "seed" in row else 0.0 for row in rows})):
            mine = [r for r in rows if (r["seed"].mean if "seed" in r else 0.0) == seed and column.key in r]
            mine = [r for r in mine if "step" in r and math.isfinite(r[column.key].mean)]
            mine.sort(key=lambda row: row["step"].mean)
            if not mine:
                continue
            look[label] = row_look(results, name)
            x, y = [row["step"].mean for row in mine], [row[column.key].mean for row in mine]
            se = [row[column.key].se if math.isfinite(row[column.key].se) else 0.0 for row in mine]
            low = [v - e for v, e in zip(y, se, strict=True)] if any(se) else []
            high = [v + e for v, e in zip(y, se, strict=True)] if any(se) else []
            curves.append(Curve(label=label, x=x, y=y, low=low, high=high))
            kept = results.kept_step.get(name, [])
            if index < len(kept) and kept[index] in x:
                at = x.index(kept[index])
                curves.append(Curve(label=label, x=[x[at]], y=[y[at]], notes=["kept"], kind="points"))
    if not curves:
        return None
    title = f"{column.label}{f', {column.unit}' if column.unit else ''}"
    panel = Panel(title=title, about=about, x="optimizer step", y="", curves=curves, x_scale="linear", y_scale="linear")
    return Figure.of(panel, look)


def _predicted_curves(results: Results) -> list[Curve]:
    """The optima of each γ, those to be trusted as a dashed curve with its band, the others as dots; best of n."""
    found = results.frontier
    curves = []
    for gamma in sorted({point.gamma for point in found.points}):
        label = f"γ = {gamma:g}" if gamma else "γ = 0 (RLHF)"
        for trusted in (True, False):
            chosen = [p for p in found.points if p.gamma == gamma and p.trusted is trusted]
            chosen.sort(key=lambda point: point.kl.mean)
            if chosen:
                kind = ("bound" if len(chosen) > 1 else "points") if trusted else "hollow"
                x, notes = [p.kl.mean for p in chosen], [_predicted_note(p) for p in chosen]
                curves.append(Curve(label=label, x=x, notes=notes, kind=kind, **_reach([p.reward for p in chosen])))
    if found.best_of:
        x, notes = [b.kl_bound for b in found.best_of], [f"n = {b.n}" for b in found.best_of]
        rewards = [b.reward for b in found.best_of]
        curves.append(Curve(label=BEST_OF_N, x=x, notes=notes, kind="points", **_reach(rewards)))
    return curves


def _predicted_note(point: Predicted) -> str:
    doubt = "" if point.trusted else ", too few to trust"
    return f"β = {point.beta:g}, effective samples {format_number(point.ess)}{doubt}"


def _reach(bands: Sequence[Difference]) -> dict[str, list[float]]:
    return {"y": [b.mean for b in bands], "low": [b.low for b in bands], "high": [b.high for b in bands]}


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 1.0
    return low - margin, high + margin


def _correlation_text(answers: Sequence[Answer]) -> str:
    lengths, rewards = [a.length for a in answers], [a.reward for a in answers]
    if len(answers) < 3 or len(set(lengths)) == 1 or len(set(rewards)) == 1:
        return f"n = {len(answers)}"
    r = f"{statistics.correlation(lengths, rewards):.2f}".replace("-", "−")
    return f"correlation {r} (n = {len(answers)})"


def _calibration_drawing(bins: Sequence[Bin], color: str) -> Draw:
    """Predicted against observed preference: area by count, bars the 95 % Wilson interval, dashed the perfect judge."""
    from distalign.stats.intervals import wilson_interval

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

    return draw
