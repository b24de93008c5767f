"""A whole on-policy step beside TRL's RLOOTrainer: 8 responses a prompt drawn, rewarded and learned from.

    python benchmarks/onpolicy.py --json onpolicy.json

RLHF at β = 0 is what RLOO does; RKL adds the entropy over the vocabulary, PD the pairs of a prompt's responses. All
sides have the same prompts of random ids (350 to 460 tokens), draw 53 tokens a response, and take a step when it is
their turn, in processes of their own; what is counted is CPU time (on a GPU: seconds), of the whole step. The first
round warms up.
The ratio is the median over the rounds of theirs / ours, beside its least and its largest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from common import DTYPES, MODELS, ON_CPU, PROMPTS, Machine, facts, ratio
from rich.console import Console
from rich.table import Table
from sides import ROUNDS, Job, Side


def compare(model: str, options: argparse.Namespace) -> list[dict]:
    """One row for each of our methods."""
    settings = {
        "model": model,
        "workload": "rounds",
        "prompts": options.prompts or PROMPTS[model],
        "steps": options.rounds + 1,
        "token_budget": 2048,
        "recompute": "none",
        "threads": options.threads,
        "device": options.device,
        "dtype": options.dtype,
        "trl_batch": options.trl_batch,
    }
    sides = {name: Side(Job(side=name, **settings)) for name in [*options.methods, "rloo"]}
    try:
        first = {name: side.step() for name, side in sides.items()}
        taken: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(options.rounds):
            for name in list(sides) if turn % 2 == 0 else list(sides)[::-1]:
                taken[name].append(sides[name].step()["step"])
                done = f"{model} round {turn + 1} of {options.rounds}"
                print(f"{done}: {name} {taken[name][-1]:.2f} {Machine(options.device).unit}", flush=True)
    finally:
        for side in sides.values():
            side.stop()
    return [
        {
            **settings,
            "method": name,
            **ratio(taken["rloo"], taken[name]),
            "rounds": options.rounds,
            "memory_ratio": first[name]["growth"] / first["rloo"]["growth"],
            "seconds": statistics.median(taken[name]),
            "rloo_seconds": statistics.median(taken["rloo"]),
        }
        for name in options.methods
    ]


def show(rows: Sequence[dict]) -> None:
    """The table, on the terminal."""
    table = Table(title="A whole on-policy step: time RLOO / ours, memory ours / RLOO")
    for column in ("model", "method", "time", "least–largest", "memory", "ours", "RLOO"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        spread = f"{row['low']:.2f}–{row['high']:.2f}"
        seconds = (f"{row['seconds']:.1f}", f"{row['rloo_seconds']:.1f}")
        table.add_row(
            row["model"], row["method"], f"{row['time_ratio']:.2f}×", spread, f"{row['memory_ratio']:.2f}×", *seconds
        )
    Console(width=120).print(table)


def main(arguments: Sequence[str] | None = None) -> list[dict]:
    """Measure, show, and write the JSON file after every model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=lambda text: text.split(","), default=ON_CPU)
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(ROUNDS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, help="prompts a step; by default 4 of the 135M, 8 of the small model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--trl-batch", type=int, default=8, help="responses of a micro-batch of RLOO")
    parser.add_argument("--json", type=Path, help="where the numbers go")
    options = parser.parse_args(arguments)
    if unknown := {*options.models} - {*MODELS} | {*options.methods} - {*ROUNDS}:
        parser.error(f"unknown {', '.join(sorted(unknown))}; there are {', '.join([*MODELS, *ROUNDS])}")
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    torch.set_num_threads(options.threads)
    rows: list[dict] = []
    for model in options.models:
        rows += compare(model, options)
        if options.json:
            content = {"rows": rows, **facts(options.device)}
            options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    show(rows)
    return rows


if __name__ == "__main__":
    main()
