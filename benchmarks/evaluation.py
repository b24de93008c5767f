"""An evaluation against its generations alone: what it costs to measure what policies say, beside having them say it.

    python benchmarks/evaluation.py --json evaluation.json

Policies: the reference and three adapters of it with small random weights. `--prompts` everyday requests as chats, one
sample of at most `--tokens` tokens each. The evaluation loads every policy, hashes its weights, samples it, takes
entropy and KL(π ‖ π₀) of every response at every step over the full vocabulary, and writes its files; no reward and no
judge, which cost what they cost. Generations alone: the same calls of `sample` on loaded models. CPU seconds of this
process on one thread; seconds on the wall with more `--threads`, and with `--device cuda`, after one round that warms
up. The order is turned in every round, and the ratio is the median of the rounds beside its least and its largest.
Where the evaluation spends its time is in its results, and shown: seconds on the wall.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from common import DTYPES, Machine, facts
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import TrainingArguments

from distalign import policy
from distalign.data import encode_prompt, end_token_id, read_prompts
from distalign.evaluate import evaluate, load_evaluation
from distalign.policy import find_model
from distalign.rollout import sample

MODEL = "smollm2-135m-instruct"


def prepare(folder: Path, count: int, tokens: int, dtype: str = "float32") -> tuple[Path, dict[str, str]]:
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
        f"output_dir: {folder}/runs\ndtype: {dtype}\n"
    )
    return recipe, policies


def generations(recipe: Path, policies: dict[str, str], machine: Machine) -> float:
    """Seconds of sampling every policy on loaded models."""
    settings = load_evaluation(recipe, [], [])
    source = find_model(MODEL)
    tokenizer = source.tokenizer()
    prompts = [encode_prompt(tokenizer, row) for row in read_prompts(str(settings.prompts))]
    end_id = end_token_id(tokenizer, conversational=True)
    spent = 0.0
    for number, place in enumerate([MODEL, *policies.values()]):
        model: Any = find_model(place).model(settings.dtype)
        model.to(machine.device)
        start = machine.seconds()
        asked: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens, "end_id": end_id, "rows": settings.rows}
        sample(model, prompts, n=1, temperature=1.0, seed=number, **asked)
        spent += machine.seconds() - start
    return spent


def evaluation(recipe: Path, policies: dict[str, str], round_: int, machine: Machine) -> tuple[float, dict[str, float]]:
    """Seconds of evaluating the same policies in a fresh folder, and on the wall those of its parts."""
    settings = load_evaluation(
        recipe, [f"name=round-{round_}"], [f"{name}={place}" for name, place in policies.items()]
    )
    policy._DIGESTS.clear()  # An evaluation is a process of its own, which has hashed no weights yet.
    start = machine.seconds()
    parts = evaluate(settings)["seconds"]
    return machine.seconds() - start, parts


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a line, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of the weights")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    found = TrainingArguments(output_dir="unused").device.type
    if found != options.device:
        parser.error(f"--device {options.device}: an evaluation takes what it finds, which is {found} here")
    torch.set_num_threads(options.threads)
    machine, rows = Machine(options.device, wall=options.threads > 1), []
    with tempfile.TemporaryDirectory() as name:
        recipe, policies = prepare(Path(name), options.prompts, options.tokens, options.dtype)
        for round_ in range(options.rounds + (options.device != "cpu")):
            spent: dict[str, Any] = {}
            for side in ("generation", "evaluation") if round_ % 2 == 0 else ("evaluation", "generation"):
                if side == "generation":
                    spent[side] = generations(recipe, policies, machine)
                else:
                    spent[side], spent["parts"] = evaluation(recipe, policies, round_, machine)
            rows.append({**spent, "ratio": spent["evaluation"] / spent["generation"]})
            told = ", ".join(f"{side} {spent[side]:.1f} {machine.unit}" for side in ("generation", "evaluation"))
            print(f"round {round_ + 1}: {told}, ratio {rows[-1]['ratio']:.2f}", flush=True)
    if options.device != "cpu":
        rows.pop(0)
    ratios = [row["ratio"] for row in rows]
    middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
    spent = statistics.median(row["generation"] for row in rows)
    Console().print(
        f"4 policies × {options.prompts} prompts × at most {options.tokens} tokens: evaluation / generations alone "
        f"{middle:.2f} [{low:.2f}, {high:.2f}] over {len(rows)} rounds; generations {spent:.1f} {machine.unit}"
    )
    parts = {part: statistics.median(row["parts"][part] for row in rows) for part in rows[0]["parts"]}
    whole = statistics.median(row["evaluation"] for row in rows)
    told = ", ".join(f"{part} {seconds:.1f}" for part, seconds in parts.items())
    Console().print(f"the evaluation: {whole:.1f} {machine.unit}; its parts in seconds on the wall: {told}")
    if options.json:
        measured = {"rows": rows, "threads": options.threads, "dtype": options.dtype, "machine": facts(options.device)}
        options.json.write_text(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
