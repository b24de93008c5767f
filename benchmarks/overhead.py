"""What our trainer costs besides forward, backward and generation: the optimizer, and everything it does itself.

    python benchmarks/overhead.py --json overhead.json

"pairs" is DPO on TL;DR-like pairs; "rounds" is RKL with 8 responses to each TL;DR-like prompt, drawn, rewarded and
learned from in every step. CPU seconds of whole optimizer steps on one thread: median over the steps, the least and the
largest. The first step warms up.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from common import ON_CPU, PROMPTS, facts
from sides import Job, Side, reference_logps


def measure(model: str, work: str, steps: int) -> dict:
    """One row: the share of a step that is spent outside."""
    prompts = PROMPTS[model] if work == "pairs" else max(2, PROMPTS[model] // 2)
    job = Job(
        side="ours",
        model=model,
        workload="tldr" if work == "pairs" else "rounds",
        prompts=prompts,
        steps=steps + 1,
        token_budget=2048,
        recompute="none",
        reference=reference_logps(model, "tldr", prompts) if work == "pairs" else (),
    )
    side = Side(job)
    try:
        side.step()
        taken = [side.step() for _ in range(steps)]
    finally:
        side.stop()
    outside = [step["outside"] for step in taken]
    return {
        "model": model,
        "work": work,
        "prompts": prompts,
        "outside_fraction": statistics.median(outside),
        "low": min(outside),
        "high": max(outside),
        "step_seconds": statistics.median(step["step"] for step in taken),
        "steps": steps,
    }


def main(arguments: Sequence[str] | None = None) -> list[dict]:
    """Measure, show, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=lambda text: text.split(","), default=ON_CPU)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where the numbers go")
    options = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    rows: list[dict] = []
    for model in options.models:
        for work in ("pairs", "rounds"):
            rows.append(measure(model, work, options.steps))
            if options.json:
                options.json.write_text(json.dumps({"rows": rows, **facts()}, indent=2) + "\n", encoding="utf-8")
    for row in rows:
        spread = f"[{row['low']:.1%}, {row['high']:.1%}], {row['steps']} steps of {row['step_seconds']:.1f} CPU s"
        print(f"{row['model']} {row['work']}: {row['outside_fraction']:.1%} {spread}")
    return rows


if __name__ == "__main__":
    main()
