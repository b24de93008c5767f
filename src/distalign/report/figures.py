"""The figures of a run: what training logged, how policies lie between reward and KL, calibration, length."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from distalign.report.drawing import INK, MUTED, Figure, Look, numbered_look, panel_figure
from distalign.report.first import DISTANCE, main_column
from distalign.report.results import REFERENCE, TARGET, Column, Difference, Logs, Results, display_name
from distalign.report.shown import Curve, Panel, Scale

_BEST_OF_N = "best of n"
_KL, _REWARD = "kl_reference", "reward"  # the columns that the reward-KL plane has as its axes
_HELD_OUT = "held out"
_DOT = "a dot: the step that was measured"


class Topic(NamedTuple):
    """A figure of training: its title, the sentence below it, and the numbers drawn in it with their labels."""

    title: str
    about: str
    keys: dict[str, str]


# What was optimised.
TRAINING = [
    Topic(
        DISTANCE,
        "Forward KL on some of the held-out prompts, nats per response.",
        {"eval_target/forward_kl": _HELD_OUT},
    ),
    Topic(
        "Loss",
        "Training loss, and the loss on held-out pairs: when only the first still falls, the model memorises.",
        {"loss": "train", "eval_loss": _HELD_OUT},
    ),
    Topic(
        "Preference accuracy",
        "Share of pairs whose chosen response gets the larger implicit reward; one half is chance.",
        {"rewards/accuracies": "train", "eval_rewards/accuracies": _HELD_OUT},
    ),
    Topic(
        "ln π of the responses",
        "Nats per response. Both falling together is likelihood displacement.",
        {"logps/chosen": "chosen", "logps/rejected": "rejected"},
    ),
    Topic("Reward", "Mean reward of the policy's samples.", {"objective/reward": "reward"}),
    Topic("Gradient norm", "Before clipping.", {"grad_norm": "norm"}),
]

# Whether the policy degenerated while it was trained.
HEALTH = [
    Topic("KL from the reference", "Nats per response, on samples of the policy.", {"objective/kl": "KL"}),
    Topic("Entropy", "Nats per response; a fall towards 0 is collapse.", {"objective/entropy": "entropy"}),
    Topic(
        "ln π of the chosen, against its start",
        "Nats per response on held-out pairs. A fall is likelihood displacement.",
        {"eval_health/chosen_logps_change": "change"},
    ),
    Topic(
        "Variety",
        "Distinct pairs of neighbouring tokens in the samples; share of 4-grams that repeat one of the same response.",
        {"health/distinct_2": "distinct-2", "health/repeated_4grams": "repeated 4-grams"},
    ),
    Topic(
        "Responses without an end",
        "Share of the samples that were cut by the length limit.",
        {"completions/clipped_ratio": "cut"},
    ),
    Topic("Length", "Mean length of the samples, in tokens.", {"completions/mean_length": "tokens"}),
    Topic(
        "Correlation of reward and length",
        "Within the samples; near 1, length is what is rewarded.",
        {"health/reward_length_correlation": "correlation"},
    ),
]


def row_look(results: Results | None, name: str) -> Look:
    """The one look of a row, everywhere on the page: ink for the target, grey for the reference, an accent each.

    A training run (None) has one row.
    """
    if results is None or name in results.trained:
        return numbered_look(results.trained.index(name) if results else 0)
    return Look(INK if name == TARGET else MUTED)


def topic_figures(topics: Sequence[Topic], results: Results | None, logs: Logs) -> list[Figure]:
    """What was logged. One run: its numbers by name; several: one figure per number, with one line per run."""
    figures = []
    for topic in topics:
        if len(logs) == 1:
            (runs,) = logs.values()
            look = {label: numbered_look(1 if label == _HELD_OUT else n) for n, label in enumerate(topic.keys.values())}
            lines = [(label, rows, key) for key, label in topic.keys.items() for rows in runs]
            figures.append(_against_steps(topic.title, topic.about, lines, look))
            continue
        look = {display_name(name): row_look(results, name) for name in logs}
        for key, label in topic.keys.items():
            lines = [(display_name(name), rows, key) for name, runs in logs.items() for rows in runs]
            title = topic.title if len(topic.keys) == 1 else f"{topic.title}: {label}"
            figures.append(_against_steps(title, topic.about, lines, look))
    return [figure for figure in figures if figure]


def learning_figures(results: Results) -> list[Figure]:
    """The main metric and the held-out loss against optimizer steps; the first of a known target is the distance."""
    logged = {key for rows in results.curves.values() for row in rows for key in row}
    main = main_column(results)
    columns = [c for c in results.columns if c.key in logged and (c.key == "forward_kl" or c == main)][:1]
    about = f"On some of the held-out prompts, from the reference (step 0) on; ± 1 standard error; {_DOT}."
    figures = [_learning_figure(results, column, about) for column in columns]
    if "eval_loss" in logged:
        about = f"Each method has its own loss: compare the shapes, not the heights; {_DOT}."
        figures.append(_learning_figure(results, Column(key="eval_loss", label="Loss on held-out pairs"), about))
    return [figure for figure in figures if figure]


def plane_figure(results: Results) -> Figure | None:
    """Reward against KL(π‖π₀): every policy with its errors, the predicted optima, best-of-n; None without a policy."""
    policies, look = [], {}
    for name, row in results.methods.items():
        reward, kl = row.get(_REWARD), row.get(_KL)
        if name == REFERENCE and reward and not kl:
            kl = reward.model_copy(update={"mean": 0.0, "se": 0.0})
        if reward and kl and math.isfinite(reward.mean) and math.isfinite(kl.mean):
            label = display_name(name)
            look[label] = row_look(results, name)
            low, high = [reward.mean - reward.se], [reward.mean + reward.se]
            x_low, x_high = [kl.mean - kl.se], [kl.mean + kl.se]
            policies.append(Curve(label, [kl.mean], [reward.mean], low, high, "points", x_low, x_high))
    if not policies:
        return None
    predictions = _predicted_curves(results)
    look = {curve.label: Look(MUTED, int(curve.label == _BEST_OF_N)) for curve in predictions} | look
    about = "Every policy as it was measured, with bars of ± 1 standard error."
    if results.frontier.points:
        about += (
            " Dashed: what the best policy of each γ was predicted to have before any training, with its 90 % band;"
            " hollow: predictions from too few effective samples to trust."
        )
    if results.frontier.best_of:
        about += " Squares: best of n, at the most KL that it can have."
    unit = next((c.unit for c in results.columns if c.key == _REWARD and c.unit), None)
    axes = "KL(π‖π₀), nats per response", f"reward, {unit}" if unit else "reward"
    curves = [*predictions, *policies]
    panel = Panel("Reward against KL", about, *axes, curves, x_scale="linear", y_scale="linear", direct=True)
    return panel_figure(panel, look, width=11.5, height=5.0)


def length_figure(results: Results) -> Figure | None:
    """Reward against length of every policy's answers, their correlation in its label."""
    curves, look = [], {}
    for name, row in results.points.items():
        known = [(answer.length, answer.reward) for answer in row if math.isfinite(answer.reward)]
        x, y = [length for length, _ in known], [reward for _, reward in known]
        varied = len(known) > 2 and len(set(x)) > 1 and len(set(y)) > 1
        r = f", r = {statistics.correlation(x, y):.2f}".replace("-", "−") if varied else ""
        curves.append(Curve(f"{display_name(name)}{r}", x, y, kind="points"))
        look[curves[-1].label] = row_look(results, name)
    about = "One dot per prompt; r: correlation. Where the two go together, a reward may have been bought with length."
    panel = Panel("Reward against length", about, "tokens", "reward", curves, "linear", "linear", direct=True)
    return panel_figure(panel, look, width=11.5, height=5.0)


def calibration_figures(results: Results) -> list[Figure]:
    """Each method's calibration plot and its expected calibration error, which is taken over these bins."""
    from distalign.stats.intervals import wilson_interval

    figures = []
    for name, bins in results.calibration.items():
        n, look, title = sum(b.n for b in bins), row_look(results, name), display_name(name)
        ends = [wilson_interval(b.observed, b.n) for b in bins]
        x, y = [b.predicted for b in bins], [b.observed for b in bins]
        points = Curve("", x, y, [end.low for end in ends], [end.high for end in ends], "points")
        gap = sum(b.n * abs(b.predicted - b.observed) for b in bins) / max(n, 1)
        about, limits = f"expected calibration error {gap:.3f} (n = {n})", (-0.03, 1.03)
        curves = [Curve(" ", [0.0, 1.0], [0.0, 1.0], kind="bound"), points]
        panel = Panel(title, about, "predicted", "observed", curves, "linear", "linear", limits, limits)
        figure = panel_figure(panel, {"": look, " ": Look(MUTED)}, width=2.9, height=2.9) if bins else None
        figures += [replace(figure, color=look.color, file_title=f"Calibration: {title}")] if figure else []
    return figures


def _against_steps(
    title: str, about: str, lines: Sequence[tuple[str, list[dict[str, float]], str]], look: Mapping[str, Look]
) -> Figure | None:
    """One line for each (label, rows of metrics, key of a number) against optimizer steps."""
    curves = []
    for label, rows, key in lines:
        points = [(row["step"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]
        curves.append(Curve(label, [x for x, _ in points], [y for _, y in points]))
    return panel_figure(Panel(title, about, "optimizer step", "", curves, "linear", "linear"), look)


def _learning_figure(results: Results, column: Column, about: str) -> Figure | None:
    """A metric against optimizer steps: one line per method and seed, a band of ± 1 standard error, the step measured.

    The distance to a known target has the reference's and the target's as dashed lines, and a logarithmic axis where
    it spans more than a factor of 10.
    """
    curves, look = [], {display_name(name): row_look(results, name) for name in results.curves}
    for name, rows in results.curves.items():
        label = display_name(name)
        seed_of = [row["seed"].mean if "seed" in row else 0.0 for row in rows]
        for index, seed in enumerate(sorted(set(seed_of))):
            points = [
                (row["step"].mean, row[column.key].mean, row[column.key].se)
                for row, own_seed in zip(rows, seed_of, strict=True)
                if own_seed == seed and "step" in row and column.key in row and math.isfinite(row[column.key].mean)
            ]
            points.sort()
            x, y = [x for x, _, _ in points], [y for _, y, _ in points]
            se = [se if math.isfinite(se) else 0.0 for _, _, se in points]
            low = [v - e for v, e in zip(y, se, strict=True)] if any(se) else []
            high = [v + e for v, e in zip(y, se, strict=True)] if any(se) else []
            curves.append(Curve(label, x, y, low, high))
            steps = results.kept_step.get(name, [])
            if index < len(steps) and steps[index] in x:
                at = x.index(steps[index])
                curves.append(Curve(label, [x[at]], [y[at]], kind="points"))
    title = f"{column.label}{f', {column.unit}' if column.unit else ''}"
    if column.key != "forward_kl":
        return panel_figure(Panel(title, about, "optimizer step", "", curves, "linear", "linear"), look)
    values = [y for curve in curves for y in curve.y]
    scale: Scale = "log" if values and max(values) > 10 * min(values) > 0 else "linear"
    if REFERENCE in results.methods and values:
        starts = [y for curve in curves for x, y in zip(curve.x, curve.y, strict=True) if x == 0]
        marks = {REFERENCE: statistics.fmean(starts)} if starts else {}
        curves += [Curve(name, [0.0], [y], kind="bound") for name, y in {**marks, TARGET: 0.0}.items()]
        look |= {name: row_look(results, name) for name in (REFERENCE, TARGET)}
    return panel_figure(Panel(DISTANCE, about, "optimizer step", title, curves, "linear", scale), look)


def _predicted_curves(results: Results) -> list[Curve]:
    """The optima of each γ, those to be trusted as a dashed curve with its band, the others as dots; best of n."""
    curves = []
    for gamma in sorted({point.gamma for point in results.frontier.points}):
        label = f"γ = {gamma:g}" if gamma else "γ = 0 (RLHF)"
        for trusted in (True, False):
            points = [p for p in results.frontier.points if p.gamma == gamma and p.trusted is trusted]
            points.sort(key=lambda point: point.kl.mean)
            kind = ("bound" if len(points) > 1 else "points") if trusted else "hollow"
            rewards = [p.reward for p in points]
            curves.append(Curve(label, [p.kl.mean for p in points], *_bands(rewards), kind=kind))
    best = results.frontier.best_of
    curves.append(Curve(_BEST_OF_N, [b.kl_bound for b in best], *_bands([b.reward for b in best]), kind="points"))
    return [curve for curve in curves if curve.x]


def _bands(values: Sequence[Difference]) -> tuple[list[float], list[float], list[float]]:
    return [v.mean for v in values], [v.low for v in values], [v.high for v in values]
