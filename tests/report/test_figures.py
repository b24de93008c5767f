"""What the figures of a run draw, and how they tell curves, labels and ticks apart."""

from __future__ import annotations

import io
import json
import re
from itertools import combinations

import pytest
from matplotlib.figure import Figure
from report_data import COMPARISON, EVIL, evaluation, metrics, write_evaluation, write_lines

from distalign.report.drawing import Look, label_ends, log_ticks, looks
from distalign.report.figures import (
    HEALTH,
    TRAINING,
    learning_figures,
    length_figure,
    plane_figure,
    topic_figures,
)
from distalign.report.results import Results, read_run
from distalign.report.shown import Curve, Panel


class Colors(dict):
    """Every colour of the page, as a shade of grey that stands for it."""

    names = ("ink", "muted", "line", *(f"c{i}" for i in range(1, 9)))

    def __init__(self):
        super().__init__({f"var(--{name})": f"#{i:02x}{i:02x}{i:02x}" for i, name in enumerate(self.names)})


def drawn(figure):
    """The axes of a figure, and the name of the page's colour of something that is drawn on them."""
    axes, colors = Figure(figsize=(figure.width, figure.height)).subplots(), Colors()
    figure.draw(axes, colors)
    return axes, {color: name.removeprefix("var(--").rstrip(")") for name, color in colors.items()}


def points(axes):
    """Markers with their bars: x and y, ends of the bars, colour."""
    series = []
    for line, _, bars in axes.containers:
        ends = sorted(round(v, 6) for bar in bars for v in bar.get_segments()[0].ravel().tolist())
        series.append((line.get_xdata().tolist(), line.get_ydata().tolist(), ends, line.get_color()))
    return series


def test_every_policy_is_on_the_plane():
    """At its KL and reward with one standard error; the reference at KL 0 though it has no column for it."""
    axes, names = drawn(plane_figure(Results.parse(evaluation())))
    policies = {tuple(x): (y, ends, names[color]) for x, y, ends, color in points(axes) if len(x) == 1}
    assert policies[0.0,] == ([0.0], [-0.1, *[0.0] * 6, 0.1], "muted")
    assert policies[4.0,] == ([1.0], [0.9, 1.0, 1.0, 1.1, 3.9, 4.0, 4.0, 4.1], "c2")
    assert policies[6.0,][2] == "c3"
    assert {text.get_text() for text in axes.texts} >= {"reference", "PMLE", "RKL", EVIL}


def test_predictions_are_on_the_plane():
    """Those to be trusted as one dashed curve per γ by increasing KL, the others hollow; best of n at its bound."""
    axes, _ = drawn(plane_figure(Results.parse(evaluation())))
    dashed = [line.get_xdata().tolist() for line in axes.lines if line.get_linestyle() == "--"]
    assert dashed == [[1.0, 2.0, 4.0]] * 2
    hollow = [line.get_xdata().tolist() for line in axes.lines if line.get_fillstyle() == "none"]
    assert hollow == [[10.0]] * 2
    (best,) = [x for x, *_ in points(axes) if len(x) == 2]
    assert best == pytest.approx([0.193147, 0.636294])
    assert {"γ = 0 (RLHF)", "γ = 0.1", "best of n"} <= {text.get_text() for text in axes.texts}


def test_length_is_set_against_reward():
    """Every policy's answers with their correlation; what has no reward has no dot."""
    axes, names = drawn(length_figure(Results.parse(evaluation())))
    assert [names[color] for *_, color in points(axes)] == ["muted", "c1", "c2", "c3"]
    (rkl,) = [text.get_text() for text in axes.texts if text.get_text().startswith("RKL")]
    assert re.fullmatch(r"RKL, r = 0\.9\d", rkl)
    assert length_figure(Results.parse(COMPARISON)) is None


def test_health_is_read_from_the_runs(tmp_path):
    """One line per method from its sub-folder."""
    run = read_run(write_evaluation(tmp_path / "everything"))
    figures = {figure.title: figure for figure in topic_figures(HEALTH, run.results, run.logs)}
    assert list(figures) == ["KL from the reference", "Entropy", "Variety: distinct-2"]
    axes, names = drawn(figures["Entropy"])
    assert [names[line.get_color()] for line in axes.lines] == ["c1", "c2"]
    assert axes.lines[1].get_ydata()[-1] == pytest.approx(40 - 2 * 60 / 10)
    assert [figure.title for figure in topic_figures(TRAINING, run.results, run.logs)] == [
        "Loss: train",
        "Loss: held out",
        "Gradient norm",
    ]


def test_the_logs_of_every_seed_are_drawn(tmp_path):
    """Seeds in their order, one line each, the method named once."""
    (tmp_path / "results.json").write_text(json.dumps(evaluation()), encoding="utf-8")
    for seed in (0, 2, 10):
        write_lines(tmp_path / f"seed-{seed}" / "pmle" / "metrics.jsonl", metrics(1.0 + seed, steps=5))
        write_lines(tmp_path / f"seed-{seed}" / "rkl" / "metrics.jsonl", metrics(1.0, steps=5))
    run = read_run(tmp_path)
    (entropy,) = [figure for figure in topic_figures(HEALTH, run.results, run.logs) if figure.title == "Entropy"]
    axes, names = drawn(entropy)
    ends = [line.get_ydata()[-1] for line in axes.lines if names[line.get_color()] == "c1"]
    assert ends == pytest.approx([40 - 0.5 * (1 + seed) for seed in (0, 2, 10)])
    assert sorted(text.get_text() for text in axes.texts) == ["PMLE", "RKL"]


def test_learning_curves_of_every_seed_have_the_step_that_was_measured():
    """One line and one dot for each; the errors are a band; reference and target are dashed."""
    content = json.loads(json.dumps(COMPARISON)) | {"kept_step": {"pmle": [16, 8], "dpo": [8]}}
    content["curves"]["pmle"] += [{**row, "seed": 1} for row in content["curves"]["pmle"]]
    kl, loss = learning_figures(Results.parse(content))
    assert (kl.title, loss.title) == ("Distance to the target", "Loss on held-out pairs")
    axes, _ = drawn(kl)
    assert sorted(x for x, *_ in points(axes)) == [[8.0], [8.0], [16.0]]
    assert len(axes.collections) - sum(len(bars) for _, _, bars in axes.containers) == 3
    assert sorted(text.get_text() for text in axes.texts) == ["DPO", "PMLE", "reference", "target"]
    assert [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"] == [10.9, 0.0]
    assert axes.get_yscale() == "linear"
    assert "the step that was measured" in kl.about


def test_a_distance_over_more_than_a_factor_of_ten_has_a_logarithmic_axis():
    """The target's zero is not on it, the reference is; the other figures stay as they are."""
    content = json.loads(json.dumps(COMPARISON))
    content["curves"]["dpo"][-1]["forward_kl"]["mean"] = 70.0
    kl, loss = learning_figures(Results.parse(content))
    assert drawn(kl)[0].get_yscale() == "log"
    assert {text.get_text() for text in drawn(kl)[0].texts} == {"DPO", "PMLE", "reference"}
    assert drawn(loss)[0].get_yscale() == "linear"
    content["curves"]["dpo"][-1]["forward_kl"]["mean"] = 0.0
    assert drawn(learning_figures(Results.parse(content))[0])[0].get_yscale() == "linear"


def test_a_long_log_is_a_short_line_with_its_extremes():
    """Only what a screen can tell apart is in the file; the spike and the dip are."""
    log = [{"step": float(i), "grad_norm": float(i % 10)} for i in range(10_000)]
    log[4321]["grad_norm"], log[7777]["grad_norm"] = 99.0, -99.0
    (figure,) = topic_figures(TRAINING, None, {"run": [log]})
    assert len(figure.svg) < 60_000
    (line,) = [path for path in re.findall(r'<path d="([^"]+)"', figure.svg) if path.count("L") > 100]
    heights = [float(y) for _, y in re.findall(r"(-?[0-9.]+) (-?[0-9.]+)", line)]
    assert heights.count(min(heights)) == heights.count(max(heights)) == 1
    assert max(heights) - min(heights) > 0.85 * 72 * (figure.height - 0.55)


def test_looks_tell_curves_apart():
    """One look for each curve, also beyond eight; a bound shares that of the longest line its label begins with."""

    def panels(*labels, kind="line"):
        return [Panel("", "", "", "", [Curve(label, [1], [1], kind=kind) for label in labels])]

    many = looks(panels(*map(str, range(20))))
    assert len(set(many.values())) == 20
    lines, bounds = panels("rkl", "rkl tuned"), panels("rkl tuned limit", "rkl limit", "reference", kind="bound")
    first = looks(lines + bounds)
    assert first["rkl tuned limit"] == first["rkl tuned"] != first["rkl limit"] == first["rkl"]
    assert first["reference"].color == "var(--muted)"
    assert looks(panels(*map(str, range(8))) + panels("other"))["other"] == Look("var(--c1)", 1)


@pytest.mark.parametrize("scale", ["linear", "log"])
@pytest.mark.parametrize("values", [(1.0, 1.0, 1.0), (1e-9, 1e-8, 1.0, 0.99, 0.98), (5.0, 1e-3, 1e-3), (2.0, 1.0, 0.1)])
def test_labels_at_line_ends_do_not_overlap(scale, values):
    """On linear and logarithmic axes, in the order of the values, labels of two lines included."""
    figure = Figure(figsize=(5.6, 3.7), layout="constrained")
    axes = figure.subplots()
    axes.set(yscale=scale, ylim=(min(values) / 2, 2 * max(values)))
    ends = [(value, f"a label\n{i}" if i == 1 else f"{i}", "black") for i, value in enumerate(values)]
    label_ends(axes, ends, thin="")
    figure.savefig(io.BytesIO())
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == len(values)
    assert not [(a, b) for a, b in combinations(boxes, 2) if a.y1 > b.y0 + 1 and b.y1 > a.y0 + 1]
    heights = [box.y0 + box.y1 for box in boxes]
    assert heights == sorted(heights)
    frame = axes.get_window_extent()
    assert all(frame.y0 - 25 < height / 2 < frame.y1 + 25 for height in heights)


def test_a_label_stands_at_the_height_of_its_value_on_a_log_axis():
    """In the middle of the logarithms, not of the values."""
    axes = Figure().subplots()
    axes.set(yscale="log", ylim=(0.01, 100))
    label_ends(axes, [(1.0, "label", "black")], thin="")
    assert axes.texts[0].get_position()[1] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.5, 2000.0, [1, 10, 100, 1000]),
        (0.5, 50.0, [1, 3, 10, 30]),
        (1.04, 1.26, [1.05, 1.1, 1.15, 1.2, 1.25]),
        (1e-30, 1e5, [1e-30, 1e-24, 1e-18, 1e-12, 1e-6, 1]),
    ],
)
def test_log_axes_have_few_round_ticks(low, high, ticks):
    """Powers of ten where there are enough of them, something finer where there are not."""
    assert log_ticks(low, high) == pytest.approx(ticks)
