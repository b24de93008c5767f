"""An evaluation against its generations alone: what it costs to measure what policies say, beside having them say it.

    python benchmarks/evaluation.py --json evaluation.json

Policies: the reference and three adapters of it with small random weights. `--prompts` everyday requests as chats, one
sample of at most `--tokens` tokens each. The evaluation loads every policy, hashes its weights, samples it, takes
entropy and KL(π ‖ π₀) of every response at every step over the full vocabulary, and writes its files; no reward and no
judge, which cost what they cost. Generations alone: the same call of `sample` on a model of its own that is loaded
already, just before the evaluation draws from that policy or just after, by turns: a machine's speed changes within
minutes. The evaluation's clock stands still meanwhile. CPU seconds of this process on one thread; seconds on the wall
with more `--threads`, and with `--device cuda`, after one round that warms up. The ratio is the median of the rounds
beside its least and its largest.
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
from unittest.mock import patch

import torch
from common import DTYPES, Machine, facts
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import TrainingArguments

from distalign.data import encode_prompt, end_token_id, read_prompts
from distalign.evaluation import evaluate, load_evaluation, run
from distalign.evaluation.answers import draw_number
from distalign.models import policy
from distalign.models.load import find_model
from distalign.rollout.sample import sample

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


def measure(recipe: Path, policies: dict[str, str], round_: int, machine: Machine) -> dict[str, Any]:
    """Seconds of evaluating the policies in a fresh folder, of sampling them alone, and both of each policy."""
    settings = load_evaluation(
        recipe, [f"name=round-{round_}"], [f"{name}={place}" for name, place in policies.items()]
    )
    places, draw = {"reference": MODEL, **policies}, run.draw_answers
    tokenizer = find_model(MODEL).tokenizer()
    asked: dict[str, Any] = {"end_id": end_token_id(tokenizer, conversational=True), "rows": settings.rows}
    prompts = [encode_prompt(tokenizer, row) for row in read_prompts(str(settings.prompts))]
    sample(find_model(MODEL).model(), prompts[:1], max_new_tokens=2, seed=0, **asked)  # What a process does once.
    parts: dict[str, dict[str, float]] = {}
    aside = 0.0

    def alone(name: str) -> None:
        nonlocal aside
        start = machine.seconds()
        model: Any = find_model(places[name]).model(settings.dtype)
        model.to(machine.device)
        loaded = machine.seconds()
        sample(model, prompts, n=1, max_new_tokens=settings.max_new_tokens, seed=draw_number(name), **asked)
        parts[name]["generation"] = machine.seconds() - loaded
        aside += machine.seconds() - start

    def beside(name: str, *given: Any, **more: Any) -> Any:
        first = (round_ + len(parts)) % 2 == 0
        parts[name] = {}
        if first:
            alone(name)
        start = machine.seconds()
        answers = draw(name, *given, **more)
        parts[name]["evaluation"] = machine.seconds() - start
        if not first:
            alone(name)
        return answers

    policy._DIGESTS.clear()  # An evaluation is a process of its own, which has hashed no weights yet.
    start = machine.seconds()
    with patch.object(run, "draw_answers", beside):
        evaluate(settings)
    spent = machine.seconds() - start - aside
    generation = sum(part["generation"] for part in parts.values())
    return {"generation": generation, "evaluation": spent, "ratio": spent / generation, "parts": parts}


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
            rows.append(measure(recipe, policies, round_, machine))
            told = ", ".join(f"{side} {rows[-1][side]:.1f} {machine.unit}" for side in ("generation", "evaluation"))
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
    whole = statistics.median(row["evaluation"] for row in rows)

    def median(policy_name: str, side: str) -> float:
        return statistics.median(row["parts"][policy_name][side] for row in rows)

    told = ", ".join(
        f"{one} {median(one, 'evaluation'):.1f} / {median(one, 'generation'):.1f}" for one in rows[0]["parts"]
    )
    Console().print(f"the evaluation: {whole:.1f} {machine.unit}; drawing and scoring / drawing alone: {told}")
    if options.json:
        measured = {"rows": rows, "threads": options.threads, "dtype": options.dtype, "machine": facts(options.device)}
        options.json.write_text(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
