"""Our rollouts against `model.generate(num_return_sequences=G)`: tokens a second, and the ratio as G grows.

    python benchmarks/generation.py --json generation.json

Both generate exactly `--tokens` tokens a response, sampled at temperature 1, without gradient, from the same prompts
of random ids, 350 to 460 tokens long as TL;DR's are. Both run in this process on `--threads` threads; what is counted
is its CPU time, which other programs do not lengthen (on an accelerator: time by the clock). In every round each has
one turn, ours and theirs first by turns; the ratio is the median over the rounds of theirs / ours, beside its least
and its largest.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import MODELS, facts
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import GenerationConfig

from distalign.rollout.sample import sample

PROMPT_TOKENS = (350, 460)


def make_prompts(count: int, vocabulary: int, lengths: tuple[int, int], seed: int = 0) -> list[list[int]]:
    """Prompts of random ids; `lengths` are the least and the most tokens of one."""
    source = random.Random(seed)
    return [[source.randrange(vocabulary) for _ in range(source.randint(*lengths))] for _ in range(count)]


def ours(model: Any, prompts: Sequence[list[int]], samples: int, tokens: int, seed: int, greedy: bool) -> list:
    """Responses by `distalign.sample`, all decoded at once: result[prompt][response]."""
    return sample(
        model,
        prompts,
        n=samples,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        temperature=0.0 if greedy else 1.0,
        end_id=0,
        seed=seed,
        rows=len(prompts) * samples,
    )


def theirs(model: Any, prompts: Sequence[list[int]], samples: int, tokens: int, seed: int, greedy: bool) -> list:
    """Responses by `model.generate`, padded on the left: result[prompt][response]."""
    torch.manual_seed(seed)
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    drawing = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    config = GenerationConfig(
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        num_return_sequences=1 if greedy else samples,
        eos_token_id=0,
        pad_token_id=0,
        **drawing,
    )
    out = model.generate(ids, attention_mask=mask, generation_config=config)[:, width:].tolist()
    return [[own] * samples for own in out] if greedy else [out[i : i + samples] for i in range(0, len(out), samples)]


def seconds(model: Any, generate: Callable, *settings: Any) -> float:
    """CPU seconds of one call; on an accelerator seconds by the clock. The call must give all tokens asked for."""
    accelerated = model.device.type != "cpu"
    clock = time.perf_counter if accelerated else time.process_time
    start = clock()
    responses = generate(model, *settings, greedy=False)
    elapsed = clock() - start
    prompts, samples, tokens = settings[:3]
    if [[len(own) for own in group] for group in responses] != [[tokens] * samples] * len(prompts):
        raise RuntimeError(f"{generate.__name__} did not give {samples} x {tokens} tokens to each prompt")
    return elapsed


def measure(name: str, model: Any, prompts: Sequence[list[int]], samples: int, tokens: int, rounds: int) -> dict:
    """One row of the table: tokens a second of both, and the ratio with its spread over the rounds."""
    times: dict[Callable, list[float]] = {ours: [], theirs: []}
    for turn in range(rounds):
        for generate in (ours, theirs) if turn % 2 == 0 else (theirs, ours):
            times[generate].append(seconds(model, generate, prompts, samples, tokens, turn))
    ratios = [b / a for a, b in zip(times[ours], times[theirs], strict=True)]
    total = len(prompts) * samples * tokens
    return {
        "model": name,
        "prompts": len(prompts),
        "samples": samples,
        "response_tokens": tokens,
        "tokens_per_second": total / statistics.median(times[ours]),
        "generate_tokens_per_second": total / statistics.median(times[theirs]),
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "rounds": rounds,
    }


def agreement(model: Any, prompts: Sequence[list[int]], tokens: int) -> float:
    """Share of the greedy tokens on which both agree."""
    pairs = zip(*(f(model, prompts, 2, tokens, 0, greedy=True) for f in (ours, theirs)), strict=True)
    same = [a == b for left, right in pairs for a, b in zip(left[1], right[1], strict=True)]
    return sum(same) / len(same)


def show(rows: Sequence[dict], unit: str) -> None:
    """The table, on the terminal."""
    of = rows[0]
    title = f"{of['model']}, {of['prompts']} prompts, {of['response_tokens']} tokens a response, {of['rounds']} rounds"
    table = Table(title=f"{title}\n(tokens a {unit})", title_justify="left")
    for column in ("samples a prompt", "ours", "generate", "ratio", "least", "largest"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        speeds = (f"{row[name]:.0f}" for name in ("tokens_per_second", "generate_tokens_per_second"))
        ratios = (f"{row[name]:.2f}" for name in ("ratio", "low", "high"))
        table.add_row(str(row["samples"]), *speeds, *ratios)
    Console().print(table)


def run(options: argparse.Namespace, model: Any) -> dict:
    """Measure every row, write the numbers after each, and show the table."""
    model = model.to(options.device).eval()
    prompts = make_prompts(options.prompts, model.config.vocab_size, options.prompt_tokens)
    share = agreement(model, prompts, options.tokens)
    print(f"greedy tokens that agree with generate: {share:.1%} of {options.prompts * options.tokens}")
    result: dict[str, Any] = {
        "rows": [],
        "greedy_agreement": share,
        "device": options.device,
        **facts(),
    }
    for samples in track(options.samples, description=options.model):
        result["rows"].append(measure(options.model, model, prompts, samples, options.tokens, options.rounds))
        if options.json:
            options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    show(result["rows"], "CPU second" if model.device.type == "cpu" else "second")
    return result


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--samples", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--tokens", type=int, default=53, help="tokens of every response")
    parser.add_argument("--prompt-tokens", type=int, nargs=2, default=PROMPT_TOKENS, metavar=("LEAST", "MOST"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="where the numbers go")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict:
    """Measure with these options. Returns what the JSON file holds."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    return run(options, MODELS[options.model]())


if __name__ == "__main__":
    main()
