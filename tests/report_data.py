"""Made-up run folders with everything that a report can show, and texts that try to become markup."""

from __future__ import annotations

import json
import math

EVIL = "<script>alert('x')</script>\"'&"
METHODS = ("pmle", "rkl", EVIL)


def number(mean, se=0.1, n=40):
    """A mean with its error."""
    return {"mean": mean, "se": se, "n": n}


def interval(mean, half=0.2):
    """A number with an interval around it."""
    return {"mean": mean, "low": mean - half, "high": mean + half}


def evaluation():
    """The content of results.json of an evaluation that found everything."""
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
    """Write one JSON object a line."""
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
