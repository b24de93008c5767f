"""From a recipe to a run folder: `train` is one method; `compare` is several on the same pairs with the same budget.

A comparison measures every policy on held-out prompts and writes `results.json`, `samples.jsonl` and `report.html`.
"""

from __future__ import annotations

import json
import logging
import math
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_utils import get_last_checkpoint

from distalign.bench import Bench, prepare
from distalign.card import CITATION, model_card
from distalign.engine import score_in_batches
from distalign.errors import InputError
from distalign.evaluate import (
    COLUMNS,
    Measured,
    calibration,
    differences,
    forward_kl,
    measure_pairs,
    measure_samples,
    summarise,
    win_probability,
)
from distalign.policy import Policy, make_policy
from distalign.progress import progress
from distalign.recipe import Recipe, RecipeError
from distalign.trainer import AlignmentTrainer, check_trainable

logger = logging.getLogger("distalign.experiment")

# Held-out prompts of the forward KL that is followed during training.
CURVE_PROMPTS = 16


def training_arguments(recipe: Recipe, name: str, folder: Path, *, held_out: bool, seed: int = 0) -> TrainingArguments:
    """The recipe's `training` for one method, with defaults that suit preference learning.

    With held-out pairs and early stopping the run is evaluated ten times and its best step is kept. Raises RecipeError
    for what `transformers.TrainingArguments` refuses.
    """
    given = recipe.training_for(name)
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 16,
        "num_train_epochs": 1,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "bf16": recipe.dtype == "bfloat16",
        "restore_callback_states_from_checkpoint": True,
        **given,
    }
    if held_out and recipe.early_stopping is not None:
        evaluated = {"eval_strategy": "steps", "eval_steps": 0.1, **given}
        follow = evaluated["eval_strategy"] != "no"
        best = {"load_best_model_at_end": follow, "metric_for_best_model": "eval_loss"}
        settings |= {"eval_on_start": follow, **best, **evaluated}
        if settings["load_best_model_at_end"]:
            # A step can be kept only if it was saved.
            saved = {"save_strategy": evaluated["eval_strategy"], "save_steps": evaluated["eval_steps"]}
            settings |= {**saved, "save_total_limit": 1, **given}
    if not held_out and settings.get("eval_strategy", "no") != "no":
        raise RecipeError(
            f"{recipe.name}: eval_strategy needs held-out pairs; give data.eval, or data.held_out above 0"
        )
    if settings["per_device_train_batch_size"] < 1:
        raise RecipeError(f"{recipe.name}: training.per_device_train_batch_size is below 1; give the pairs of a batch")
    try:
        arguments = TrainingArguments(output_dir=str(folder), seed=seed, **settings)
        # A logger whose package is missing says so here, not after the model is loaded.
        for logger_callback in get_reporting_integration_callbacks(arguments.report_to):
            logger_callback()
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise RecipeError(f"{recipe.name}: training of {name}: {error}") from None
    return arguments


def check(recipe: Recipe, methods: Sequence[str]) -> None:
    """All that can be known to be wrong before a model is loaded. Raises InputError saying where and what to do."""
    held_out = recipe.data is None or recipe.data.eval is not None or recipe.data.held_out > 0
    for name in methods:
        check_trainable(name, recipe.method(name))
        training_arguments(recipe, name, Path("unused"), held_out=held_out)
    writable(recipe.run_dir)


def writable(folder: Path) -> Path:
    """Make a folder and check that files can be written in it. Raises InputError saying what to do."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{folder}: cannot be written ({reason}); choose another: --set output_dir=FOLDER") from None
    return folder


# One method -----------------------------------------------------------------------------------------------------------


def train(recipe: Recipe, name: str, *, resume: bool = False, overwrite: bool = False) -> dict[str, float]:
    """Train one method of a recipe in its run folder; returns the last numbers on held-out pairs (empty without).

    `resume` continues from the last checkpoint of the folder, `overwrite` removes what an earlier run left there.
    Raises InputError before a model is loaded for settings and data that cannot be used.
    """
    check(recipe, [name])
    if resume:
        _last_checkpoint(recipe.run_dir)
    elif not overwrite and (old := sorted(recipe.run_dir.glob("checkpoint-*"))):
        raise InputError(
            f"{recipe.run_dir}: holds {old[-1].name} of an earlier run; go on with --resume, start over with "
            "--overwrite, or give another name with --set name=…"
        )
    bench = prepare(recipe, recipe.seed, measured=False)
    _, trainer = train_method(bench, name, recipe.run_dir, resume=resume)
    return {key.removeprefix("eval_"): value for key, value in _last_evaluation(trainer).items()}


def train_method(bench: Bench, name: str, folder: Path, *, resume: bool = False) -> tuple[Policy, AlignmentTrainer]:
    """Train a policy of its own for one method and save it under `folder`; the bench stays as it is."""
    recipe, method = bench.recipe, bench.recipe.method(name)
    writable(folder)
    recipe.dump(folder / "recipe.yaml")
    checkpoint = _last_checkpoint(folder) if resume else None
    _forget_after(folder, checkpoint)
    args = training_arguments(recipe, name, folder, held_out=bool(bench.held), seed=bench.seed)
    torch.manual_seed(bench.seed)
    policy = make_policy(bench.base, bench.tokenizer, bench.source, lora=recipe.lora, reference=method.needs.reference)
    stopping = recipe.early_stopping
    trainer = AlignmentTrainer(
        policy,
        method,
        args,
        bench.train,
        bench.held,
        token_budget=recipe.token_budget,
        label=f"train {name}",
        patience=stopping.patience if stopping and args.load_best_model_at_end else None,
        min_delta=stopping.min_delta if stopping else 0.0,
        extra_evaluation=_follow_target(bench),
        reference_cache=bench.reference_cache,
    )
    started = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except ImportError as error:
        raise RecipeError(f"{recipe.name}: training of {name} needs a package: {error}") from error
    bench.seconds[name] = time.monotonic() - started
    policy.model.eval()
    if args.load_best_model_at_end:
        stopped = "stopped early" if trainer.state.global_step < trainer.state.max_steps else "ran to the end"
        logger.info(
            "%s %s at step %d of %d and kept step %d, the best on %d held-out pairs",
            name, stopped, trainer.state.global_step, trainer.state.max_steps, trainer.kept_step, len(bench.held),
        )  # fmt: skip
    results = _last_evaluation(trainer)
    card = model_card(
        base_model=bench.source.name,
        name=name,
        method=method,
        data=bench.facts,
        training={**recipe.training_for(name), "kept_step": trainer.kept_step, "seed": bench.seed},
        results=results,
    )
    policy.save(folder / "model", card)
    return policy, trainer


def _last_checkpoint(folder: Path) -> Path:
    """The checkpoint with the largest step. Raises InputError if there is none."""
    found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if found is None:
        raise InputError(f"{folder}: holds no checkpoint to continue from; leave --resume out, or set save_strategy")
    return Path(found)


def _forget_after(folder: Path, checkpoint: Path | None) -> None:
    """Remove what a run told after the checkpoint that it goes on from; without one, all of the run before."""
    metrics = folder / "metrics.jsonl"
    if checkpoint is None:
        metrics.unlink(missing_ok=True)
        for old in folder.glob("checkpoint-*"):
            shutil.rmtree(old)
    elif metrics.is_file():
        step = int(checkpoint.name.removeprefix("checkpoint-"))
        rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        kept = [row for row in rows if row["step"] <= step and "train_runtime" not in row]
        metrics.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")


def _follow_target(bench: Bench) -> Any:
    task = bench.task
    if not task.target_groups:
        return None

    def follow(model: nn.Module) -> dict[str, float]:
        found = forward_kl(model, task, CURVE_PROMPTS)
        return {"target/forward_kl": found.mean, "target/forward_kl_se": found.se, "target/prompts": found.n}

    return follow


def _last_evaluation(trainer: AlignmentTrainer) -> dict[str, float]:
    """Numbers of the evaluation at the step that was kept."""
    rows = [row for row in trainer.state.log_history if "eval_loss" in row]
    kept = [row for row in rows if row["step"] == trainer.kept_step] or rows[-1:]
    return {key: value for key, value in kept[-1].items() if key.startswith("eval_")} if kept else {}


# Several methods ------------------------------------------------------------------------------------------------------


def compare(recipe: Recipe, methods: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Train several methods on the same pairs, measure them on held-out prompts, and write the run folder.

    Every seed draws its own pairs (where a known target makes them) and trains anew, in a subfolder if there are
    several. Returns what `results.json` holds.
    """
    check(recipe, methods)
    root = recipe.run_dir
    recipe.dump(root / "recipe.yaml")
    runs: dict[str, list[Measured]] = {}
    extra: dict[str, Any] = {"curves": {}, "kept_step": {}, "seconds": {}}
    facts: dict[str, Any] = {}
    for seed in seeds:
        bench = prepare(recipe, seed, measured=True)
        facts = bench.facts
        logger.info("pairs: %s", facts)
        _compare_seed(bench, methods, root if len(seeds) == 1 else root / f"seed-{seed}", runs, extra)
        if seed == seeds[0]:
            _write_samples(root / "samples.jsonl", bench, runs)
    results = {
        "name": recipe.name,
        "seeds": list(seeds),
        "columns": COLUMNS,
        "methods": {name: _plain(summarise(own)) for name, own in runs.items()},
        "paired": {name: _plain(differences(own, runs["reference"])) for name, own in runs.items() if name in methods},
        **extra,
        "calibration": {
            name: [row._asdict() for row in calibration(own)] for name, own in runs.items() if len(own[0].confidence)
        },
        "by_seed": {name: [_plain(summarise([one])) for one in own] for name, own in runs.items()},
        "pairs": facts,
        "settings": recipe.model_dump(mode="json"),
        "environment": environment(),
        "citation": CITATION,
    }
    (root / "results.json").write_text(json.dumps(_finite(results), indent=1, ensure_ascii=False), encoding="utf-8")
    return results


def _compare_seed(
    bench: Bench, methods: Sequence[str], folder: Path, runs: dict[str, list[Measured]], extra: dict[str, Any]
) -> None:
    task = bench.task
    gamma = task.gamma if task.target else getattr(bench.recipe.method(methods[0]), "gamma", 1.0)
    found: dict[str, Measured] = {}
    if task.target is not None:
        found["target"] = measure_samples(task.target, task, reference=bench.base)
        if task.target_logit is not None:
            logit = torch.stack([task.target_logit, torch.zeros_like(task.target_logit)], 1)
            measure_pairs(found["target"], logit, task, lambda logit: logit)
    found["reference"] = measure_samples(bench.base, task, reference=None)
    reference_logps = _reference_logps(bench)
    if bench.held:
        measure_pairs(found["reference"], reference_logps, task, lambda logps: gamma * logps)
    for name in methods:
        policy, trainer = train_method(bench, name, folder / name)
        _note_training(trainer, name, bench.seed, extra)
        started = time.monotonic()
        with progress(f"measure {name}", 1) as advance:
            found[name] = measure_samples(policy.model, task, reference=bench.base)
            if bench.held:
                logps = score_in_batches(policy.model, task.pair_groups(), token_budget=task.token_budget).logps
                method = bench.recipe.method(name)
                measure_pairs(
                    found[name],
                    logps.view(-1, 2),
                    task,
                    lambda logps, method=method: method.implied_reward(logps, reference_logps),
                )
            advance(1)
        bench.seconds[f"measure {name}"] = time.monotonic() - started
        del policy, trainer
    for name, measured in found.items():
        if task.target is not None and name != "reference":
            measured.values["win_rate"] = win_probability(measured, found["reference"], task)
        runs.setdefault(name, []).append(measured)
    for key, value in bench.seconds.items():
        extra["seconds"][key] = extra["seconds"].get(key, 0.0) + value


def _reference_logps(bench: Bench) -> torch.Tensor:
    """ln π₀ of the held-out pairs, remembered for the methods that need them."""
    missing = [pair for pair in bench.held if pair.key not in bench.reference_cache]
    if missing:
        logps = score_in_batches(bench.base, bench.task.pair_groups(), token_budget=bench.recipe.token_budget).logps
        bench.reference_cache.update({p.key: own for p, own in zip(bench.held, logps.view(-1, 2), strict=True)})
    return torch.stack([bench.reference_cache[pair.key] for pair in bench.held]) if bench.held else torch.zeros(0, 2)


def _note_training(trainer: AlignmentTrainer, name: str, seed: int, extra: dict[str, Any]) -> None:
    for row in trainer.state.log_history:
        if "eval_loss" not in row:
            continue
        point: dict[str, Any] = {"seed": seed, "step": row["step"], "eval_loss": row["eval_loss"]}
        if "eval_target/forward_kl" in row:
            point["forward_kl"] = {
                "mean": row["eval_target/forward_kl"],
                "se": row["eval_target/forward_kl_se"],
                "n": int(row["eval_target/prompts"]),
            }
        extra["curves"].setdefault(name, []).append(point)
    extra["kept_step"].setdefault(name, []).append(trainer.kept_step)


def _write_samples(path: Path, bench: Bench, runs: Mapping[str, Sequence[Measured]]) -> None:
    tokenizer: Any = bench.tokenizer
    with path.open("w", encoding="utf-8") as file:
        for index, prompt in enumerate(bench.task.prompts):
            responses = {
                name: tokenizer.decode(own[0].responses[index][0], skip_special_tokens=True)
                for name, own in runs.items()
            }
            line = {"prompt": tokenizer.decode(prompt, skip_special_tokens=True), "responses": responses}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value._asdict() for key, value in values.items()}


def _finite(value: Any) -> Any:
    """JSON has no NaN: a number that could not be computed is null."""
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def environment() -> dict[str, str]:
    """Versions and device, for a result to be repeated."""
    packages = ("distalign", "torch", "transformers", "peft", "accelerate")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {"python": platform.python_version(), **{name: version(name) for name in packages}, "device": device}
