"""Peak memory of one training step, ours at several settings beside TRL's DPOTrainer.

    python benchmarks/memory.py --json memory.json

Each is a real trainer's `train()` in a fresh process of its own: first the growth of its resident set during forward
and backward of its first step, gradients included, before there is an optimizer state; then its absolute peak. Every
figure is the median of `--repeats` processes, with the least and the largest. Linux only: the peak is the kernel's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from common import MODELS, PROMPTS, facts
from rich.console import Console
from rich.table import Table
from sides import Job, Side, reference_logps

SIDES = {
    "ours, 512 tokens": (512, "none"),
    "ours, 512 tokens, selective": (512, "selective"),
    "ours, 512 tokens, full": (512, "full"),
    "ours, 2048 tokens": (2048, "none"),
    "ours, 2048 tokens, selective": (2048, "selective"),
    "trl_defaults": (0, "none"),
    "trl_best": (0, "none"),
}


def measure(model: str, workload: str, options: argparse.Namespace) -> list[dict]:
    """A row for each side."""
    prompts = PROMPTS[model]
    reference = reference_logps(model, workload, prompts)
    rows = []
    for name in options.sides:
        budget, recompute = SIDES[name]
        job = Job(
            side=name.split(",")[0],
            model=model,
            workload=workload,
            prompts=prompts,
            steps=1,
            token_budget=budget,
            recompute=recompute,
            reference=reference,
        )
        steps = []
        for _ in range(options.repeats):
            side = Side(job)
            try:
                steps.append(side.step())
            finally:
                side.stop()
        growth = [step["growth"] for step in steps]
        rows.append(
            {
                "model": model,
                "workload": workload,
                "prompts": prompts,
                "side": name,
                "token_budget": budget or None,
                "recompute": recompute,
                "growth_mb": statistics.median(growth),
                "low": min(growth),
                "high": max(growth),
                "peak_mb": statistics.median(step["peak"] for step in steps),
                "repeats": options.repeats,
            }
        )
        print(f"{model} {workload} {name}: {rows[-1]['growth_mb']:.0f} MB", flush=True)
    return rows


def show(rows: Sequence[dict]) -> None:
    """The table, on the terminal."""
    table = Table(title="Memory of forward and backward of one step, MB: growth, its spread, absolute peak")
    for column in ("model", "work", "side", "growth", "least–largest", "peak"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        growth = (f"{row['growth_mb']:.0f}", f"{row['low']:.0f}–{row['high']:.0f}", f"{row['peak_mb']:.0f}")
        table.add_row(row["model"], row["workload"], row["side"], *growth)
    Console(width=120).print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, show, and write the JSON file after every model and workload."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=lambda text: text.split(","), default=["smollm2-135m"])
    parser.add_argument("--workloads", type=lambda text: text.split(","), default=["tldr", "chat"])
    parser.add_argument("--sides", type=lambda text: text.split(";"), default=list(SIDES), help="separated by ;")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where the numbers go")
    options = parser.parse_args(arguments)
    unknown = [name for name in (*options.models, *options.sides) if name not in (*MODELS, *SIDES)]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; models are {', '.join(MODELS)}; sides {'; '.join(SIDES)}")
    os.environ["OMP_NUM_THREADS"] = "1"
    rows: list[dict] = []
    for model in options.models:
        for workload in options.workloads:
            rows += measure(model, workload, options)
            if options.json:
                options.json.write_text(json.dumps({"rows": rows, **facts()}, indent=2) + "\n", encoding="utf-8")
    show(rows)


if __name__ == "__main__":
    main()
