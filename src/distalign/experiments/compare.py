"""Several methods on the same pairs with the same budget, measured on held-out prompts: `results.json` and samples."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distalign.engine import score_in_batches
from distalign.errors import DAMAGED, InputError
from distalign.evaluation.metrics import (
    COLUMNS,
    Measured,
    measure_pairs,
    measure_rewards,
    measure_samples,
    plain,
    policy_tables,
    summarise,
    win_probability,
)
from distalign.evaluation.results import Results, environment, forget_results, write_results, write_samples
from distalign.experiments.recipe import Recipe, RecipeSource, as_recipe
from distalign.experiments.results import (
    FINISHED,
    ResumeRecord,
    claim,
    data_key,
    is_of,
    load_resume_record,
    reward_key,
    run_key,
)
from distalign.experiments.setup import Setup, load_setup
from distalign.experiments.train import NEW_REWARD, check, check_places, make_setup_reward, train_method
from distalign.models.card import CITATION
from distalign.models.load import weights_digest
from distalign.models.targets import Target
from distalign.progress import in_words, progress
from distalign.rewards import RewardError, UnreadableReward
from distalign.rewards.potential import POTENTIAL
from distalign.settings import masked
from distalign.training.checkpoint import checkpoints
from distalign.training.processes import refuse_several_processes
from distalign.training.prompts import implicit_rewards
from distalign.training.rollout_settings import draws_responses
from distalign.training.run_folder import check_no_links, locked, remove
from distalign.training.trainer import AlignmentTrainer

logger = logging.getLogger("distalign.experiments.compare")


def compare(
    recipe: RecipeSource,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    target: Target | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> Results:
    """Train several methods on the same pairs, measure them on held-out prompts, and write the run folder.

    `recipe` is one, or a packaged one's name, a file or a mapping. Without `methods` those that the recipe compares are
    trained, without `seeds` its own is used. Every seed draws its own pairs (where a known target makes them) and
    trains anew, in a subfolder if there are several. `target` stands in for the recipe's own, whose other settings
    (gamma, pairs, strengths) hold. `resume` goes on with a comparison that was stopped: what is done is not
    done again, a method in the middle goes on from its last checkpoint, and what has other settings or data now starts
    over. `overwrite` starts all over. Raises InputError for a folder that holds a comparison, without either. What was
    there stays until all has been checked and the first training starts.
    """
    recipe = as_recipe(recipe)
    methods = list(methods or recipe.compare or recipe.methods)
    seeds = [recipe.seed] if seeds is None else list(seeds)
    refuse_several_processes("a comparison")
    recipe = recipe.only(methods)
    check(recipe, methods, compared=True)
    _warn_of_temperatures(recipe, methods)
    root = recipe.run_dir
    folders = {seed: root if len(seeds) == 1 else root / f"seed-{seed}" for seed in seeds}
    for place in (folder / name for folder in folders.values() for name in (*methods, "reward")):
        check_no_links(place, Path(recipe.output_dir))
    check_places(recipe, [root, *folders.values(), *(folder / name for folder in folders.values() for name in methods)])
    runs: dict[str, list[Measured]] = {}
    training: dict[str, Any] = {"curves": {}, "kept_step": {}, "seconds": {}, "potential": []}
    results: dict[str, Any] = {}
    with locked(root):
        if not (resume or overwrite) and (old := _earlier(root)):
            raise InputError(
                f"{root}: holds {old.relative_to(root)} of an earlier comparison; go on with --resume, start over with "
                "--overwrite, or give another name with --set name=…"
            )
        if resume:
            _check_resumed(root, methods, seeds)
        for number, (seed, folder) in enumerate(folders.items(), 1):
            setup = load_setup(recipe, seed, measured=True, target=target)
            if number == 1:
                # What is auto is chosen on the pairs of the first seed, for all.
                recipe = setup.recipe
            logger.info("pairs: %s", in_words(setup.statistics))
            begin = partial(_begin, recipe, folder, first=number == 1)
            _compare_seed(setup, methods, folder, runs, training, resume, begin)
            # Of methods that were all done before none has begun.
            begin()
            if number == 1:
                samples = {name: own[0] for name, own in runs.items()}
                prompts = [one.row.prompt if one.row is not None else "" for one in setup.held_prompts]
                write_samples(root, setup.tokenizer, prompts, samples)
            # After every seed: a run that is stopped keeps those that it has.
            results = _results(setup, methods, seeds[:number], runs, training)
            write_results(root, results)
    return Results(root, results)


def _earlier(root: Path) -> Path | None:
    """Something that a comparison left in its folder: results, or a method's checkpoint, model or record."""
    left = [f"{place}/{name}" for place in ("*", "seed-*/*") for name in ("checkpoint-*", "model", FINISHED)]
    return next((path for pattern in ("results.json", *left) for path in sorted(root.glob(pattern))), None)


def _check_resumed(root: Path, methods: Sequence[str], seeds: Sequence[int]) -> None:
    """Refuse one seed where several lie, or the reverse: runs would be trained again. Warn of results that are lost."""
    place, kind = ("seed-*/*", "several seeds") if len(seeds) == 1 else ("*", "one seed")
    if other := sorted(root.glob(f"{place}/{FINISHED}")):
        raise InputError(
            f"{root}: holds {other[0].relative_to(root)} of a comparison of {kind}; go on with the seeds it had, or "
            "give another name with --set name=…"
        )
    try:
        old = json.loads((root / "results.json").read_text(encoding="utf-8"))
        lost = [*(set(old["by_seed"]) - {*methods, "target", "reference"}), *(set(old["seeds"]) - set(seeds))]
    except DAMAGED:
        return
    if lost:
        names = ", ".join(sorted(map(str, lost)))
        logger.warning("%s: its results hold %s too, and are replaced; name all to have them in one", root, names)


def _begin(recipe: Recipe, folder: Path, *, first: bool) -> None:
    """All has been checked: what an earlier comparison left goes, and a reward that was trained takes its place."""
    if first:
        forget_results(recipe.run_dir)
        recipe.dump(recipe.run_dir / "recipe.yaml")
    if (folder / NEW_REWARD).is_dir():
        remove(folder / "reward")
        (folder / NEW_REWARD).rename(folder / "reward")


def _warn_of_temperatures(recipe: Recipe, methods: Sequence[str]) -> None:
    measured = recipe.evaluation.temperature
    for name in methods:
        trained = recipe.rollout_for(name).temperature
        if draws_responses(recipe.method(name)) and measured != trained:
            logger.warning(
                "%s: evaluation.temperature is %g, and %s learns the distribution at rollout.temperature %g: give both "
                "the same", recipe.name, measured, name, trained,
            )  # fmt: skip


def _results(
    setup: Setup,
    methods: Sequence[str],
    seeds: Sequence[int],
    runs: Mapping[str, Sequence[Measured]],
    training: Mapping[str, Any],
) -> dict[str, Any]:
    recipe = setup.recipe
    return {
        "name": recipe.name,
        "seeds": list(seeds),
        "columns": COLUMNS,
        **policy_tables(runs, methods, seed=recipe.seed),
        **training,
        "by_seed": {name: [plain(summarise([measured])) for measured in own] for name, own in runs.items()},
        "pairs": setup.statistics,
        "settings": masked(recipe.model_dump(mode="json")),
        "environment": environment(),
        "citation": CITATION,
    }


def _compare_seed(
    setup: Setup,
    methods: Sequence[str],
    folder: Path,
    runs: dict[str, list[Measured]],
    training: dict[str, Any],
    resume: bool,
    begin: Callable[[], None],
) -> None:
    """Measure target and reference, train and measure the methods, and add all to `runs` and `training`."""
    # Of a run that was killed before a method began.
    remove(folder / NEW_REWARD)
    measured = _measure_known(setup)
    # Columns are of the data's responses, not of these.
    scored = not any(part.columns for part in setup.recipe.reward)
    if any(setup.recipe.method(name).needs.reward for name in methods):
        found = _make_reward(setup, folder, resume) / POTENTIAL
        if found.is_file():
            training["potential"].append(json.loads(found.read_text(encoding="utf-8")))
    for name in methods:
        record = _run_method(setup, name, folder / name, resume, begin)
        training["curves"].setdefault(name, []).extend(record.curve)
        training["kept_step"].setdefault(name, []).append(record.kept_step)
        setup.seconds |= record.seconds
        measured[name] = record.measured
    for name, policy in measured.items():
        if setup.reward is not None and scored:
            try:
                measure_rewards(policy, setup.reward, setup.held_prompts)
            except RewardError as error:
                # What was trained and measured otherwise is not lost to it.
                logger.error("%s is left without its column reward: %s", name, error)
        if setup.task.target is not None and name != "reference":
            policy.values["win_rate"] = win_probability(policy, measured["reference"], setup.task)
        runs.setdefault(name, []).append(policy)
    for key, value in setup.seconds.items():
        training["seconds"][key] = training["seconds"].get(key, 0.0) + value


def _measure_known(setup: Setup) -> dict[str, Measured]:
    """The target, if there is one, and the reference."""
    task = setup.task
    measured: dict[str, Measured] = {}
    if task.target is not None:
        measured["target"] = measure_samples(task.target, task, reference=setup.base)
        if task.target_logit is not None:
            logit = torch.stack([task.target_logit, torch.zeros_like(task.target_logit)], 1)
            measure_pairs(measured["target"], logit, task.pairs, lambda logit: logit, task.target_logit)
    reference = measured["reference"] = measure_samples(setup.base, task, reference=None)
    if setup.held:
        logps = _reference_logps(setup)
        measure_pairs(reference, logps, task.pairs, lambda logps: task.gamma * logps, task.target_logit)
        if task.target is None:
            # How sure π₀ is of its preference depends on gamma, and each method has its own: only the side is π₀'s.
            del reference.values["nll"]
            reference.confidence = torch.zeros(0)
    return measured


def _run_method(setup: Setup, name: str, folder: Path, resume: bool, begin: Callable[[], None]) -> ResumeRecord:
    """One method, trained and measured; from its record, or on from its checkpoint, where that is allowed."""
    task = setup.task
    key = run_key(setup.recipe, name, setup.seed, weights_digest(setup.source), _data(setup))
    record = load_resume_record(folder, key, setup.held) if resume else None
    if record is not None:
        logger.info("%s, seed %d: done before", name, setup.seed)
        return record
    if resume and (folder / FINISHED).is_file() and not is_of(folder, key):
        logger.warning(
            "%s, seed %d: is trained again: its settings, data or weights are not those it had", name, setup.seed
        )
    going_on = resume and is_of(folder, key) and any(checkpoints(folder))

    def take() -> None:
        begin()
        claim(folder, key)

    policy, trainer = train_method(setup, name, folder, compared=True, resume=going_on, begin=take)
    started = time.monotonic()
    with progress(f"measure {name}", 1) as advance:
        measured = measure_samples(policy.model, task, reference=setup.base)
        if setup.held:
            pairs, method = trainer.held_out(setup.held), trainer.method
            measure_pairs(
                measured,
                pairs.logps,
                task.pairs,
                lambda logps: implicit_rewards(method, pairs.replace(logps=logps)),
                task.target_logit,
            )
        advance(1)
    seconds = {name: setup.seconds[name], f"measure {name}": time.monotonic() - started}
    record = ResumeRecord(measured, _curve(trainer, setup.seed), trainer.kept_step, seconds)
    record.save(folder, key)
    return record


def _make_reward(setup: Setup, above: Path, resume: bool) -> Path:
    """The recipe's reward, and its folder; a trained one stays if it is whole and of the same settings, weights, pairs.

    Another waits beside it until the first method begins.
    """
    folder, new = above / "reward", above / NEW_REWARD
    if not any(one.train is not None for one in setup.recipe.reward):
        make_setup_reward(setup, folder)
        return folder
    key = reward_key(setup.recipe, setup.seed, weights_digest(setup.source), _data(setup))
    if resume and is_of(folder, key):
        try:
            make_setup_reward(setup, folder, reuse=True)
            return folder
        except UnreadableReward as error:
            logger.warning("%s: it is trained anew", error)
    elif resume and folder.is_dir():
        logger.info("%s: unfinished, or of other settings, weights or pairs: the reward is trained anew", folder)
    make_setup_reward(setup, new)
    claim(new, key)
    return new


def _data(setup: Setup) -> str:
    return data_key([*setup.train, *setup.held], setup.prompts, setup.task.prompts)


def _reference_logps(setup: Setup) -> torch.Tensor:
    """ln π₀ of the held-out pairs, cached for the methods that need them."""
    missing = [pair for pair in setup.held if pair.key not in setup.reference_cache]
    if missing:
        logps = score_in_batches(setup.base, setup.task.pair_groups(), token_budget=setup.recipe.forward_budget).logps
        setup.reference_cache.update({p.key: own for p, own in zip(setup.held, logps.view(-1, 2), strict=True)})
    return torch.stack([setup.reference_cache[pair.key] for pair in setup.held])


def _curve(trainer: AlignmentTrainer, seed: int) -> list[dict[str, Any]]:
    """The evaluations of a training run, one row per step."""
    rows = []
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
        rows.append(point)
    return rows
