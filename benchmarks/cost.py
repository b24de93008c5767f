"""What sharing the prompt should save, and what it does: forward and backward, shared against one response at a time.

    python benchmarks/cost.py --json cost.json

With prompts of P tokens, responses of R and G responses to each, P + G (R − 1) tokens go through the layers instead of
G (P + R − 1). The prediction counts operations of the layers, the head and attention (`common.useful_operations`), and
one more product of the head on both sides, which the backward pass computes again. Both sides run in this process, in
turn; the ratio is the median over the rounds beside its least and its largest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import MODELS, ON_CPU, Workload, body_size, facts, useful_operations
from rich.console import Console
from rich.table import Table
from torch import Tensor

from distalign.engine import Group, score

SHAPES = {"tldr": (411, 42), "chat": (175, 250)}


def alone(group: Group) -> list[Group]:
    """Each response with the prompt for itself."""
    return [Group(group.prompt, [response]) for response in group.responses]


def operations(model: Any, groups: Sequence[Group]) -> float:
    """What forward and backward of these groups compute, the head's second forward product included."""
    config = model.config
    again = sum(len(response) for group in groups for response in group.responses) * config.vocab_size
    return useful_operations(config, groups, body_size(model)) + 2 * again * config.hidden_size


def seconds(model: Any, parts: Sequence[Sequence[Group]]) -> float:
    """CPU seconds of forward and backward of the parts, one after another."""
    start = time.process_time()
    for groups in parts:
        logps: Tensor = score(model, groups).logps
        (logps * torch.linspace(-1, 1, len(logps), dtype=logps.dtype)).sum().backward()
    elapsed = time.process_time() - start
    model.zero_grad()
    return elapsed


def measure(name: str, model: Any, shape: str, responses: int, rounds: int) -> dict[str, Any]:
    """One row: tokens, predicted and measured ratio."""
    prompt, length = SHAPES[shape]
    (group,) = Workload((prompt, prompt), (length, length), responses).groups(1, model.config.vocab_size)
    sides = {"shared": [[group]], "separate": [[one] for one in alone(group)]}
    times: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(rounds):
        for side in list(sides) if turn % 2 == 0 else list(sides)[::-1]:
            times[side].append(seconds(model, sides[side]))
    ratios = [b / a for a, b in zip(times["shared"], times["separate"], strict=True)]
    shared, separate = prompt + responses * (length - 1), responses * (prompt + length - 1)
    return {
        "model": name,
        "prompt_tokens": prompt,
        "response_tokens": length,
        "responses": responses,
        "tokens_shared": shared,
        "tokens_separate": separate,
        "token_ratio": separate / shared,
        "predicted": operations(model, alone(group)) / operations(model, [group]),
        "measured": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "rounds": rounds,
    }


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The table, on the terminal."""
    table = Table(title="Forward and backward of a group: separate / shared")
    for column in ("model", "P", "R", "G", "tokens", "ratio of tokens", "predicted", "measured", "least–largest"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["model"],
            *(str(row[name]) for name in ("prompt_tokens", "response_tokens", "responses")),
            f"{row['tokens_separate']} → {row['tokens_shared']}",
            *(f"{row[name]:.2f}" for name in ("token_ratio", "predicted", "measured")),
            f"{row['low']:.2f}–{row['high']:.2f}",
        )
    Console(width=120).print(table)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, show, and write the JSON file after every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=lambda text: text.split(","), default=ON_CPU)
    parser.add_argument("--shapes", type=lambda text: text.split(","), default=list(SHAPES))
    parser.add_argument("--responses", type=lambda text: [int(n) for n in text.split(",")], default=[2, 4, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where the numbers go")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in options.models:
        model = MODELS[name]().train()
        seconds(model, [Workload((50, 50), (20, 20)).groups(1, model.config.vocab_size)])
        for shape in options.shapes:
            for responses in options.responses:
                rows.append(measure(name, model, shape, responses, options.rounds))
                if options.json:
                    text = json.dumps({"rows": rows, **facts()}, indent=2)
                    options.json.write_text(text + "\n", encoding="utf-8")
    show(rows)
    return rows


if __name__ == "__main__":
    main()
