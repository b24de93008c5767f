"""Made-up run folders with everything that a report can show, and texts that try to become markup."""

from __future__ import annotations

import json
import math
import re

EVIL = "<script>alert('x')</script>\"'&"
METHODS = ("pmle", "rkl", EVIL)


def number(mean, se=0.1, n=40):
    """A mean with its error."""
    return {"mean": mean, "se": se, "n": n}


def interval(mean, half=0.2):
    """A number with an interval around it."""
    return {"mean": mean, "low": mean - half, "high": mean + half}


def difference(mean, low, high, n=48):
    """A paired difference with its interval and count."""
    return {"mean": mean, "low": low, "high": high, "n": n}


COMPARISON = {
    "name": "quickstart",
    "seeds": [0],
    "columns": [
        {"key": "forward_kl", "label": "KL(π*‖π)", "unit": "nats", "better": "lower", "about": "Distance."},
        {"key": "accuracy", "label": "accuracy", "unit": None, "better": "higher", "about": "Share of pairs."},
        {"key": "entropy", "label": "entropy", "unit": "nats", "better": None, "about": "Spread."},
    ],
    "methods": {
        "target": {"forward_kl": number(0.0, 0.0, 48), "accuracy": number(0.789, 0.036, 128)},
        "reference": {"forward_kl": number(10.9, 0.9, 48), "accuracy": number(0.656, 0.042, 128)},
        "pmle": {
            "forward_kl": number(5.97, 0.53, 48),
            "accuracy": number(0.758, 0.012, 128),
            "entropy": number(40, 1, 48),
        },
        "dpo": {
            "forward_kl": number(10.4, 0.8, 48),
            "accuracy": number(0.705, 0.04, 128),
            "entropy": number(29, 2, 48),
        },
    },
    "paired": {
        "pmle": {"forward_kl": difference(-4.93, -6.21, -3.7), "accuracy": difference(0.102, 0.03, 0.17, 128)},
        "dpo": {"forward_kl": difference(-0.5, -1.6, 0.6), "accuracy": difference(0.049, -0.02, 0.12, 128)},
    },
    "curves": {
        name: [
            {"seed": 0, "step": step, "forward_kl": number(10.9 - rate * step, 0.8, 24), "eval_loss": 0.8 - step / 99}
            for step in (0, 8, 16)
        ]
        for name, rate in (("pmle", 0.3), ("dpo", 0.05))
    },
    "kept_step": {"pmle": [16], "dpo": [8]},
    "calibration": {
        "pmle": [{"predicted": 0.05, "observed": 0.11, "n": 31}, {"predicted": 0.9, "observed": 0.8, "n": 9}]
    },
    "pairs": {"train": 320, "held_out": 128, "median_logit": 1.0},
    "settings": {"model": "tiny", "methods": {"pmle": {"gamma": 0.15}}},
    "environment": {"torch": "2.9.1"},
    "seconds": {"data": 120.0, "pmle": 150.0},
    "citation": "arXiv 2506.01523",
}


def evaluation():
    """The content of results.json of an evaluation with everything."""
    rows = ("reference", *METHODS)
    return {
        "name": "everything",
        "seeds": [0],
        "columns": [
            {"key": "reward", "label": "reward", "unit": None, "better": "higher", "about": "Mean."},
            {"key": "kl_reference", "label": "KL(π‖π₀)", "unit": "nats", "better": None},
        ],
        "methods": {
            name: {"reward": number(0.5 * i), **({"kl_reference": number(2.0 * i)} if i else {})}
            for i, name in enumerate(rows)
        },
        "paired": {name: {"reward": {**interval(0.5 * i), "n": 40}} for i, name in enumerate(METHODS, 1)},
        "significance": {"pmle": {"reward": {"p": 0.0004, "holm": 0.0012, "stars": "**"}}},
        "win_rates": {
            "judge": EVIL,
            "matrix": {
                one: {other: number(0.5 + 0.1 * (i - j), 0.05) for j, other in enumerate(rows) if i != j}
                for i, one in enumerate(rows)
            },
        },
        "ratings": {name: interval(0.4 * i, 0.2 * (i > 0)) for i, name in enumerate(rows)},
        "length_controlled": {name: interval(0.5 + 0.05 * i, 0.03) for i, name in enumerate(METHODS, 1)},
        "points": {
            name: [{"length": 5 + k, "reward": 0.1 * k * i + math.sin(k), "prompt": k} for k in range(40)]
            for i, name in enumerate(rows)
        },
        "calibration": {
            "pmle": [{"predicted": 0.2, "observed": 0.3, "n": 9}, {"predicted": 0.8, "observed": 0.7, "n": 9}]
        },
        "frontier": {
            "points": [
                {
                    "beta": beta,
                    "gamma": gamma,
                    "reward": {
                        "value": math.sqrt(1 / beta),
                        "low": 0.9 * math.sqrt(1 / beta),
                        "high": None,
                        "se_prompts": None,
                    },
                    "kl": {"value": 1 / beta, "low": 0.9 / beta, "high": 1.1 / beta, "se_prompts": 0.1},
                    "ess": 400 * beta,
                    "trusted": beta > 0.2,
                    "warning": None,
                }
                for gamma in (0.0, 0.1)
                for beta in (1.0, 0.5, 0.25, 0.1)
            ],
            "best_of": [{"n": n, "reward": interval(0.2 * n), "kl_bound": math.log(n) - (n - 1) / n} for n in (2, 4)],
        },
        "settings": {
            "methods": {"pmle": {"gamma": 0.1, "beta": 0.0}, "rkl": {"gamma": 0.1, "epochs": 2}},
            "note": EVIL,
        },
        "environment": {"torch": "2.9.1"},
        "citation": EVIL,
    }


def metrics(slope=1.0, steps=60):
    """Lines of metrics.jsonl."""
    lines = []
    for step in range(1, steps + 1):
        lines.append(
            {
                "step": step,
                "loss": math.exp(-slope * step / steps),
                "grad_norm": 1 + 0.1 * (step % 7),
                "objective/entropy": 40 - slope * step / 10,
                "objective/kl": slope * step / 10,
                "health/distinct_2": 0.9,
            }
        )
        if step % 10 == 0:
            lines.append({"step": step, "eval_loss": 0.1 + math.exp(-slope * step / steps)})
    return lines


def write_lines(path, rows):
    """Write one JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_evaluation(folder):
    """A folder with results, the logs of two trained methods, and samples."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(evaluation()), encoding="utf-8")
    write_lines(folder / "pmle" / "metrics.jsonl", metrics(0.5))
    write_lines(folder / "rkl" / "metrics.jsonl", metrics(2.0))
    prompts = ("Where do swallows go?", f"Say {EVIL}.", "What is a kelp forest?")
    answers = {"reference": "Nowhere.", "pmle": "South, to Africa.", "rkl": "The sea has forests.", EVIL: EVIL}
    write_lines(
        folder / "samples.jsonl",
        [{"prompt": p, "responses": answers if i else {**answers, "rkl": "A zebra."}} for i, p in enumerate(prompts)],
    )
    return folder


def write_training(folder, slope=1.0, **settings):
    """A training run's folder."""
    write_lines(folder / "metrics.jsonl", metrics(slope))
    (folder / "recipe.yaml").write_text(json.dumps({"seed": 0, "method": {"gamma": 0.1}, **settings}), encoding="utf-8")
    return folder


def curve(label="pmle", y=(1.0, 0.1, 0.01), **changes):
    """A curve as lab.json has it."""
    return {"label": label, "x": [10.0, 100.0, 1000.0], "y": list(y), **changes}


def panel(*curves, **changes):
    """A figure as lab.json has it."""
    return {"title": "KL against n", "about": "Medians.", "x": "n", "y": "nats", "curves": list(curves), **changes}


def measured(name="figure1", **shown):
    """An experiment's lab.json; `shown` replaces parts of what it shows."""
    claims = [
        {"promised": "falls like 1/n", "found": "slope −1.02", "holds": True},
        {"promised": "levels off", "found": "35 % too low", "holds": False},
    ]
    table = {"title": "KL", "about": "In nats.", "columns": ["method", "n", "KL"], "rows": [["pmle", 65536, 0.012345]]}
    parts = {"title": "Who gets there", "about": "A toy.", "claims": claims, "tables": [table]}
    parts["panels"] = [panel(curve(), curve("pmle limit", (0.02, 0.02, 0.02), kind="bound"))]
    return {"experiment": name, "settings": {"seed": 3, "gamma": 0.5}, "shown": {**parts, **shown}, "seconds": 12.0}


def write_lab(folder, *experiments):
    """Experiments in sub-folders."""
    for experiment in experiments:
        path = folder / re.sub(r"\W", "", experiment["experiment"])
        path.mkdir(parents=True)
        (path / "lab.json").write_text(json.dumps(experiment), encoding="utf-8")
    return folder
