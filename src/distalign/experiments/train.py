"""From a recipe to a run folder: everything checked, one method trained, the best step kept, the model saved."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_utils import get_last_checkpoint

from distalign.engine.memory import set_recompute
from distalign.errors import InputError
from distalign.evaluation.metrics import forward_kl
from distalign.evaluation.results import forget_results
from distalign.experiments.recipe import Recipe, load_recipe
from distalign.experiments.setup import Bench, prepare
from distalign.models.card import model_card
from distalign.models.policy import Policy, make_policy
from distalign.rewards import (
    Reward,
    RewardError,
    RewardSettings,
    RewardTraining,
    Trained,
    check_rewards,
    load_reward,
    make_reward,
    train_reward,
)
from distalign.settings import RecipeError
from distalign.training.rounds import Rollout, check_rollout, is_on_policy
from distalign.training.trainer import AlignmentTrainer

logger = logging.getLogger("distalign.experiments.train")

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
        judged = labels_judge(recipe, name)
        evaluated = {"eval_strategy": "steps", "eval_steps": 0.1, **given}
        follow = evaluated["eval_strategy"] != "no"
        best = {"load_best_model_at_end": follow and judged, "metric_for_best_model": "eval_loss"}
        settings |= {"eval_on_start": follow, **best, **evaluated}
        if settings["load_best_model_at_end"]:
            # A step can be kept only if it was saved.
            saved = {"save_strategy": evaluated["eval_strategy"], "save_steps": evaluated["eval_steps"]}
            settings |= {**saved, "save_total_limit": 1, **given}
    if not held_out and settings.get("eval_strategy", "no") != "no":
        raise RecipeError(
            f"{recipe.name}: eval_strategy needs held-out pairs; give data.eval, or data.held_out above 0"
        )
    for key in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if settings.get(key, 1) < 1:
            raise RecipeError(f"{recipe.name}: training.{key} is {settings[key]}; it must be at least 1")
    if settings.get("learning_rate", 1) < 0:
        raise RecipeError(
            f"{recipe.name}: training.learning_rate is {settings['learning_rate']}; it must not be below 0"
        )
    try:
        arguments = TrainingArguments(output_dir=str(folder), seed=seed, **settings)
        # A logger whose package is missing says so here, not after the model is loaded.
        for logger_callback in get_reporting_integration_callbacks(arguments.report_to):
            logger_callback()
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise RecipeError(f"{recipe.name}: training of {name}: {error}") from None
    return arguments


def labels_judge(recipe: Recipe, name: str) -> bool:
    """Whether the likelihood of held-out labels says which step of a method is the best.

    Not where the reward was not learned from labels of this kind (a function, a judge), nor where the policy stands
    for no reward at all (RLHF at β = 0): then the last step is kept.
    """
    method = recipe.method(name)
    probe = torch.tensor([0.0, -1.0])
    rewards = method.implicit_reward(probe, torch.zeros(2))
    if rewards[0] == rewards[1]:
        return False
    return not method.needs.reward or all(one.train is not None or one.exact for one in recipe.reward)


def check(recipe: Recipe, methods: Sequence[str]) -> None:
    """All that can be known to be wrong before a model is loaded. Raises InputError saying where and what to do."""
    held_out = recipe.data is None or recipe.data.eval is not None or recipe.data.held_out > 0
    for name in methods:
        method = recipe.method(name)
        training_arguments(recipe, name, Path("unused"), held_out=held_out)
        if is_on_policy(method):
            check_rollout(name, method, recipe.rollout_for(name))
        if method.needs.reward and not recipe.reward:
            raise RewardError(
                f"{recipe.name}: {name} needs a reward for the responses that it draws; add reward to the recipe "
                "(train: {gamma: …} trains one on the pairs)"
            )
        if method.needs.reward and not held_out and any(one.train is not None for one in recipe.reward):
            raise RewardError(
                f"{recipe.name}: reward.train stops by held-out pairs and there are none; give data.eval, or "
                "data.held_out above 0"
            )
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
    recipe = recipe.only([name])
    check(recipe, [name])
    if resume:
        _last_checkpoint(recipe.run_dir)
        _check_same_run(recipe, name)
    elif not overwrite and (old := sorted(recipe.run_dir.glob("checkpoint-*"))):
        raise InputError(
            f"{recipe.run_dir}: holds {old[-1].name} of an earlier run; go on with --resume, start over with "
            "--overwrite, or give another name with --set name=…"
        )
    bench = prepare(recipe, recipe.seed, measured=False)
    if recipe.method(name).needs.reward:
        reward_of(bench, recipe.run_dir / "reward", keep=resume)
    _, trainer = train_method(bench, name, recipe.run_dir, resume=resume)
    return {key.removeprefix("eval_"): value for key, value in _last_evaluation(trainer).items()}


def _check_same_run(recipe: Recipe, name: str) -> None:
    """Raise InputError if the folder's run had another model, data or method: its weights are not this recipe's.

    A reward may be mended: rewards from here on are the new one's.
    """
    old = load_recipe(recipe.run_dir / "recipe.yaml")
    before, now = ({**one.model_dump(), **_of_one_run(one, name)} for one in (old, recipe))
    for key in ("model", "dtype", "lora", "data", "target", "methods", "rollout", "batches", "seed"):
        if before[key] != now[key]:
            raise InputError(
                f"{recipe.run_dir}: the run to go on with had {key} {before[key]}, the recipe has {now[key]}; "
                "give the same, or start over with --overwrite"
            )
    if before["reward"] != now["reward"]:
        logger.warning("%s: the reward is not the one that the run began with", recipe.run_dir)


def _of_one_run(recipe: Recipe, name: str) -> dict[str, Any]:
    """What must be the same for a run to go on: the method's settings, and how its data are cut into steps."""
    batches = ("per_device_train_batch_size", "gradient_accumulation_steps")
    training = recipe.training_for(name) if name in recipe.methods else {}
    return {
        "methods": {name: recipe.method(name) if name in recipe.methods else None},
        "rollout": recipe.rollout_for(name) if name in recipe.methods else None,
        "batches": {key: training[key] for key in batches if key in training},
    }


def reward_of(bench: Bench, folder: Path, *, keep: bool = False) -> Reward:
    """The recipe's reward, made once for all methods. One that is to be trained is trained, and saved in `folder`.

    `keep` takes one that is there already. Raises RewardError.
    """
    if bench.reward is None:
        recipe, trained = bench.recipe, None
        if any(one.train is not None for one in recipe.reward):
            if keep and folder.is_dir():
                trained = load_reward(
                    folder, base=bench.base, tokenizer=bench.tokenizer, token_budget=recipe.token_budget
                )
            else:
                trained = reward_model(bench, folder).reward
        bench.reward = make_reward(
            recipe.reward,
            base=bench.base,
            tokenizer=bench.tokenizer,
            token_budget=recipe.token_budget,
            target=bench.task.target,
            gamma=None if recipe.target is None else recipe.target.gamma,
            trained=trained,
        )
    return bench.reward


def train_reward_model(recipe: Recipe) -> Trained:
    """Train the recipe's reward model alone, into the folder `reward` of its run. Raises InputError."""
    one = next((one for one in recipe.reward if one.train is not None), RewardSettings(train=RewardTraining()))
    target = recipe.target
    gamma = None if target is None else target.gamma
    check_rewards([one], conversational=False, target=target is not None, gamma=gamma)
    writable(recipe.run_dir)
    bench = prepare(recipe.only([]), recipe.seed, measured=False)
    return reward_model(bench, recipe.run_dir / "reward")


def reward_model(bench: Bench, folder: Path) -> Trained:
    """Train a reward on the recipe's pairs and save it in `folder`. Raises RewardError."""
    recipe = bench.recipe
    settings = next((one.train for one in recipe.reward if one.train is not None), RewardTraining())
    shutil.rmtree(folder, ignore_errors=True)
    started = time.monotonic()
    trained = train_reward(
        settings,
        bench.base,
        bench.tokenizer,
        bench.source,
        bench.train,
        bench.held,
        gamma=None if recipe.target is None else recipe.target.gamma,
        token_budget=recipe.token_budget,
        seed=bench.seed,
        folder=folder,
    )
    bench.seconds["reward"] = time.monotonic() - started
    told = ", ".join(f"{name} {found.mean:.3f} ± {found.se:.3f}" for name, found in trained.results.items())
    logger.info("reward: %s on %d held-out pairs", told, len(bench.held))
    bench.facts["reward model, held out"] = told
    return trained


def train_method(bench: Bench, name: str, folder: Path, *, resume: bool = False) -> tuple[Policy, AlignmentTrainer]:
    """Train a policy of its own for one method and save it under `folder`; the bench stays as it is."""
    recipe, method = bench.recipe, bench.recipe.method(name)
    writable(folder)
    recipe.dump(folder / "recipe.yaml")
    checkpoint = _last_checkpoint(folder) if resume else None
    _forget_after(folder, checkpoint)
    args = training_arguments(recipe, name, folder, held_out=bool(bench.held), seed=bench.seed)
    torch.manual_seed(bench.seed)
    # The reference costs no memory here, and that the run starts there is checked for every method.
    policy = make_policy(bench.base, bench.tokenizer, bench.source, lora=recipe.lora, reference=True)
    try:
        set_recompute(policy.model, recipe.recompute)
    except ValueError as error:
        raise RecipeError(f"{recipe.name}: recompute is {recipe.recompute}: {error}; leave it out") from None
    stopping = recipe.early_stopping
    labelled = method.needs.pairs == "labelled"
    trainer = AlignmentTrainer(
        policy,
        method,
        args,
        bench.train if labelled else bench.prompts,
        bench.held,
        rollout=Rollout(recipe.rollout_for(name), bench.task.end_id, bench.reward if method.needs.reward else None),
        health=recipe.health,
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
        if trainer.kept_step == 0:
            logger.warning("%s improved nothing on the held-out pairs: the model kept is the one it started from", name)
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
    told = [folder / "metrics.jsonl", folder / "samples.jsonl"]
    if checkpoint is None:
        forget_results(folder)
        told[0].unlink(missing_ok=True)
        for old in folder.glob("checkpoint-*"):
            shutil.rmtree(old)
        return
    (folder / "results.json").unlink(missing_ok=True)
    (folder / "report.html").unlink(missing_ok=True)
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    for path in told:
        if path.is_file():
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            # Metrics of a step are written after it, samples before it.
            last = step if path == told[0] else step - 1
            kept = [row for row in rows if row["step"] <= last and "train_runtime" not in row]
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")


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
