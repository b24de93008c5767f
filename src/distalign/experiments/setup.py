"""Getting ready: the model, the pairs and the held-out prompts of a recipe, shared by all its methods.

Everything that can be read without the weights is read, and refused, before they are loaded.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from distalign.data import (
    Data,
    EncodedPair,
    EncodedPrompt,
    encode_pairs,
    encode_prompt,
    end_token_id,
    plain_text,
    prompt_key,
    read_pairs,
    read_prompts,
    split_by_prompt,
)
from distalign.engine import Group
from distalign.errors import InputError
from distalign.evaluation.metrics import Task
from distalign.experiments.recipe import Recipe
from distalign.models.load import Source, find_model
from distalign.models.targets import Target, TargetPairs, Tilt, make_pairs, target_prompts
from distalign.progress import progress
from distalign.rewards import Reward, check_rewards
from distalign.rollout.sample import sample
from distalign.training.rounds import is_on_policy

logger = logging.getLogger("distalign.experiments.setup")


@dataclass
class Bench:
    """What all methods of an experiment share: model, pairs, and what they are measured on."""

    recipe: Recipe
    seed: int
    source: Source
    tokenizer: Any
    base: PreTrainedModel
    train: list[EncodedPair]
    held: list[EncodedPair]
    task: Task
    prompts: list[EncodedPrompt]
    held_prompts: list[EncodedPrompt]
    facts: dict[str, Any] = field(default_factory=dict)
    prompt_texts: list[str] = field(default_factory=list)
    reference_cache: dict[tuple, Tensor] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    reward: Reward | None = None


def prepare(recipe: Recipe, seed: int, *, measured: bool, target: Target | None = None) -> Bench:
    """Read or draw the pairs and load the model. The user's data are read and encoded before the weights are.

    `measured` gets ready for `compare`: it then samples the target on the held-out prompts. `target` stands in for the
    recipe's tilt of words.
    """
    source = find_model(recipe.model, trust_remote_code=recipe.trust_remote_code)
    tokenizer = source.tokenizer()
    if recipe.target is not None:
        tilt = Tilt(tuple(recipe.target.words), recipe.target.bonus, recipe.target.end_bonus)
        return _prepare_target(recipe, seed, source, tokenizer, measured, target or tilt)
    train, held, held_prompts, counts = _read_data(recipe, source, tokenizer, measured)
    conversational = bool(tokenizer.chat_template) and counts["format"] == "conversational"
    _check_rewards(recipe, conversational)
    prompts = _prompts_to_answer(recipe, source, tokenizer, train, counts)
    base = _load(source, recipe)
    end_id = end_token_id(tokenizer, conversational=conversational)
    task = _task(recipe, seed, base, [one.prompt for one in held_prompts], held, end_id)
    return Bench(recipe, seed, source, tokenizer, base, train, held, task, prompts, held_prompts, counts)


def _check_rewards(recipe: Recipe, conversational: bool) -> None:
    if any(recipe.method(name).needs.reward for name in recipe.methods):
        target = recipe.target
        gamma = None if target is None else target.gamma
        check_rewards(recipe.reward, conversational=conversational, target=target is not None, gamma=gamma)


def _load(source: Source, recipe: Recipe) -> PreTrainedModel:
    device = TrainingArguments(output_dir="unused", **_device(recipe)).device
    model: Any = source.model(recipe.dtype)
    return model.to(device).requires_grad_(False)


def _device(recipe: Recipe) -> dict[str, Any]:
    return {key: recipe.training[key] for key in ("use_cpu",) if key in recipe.training}


def _task(recipe: Recipe, seed: int, base: Any, prompts: Any, held: Any, end_id: int, **target: Any) -> Task:
    settings = recipe.evaluation
    return Task(
        base=base,
        prompts=prompts,
        pairs=held,
        end_id=end_id,
        seed=seed,
        samples=settings.samples,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        token_budget=recipe.token_budget,
        **target,
    )


def _check_held_out(prompts: list[list[int]], pairs: int) -> None:
    """Raise InputError if there is too little to measure policies on."""
    if min(len(prompts), pairs) < 2:
        raise InputError(
            f"a comparison is measured on {len(prompts)} held-out prompts and {pairs} pairs; standard errors need two "
            "of each: give more prompts, data.eval or a larger data.held_out, evaluation.prompts or target.eval_pairs"
        )


def _check_ids(source: Source, sequences: Iterable[list[int]]) -> None:
    """Raise InputError if the tokenizer gives ids that the model does not have."""
    known, largest = source.config().get_text_config().vocab_size, max(map(max, sequences))
    if largest >= known:
        raise InputError(
            f"model {source.name}: its tokenizer gives token {largest}, but the model has {known}; put the "
            "tokenizer that belongs to the model in its folder"
        )


def _check_room(source: Source, prompts: list[list[int]], new_tokens: int, setting: str) -> None:
    """Raise InputError if the model has no positions left for responses of that length."""
    limit, longest = source.max_length(), max(map(len, prompts), default=0)
    if limit is not None and longest + new_tokens > limit:
        raise InputError(
            f"model {source.name}: the longest prompt has {longest} tokens and {setting} is {new_tokens}, but the "
            f"model has {limit} positions; lower {setting} or leave out long prompts"
        )


def _read_data(
    recipe: Recipe, source: Source, tokenizer: Any, measured: bool
) -> tuple[list[EncodedPair], list[EncodedPair], list[EncodedPrompt], dict[str, Any]]:
    settings = recipe.data
    assert settings is not None
    data = read_pairs(settings.train, split=settings.split, drop_ties=settings.drop_ties, limit=settings.limit)
    if settings.eval is not None:
        train = data
        held = read_pairs(
            settings.eval, split=settings.eval_split, drop_ties=settings.drop_ties, limit=settings.eval_limit
        )
    elif settings.held_out:
        train, held = split_by_prompt(data, settings.held_out, recipe.seed)
        held = Data(held.rows[: settings.eval_limit], held.source, held.format, held.implicit)
    else:
        train, held = data, Data([], data.source, data.format)
    positions = source.max_length()
    if positions is not None and (settings.max_length or 0) > positions:
        raise InputError(f"data.max_length is {settings.max_length}, but the model has {positions} positions; lower it")
    limits: dict[str, Any] = {
        "max_length": settings.max_length or positions,
        "max_response_tokens": settings.max_response_tokens,
        "too_long": settings.too_long,
    }
    pairs, counts = encode_pairs(tokenizer, train, **limits)
    held_pairs, held_counts = encode_pairs(tokenizer, held, **limits) if held.rows else ([], None)
    _check_ids(source, (ids for pair in [*pairs, *held_pairs] for ids in (pair.prompt, pair.chosen, pair.rejected)))
    distinct = {tuple(pair.prompt): EncodedPrompt(pair.prompt, pair.where, pair.row) for pair in held_pairs}
    prompts = list(distinct.values())[: recipe.evaluation.prompts]
    if measured:
        ids = [one.prompt for one in prompts]
        _check_held_out(ids, len(held_pairs))
        _check_room(source, ids, recipe.evaluation.max_new_tokens, "evaluation.max_new_tokens")
    shared = {prompt_key(row.prompt) for row in train} & {prompt_key(row.prompt) for row in held}
    if shared:
        logger.warning("%d prompts of %s are in %s too: held out they are not", len(shared), held.source, train.source)
    facts = {
        "source": settings.train,
        "prompts in both parts": len(shared),
        "format": data.format,
        "train": len(pairs),
        "held_out": len(held_pairs),
        "ties dropped": data.ties,
        "encoding": str(counts),
        **({"held-out encoding": str(held_counts)} if held_counts else {}),
    }
    return pairs, held_pairs, prompts, facts


def _longest_rollout(recipe: Recipe) -> int:
    return max(recipe.rollout_for(name).max_new_tokens for name in recipe.methods)


def _prompts_to_answer(
    recipe: Recipe, source: Source, tokenizer: Any, train: list[EncodedPair], facts: dict[str, Any]
) -> list[EncodedPrompt]:
    """The prompts of the training pairs, each once, and those of `data.prompts`, if a method answers prompts at all."""
    settings = recipe.data
    assert settings is not None
    if not any(is_on_policy(recipe.method(name)) for name in recipe.methods):
        return []
    found = {tuple(pair.prompt): EncodedPrompt(pair.prompt, pair.where, pair.row) for pair in train}
    if settings.prompts is not None:
        data = read_prompts(settings.prompts)
        if data.format != facts["format"]:
            raise InputError(
                f"data.prompts {settings.prompts} holds {data.format} prompts and the pairs are {facts['format']}; "
                "write both as strings or both as messages"
            )
        for row in data:
            ids = encode_prompt(tokenizer, row)
            found.setdefault(tuple(ids), EncodedPrompt(ids, row.where, row))
    prompts = list(found.values())
    _check_ids(source, (one.prompt for one in prompts))
    _check_room(source, [one.prompt for one in prompts], _longest_rollout(recipe), "rollout.max_new_tokens")
    facts["prompts to answer"] = len(prompts)
    return prompts


def _draw(recipe: Recipe, target: Target, base: Any, tokenizer: Any, prompts: Any, *, held_out: bool, seed: int) -> Any:
    settings = recipe.target
    assert settings is not None
    n, label = (settings.eval_pairs, "held-out") if held_out else (settings.pairs, "training")
    with progress(f"draw and label {label} pairs", 3 * n) as advance:
        return make_pairs(
            target,
            base,
            tokenizer,
            prompts,
            n=n,
            gamma=settings.gamma,
            strengths=settings.strengths,
            temperature=settings.temperature,
            max_new_tokens=settings.max_new_tokens,
            token_budget=recipe.token_budget,
            seed=2 * seed + held_out,
            progress=advance,
        )


def _prepare_target(recipe: Recipe, seed: int, source: Source, tokenizer: Any, measured: bool, target: Target) -> Bench:
    settings = recipe.target
    assert settings is not None
    _check_rewards(recipe, bool(tokenizer.chat_template))
    train_rows, held_rows = target_prompts(settings, tokenizer)
    held_rows = held_rows[: recipe.evaluation.prompts]
    train_prompts, held_prompts = ([encode_prompt(tokenizer, row) for row in rows] for rows in (train_rows, held_rows))
    _check_ids(source, [*train_prompts, *held_prompts])
    _check_room(source, [*train_prompts, *held_prompts], settings.max_new_tokens, "target.max_new_tokens")
    if any(is_on_policy(recipe.method(name)) for name in recipe.methods):
        _check_room(source, train_prompts, _longest_rollout(recipe), "rollout.max_new_tokens")
    if measured:
        _check_held_out(held_prompts, settings.eval_pairs)
        _check_room(source, held_prompts, recipe.evaluation.max_new_tokens, "evaluation.max_new_tokens")
    base = _load(source, recipe)
    started = time.monotonic()
    train = _draw(recipe, target, base, tokenizer, train_prompts, held_out=False, seed=seed)
    held = _draw(recipe, target, base, tokenizer, held_prompts, held_out=True, seed=seed)
    model = target.model(base, tokenizer)
    end_id = end_token_id(tokenizer, conversational=bool(tokenizer.chat_template))
    task = _task(
        recipe,
        seed,
        base,
        held_prompts,
        held.pairs,
        end_id,
        gamma=settings.gamma,
        target=model,
        target_logit=held.logit,
    )
    if measured:
        # The same responses of the target for every seed, so that seeds differ in what was learned alone.
        responses = sample(
            model,
            held_prompts,
            n=task.samples,
            max_new_tokens=task.max_new_tokens,
            temperature=task.temperature,
            end_id=end_id,
            seed=10_000,
        )
        groups = [Group(prompt, own) for prompt, own in zip(held_prompts, responses, strict=True)]
        task = replace(task, target_groups=groups)
    prompts = [EncodedPrompt(ids, row.where, row) for ids, row in zip(train_prompts, train_rows, strict=True)]
    held_out = [EncodedPrompt(ids, row.where, row) for ids, row in zip(held_prompts, held_rows, strict=True)]
    bench = Bench(recipe, seed, source, tokenizer, base, train.pairs, held.pairs, task, prompts, held_out)
    bench.facts = _facts(train, held, settings.gamma)
    bench.prompt_texts = [plain_text(row.prompt) for row in held_rows]
    for part in (train, held):
        bench.reference_cache |= {p.key: own for p, own in zip(part.pairs, part.reference_logps, strict=True)}
    bench.seconds["pairs"] = time.monotonic() - started
    return bench


def _facts(train: TargetPairs, held: TargetPairs, gamma: float) -> dict[str, Any]:
    information = train.information(gamma)
    return {
        "train": len(train.pairs),
        "held_out": len(held.pairs),
        "median_logit": float(train.logit.abs().median()),
        "information_per_pair": information,
        "strength_se": 1 / math.sqrt(len(train.pairs) * information),
        "ties_redrawn": train.ties + held.ties,
    }
