"""A grid of comparisons on a known target: each cell one resumable `compare`, then one table and the slopes in n."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from distalign.errors import InputError
from distalign.evaluation.results import environment, finite
from distalign.experiments.compare import compare
from distalign.experiments.recipe import Recipe, load_recipe
from distalign.lab.experiment import Row, curve, level, select
from distalign.report.shown import Curve, Panel, Shown, Table
from distalign.settings import masked
from distalign.stats.intervals import Estimate, Interval, mean_and_se, paired_difference, student_quantile
from distalign.training.run_folder import write_text

logger = logging.getLogger("distalign.experiments.study")

# What a study keeps of every run.
KEYS = ("forward_kl", "reverse_kl", "entropy", "win_rate", "length", "kl_reference", "nll")
PAIRS = "target.pairs"
OPTIMUM = "the reward's optimum"

# The settings of a cell that a method without a reward sees.
Plain = tuple[tuple[str, str], ...]


def study(recipe: Recipe, *, seeds: Sequence[int] | None = None) -> Row:
    """Run the recipe's `study` and write lab.json into the run's folder, after every cell what there is so far.

    Cells are comparisons in subfolders; what is done is not done again, so a study that was stopped goes on. Methods
    that take no reward are trained once, not for every reward. Raises InputError for a recipe without `study` or
    without a known target, and for a cell that is no recipe, before anything is trained.
    """
    if recipe.study is None:
        raise InputError(f"{recipe.name}: has no study; add study: {{grid: {{target.pairs: [256, 1024]}}}}")
    if recipe.target is None:
        raise InputError(f"{recipe.name}: a study measures the distance to a known target; add target")
    seeds = list(recipe.study.seeds if seeds is None else seeds)
    names = recipe.compare or list(recipe.methods)
    folder = recipe.run_dir
    cells = [dict(zip(recipe.study.grid, each, strict=True)) for each in itertools.product(*recipe.study.grid.values())]
    runs = [cell_recipe(recipe, cell) for cell in cells]
    resolved = [json.dumps(run.model_dump(mode="json", exclude={"name", "seed"}), sort_keys=True) for run in runs]
    if len({run.name for run in runs}) < len(runs) or len(set(resolved)) < len(runs) or len(set(seeds)) < len(seeds):
        raise InputError(
            f"{recipe.name}: study: two cells or two seeds are the same, or have one name; give each value once (seeds "
            "as study.seeds)"
        )
    rows: list[Row] = []
    result: Row = {}
    trained: set[Plain] = set()
    started = time.monotonic()
    for cell, run in zip(cells, runs, strict=True):
        plain = _without_reward(cell)
        methods = [name for name in names if recipe.method(name).needs.reward or plain not in trained]
        trained.add(plain)
        logger.info("study: %s: %s", run.name, ", ".join(methods))
        content = compare(run, methods, seeds, resume=True).content
        rows += _rows({PAIRS: run.target.pairs if run.target else 0, **cell}, content)
        result = {
            "experiment": "study",
            "settings": masked(recipe.model_dump(mode="json")),
            "seeds": seeds,
            "rows": rows,
            "slopes": slopes(rows),
            "shown": dataclasses.asdict(show(rows)),
            "seconds": time.monotonic() - started,
            "environment": environment(),
        }
        write_text(folder / "lab.json", json.dumps(finite(result), indent=1, ensure_ascii=False))
    return result


def _without_reward(cell: Row) -> Plain:
    return tuple(sorted((key, repr(value)) for key, value in cell.items() if not key.startswith("reward")))


def cell_recipe(recipe: Recipe, cell: Row) -> Recipe:
    """The recipe of one cell of the grid, in a subfolder of the study's."""
    settings = recipe.model_dump(mode="json", exclude={"study"})
    if len(settings["reward"]) == 1:
        (settings["reward"],) = settings["reward"]  # so that the grid can name its settings
    words = "-".join(f"{key.rpartition('.')[2]}-{value}" for key, value in cell.items())
    name = re.sub(r"[^\w.]+", "-", words).strip("-.") or recipe.name
    changes = [f"{key}={json.dumps(value)}" for key, value in cell.items()]
    return load_recipe({**settings, "name": name, "output_dir": str(Path(recipe.output_dir) / recipe.name)}, changes)


def _rows(cell: Row, content: Row) -> list[Row]:
    """One row per policy and seed: the cell, and what was measured at the last step."""
    rows = []
    for name, by_seed in content["by_seed"].items():
        for seed, measured in zip(content["seeds"], by_seed, strict=True):
            numbers = {key: measured[key] for key in KEYS if key in measured}
            curve = [
                [point["step"], point["forward_kl"]["mean"], point["eval_loss"]]
                for point in content["curves"].get(name, [])
                if point["seed"] == seed and "forward_kl" in point
            ]
            rows.append({"cell": dict(cell), "method": name, "seed": seed, **numbers, "curve": curve})
    # What RKL and PD would reach with the learned reward: their floor.
    for seed, potential in zip(content["seeds"], content["potential"], strict=False):
        if "distance" in potential:
            numbers = {"forward_kl": potential["distance"], "curve": []}
            rows.append({"cell": dict(cell), "method": OPTIMUM, "seed": seed, **numbers})
    return rows


def _by_label(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of every method, by its name and what it had several values of, the number of pairs aside."""
    values: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        for key, value in row["cell"].items():
            values.setdefault((row["method"], key), set()).add(repr(value))
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["method"] not in ("target", "reference"):
            told = [key for key in row["cell"] if key != PAIRS and len(values[row["method"], key]) > 1]
            others = ", ".join(f"{key.rpartition('.')[2]} {row['cell'][key]}" for key in told)
            groups.setdefault(f"{row['method']} ({others})" if others else row["method"], []).append(row)
    return groups


def show(rows: Sequence[Row]) -> Shown:
    """The figures and tables of a study."""
    sizes = sorted({row["cell"].get(PAIRS, 0) for row in rows})
    known = {name: select(rows, method=name) for name in ("target", "reference")}
    falls, entropies, steps, planes, table, nearest = [], [], [], [], [], []
    first = next((row["method"] for row in rows if row["method"] not in (*known, OPTIMUM)), "")
    for label, own in _by_label(rows).items():
        by_size = [(n, [row for row in own if row["cell"].get(PAIRS, 0) == n]) for n in sizes]
        by_size = [(n, same) for n, same in by_size if same]
        falls.append(_curve(label, by_size, "forward_kl"))
        if all("entropy" in row for row in own):
            entropies.append(_curve(label, by_size, "entropy"))
            planes.append(_plane(label, [same for _, same in by_size], "line" if len(by_size) > 1 else "points"))
        largest = by_size[-1][1]
        if largest[0]["curve"]:
            # A run that collapsed may have stopped before the others.
            points = list(zip(*(row["curve"] for row in largest), strict=False))
            means = [sum(kl for _, kl, _ in same) / len(same) for same in points]
            steps.append(Curve(label, [same[0][0] for same in points], means))
        table += [[label, n, *_texts(same), _seeds(same)] for n, same in by_size]
        nearest += [[label, n, *_nearest(same)] for n, same in by_size if all(row["curve"] for row in same)]
    table += [[name, None, *_texts(own), _seeds(own)] for name, own in known.items()]
    planes += [_plane(name, [own], "points") for name, own in known.items()]
    start = _over_seeds(known["reference"], "forward_kl").mean
    entropy_levels = [level(f"{name}'s", sizes, _over_seeds(own, "entropy").mean) for name, own in known.items()]
    nats = "KL(π*‖π), nats per response"
    over = "Last step; mean over seeds, a band of ± 1 standard error."
    exponents = [
        [label, f"{slope['slope']:.2f}", f"[{slope['low']:.2f}, {slope['high']:.2f}]", slope["runs"]]
        for label, slope in slopes(rows).items()
    ]
    return Shown(
        "How near the methods come to a known target",
        "Each method on pairs that a known target labelled; its distance on held-out prompts, after the last step.",
        panels=[
            Panel(
                "Distance against the number of pairs",
                f"{over} Dashed: π₀, and a line that falls as 1/n.",
                "labelled pairs",
                nats,
                [
                    *falls,
                    level("π₀", sizes, start),
                    Curve("1/n", sizes, [start * sizes[0] / n for n in sizes], kind="bound"),
                ],
            ),
            Panel("Distance during training", "At the largest number of pairs; mean over seeds.", "step", nats, steps,
                  "linear", "log"),
            Panel("Entropy", f"{over} Dashed: the target's and π₀'s.", "labelled pairs", "nats per response",
                  [*entropies, *entropy_levels], "log", "linear"),
            Panel("Reward against distance from the start", "The exact reward over γ, E[ln π*], against KL(π‖π₀): mean "
                  "over seeds, a line from few pairs to many. RLHF's optimum has the most reward for its distance.",
                  "KL(π‖π₀), nats per response", "E[ln π*], nats per response", planes, "linear", "linear",
                  direct=True),
        ],
        tables=[
            Table("At the last step", "Mean ± standard error over seeds, which share prompts; of one seed over these.",
                  ["method", "pairs", "KL(π*‖π)", "KL(π‖π*)", "entropy", "win rate", "label NLL", "seeds"], table),
            Table("Differences in KL(π*‖π)", "Nats, paired by seed, with 95 % intervals by Student's t.",
                  ["method", "pairs", "from π₀", f"from {first}"], _differences(rows, first)),
            Table("During training", "KL(π*‖π) on the curve's prompts, which are fewer; mean ± standard error over "
                  "seeds. The nearest step is known to an oracle alone; by labels: that of the least held-out NLL.",
                  ["method", "pairs", "start", "nearest", "at step", "by labels", "at step", "last", "of"], nearest),
            Table("Exponents", "ln KL against ln n, least squares over all runs; 95 % by Student's t. The theory: −1.",
                  ["method", "exponent", "interval", "runs"], exponents),
        ],
    )  # fmt: skip


def _curve(label: str, by_size: Sequence[tuple[int, Sequence[Row]]], key: str) -> Curve:
    points = []
    for n, same in by_size:
        mean, se, _ = _over_seeds(same, key)
        points.append({"n": n, key: {"mean": mean, "se": 0.0 if math.isnan(se) else se}})
    return curve(label, points, "n", key)


def _plane(label: str, groups: Sequence[Sequence[Row]], kind: Literal["line", "points"]) -> Curve:
    """Exact reward against the distance from the start, one point for each group of runs."""
    kl, entropy, reverse = (
        [_over_seeds(rows, key).mean for rows in groups] for key in ("kl_reference", "entropy", "reverse_kl")
    )
    # E_π[ln π*] = −H(π) − KL(π‖π*), of the same responses.
    return Curve(label, kl, [-h - d for h, d in zip(entropy, reverse, strict=True)], kind=kind)


def _over_seeds(rows: Sequence[Row], key: str) -> Estimate:
    """Mean and error over seeds; of one seed its own."""
    values = [row[key] for row in rows if key in row]
    if not values:
        return Estimate(math.nan, math.nan, 0)
    if len(values) == 1:
        return Estimate(values[0]["mean"], values[0]["se"], 1)
    return mean_and_se(torch.tensor([value["mean"] for value in values], dtype=torch.float64))


def _texts(rows: Sequence[Row]) -> list[str]:
    """What the table has of these runs, each with its error."""
    estimates = [_over_seeds(rows, key) for key in ("forward_kl", "reverse_kl", "entropy", "win_rate", "nll")]
    return ["–" if math.isnan(mean) else f"{mean:.2f} ± {se:.2f}" for mean, se, _ in estimates]


def _seeds(rows: Sequence[Row]) -> int:
    return len({row["seed"] for row in rows})


def _nearest(rows: Sequence[Row]) -> list[str | int]:
    """Of the curves of these runs: the start, the nearest point, that of the least label NLL, the end; the steps."""
    curves = [row["curve"] for row in rows]
    cells: list[str | int] = []
    for chosen in (
        [points[0] for points in curves],
        [min(points, key=lambda point: point[1]) for points in curves],
        [min(points, key=lambda point: point[2]) for points in curves],
        [points[-1] for points in curves],
    ):
        cells += [_text([kl for _, kl, _ in chosen]), round(sum(step for step, *_ in chosen) / len(chosen))]
    return [cells[0], *cells[2:]]


def _text(values: Sequence[float]) -> str:
    mean, se, n = mean_and_se(torch.tensor(values))
    return f"{mean:.2f} ± {se:.2f}" if n > 1 else f"{mean:.2f}"


def _differences(rows: Sequence[Row], first: str) -> list[list[str | int]]:
    """Each method's KL(π*‖π) less that of the reference, and of the first method, of the same seed and pairs."""

    def at(method: str, row: Row) -> float:
        """Of the row's cell, or, of a method that is trained for the first reward alone, of that reward's."""
        of = method, row["seed"], _without_reward(row["cell"])
        there = [one for one in rows if (one["method"], one["seed"], _without_reward(one["cell"])) == of]
        return next((one for one in there if one["cell"] == row["cell"]), there[0])["forward_kl"]["mean"]

    table: list[list[str | int]] = []
    for label, own in _by_label(rows).items():
        for n in sorted({row["cell"].get(PAIRS, 0) for row in own if row["method"] != OPTIMUM}):
            same = [row for row in own if row["cell"].get(PAIRS, 0) == n]
            own_kl = torch.tensor([row["forward_kl"]["mean"] for row in same])
            texts = []
            for other in ("reference", first):
                if len(same) < 2 or own[0]["method"] == other:
                    texts.append("–")
                    continue
                kl = torch.tensor([at(other, row) for row in same])
                mean, low, high = paired_difference(own_kl, kl)
                texts.append(f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]")
            table.append([label, n, *texts])
    return table


def slopes(rows: Sequence[Row]) -> dict[str, Row]:
    """The exponent of the forward KL in n for every method and every other setting of the grid."""
    found: dict[str, Row] = {}
    for label, own in _by_label(rows).items():
        points = [(row["cell"][PAIRS], row["forward_kl"]["mean"]) for row in own if PAIRS in row["cell"]]
        if len(points) > 2 and len({n for n, _ in points}) > 1 and min(kl for _, kl in points) > 0:
            slope, low, high = fit_slope(points)
            found[label] = {"slope": slope, "low": low, "high": high, "runs": len(points)}
    return found


def fit_slope(points: Sequence[tuple[int, float]]) -> Interval:
    """Least squares of ln KL on ln n over runs (seeds and sizes): its exponent, with a 95 % interval by Student's t."""
    x, y = torch.tensor(points, dtype=torch.float64).log().unbind(1)
    centred = x - x.mean()
    slope = float(centred @ y / centred.square().sum())
    rest = y - y.mean() - slope * centred
    se = math.sqrt(float(rest.square().sum()) / (len(points) - 2) / float(centred.square().sum()))
    half = student_quantile(len(points) - 2) * se
    return Interval(slope, slope - half, slope + half)
