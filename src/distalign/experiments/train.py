"""From a recipe to a run folder: everything checked, one method trained, the best step kept, the model saved."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from distalign.engine import Group
from distalign.errors import DAMAGED, InputError
from distalign.evaluation.metrics import forward_kl
from distalign.evaluation.results import RESULTS, forget_results
from distalign.experiments.auto import settle_gamma
from distalign.experiments.recipe import EarlyStopping, Recipe, RecipeSource, as_recipe, load_recipe
from distalign.experiments.setup import Setup, load_setup
from distalign.methods import Method
from distalign.models.load import find_model
from distalign.models.policy import MODEL_FILES, Policy, make_policy
from distalign.models.quantized import check_installed
from distalign.rewards import (
    RewardError,
    RewardSettings,
    RewardTraining,
    Trained,
    check_rewards,
    load_reward,
    make_reward,
    train_reward,
)
from distalign.rewards.potential import POTENTIAL, PROMPTS, SAMPLES, potential, score_together, start_share
from distalign.rewards.potential import forward_kl as divergence_from
from distalign.rollout.sample import sample
from distalign.settings import RecipeError, masked
from distalign.stats.intervals import mean_and_se
from distalign.training.checkpoint import LATER, SAVING, checkpoints, newest_complete
from distalign.training.config import AlignmentConfig
from distalign.training.inputs import server_of
from distalign.training.processes import Processes, refuse_several_processes
from distalign.training.resumable import FREE_SETTINGS, fixed_arguments
from distalign.training.rollout_settings import TrainingError, check_rollout, draws_responses
from distalign.training.run_folder import check_no_links, check_not_read, locked, remove, whole_folder, writable
from distalign.training.trainer import AlignmentTrainer

logger = logging.getLogger("distalign.experiments.train")

# Held-out prompts of the forward KL that is followed during training.
CURVE_PROMPTS = 16
# A reward that is trained waits here until all has been checked and an earlier run's may go.
NEW_REWARD = "reward.new"
# Where `distalign merge` puts a run's model.
MERGED = "merged"


def training_arguments(
    recipe: Recipe,
    name: str,
    folder: Path,
    *,
    held_out: bool,
    compared: bool = False,
    seed: int = 0,
    end_token_id: int | None = None,
) -> AlignmentConfig:
    """The recipe's `training` and `rollout` for one method, as the trainer takes them.

    With held-out pairs the run is evaluated ten times; with early stopping its best step is kept, but not where methods
    are `compared`: no criterion is fair to all of them, so each keeps its last step. Raises RecipeError for what
    `transformers.TrainingArguments` refuses.
    """
    given = recipe.training_for(name)
    settings: dict[str, Any] = {
        "bf16": recipe.dtype == "bfloat16",
        # Of loggers: one run for each method and seed, in trackio's project of the recipe.
        "run_name": f"{recipe.name}-{name}-seed-{seed}",
        "project": recipe.name,
        **given,
    }
    if held_out and (compared or recipe.early_stopping is not None):
        evaluated = {"eval_strategy": "steps", "eval_steps": 0.1, **given}
        follow = evaluated["eval_strategy"] != "no"
        settings |= {"eval_on_start": follow, **evaluated}
        if follow:
            # A step can be kept only if it was saved.
            settings |= {"save_strategy": evaluated["eval_strategy"], "save_steps": evaluated["eval_steps"], **given}
        if follow and not compared and labels_choose_step(recipe, name):
            settings |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", **given}
    if not held_out and settings.get("eval_strategy", "no") != "no":
        raise RecipeError(
            f"{recipe.name}: eval_strategy needs held-out pairs; give data.eval, or data.held_out above 0"
        )
    if settings.get("push_to_hub"):
        # A repository for each method, and for each seed of a comparison.
        hub_id = settings.get("hub_model_id") or recipe.name
        settings["hub_model_id"] = f"{hub_id}-{name}" + (f"-seed-{seed}" if compared else "")
    settings |= recipe.rollout_for(name).model_dump()
    settings |= {"token_budget": recipe.token_budget, "recompute": recipe.recompute, "end_token_id": end_token_id}
    try:
        arguments = AlignmentConfig(output_dir=str(folder), seed=seed, health=recipe.health.model_dump(), **settings)
        # A logger whose package is missing says so here, not after the model is loaded.
        for logger_callback in get_reporting_integration_callbacks(arguments.report_to):
            logger_callback()
    except (*DAMAGED, ImportError, RuntimeError) as error:
        keeps = settings.get("load_best_model_at_end") and "load_best_model_at_end" in str(error)
        advice = "; set eval_steps to what save_steps is, or early_stopping: false, which keeps the last step"
        raise RecipeError(f"{recipe.name}: training of {name}: {error}{advice if keeps else ''}") from None
    return arguments


def labels_choose_step(recipe: Recipe, name: str) -> bool:
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


def check(recipe: Recipe, methods: Sequence[str], *, compared: bool = False) -> None:
    """All that can be known to be wrong before a model is loaded. Raises InputError saying where and what to do."""
    held_out = recipe.data is None or recipe.data.eval is not None or recipe.data.held_out > 0
    if recipe.quantization is not None:
        check_installed(recipe.name)
    for name in methods:
        method = recipe.method(name)
        args = training_arguments(recipe, name, Path("unused"), held_out=held_out, compared=compared)
        if recipe.early_stopping not in (None, EarlyStopping()) and args.eval_strategy == "no" and not compared:
            logger.warning(
                "%s: early_stopping is set and nothing is evaluated: it has no effect on %s", recipe.name, name
            )
        if draws_responses(method):
            check_rollout(name, method, args.rollout)
            if args.use_vllm:
                source = find_model(recipe.model, trust_remote_code=recipe.trust_remote_code)
                server_of(name, method, args, source, recipe.lora)
        if method.needs.reward and not recipe.reward:
            raise RewardError(
                f"{recipe.name}: {name} needs a reward for the responses that it draws; add reward to the recipe "
                "(train: {gamma: …} trains one on the pairs)"
            )
        unknown = [one for one in recipe.reward if one.train is None and not one.exact]
        if name in recipe.automatic("beta") and method.needs.pairs != "labelled" and unknown:
            raise RewardError(
                f"{recipe.name}: beta of {name} is auto, which asks how much noise the labels leave in a reward that "
                "is trained on these pairs; this reward is another: give beta a number"
            )
        if method.needs.reward and not held_out and any(one.train is not None for one in recipe.reward):
            raise RewardError(
                f"{recipe.name}: reward.train stops by held-out pairs and there are none; give data.eval, or "
                "data.held_out above 0"
            )
    prompts = None if recipe.data is None else recipe.data.prompts
    if prompts is not None and not any(draws_responses(recipe.method(name)) for name in methods):
        logger.warning("data.prompts %s is not read: no method draws responses (%s)", prompts, ", ".join(methods))
    writable(recipe.run_dir)


def check_places(recipe: Recipe, folders: Sequence[Path]) -> None:
    """Raise InputError if the recipe reads what a run in one of these folders removes there or writes anew."""
    trained = ["reward"] if any(one.train is not None for one in recipe.reward) else []
    names = ("model", MERGED, *trained, SAVING, LATER, "metrics.jsonl", *RESULTS)
    replaced = [path for folder in folders for path in (*(folder / name for name in names), *checkpoints(folder))]
    check_not_read(recipe.model_dump(mode="json", exclude={"name", "output_dir"}), replaced)


# One method -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainResult:
    """One trained method: its run's folder, the model's, the step that was kept, the last numbers on held-out pairs."""

    method: str
    folder: Path
    model: Path
    kept_step: int
    held_out: dict[str, float]


def train(
    recipe: RecipeSource, method: str | None = None, *, resume: bool = False, overwrite: bool = False
) -> TrainResult:
    """Train one method in a folder of its run.

    `recipe` is one, or a packaged one's name, a file or a mapping; `method` is needed if it has several, and may be a
    class of the user's, `file.py:Class`. The folder is output_dir/name/train/METHOD, a reward that is trained first its
    subfolder `reward`. `resume` continues from the last checkpoint of the folder, `overwrite` removes what an earlier
    run left there. Raises InputError before a model is loaded for settings and data that cannot be used.
    """
    recipe = as_recipe(recipe, method)
    name = _one_method(recipe, method)
    recipe = recipe.only([name])
    check(recipe, [name])
    folder = recipe.train_dir / name
    if overwrite:
        check_no_links(folder, Path(recipe.output_dir))
    check_places(recipe, [folder])
    processes = Processes.here()
    with ExitStack() as stack:
        processes.from_first(lambda: stack.enter_context(locked(writable(folder))))
        if resume:
            if not (folder / "recipe.yaml").is_file():
                raise InputError(f"{folder}: holds no checkpoint to continue from; leave --resume out")
            recipe = _as_begun(recipe, name, folder)
            _check_same_run(recipe, name, folder)
            # Of a run that was killed before it took the folder: the reward of this one is in "reward".
            processes.from_first(lambda: remove(folder / NEW_REWARD))
        elif not overwrite and (old := [*folder.glob("model"), *checkpoints(folder)]):
            raise InputError(
                f"{folder}: holds {old[-1].name} of an earlier run; go on with --resume, start over with --overwrite, "
                "or give another name with --set name=…"
            )
        if processes.first and not (folder / "recipe.yaml").is_file():
            # If the run is killed before its first step, --resume begins it anew.
            recipe.dump(folder / "recipe.yaml")
        setup = load_setup(recipe, recipe.seed, measured=False)
        if recipe.method(name).needs.reward:
            make_setup_reward(setup, folder / ("reward" if resume else NEW_REWARD), reuse=resume)
        _, trainer = train_method(setup, name, folder, resume=resume)
    held_out = {key.removeprefix("eval_"): value for key, value in trainer.last_evaluation().items()}
    return TrainResult(name, folder, folder / "model", trainer.kept_step, held_out)


def _one_method(recipe: Recipe, method: str | None) -> str:
    """The name of the method to train; a class of the user's is called by its name in small letters."""
    if method is not None:
        return method.rpartition(":")[2].lower() if ":" in method else method
    if len(recipe.methods) > 1:
        raise RecipeError(f"{recipe.name}: has the methods {', '.join(recipe.methods)}; choose one")
    return next(iter(recipe.methods))


def _as_begun(recipe: Recipe, name: str, folder: Path) -> Recipe:
    """The recipe with the numbers that the folder's run took for what is auto."""
    before = load_recipe(folder / "recipe.yaml").methods.get(name, {})
    for setting in ("gamma", "beta"):
        if recipe.automatic(setting) and before.get(setting, "auto") != "auto":
            recipe = recipe.with_numbers(setting, {name: before[setting]})
    return recipe


def _check_same_run(recipe: Recipe, name: str, folder: Path) -> None:
    """Raise InputError if the folder's run had another model, data or method: its weights are not this recipe's.

    A reward may be fixed: rewards from here on are the new one's.
    """
    old = load_recipe(folder / "recipe.yaml")
    # A secret may be another, and is not shown: in the folder it is hidden.
    before, now = (masked({**one.model_dump(), **_fixed_settings(one, name)}) for one in (old, recipe))
    for key in ("model", "dtype", "quantization", "lora", "data", "target", "methods", "rollout", "batches", "seed"):
        if before[key] != now[key]:
            raise InputError(
                f"{folder}: the run to go on with had {_difference(key, before[key], now[key])}; give the same, or "
                "start over with --overwrite"
            )
    trained = [[one["train"] for one in each["reward"] if one["train"]] for each in (before, now)]
    if trained[0] != trained[1]:
        raise InputError(
            f"{folder}: the run to go on with had a reward that was trained with other settings; give the same, or "
            "start over with --overwrite"
        )
    if before["reward"] != now["reward"]:
        logger.warning("%s: the reward is not the one that the run began with", folder)


def _difference(key: str, before: object, now: object) -> str:
    """The first setting in which two values of a recipe differ: "data.held_out 0.3, the recipe has 0.4"."""
    if isinstance(before, dict) and isinstance(now, dict):
        name = next(name for name in (*before, *now) if before.get(name) != now.get(name))
        return _difference(f"{key}.{name}", before.get(name), now.get(name))
    return f"{key} {before}, the recipe has {now}"


def _fixed_settings(recipe: Recipe, name: str) -> dict[str, Any]:
    """What must be the same for a run to go on: the method's settings, and how its data are cut into steps."""
    if name not in recipe.methods:
        return {"methods": {name: None}, "rollout": None, "batches": {}}
    training, method = recipe.training_for(name), recipe.method(name)
    batches = (
        # The prompts of a batch are those of all processes: its checkpoints know them.
        "gradient_accumulation_steps",
        *fixed_arguments(training.get("lr_scheduler_type", "linear")),
    )
    return {
        "methods": {name: {"class": type(method).__name__, **vars(method)}},
        "rollout": recipe.rollout_for(name).model_dump(exclude=FREE_SETTINGS),
        "batches": {key: training[key] for key in batches if key in training},
    }


def train_method(
    setup: Setup,
    name: str,
    folder: Path,
    *,
    compared: bool = False,
    resume: bool = False,
    begin: Callable[[], None] = lambda: None,
) -> tuple[Policy, AlignmentTrainer]:
    """Train a policy of its own for one method and save it under `folder`; the setup stays as it is.

    `begin` is called when all has been checked and the folder is this run's, before the first step.
    """
    recipe, processes = setup.recipe, Processes.here()
    processes.from_first(lambda: writable(folder))
    logger.info("%s: %s", name, where_it_ends(setup, recipe.method(name)))
    args = training_arguments(
        recipe,
        name,
        folder,
        held_out=bool(setup.held),
        compared=compared,
        seed=setup.seed,
        end_token_id=setup.task.end_id,
    )
    torch.manual_seed(setup.seed)
    # The reference costs no memory here, and that the run starts there is checked for every method.
    policy = make_policy(setup.base, setup.tokenizer, setup.source, lora=recipe.lora, reference=True)
    trainer = _make_trainer(setup, name, policy, args)
    # All has been checked: from here on the folder is this run's.
    checkpoint = processes.from_first(lambda: newest_complete(folder)) if resume else None
    if resume and checkpoint is None:
        logger.warning("%s: holds no complete checkpoint: the run begins anew", folder)
    processes.from_first(lambda: _forget(folder, everything=checkpoint is None, resume=resume))
    begin()
    if processes.first:
        recipe.only([name]).dump(folder / "recipe.yaml")
    started = time.monotonic()
    try:
        with one_run(args, recipe.name):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except ImportError as error:
        raise RecipeError(f"{recipe.name}: training of {name} needs a package: {error}") from error
    setup.seconds[name] = time.monotonic() - started
    policy.model.eval()
    if args.load_best_model_at_end:
        _log_kept_step(name, trainer, len(setup.held))
    with ExitStack() as stack:
        model = whole_folder(folder / "model", ours=MODEL_FILES)
        trainer.save_policy(processes.from_first(lambda: stack.enter_context(model)))
        processes.from_first(stack.close)
    if args.push_to_hub:
        try:
            trainer.push_to_hub()
        except TrainingError as error:
            logger.warning("%s; the model is saved in %s", error, folder / "model")
    return policy, trainer


@contextmanager
def one_run(args: TrainingArguments, group: str) -> Iterator[None]:
    """What is logged within is one run. wandb reads its group from WANDB_RUN_GROUP; one that is set already stays."""
    if "wandb" not in (args.report_to or ()):
        yield
        return
    import wandb  # pyright: ignore[reportMissingImports]

    # transformers' callback goes on with a run that is open: the user's own stays, ours is closed before the next.
    users_own, grouped = wandb.run is not None, "WANDB_RUN_GROUP" in os.environ
    os.environ.setdefault("WANDB_RUN_GROUP", group)
    try:
        yield
    finally:
        if not grouped:
            del os.environ["WANDB_RUN_GROUP"]
        if not users_own:
            wandb.finish()


def where_it_ends(setup: Setup, method: Method) -> str:
    """What the method's settings tend to with endless pairs, how fast, and its distance from a known target."""
    text = f"with endless pairs it ends at {method.optimum}"
    if method.rate is not None:
        return f"{text}; its distance falls like {method.rate}"
    beta, task = getattr(method, "beta", 0.0), setup.task
    text += f"; beta is {beta:g}" if beta else ""
    share = start_share(method, task.gamma)
    if task.target is None or share is None or not task.prompts:
        return text
    prompts, reference, responses = _known_responses(setup)
    groups = [Group(p, [*a, *b]) for p, a, b in zip(prompts, reference, responses, strict=True)]
    budget = setup.recipe.forward_budget
    base, true = (score_together(model, groups, budget) for model in (setup.base, task.target))
    least = mean_and_se(divergence_from(true, share * base + (1 - share) * true, base, SAMPLES))
    start = float((true - base)[:, SAMPLES:].mean())
    return f"{text}, {least.mean:.2f} ± {least.se:.2f} nats from the target with its exact reward (π₀ {start:.2f})"


def _make_trainer(setup: Setup, name: str, policy: Policy, args: AlignmentConfig) -> AlignmentTrainer:
    def follow_target(model: nn.Module) -> dict[str, float]:
        kl = forward_kl(model, setup.task, CURVE_PROMPTS)
        return {"target/forward_kl": kl.mean, "target/forward_kl_se": kl.se, "target/prompts": kl.n}

    recipe, method = setup.recipe, setup.recipe.method(name)
    stopping = recipe.early_stopping
    callbacks: list[TrainerCallback] = []
    if stopping is not None and args.load_best_model_at_end:
        callbacks.append(EarlyStoppingCallback(stopping.patience, stopping.min_delta))
    trainer = AlignmentTrainer(
        policy,
        method,
        args,
        setup.train if "labelled" in method.needs.pairs else setup.prompts,
        setup.held or None,
        reward_funcs=setup.reward if method.needs.reward else None,
        callbacks=callbacks,
        label=f"train {name}",
        extra_evaluation=follow_target if setup.task.target_groups else None,
        reference_cache=setup.reference_cache,
    )
    trainer.statistics = setup.statistics
    # A recipe's reward may be fixed: `_check_same_run` compares them.
    trainer.reward_names = []
    return trainer


def _log_kept_step(name: str, trainer: AlignmentTrainer, pairs: int) -> None:
    state = trainer.state
    stopped = "stopped early" if state.global_step < state.max_steps else "ran to the end"
    logger.info(
        "%s %s at step %d of %d and kept step %d, the best on %d held-out pairs",
        name, stopped, state.global_step, state.max_steps, trainer.kept_step, pairs,
    )  # fmt: skip
    if trainer.kept_step == 0:
        logger.warning("%s improved nothing on the held-out pairs: the model kept is the one it started from", name)


def _forget(folder: Path, *, everything: bool, resume: bool) -> None:
    """Remove what an earlier run left, or of one that goes on what is made anew; the trainer cuts its logs.

    The merged model of one that goes on stays, with what the user has put beside it.
    """
    if resume and (folder / MERGED).exists():
        logger.warning(
            "%s: is made of the model that the run had until now; to make it anew run distalign merge %s --overwrite",
            folder / MERGED, folder,
        )  # fmt: skip
    if not everything:
        remove(folder / "results.json")
        remove(folder / "report.html")
        return
    forget_results(folder)
    for old in (folder / "metrics.jsonl", folder / SAVING, folder / LATER, *checkpoints(folder)):
        remove(old)
    if not resume:
        remove(folder / MERGED)
    if (folder / NEW_REWARD).is_dir():
        remove(folder / "reward")
        (folder / NEW_REWARD).rename(folder / "reward")


# The reward -----------------------------------------------------------------------------------------------------------


def train_reward_model(recipe: Recipe, *, overwrite: bool = False) -> Trained:
    """Train the recipe's reward model alone, into the folder train/reward of its run.

    `overwrite` replaces one that is there. Raises InputError.
    """
    refuse_several_processes("training a reward alone")
    settings = next((one for one in recipe.reward if one.train is not None), RewardSettings(train=RewardTraining()))
    known = recipe.target is not None
    check_rewards([settings], conversational=False, target=known, gamma=recipe.has_gamma)
    folder = recipe.train_dir / "reward"
    if overwrite:
        check_no_links(folder, Path(recipe.output_dir))
    check_not_read(recipe.model_dump(mode="json", exclude={"name", "output_dir", "reward"}), [folder])
    with locked(writable(recipe.train_dir)):
        if folder.exists() and not overwrite:
            raise InputError(
                f"{folder}: is there already; start over with --overwrite, or give another name with --set name=…"
            )
        setup = load_setup(recipe.only([]), recipe.seed, measured=False)
        setup.recipe = settle_gamma(recipe, setup.base, setup.train)
        return _fit_reward(setup, folder)


def make_setup_reward(setup: Setup, folder: Path, *, reuse: bool = False) -> None:
    """Make the recipe's reward, for all methods. One that is to be trained is trained, and saved in `folder`.

    `reuse` takes one that is there already. Raises RewardError.
    """
    recipe, trained = setup.recipe, None
    if any(one.train is not None for one in recipe.reward):
        processes = Processes.here()
        kept = processes.from_first(lambda: reuse and folder.is_dir())
        with processes.together():
            if processes.first and not kept:
                trained = _fit_reward(setup, folder).reward
        # The first process trains it, the others take what it saved.
        trained = trained or load_reward(
            folder, base=setup.base, tokenizer=setup.tokenizer, token_budget=recipe.forward_budget
        )
    setup.reward = make_reward(
        recipe.reward,
        base=setup.base,
        tokenizer=setup.tokenizer,
        token_budget=recipe.forward_budget,
        target=setup.task.target,
        gamma=recipe.target_gamma,
        trained=trained,
    )


def _fit_reward(setup: Setup, folder: Path) -> Trained:
    """Train a reward on the recipe's pairs and save it in `folder`. Raises RewardError."""
    recipe = setup.recipe
    settings = next((one.train for one in recipe.reward if one.train is not None), RewardTraining())
    started = time.monotonic()
    with whole_folder(folder) as scratch:
        trained = train_reward(
            settings,
            setup.base,
            setup.tokenizer,
            setup.source,
            setup.train,
            setup.held,
            gamma=recipe.target_gamma,
            token_budget=recipe.forward_budget,
            seed=setup.seed,
            folder=scratch,
        )
        setup.seconds["reward"] = time.monotonic() - started
        summary = ", ".join(f"{name} {value.mean:.3f} ± {value.se:.3f}" for name, value in trained.results.items())
        logger.info("reward: head %s; %s on %d held-out pairs", trained.head, summary, len(setup.held))
        setup.statistics["reward model, held out"] = summary
        if trained.reward.gamma is not None and setup.task.prompts:
            prompts, reference, responses = _known_responses(setup)
            made = potential(
                trained,
                prompts,
                reference,
                gamma=trained.reward.gamma,
                target=setup.task.target,
                target_responses=responses,
            )
            logger.info("reward: %s", made)
            setup.statistics["reward model, potential"] = str(made)
            (scratch / POTENTIAL).write_text(json.dumps(made.to_json(), indent=1) + "\n", encoding="utf-8")
            if made.warning is not None:
                logger.warning("%s", made.warning)
    return trained


def _known_responses(setup: Setup) -> tuple[list[list[int]], list[list[list[int]]], list[list[list[int]]]]:
    """Some held-out prompts, with responses of π₀ and of a known target."""
    task, prompts = setup.task, list(setup.task.prompts[:PROMPTS])
    settings: dict[str, Any] = {"n": SAMPLES, "max_new_tokens": task.max_new_tokens, "end_id": task.end_id}
    reference = sample(setup.base, prompts, seed=20_000, **settings)
    return prompts, reference, [] if task.target is None else sample(task.target, prompts, seed=20_001, **settings)
