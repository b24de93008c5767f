"""What training logs: the figures that are always drawn of it, and every number for the page's script to draw."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from distalign.report.figures import Figure
from distalign.report.numbers import display_name
from distalign.report.panels import Look, numbered_look, panel_data
from distalign.report.results import read_metrics, series
from distalign.report.shown import Curve, Panel

__all__ = ["Logs", "curves_data", "health_figures", "read_logs", "training_figures"]

# The rows of metrics.jsonl by run: one list a seed.
Logs = Mapping[str, Sequence[list[dict[str, float]]]]

HELD_OUT = "held out"
_MOST_POINTS = 400  # of a series on the page: more than a screen can tell apart


class Topic(NamedTuple):
    """A figure of training: its title, the sentence below it, and the numbers drawn in it with their labels."""

    title: str
    about: str
    keys: dict[str, str]


TRAINING = [
    Topic(
        "Loss",
        "Training loss, and the loss on held-out pairs: when only the first still falls, the model memorises.",
        {"loss": "train", "eval_loss": HELD_OUT},
    ),
    Topic(
        "Preference accuracy",
        "Share of pairs whose chosen response gets the larger implied reward; one half is chance.",
        {"rewards/accuracies": "train", "eval_rewards/accuracies": HELD_OUT},
    ),
    Topic(
        "ln π of the responses",
        "Nats per response. Both falling together is likelihood displacement.",
        {"logps/chosen": "chosen", "logps/rejected": "rejected"},
    ),
    Topic(
        "Margin",
        "Implied reward of the chosen response minus that of the rejected one.",
        {"rewards/margins": "train", "eval_rewards/margins": HELD_OUT},
    ),
    Topic("Reward", "Mean reward of the policy's samples.", {"objective/reward": "reward"}),
    Topic("Gradient norm", "Before clipping.", {"grad_norm": "norm"}),
]

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


def read_logs(folder: Path, names: Iterable[str]) -> Logs:
    """The metrics of a comparison's runs, by method: of its sub-folders, or of those of every seed."""
    found = {}
    for name in names:
        files = [path / name / "metrics.jsonl" for path in (folder, *sorted(folder.glob("seed-*"), key=_natural))]
        rows = [read_metrics(path) for path in files if path.is_file()]
        if rows:
            found[name] = rows
    return found


def training_figures(logs: Logs, look: Mapping[str, Look]) -> list[Figure]:
    """What was optimised. One run: its numbers by name; several: a figure a number, a line a run in its look."""
    return _figures(TRAINING, logs, look)


def health_figures(logs: Logs, look: Mapping[str, Look]) -> list[Figure]:
    """Whether the policy degenerated while it was trained, as `training_figures`."""
    return _figures(HEALTH, logs, look)


def curves_data(logs: Logs, look: Mapping[str, Look]) -> str:
    """Everything that was logged as JSON: [name, figure] of every number, for a page to choose from; "" without two."""
    keys = sorted({key for runs in logs.values() for rows in runs for row in rows for key in row} - {"step", "epoch"})
    alone = len(logs) == 1
    topics = []
    for key in keys:
        if alone and key.startswith("eval_") and key.removeprefix("eval_") in keys:
            continue
        pair = {key: HELD_OUT if key.startswith("eval_") else "train", f"eval_{key}": HELD_OUT}
        topics.append(Topic(key, "", pair if alone else {key: key}))
    drawn = [(topic.title, panel) for topic in topics for panel in _panels(topic, logs, look) if _is_curve(panel[0])]
    parts = [f"[{json.dumps(name, ensure_ascii=False)},{panel_data(*panel)}]" for name, panel in drawn]
    return f"[{','.join(parts)}]" if len(parts) > 1 else ""


def _figures(topics: Sequence[Topic], logs: Logs, look: Mapping[str, Look]) -> list[Figure]:
    return [Figure.of(*panel) for topic in topics for panel in _panels(topic, logs, look)]


def _panels(topic: Topic, logs: Logs, look: Mapping[str, Look]) -> list[tuple[Panel, Mapping[str, Look]]]:
    """One panel with a line a key for a lone run; one panel a key with a line a run for several."""
    if len(logs) == 1:
        (runs,) = logs.values()
        curves = [(label, rows, key) for key, label in topic.keys.items() for rows in runs]
        own = {label: numbered_look(1 if label == HELD_OUT else n) for n, label in enumerate(topic.keys.values())}
        return _panel(topic.title, topic.about, curves, own)
    found = []
    for key, label in topic.keys.items():
        curves = [(display_name(name), rows, key) for name, runs in logs.items() for rows in runs]
        title = topic.title if len(topic.keys) == 1 else f"{topic.title}: {label}"
        found += _panel(title, topic.about, curves, {display_name(name): one for name, one in look.items()})
    return found


def _panel(
    title: str, about: str, lines: Sequence[tuple[str, list[dict[str, float]], str]], look: Mapping[str, Look]
) -> list[tuple[Panel, Mapping[str, Look]]]:
    curves = []
    for label, rows, key in lines:
        points = _thinned(series(rows, key))
        if points:
            x, y = zip(*points, strict=True)
            curves.append(Curve(label=label, x=list(x), y=list(y)))
    panel = Panel(title=title, about=about, x="optimizer step", y="", curves=curves, x_scale="linear", y_scale="linear")
    return [(panel, look)] if curves else []


def _is_curve(panel: Panel) -> bool:
    """Whether something in the panel was logged more than once."""
    return any(len(curve.x) > 1 for curve in panel.curves)


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points, or of every stretch its least and its largest where there are too many to be told apart."""
    if len(points) <= _MOST_POINTS:
        return points
    size = -(-len(points) * 2 // _MOST_POINTS)
    kept = []
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        ends = {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
        kept += [points[i] for i in sorted(ends)]
    return kept


def _natural(path: Path) -> tuple[int, str]:
    return len(path.name), path.name
