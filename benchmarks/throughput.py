"""One optimizer step of our trainer against one of TRL's DPOTrainer, side by side on the same token ids.

    python benchmarks/throughput.py --json throughput.json

Every side is a real trainer's `train()` in a process of its own, on one thread. In each round every side takes one step
in turn; counted are the CPU seconds of forward and backward over the whole batch, which other programs hardly lengthen
(reference log-probabilities are known before on all sides). The first round is a warm-up. Ratios are theirs / ours,
median over the rounds, with the least and the largest. The memory of a side is the growth of its resident set during
forward and backward of its first step, before there is an optimizer state; its ratio is ours / theirs. Gradients of
the first step are compared tensor by tensor.

With --device cuda everything is on one GPU: seconds are then the wall's, and memory is what torch allocates there.
--dtype is that of the weights, on all sides. TRL's best side takes --trl-batch pairs a micro-batch.

Our side runs at two settings, and every number is given of both: "lean" takes one group a micro-batch (token_budget
512) and recomputes selectively, "fast" takes 2,048 tokens (or --token-budget) and recomputes nothing.

trl_defaults is TRL as shipped: activation checkpointing, every position through the head on a CPU. trl_best is what its
GPU users get: one pair a micro-batch, no checkpointing, the head on response positions only. separate_rows is this
engine's own head with each response encoded on its own, unpadded.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

# Before torch is loaded, here and in the processes that are started: threads that wait must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from common import DTYPES, MODELS, ON_CPU, PROMPTS, WORKLOADS, Machine, facts, ratio
from rich.console import Console
from rich.table import Table
from sides import Job, Side, gradient_error, reference_logps

SETTINGS = {"lean": (512, "selective"), "fast": (2048, "none")}
AGAINST = {"tldr": ["trl_defaults", "trl_best"], "chat": ["trl_defaults", "trl_best"], "group8": ["separate_rows"]}


def compare(model: str, workload: str, options: argparse.Namespace) -> list[dict]:
    """Rows of one model and workload: ours at each setting against each other side."""
    against = [side for side in AGAINST[workload] if side in options.against]
    if not against:
        return []
    prompts = options.prompts or PROMPTS[model]
    if workload == "group8":
        prompts = max(1, prompts // 4)
    machine, where = Machine(options.device), {"device": options.device, "dtype": options.dtype}
    common = {
        **where,
        "model": model,
        "workload": workload,
        "prompts": prompts,
        "steps": options.rounds + 1,
        "reference": () if workload == "group8" else reference_logps(model, workload, prompts, **where),
        "threads": options.threads,
        "trl_batch": options.trl_batch,
    }
    budgets = {"fast": options.token_budget} if options.token_budget else {}
    jobs = {
        name: Job(side="ours", token_budget=budgets.get(name, SETTINGS[name][0]), recompute=SETTINGS[name][1], **common)
        for name in options.settings
    }
    jobs |= {name: Job(side=name, token_budget=0, recompute="none", **common) for name in against}
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.safetensors" for name in jobs}
        sides = {name: Side(replace(job, gradients=str(files[name]))) for name, job in jobs.items()}
        try:
            # The first round warms up; it alone is measured for memory and gradients.
            first = {name: side.step() for name, side in sides.items()}
            errors = {(a, b): gradient_error(files[a], files[b]) for a in options.settings for b in against}
            taken: dict[str, list[dict]] = {name: [] for name in sides}
            roofs = []
            for turn in range(options.rounds):
                roofs.append(machine.roof(options.dtype))
                for name in list(sides) if turn % 2 == 0 else list(sides)[::-1]:
                    taken[name].append(sides[name].step())
                    done = f"{model} {workload} round {turn + 1} of {options.rounds}"
                    print(f"{done}: {name} {taken[name][-1]['seconds']:.3f} {machine.unit}", flush=True)
        finally:
            for side in sides.values():
                side.stop()
    seconds = {name: [step["seconds"] for step in steps] for name, steps in taken.items()}
    rows = []
    for name in options.settings:
        steps, job = taken[name], jobs[name]
        reached = [step["operations"] / step["seconds"] / top for step, top in zip(steps, roofs, strict=True)]
        outside = [step["outside"] for step in steps if "outside" in step]
        rows += [
            {
                "model": model,
                "workload": workload,
                "prompts": prompts,
                "setting": name,
                **where,
                "trl_batch": options.trl_batch,
                "token_budget": job.token_budget,
                "recompute": job.recompute,
                "against": other,
                **ratio(seconds[other], seconds[name]),
                "rounds": options.rounds,
                "memory_ratio": first[name]["growth"] / first[other]["growth"],
                "max_gradient_error": errors[name, other],
                "roof_fraction": statistics.median(reached),
                "outside_fraction": statistics.median(outside) if outside else None,
                "ours": _side(seconds[name], first[name]),
                "theirs": _side(seconds[other], first[other]),
            }
            for other in against
        ]
    return rows


def _side(seconds: Sequence[float], first: dict[str, float]) -> dict[str, float]:
    """What was measured of one side: median seconds, and MB of memory in its first step."""
    return {"seconds": statistics.median(seconds), "growth_mb": first["growth"], "peak_mb": first["peak"]}


def show(rows: Sequence[dict]) -> None:
    """The table, on the terminal."""
    table = Table(title="Forward and backward of one optimizer step: time theirs / ours, memory ours / theirs")
    for column in ("model", "work", "ours", "against", "time", "least–largest", "memory", "gradients", "of roof"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(
            row["model"],
            row["workload"],
            row["setting"],
            row["against"],
            f"{row['time_ratio']:.2f}×",
            f"{row['low']:.2f}–{row['high']:.2f}",
            f"{row['memory_ratio']:.2f}×",
            f"{row['max_gradient_error']:.0e}",
            f"{row['roof_fraction']:.2f}",
        )
    Console(width=120).print(table)
    outside = [row["outside_fraction"] for row in rows if row["outside_fraction"] is not None]
    if outside:
        print(f"our trainer's time outside forward and backward: at most {max(outside):.1%} of a step")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""

    def names(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sides = sorted({side for against in AGAINST.values() for side in against})
    several = {"models": MODELS, "workloads": WORKLOADS, "settings": SETTINGS, "against": sides}
    for name, known in several.items():
        parser.add_argument(f"--{name}", type=names, default=ON_CPU if name == "models" else list(known))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, help="prompts a step; by default 4 of the 135M, 8 of the small model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of the weights, on all sides")
    parser.add_argument("--token-budget", type=int, help='tokens of a micro-batch at "fast" instead of 2,048')
    parser.add_argument("--trl-batch", type=int, default=1, help="pairs of a micro-batch of trl_best")
    parser.add_argument("--json", type=Path, help="where the numbers go")
    options = parser.parse_args(arguments)
    for name, known in several.items():
        wrong = [value for value in getattr(options, name) if value not in known]
        if wrong:
            parser.error(f"--{name}: unknown {', '.join(wrong)}; there are {', '.join(known)}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, show, and write the JSON file after every workload."""
    options = parse(arguments)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    torch.set_num_threads(options.threads)
    rows: list[dict] = []
    for model in options.models:
        for workload in options.workloads:
            rows += compare(model, workload, options)
            if options.json and rows:
                options.json.write_text(
                    json.dumps({"rows": rows, **facts(options.device)}, indent=2) + "\n", encoding="utf-8"
                )
    show(rows)


if __name__ == "__main__":
    main()
