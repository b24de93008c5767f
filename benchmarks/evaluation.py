"""An evaluation against its generations alone: what it costs to measure what policies say, beside having them say it.

    python benchmarks/evaluation.py --json evaluation.json

Policies: the reference and three adapters of it with small random weights. `--prompts` everyday requests as chats, one
sample of at most `--tokens` tokens each. The evaluation loads every policy, hashes its weights, samples it, takes
entropy and KL(π ‖ π₀) of every response at every step over the full vocabulary, and writes its files; no reward and no
judge, which cost what they cost. Generations alone: the same calls of `sample` on loaded models. CPU seconds of this
process on `--threads` threads; the order is turned in every round, and the ratio is the median of the rounds beside its
least and its largest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from common import facts
from peft import LoraConfig, get_peft_model
from rich.console import Console

from distalign.data import encode_prompt, end_token_id, read_prompts
from distalign.evaluate import evaluate, load_evaluation
from distalign.policy import find_model
from distalign.rollout import sample

MODEL = "smollm2-135m-instruct"


def prepare(folder: Path, count: int, tokens: int) -> tuple[Path, dict[str, str]]:
    """Prompts, adapters and settings in a folder: (the recipe, the policies)."""
    text = files("distalign").joinpath("assets/everyday_prompts.txt").read_text(encoding="utf-8")
    lines = [line for line in text.split("\n") if line.strip()][:count]
    with (folder / "prompts.jsonl").open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps({"prompt": [{"role": "user", "content": line}]}) + "\n")
    source = find_model(MODEL)
    policies = {}
    for number in range(3):
        torch.manual_seed(number)
        model = get_peft_model(source.model(), LoraConfig(r=8, target_modules="all-linear"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.002)
        model.peft_config["default"].base_model_name_or_path = source.path
        model.save_pretrained(folder / f"policy-{number}")
        policies[f"policy-{number}"] = str(folder / f"policy-{number}")
    recipe = folder / "evaluation.yaml"
    recipe.write_text(
        f"model: {MODEL}\nprompts: {folder}/prompts.jsonl\nlimit: {count}\nmax_new_tokens: {tokens}\n"
        f"output_dir: {folder}/runs\n"
    )
    return recipe, policies


def generations(recipe: Path, policies: dict[str, str]) -> float:
    """CPU seconds of sampling every policy on loaded models."""
    settings = load_evaluation(recipe, [], [])
    source = find_model(MODEL)
    tokenizer = source.tokenizer()
    prompts = [encode_prompt(tokenizer, row) for row in read_prompts(str(settings.prompts))]
    end_id = end_token_id(tokenizer, conversational=True)
    spent = 0.0
    for number, place in enumerate([MODEL, *policies.values()]):
        model = find_model(place).model()
        start = time.process_time()
        asked: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens, "end_id": end_id, "rows": settings.rows}
        sample(model, prompts, n=1, temperature=1.0, seed=number, **asked)
        spent += time.process_time() - start
    return spent


def evaluation(recipe: Path, policies: dict[str, str], round_: int) -> float:
    """CPU seconds of evaluating the same policies in a fresh folder."""
    settings = load_evaluation(
        recipe, [f"name=round-{round_}"], [f"{name}={place}" for name, place in policies.items()]
    )
    start = time.process_time()
    evaluate(settings)
    return time.process_time() - start


def main() -> None:
    """Measure, print a line, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        recipe, policies = prepare(Path(name), arguments.prompts, arguments.tokens)
        for round_ in range(arguments.rounds):
            sides = {"generation": lambda: generations(recipe, policies)}
            sides["evaluation"] = lambda number=round_: evaluation(recipe, policies, number)
            order = list(sides) if round_ % 2 == 0 else list(sides)[::-1]
            spent = {side: sides[side]() for side in order}
            rows.append({**spent, "ratio": spent["evaluation"] / spent["generation"]})
    ratios = [row["ratio"] for row in rows]
    middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
    spent = statistics.median(row["generation"] for row in rows)
    Console().print(
        f"4 policies × {arguments.prompts} prompts × at most {arguments.tokens} tokens: evaluation / generations alone "
        f"{middle:.2f} [{low:.2f}, {high:.2f}] over {len(rows)} rounds; generations {spent:.0f} CPU s"
    )
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"rows": rows, "threads": arguments.threads, "machine": facts()}, indent=1)
        )


if __name__ == "__main__":
    main()
