"""Getting ready: the model, the pairs and the held-out prompts of a recipe, shared by all its methods.

Everything that can be read without the weights is read, and refused, before they are loaded.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from distalign.data import (
    Data,
    EncodedPair,
    EncodedPrompt,
    Pair,
    Tokenizer,
    encode_pairs,
    encode_prompt,
    end_token_id,
    prompt_key,
    prompts_of,
    read_pairs,
    read_prompts,
    split_by_prompt,
)
from distalign.errors import InputError
from distalign.evaluation.metrics import Task, target_responses
from distalign.experiments.auto import settle_beta, settle_gamma
from distalign.experiments.recipe import DataSettings, Recipe
from distalign.models.load import Source, check_positions, check_token_ids, find_model
from distalign.models.targets import Target, TargetPairs, TargetSettings, make_pairs, make_target, target_prompts
from distalign.progress import progress
from distalign.rewards import Reward, check_columns, check_rewards, warn_of_columns
from distalign.training.config import AlignmentConfig
from distalign.training.rollout_settings import draws_responses

logger = logging.getLogger("distalign.experiments.setup")


@dataclass
class Setup:
    """What all methods of an experiment share: model, pairs, and what they are measured on.

    `statistics` count what was read or drawn.
    """

    recipe: Recipe
    seed: int
    source: Source
    tokenizer: Any  # a transformers tokenizer: their classes do not declare what they all have
    base: PreTrainedModel
    train: list[EncodedPair]
    held: list[EncodedPair]
    task: Task
    prompts: list[EncodedPrompt]
    held_prompts: list[EncodedPrompt]
    statistics: dict[str, Any]
    reference_cache: dict[tuple, Tensor] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    reward: Reward | None = None


def load_setup(recipe: Recipe, seed: int, *, measured: bool, target: Target | None = None) -> Setup:
    """Read or draw the pairs and load the model. The user's data are read and encoded before the weights are.

    `measured` gets ready for `compare`: it then samples the target on the held-out prompts. `target` stands in for the
    recipe's own. The setup's recipe has numbers where the recipe says auto.
    """
    source = find_model(recipe.model, trust_remote_code=recipe.trust_remote_code)
    source = source if recipe.quantization is None else source.in_4bit()
    source.check_trainable(adapter=recipe.lora is not None)
    tokenizer = source.tokenizer()
    if recipe.data is not None:
        read = _read_data(recipe, recipe.data, source, tokenizer)
    else:
        assert recipe.target is not None
        target = target or make_target(recipe.target, source, tokenizer)
        read = _read_target(recipe, recipe.target, tokenizer)
    _check(recipe, source, read, measured)
    base = _load(source, recipe)
    settings = recipe.evaluation
    task = Task(
        base=base,
        prompts=[one.prompt for one in read.held_prompts],
        pairs=read.held,
        end_id=end_token_id(tokenizer, conversational=read.conversational),
        seed=seed,
        samples=settings.samples,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        token_budget=recipe.forward_budget,
    )
    setup = Setup(
        recipe=recipe,
        seed=seed,
        source=source,
        tokenizer=tokenizer,
        base=base,
        train=read.train,
        held=read.held,
        task=task,
        prompts=read.prompts,
        held_prompts=read.held_prompts,
        statistics=read.statistics,
    )
    if recipe.target is not None and target is not None:
        _draw_pairs(setup, recipe.target, target, measured)
    recipe = settle_gamma(recipe, setup.base, setup.train)
    setup.recipe = settle_beta(recipe, setup.base, setup.train, setup.task.end_id)
    return setup


# What is read before weights are loaded -------------------------------------------------------------------------------


@dataclass
class _Read:
    """Prompts to answer, those to measure on, and the user's pairs; a known target makes its pairs with the model."""

    conversational: bool
    prompts: list[EncodedPrompt]
    held_prompts: list[EncodedPrompt]
    train: list[EncodedPair] = field(default_factory=list)
    held: list[EncodedPair] = field(default_factory=list)
    statistics: dict[str, Any] = field(default_factory=dict)


def _read_data(recipe: Recipe, data: DataSettings, source: Source, tokenizer: Tokenizer) -> _Read:
    """The user's own pairs."""
    train_rows, held_rows = _read_parts(data, recipe.seed)
    train, held, statistics = _encode_parts(data, source, tokenizer, train_rows, held_rows)
    conversational = bool(tokenizer.chat_template) and train_rows.format == "conversational"
    _check_rewards(recipe, conversational, train)
    prompts: list[EncodedPrompt] = []
    if _draws_responses(recipe):
        prompts = _prompts_to_answer(data, tokenizer, train, train_rows.format)
        if shared := {tuple(pair.prompt) for pair in held} & {tuple(one.prompt) for one in prompts}:
            logger.warning("%d held-out prompts are answered in training too: held out they are not", len(shared))
        statistics["prompts to answer"] = len(prompts)
    held_prompts = prompts_of(held)[: recipe.evaluation.prompts]
    return _Read(conversational, prompts, held_prompts, train, held, statistics)


def _read_target(recipe: Recipe, settings: TargetSettings, tokenizer: Tokenizer) -> _Read:
    """The prompts of a known target's pairs."""
    conversational = bool(tokenizer.chat_template)
    _check_rewards(recipe, conversational)
    train_rows, held_rows = target_prompts(settings, tokenizer)
    train, held = (
        [EncodedPrompt(encode_prompt(tokenizer, row), row.where, row) for row in rows]
        for rows in (train_rows, held_rows[: recipe.evaluation.prompts])
    )
    return _Read(conversational, train, held)


def _draw_pairs(setup: Setup, settings: TargetSettings, target: Target, measured: bool) -> None:
    """Make the pairs that a known target labels; the target is what the distance is measured to."""
    started = time.monotonic()

    def draw(label: str, prompts: Sequence[list[int]], n: int, seed: int) -> TargetPairs:
        with progress(f"draw and label {label} pairs", 3 * n) as advance:
            return make_pairs(
                target,
                setup.base,
                setup.tokenizer,
                prompts,
                n=n,
                gamma=settings.gamma,
                strengths=settings.strengths,
                temperature=settings.temperature,
                max_new_tokens=settings.max_new_tokens,
                token_budget=setup.recipe.forward_budget,
                seed=seed,
                progress=advance,
            )

    train = draw("training", [one.prompt for one in setup.prompts], settings.pairs, 2 * setup.seed)
    information = train.information(settings.gamma)
    if information == 0:
        raise InputError(
            "target: the labels hold no information about it: it is the model itself, or no label is in doubt; give a "
            "target other than the model (of words, a bonus other than 0), or lower target.gamma"
        )
    held = draw("held-out", setup.task.prompts, settings.eval_pairs, 2 * setup.seed + 1)
    if measured:
        _check_held_out(len(setup.task.prompts), len(held.pairs))
    setup.train, setup.held = train.pairs, held.pairs
    setup.statistics = {
        "train": len(train.pairs),
        "held_out": len(held.pairs),
        "median_logit": float(train.logit.abs().median()),
        "information_per_pair": information,
        "strength_se": 1 / math.sqrt(len(train.pairs) * information),
        "ties_redrawn": train.ties + held.ties,
        "ties_dropped": train.dropped + held.dropped,
    }
    setup.reference_cache = {
        pair.key: logps for part in (train, held) for pair, logps in zip(part.pairs, part.reference_logps, strict=True)
    }
    model = target.model(setup.base, setup.tokenizer)
    task = replace(setup.task, pairs=held.pairs, gamma=settings.gamma, target=model, target_logit=held.logit)
    setup.task = replace(task, target_groups=target_responses(model, task)) if measured else task
    setup.seconds["pairs"] = time.monotonic() - started


# What is refused before weights are loaded ----------------------------------------------------------------------------


def _check(recipe: Recipe, source: Source, read: _Read, measured: bool) -> None:
    """Raise InputError for prompts that cannot be used; `measured`: policies are measured on the held-out ones."""
    prompts, held = ([one.prompt for one in part] for part in (read.prompts, read.held_prompts))
    check_token_ids(source.name, source.config(), [*prompts, *held])
    check_room = partial(check_positions, source.name, source.config())
    if recipe.target is not None:
        check_room([*prompts, *held], recipe.target.max_new_tokens, "target.max_new_tokens")
    if _draws_responses(recipe):
        check_room(prompts, _longest_rollout(recipe), "rollout.max_completion_length")
    if measured:
        _check_held_out(len(held), len(read.held) if recipe.target is None else recipe.target.eval_pairs)
        check_room(held, recipe.evaluation.max_new_tokens, "evaluation.max_new_tokens")


def _check_rewards(recipe: Recipe, conversational: bool, pairs: Sequence[EncodedPair] = ()) -> None:
    rewarded = {name: needs for name in recipe.methods if (needs := recipe.method(name).needs).reward}
    if rewarded:
        known, gamma = recipe.target is not None, recipe.has_gamma
        check_rewards(recipe.reward, conversational=conversational, target=known, gamma=gamma, pairs=not known)
    if any(part.columns for part in recipe.reward):
        for name, needs in rewarded.items():
            check_columns(name, needs, pairs)
    if any(part.function for part in recipe.reward):
        for name, needs in rewarded.items():
            warn_of_columns(name, needs, pairs)


def _check_held_out(prompts: int, pairs: int) -> None:
    """Raise InputError if there is too little to measure policies on."""
    if min(prompts, pairs) < 2:
        raise InputError(
            f"a comparison is measured on {prompts} held-out prompts and {pairs} pairs; standard errors need two of "
            "each: give more prompts, data.eval or a larger data.held_out, evaluation.prompts or target.eval_pairs"
        )


def _draws_responses(recipe: Recipe) -> bool:
    return any(draws_responses(recipe.method(name)) for name in recipe.methods)


def _longest_rollout(recipe: Recipe) -> int:
    return max(recipe.rollout_for(name).max_completion_length for name in recipe.methods)


def _load(source: Source, recipe: Recipe) -> PreTrainedModel:
    use_cpu = bool(recipe.training.get("use_cpu", False))
    device = AlignmentConfig(output_dir="unused", use_cpu=use_cpu).device
    return source.model(recipe.dtype, device).requires_grad_(False)


# The user's data ------------------------------------------------------------------------------------------------------


def _read_parts(settings: DataSettings, seed: int) -> tuple[Data[Pair], Data[Pair]]:
    """The rows to learn from and the held-out ones."""
    rows = read_pairs(settings.train, split=settings.split, drop_ties=settings.drop_ties, limit=settings.limit)
    if settings.eval is not None:
        split, limit = settings.eval_split, settings.eval_limit
        return rows, read_pairs(settings.eval, split=split, drop_ties=settings.drop_ties, limit=limit)
    if not settings.held_out:
        return rows, Data([], rows.source, rows.format)
    train, held = split_by_prompt(rows, settings.held_out, seed)
    return train, replace(held, rows=held.rows[: settings.eval_limit])


def _encode_parts(
    settings: DataSettings,
    source: Source,
    tokenizer: Tokenizer,
    train: Data[Pair],
    held: Data[Pair],
) -> tuple[list[EncodedPair], list[EncodedPair], dict[str, Any]]:
    """Both parts as ids, and their statistics."""
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
    check_token_ids(
        source.name,
        source.config(),
        (ids for pair in [*pairs, *held_pairs] for ids in (pair.prompt, pair.chosen, pair.rejected)),
    )
    shared = {prompt_key(row.prompt) for row in train} & {prompt_key(row.prompt) for row in held}
    if shared:
        logger.warning("%d prompts of %s are in %s too: held out they are not", len(shared), held.source, train.source)
    if ties := train.ties + held.ties:
        logger.info("data: %d ties are left out (drop_ties)", ties)
    statistics = {
        "source": settings.train,
        "prompts in both parts": len(shared),
        "format": train.format,
        "train": len(pairs),
        "held_out": len(held_pairs),
        "ties dropped": train.ties,
        "encoding": str(counts),
    }
    if held_counts is not None:
        statistics["held-out encoding"] = str(held_counts)
    return pairs, held_pairs, statistics


def _prompts_to_answer(
    settings: DataSettings, tokenizer: Tokenizer, train: Sequence[EncodedPair], form: str
) -> list[EncodedPrompt]:
    """The prompts of the training pairs, each once, and those of `data.prompts`: rows with other columns apart."""
    prompts: dict[object, EncodedPrompt] = {tuple(one.prompt): one for one in prompts_of(train)}
    if settings.prompts is not None:
        data = read_prompts(settings.prompts)
        if data.format != form:
            raise InputError(
                f"data.prompts {settings.prompts} holds {data.format} prompts and the pairs are {form}; "
                "write both as strings or both as messages"
            )
        for row in data:
            one = EncodedPrompt(encode_prompt(tokenizer, row), row.where, row)
            prompts.setdefault(one.question if row.extra else tuple(one.prompt), one)
    return list(prompts.values())
