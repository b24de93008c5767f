"""Several methods on the same pairs with the same budget, measured on held-out prompts: `results.json` and samples."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from distalign.engine import score_in_batches
from distalign.errors import InputError
from distalign.evaluation.metrics import (
    COLUMNS,
    Measured,
    calibration,
    differences,
    measure_pairs,
    measure_rewards,
    measure_samples,
    significance,
    summarise,
    win_probability,
)
from distalign.evaluation.results import environment, finite, forget_results, plain
from distalign.experiments.recipe import Recipe
from distalign.experiments.results import Finished, claim, data_key, is_of, load_finished, reward_key, run_key
from distalign.experiments.setup import Bench, prepare
from distalign.experiments.train import check, reward_of, train_method
from distalign.models.card import CITATION
from distalign.models.load import weights_digest
from distalign.models.targets import Target
from distalign.progress import progress
from distalign.rewards import RewardError, UnreadableReward
from distalign.training.prompts import implicit_rewards
from distalign.training.trainer import AlignmentTrainer

logger = logging.getLogger("distalign.experiments.compare")


def compare(
    recipe: Recipe,
    methods: Sequence[str],
    seeds: Sequence[int],
    target: Target | None = None,
    *,
    resume: bool = False,
) -> dict[str, Any]:
    """Train several methods on the same pairs, measure them on held-out prompts, and write the run folder.

    Every seed draws its own pairs (where a known target makes them) and trains anew, in a subfolder if there are
    several. `target` stands in for the recipe's tilt of words, whose other settings (gamma, pairs, strengths) hold.
    `resume` goes on with a comparison that was stopped: what is done is not done again, a method in the middle goes on
    from its last checkpoint, and what has other settings or data now starts over. Returns what `results.json` holds.
    """
    recipe = recipe.only(methods)
    check(recipe, methods)
    if (recipe.run_dir / "metrics.jsonl").is_file():
        raise InputError(
            f"{recipe.run_dir}: holds a run of distalign train; give the comparison another name with --set name=…"
        )
    forget_results(recipe.run_dir)
    root = recipe.run_dir
    recipe.dump(root / "recipe.yaml")
    runs: dict[str, list[Measured]] = {}
    extra: dict[str, Any] = {"curves": {}, "kept_step": {}, "seconds": {}}
    results: dict[str, Any] = {}
    for number, seed in enumerate(seeds, 1):
        bench = prepare(recipe, seed, measured=True, target=target)
        logger.info("pairs: %s", bench.facts)
        _compare_seed(bench, methods, root if len(seeds) == 1 else root / f"seed-{seed}", runs, extra, resume)
        if number == 1:
            _write_samples(root / "samples.jsonl", bench, runs)
        # After every seed: a run that is stopped keeps those that it has.
        results = _results(bench, methods, seeds[:number], runs, extra)
        text = json.dumps(finite(results), indent=1, ensure_ascii=False)
        (root / "results.json").write_text(text, encoding="utf-8")
    return results


def _results(
    bench: Bench,
    methods: Sequence[str],
    seeds: Sequence[int],
    runs: Mapping[str, Sequence[Measured]],
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    recipe, start = bench.recipe, runs["reference"]
    return {
        "name": recipe.name,
        "seeds": list(seeds),
        "columns": COLUMNS,
        "methods": {name: plain(summarise(own)) for name, own in runs.items()},
        "paired": {name: plain(differences(runs[name], start)) for name in methods},
        "between": {
            one: {other: plain(differences(runs[one], runs[other])) for other in methods if other != one}
            for one in methods
        },
        "significance": significance({name: runs[name] for name in methods}, start, seed=recipe.seed),
        **extra,
        "calibration": {
            name: [row._asdict() for row in calibration(own)] for name, own in runs.items() if len(own[0].confidence)
        },
        "by_seed": {name: [plain(summarise([one])) for one in own] for name, own in runs.items()},
        "paired_by_seed": {
            name: [plain(differences([one], [base])) for one, base in zip(runs[name], start, strict=True)]
            for name in methods
        },
        "pairs": bench.facts,
        "settings": recipe.model_dump(mode="json"),
        "environment": environment(),
        "citation": CITATION,
    }


def _compare_seed(
    bench: Bench,
    methods: Sequence[str],
    folder: Path,
    runs: dict[str, list[Measured]],
    extra: dict[str, Any],
    resume: bool,
) -> None:
    task = bench.task
    found: dict[str, Measured] = {}
    if task.target is not None:
        found["target"] = measure_samples(task.target, task, reference=bench.base)
        if task.target_logit is not None:
            logit = torch.stack([task.target_logit, torch.zeros_like(task.target_logit)], 1)
            measure_pairs(found["target"], logit, task.pairs, lambda logit: logit, task.target_logit)
    found["reference"] = measure_samples(bench.base, task, reference=None)
    reference_logps = _reference_logps(bench)
    if bench.held:
        measure_pairs(
            found["reference"], reference_logps, task.pairs, lambda logps: task.gamma * logps, task.target_logit
        )
        if task.target is None:
            # How sure π₀ is of its preference depends on gamma, and each method has its own: only the side is π₀'s.
            del found["reference"].values["nll"]
            found["reference"].confidence = torch.zeros(0)
    if any(bench.recipe.method(name).needs.reward for name in methods):
        _make_reward(bench, folder / "reward", resume)
    for name in methods:
        one = _finish(bench, name, folder / name, resume)
        extra["curves"].setdefault(name, []).extend(one.curve)
        extra["kept_step"].setdefault(name, []).append(one.kept_step)
        bench.seconds |= one.seconds
        found[name] = one.measured
    for name, measured in found.items():
        if bench.reward is not None:
            try:
                measure_rewards(measured, bench.reward, bench.held_prompts)
            except RewardError as error:
                # What was trained and measured otherwise is not lost to it.
                logger.error("%s is left without its column reward: %s", name, error)
        if task.target is not None and name != "reference":
            measured.values["win_rate"] = win_probability(measured, found["reference"], task)
        runs.setdefault(name, []).append(measured)
    for key, value in bench.seconds.items():
        extra["seconds"][key] = extra["seconds"].get(key, 0.0) + value


def _finish(bench: Bench, name: str, folder: Path, resume: bool) -> Finished:
    """One method, trained and measured; from its record, or on from its checkpoint, where that is allowed."""
    task = bench.task
    key = run_key(bench.recipe, name, bench.seed, weights_digest(bench.source), _data(bench))
    kept = load_finished(folder, key, bench.held) if resume else None
    if kept is not None:
        logger.info("%s, seed %d: done before", name, bench.seed)
        return kept
    going_on = resume and is_of(folder, key) and any(folder.glob("checkpoint-*"))
    claim(folder, key)
    policy, trainer = train_method(bench, name, folder, resume=going_on)
    started = time.monotonic()
    with progress(f"measure {name}", 1) as advance:
        measured = measure_samples(policy.model, task, reference=bench.base)
        if bench.held:
            pairs, method = trainer.held_out(bench.held), trainer.method
            measure_pairs(
                measured,
                pairs.logps,
                task.pairs,
                lambda logps: implicit_rewards(method, pairs.replace(logps=logps)),
                task.target_logit,
            )
        advance(1)
    seconds = {name: bench.seconds[name], f"measure {name}": time.monotonic() - started}
    one = Finished(measured, _curve(trainer, bench.seed), trainer.kept_step, seconds)
    one.save(folder, key)
    return one


def _make_reward(bench: Bench, folder: Path, resume: bool) -> None:
    """The recipe's reward; a trained one stays if it is whole and of the same settings, weights and pairs."""
    if not any(one.train is not None for one in bench.recipe.reward):
        reward_of(bench, folder)
        return
    key = reward_key(bench.recipe, bench.seed, weights_digest(bench.source), _data(bench))
    if resume and is_of(folder, key):
        try:
            reward_of(bench, folder, keep=True)
            return
        except UnreadableReward as error:
            logger.warning("%s: it is trained anew", error)
    elif resume and folder.is_dir():
        logger.info("%s: unfinished, or of other settings, weights or pairs: the reward is trained anew", folder)
    reward_of(bench, folder)
    claim(folder, key)


def _data(bench: Bench) -> str:
    prompts = [*(one.prompt for one in bench.prompts), *bench.task.prompts]
    return data_key([*bench.train, *bench.held], prompts)


def _reference_logps(bench: Bench) -> torch.Tensor:
    """ln π₀ of the held-out pairs, remembered for the methods that need them."""
    missing = [pair for pair in bench.held if pair.key not in bench.reference_cache]
    if missing:
        logps = score_in_batches(bench.base, bench.task.pair_groups(), token_budget=bench.recipe.token_budget).logps
        bench.reference_cache.update({p.key: own for p, own in zip(bench.held, logps.view(-1, 2), strict=True)})
    return torch.stack([bench.reference_cache[pair.key] for pair in bench.held]) if bench.held else torch.zeros(0, 2)


def _curve(trainer: AlignmentTrainer, seed: int) -> list[dict[str, Any]]:
    """The evaluations of a training run, a row a step."""
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


def _write_samples(path: Path, bench: Bench, runs: Mapping[str, Sequence[Measured]]) -> None:
    tokenizer: Any = bench.tokenizer
    texts = bench.prompt_texts or [tokenizer.decode(ids, skip_special_tokens=True) for ids in bench.task.prompts]
    with path.open("w", encoding="utf-8") as file:
        for index, prompt in enumerate(texts):
            responses = {
                name: tokenizer.decode(own[0].responses[index][0], skip_special_tokens=True)
                for name, own in runs.items()
            }
            line = {"prompt": prompt, "responses": responses}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
