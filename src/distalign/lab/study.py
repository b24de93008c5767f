"""A grid of comparisons on a known target: each cell one resumable `compare`, then one table and the slopes in n."""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distalign.errors import InputError
from distalign.evaluation.results import environment, finite
from distalign.experiments.compare import compare
from distalign.experiments.recipe import Recipe, load_recipe
from distalign.stats.intervals import student_quantile

logger = logging.getLogger("distalign.experiments.study")

# What a study keeps of every run.
KEYS = ("forward_kl", "reverse_kl", "entropy", "win_rate", "length", "kl_reference", "nll")
PAIRS = "target.pairs"


@dataclass(frozen=True)
class Slope:
    """ln KL against ln n over runs (seeds and sizes): exponent with its 95 % interval by Student's t."""

    slope: float
    low: float
    high: float
    runs: int


def study(recipe: Recipe, *, seeds: Sequence[int] | None = None) -> dict[str, Any]:
    """Run the recipe's `study` and write study.json into the run's folder, after every cell what there is so far.

    Cells are comparisons in subfolders; what is done is not done again, so a study that was stopped goes on. Methods
    that take no reward are trained once, not for every reward. Raises InputError for a recipe without `study`.
    """
    if recipe.study is None:
        raise InputError(f"{recipe.name}: has no study; add study: {{grid: {{target.pairs: [256, 1024]}}}}")
    seeds = list(recipe.study.seeds if seeds is None else seeds)
    names = recipe.compare or list(recipe.methods)
    folder = recipe.run_dir
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    trained: set[tuple[Any, ...]] = set()
    for values in itertools.product(*recipe.study.grid.values()):
        cell = dict(zip(recipe.study.grid, values, strict=True))
        plain = tuple(sorted((key, repr(value)) for key, value in cell.items() if not key.startswith("reward")))
        methods = [name for name in names if recipe.method(name).needs.reward or plain not in trained]
        trained.add(plain)
        run = cell_recipe(recipe, cell)
        logger.info("study: %s: %s", run.name, ", ".join(methods))
        content = compare(run, methods, seeds, resume=True).content
        rows += _rows(cell, content)
        result = {
            "name": recipe.name,
            "seeds": seeds,
            "rows": rows,
            "slopes": slopes(rows),
            "settings": recipe.model_dump(mode="json"),
            "environment": environment(),
        }
        text = json.dumps(finite(result), indent=1, ensure_ascii=False)
        (folder / "study.json").write_text(text, encoding="utf-8")
    return result


def cell_recipe(recipe: Recipe, cell: Mapping[str, Any]) -> Recipe:
    """The recipe of one cell of the grid, in a subfolder of the study's."""
    settings = recipe.model_dump(mode="json", exclude={"study"})
    name = "-".join(f"{key.rpartition('.')[2]}-{value}" for key, value in cell.items()) or recipe.name
    changes = [f"{key}={json.dumps(value)}" for key, value in cell.items()]
    return load_recipe({**settings, "name": name, "output_dir": str(Path(recipe.output_dir) / recipe.name)}, changes)


def _rows(cell: Mapping[str, Any], content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per policy and seed: the cell, and what was measured at the last step."""
    rows = []
    for name, by_seed in content["by_seed"].items():
        for seed, measured in zip(content["seeds"], by_seed, strict=True):
            numbers = {key: measured[key] for key in KEYS if key in measured}
            curve = [
                [point["step"], point["forward_kl"]["mean"]]
                for point in content["curves"].get(name, [])
                if point["seed"] == seed and "forward_kl" in point
            ]
            rows.append({"cell": dict(cell), "method": name, "seed": seed, **numbers, "curve": curve})
    return rows


def slopes(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The exponent of the forward KL in n for every method and every other setting of the grid."""
    groups: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        others = ", ".join(f"{key}={value}" for key, value in row["cell"].items() if key != PAIRS)
        label = f"{row['method']} ({others})" if others else row["method"]
        kl = row.get("forward_kl", {}).get("mean", math.nan)
        if PAIRS in row["cell"] and kl > 0:
            groups.setdefault(label, []).append((row["cell"][PAIRS], kl))
    return {
        label: vars(fit_slope(points))
        for label, points in groups.items()
        if len(points) > 2 and len({n for n, _ in points}) > 1
    }


def fit_slope(points: Sequence[tuple[int, float]]) -> Slope:
    """Least squares of ln KL on ln n, with the interval of its exponent."""
    x, y = torch.tensor(points, dtype=torch.float64).log().unbind(1)
    centred = x - x.mean()
    slope = float(centred @ y / centred.square().sum())
    rest = y - y.mean() - slope * centred
    se = math.sqrt(float(rest.square().sum()) / (len(points) - 2) / float(centred.square().sum()))
    half = student_quantile(len(points) - 2) * se
    return Slope(slope, slope - half, slope + half, len(points))
