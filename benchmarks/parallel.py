"""A step in several processes beside the same step in one, on the same cores: seconds by the clock, and their ratio.

    python benchmarks/parallel.py --json parallel.json

One process has a thread for each core, several have one each and meet by gloo (DDP). DPO on pairs like TL;DR's, and RKL
with 8 responses of 53 tokens to each prompt, drawn, rewarded and learned from. Whole runs take turns; the first step of
each warms up. The ratio is one / several: above 1, processes use the cores better than threads do. Nothing else may
compute meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from common import MODELS, PROMPTS, facts, ratio
from sides import Job, reference_logps, train_ours, train_rounds

WORK = {"dpo": ("tldr", train_ours), "rkl": ("rounds", train_rounds)}


class Collect:
    """The pipe of a side that waits for nobody."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    def recv(self) -> None:
        """Go."""

    def send(self, report: dict[str, float]) -> None:
        """Keep the seconds of the step."""
        self.steps.append(report["step"])


def work(method: str, options: argparse.Namespace) -> None:
    """What each process does: train, and the first writes the seconds of a step."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(options.cores // processes)
    workload, train = WORK[method]
    prompts = options.prompts or 2 * PROMPTS[options.model]
    reference = reference_logps(options.model, workload, prompts) if method == "dpo" else ()
    job = Job(
        method if method == "rkl" else "ours", options.model, workload, prompts, options.steps + 1, 2048, "none",
        reference, wall=True, processes=processes,
    )  # fmt: skip
    pipe = Collect()
    with tempfile.TemporaryDirectory() as folder:
        train(pipe, job, folder)
    if os.environ.get("RANK", "0") == "0":
        options.work.write_text(json.dumps(statistics.median(pipe.steps[1:])), encoding="utf-8")


def start(method: str, processes: int, options: argparse.Namespace) -> float:
    """Seconds of a step of a run in so many processes."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    settings = ["--model", options.model, "--steps", str(options.steps), "--cores", str(options.cores)]
    if options.prompts:
        settings += ["--prompts", str(options.prompts)]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "seconds.json"
        command = [sys.executable, *(launch if processes > 1 else []), __file__, "--work", str(out)]
        # torchrun gives each process one thread, unless it is told.
        environment = os.environ | {"OMP_NUM_THREADS": str(options.cores // processes)}
        subprocess.run([*command, "--methods", method, *settings], env=environment, check=True, capture_output=True)
        return json.loads(out.read_text())


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the JSON file after each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="small-32k")
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(WORK))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--prompts", type=int, help="prompts of a step, of all processes")
    parser.add_argument("--steps", type=int, default=4, help="steps of a run, after its first")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where the numbers go")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work is not None:
        work(options.methods[0], options)
        return
    rows = []
    for method in options.methods:
        seconds: dict[int, list[float]] = {1: [], options.processes: []}
        for turn in range(options.rounds):
            for processes in list(seconds) if turn % 2 == 0 else list(seconds)[::-1]:
                seconds[processes].append(start(method, processes, options))
        row = {
            "model": options.model,
            "method": method,
            "processes": options.processes,
            "cores": options.cores,
            **ratio(seconds[1], seconds[options.processes]),
            "one": statistics.median(seconds[1]),
            "several": statistics.median(seconds[options.processes]),
            "rounds": options.rounds,
        }
        rows.append(row)
        print(
            f"{method}, {options.model}: one process {row['one']:.2f} s, {options.processes} processes "
            f"{row['several']:.2f} s: {row['time_ratio']:.2f}× [{row['low']:.2f}, {row['high']:.2f}]",
            flush=True,
        )
        if options.json:
            options.json.write_text(json.dumps({"rows": rows, **facts()}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
