"""What a caller gives as `reward_funcs`, checked before a model is loaded, and made into one reward."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import FunctionType
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distalign.methods import Method
from distalign.models.load import Source, weights_digest
from distalign.rewards import (
    ClassifierReward,
    ColumnReward,
    FunctionReward,
    Reward,
    RewardError,
    RewardSettings,
    RewardTraining,
    Trained,
    WeightedSum,
    check_columns,
    check_rewards,
    make_reward,
    train_reward,
    warn_of_columns,
)
from distalign.rewards.classifier import find_classifier
from distalign.rewards.reward_model import is_reward_model
from distalign.training.checkpoint import lasting, model_digest
from distalign.training.config import AlignmentConfig
from distalign.training.rows import Rows

# A TRL-like reward function, a name (classifier, trained reward's folder), a model, settings to train one, or our own.
RewardFunc = Callable[..., Any] | str | PreTrainedModel | RewardTraining | Reward


def reward_list(reward_funcs: RewardFunc | Sequence[RewardFunc] | None) -> list[RewardFunc]:
    """The rewards as a list. Raises RewardError for what cannot be one."""
    if reward_funcs is None:
        return []
    given: list[Any] = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    for reward in given:
        if isinstance(reward, type) or not (isinstance(reward, str | Path | RewardTraining) or callable(reward)):
            raise RewardError(
                f"reward_funcs has {reward!r}; give functions, names or models of classifiers, folders of trained "
                "rewards, RewardTraining(…) or ColumnReward(…)"
            )
        if isinstance(reward, nn.Module) and not isinstance(reward, PreTrainedModel | Reward):
            raise RewardError(
                f"reward_funcs has a {type(reward).__name__}, which is no model of transformers; of a classifier with "
                "an adapter give the folder, or merge_and_unload()"
            )
        if isinstance(reward, PreTrainedModel) and not reward.name_or_path:
            raise RewardError(
                f"reward_funcs has a {type(reward).__name__} of no folder, whose tokenizer is not known; save both by "
                "save_pretrained, and give the folder"
            )
    return [str(reward) if isinstance(reward, Path) else reward for reward in given]


def check_reward_funcs(
    label: str, method: Method, rewards: Iterable[RewardFunc], rows: Rows, args: AlignmentConfig
) -> None:
    """Raise RewardError for rewards that cannot work, before a model is loaded."""
    rewards = list(rewards)
    weights = args.reward_weights
    if weights is not None and len(weights) != len(rewards):
        raise RewardError(
            f"reward_weights has {len(weights)} numbers for {len(rewards)} reward_funcs; give one for each"
        )
    settings = [named for reward in rewards if (named := _named(reward)) is not None]
    if settings:
        check_rewards(settings, conversational=rows.conversational)
    functions = any(callable(reward) and not isinstance(reward, Reward | PreTrainedModel) for reward in rewards)
    if functions or any(one.function for one in settings):
        warn_of_columns(label, method.needs, rows.pairs)
    if any(isinstance(reward, ColumnReward) for reward in rewards):
        check_columns(label, method.needs, rows.pairs)
    trained = [reward for reward in rewards if isinstance(reward, RewardTraining)]
    if args.model_settings.get("quantization_config") is not None:
        for reward in trained:
            reward.check_4bit()
    if trained:
        if not rows.pairs:
            raise RewardError("reward_funcs: a reward is trained on pairs, and train_dataset has prompts alone")
        if len(rows.first_held_out) < 2:
            raise RewardError("reward_funcs: training a reward stops by held-out pairs; pass them as eval_dataset")
        folder = Path(str(args.output_dir)) / "reward"
        if folder.exists() and not is_reward_model(str(folder)):
            raise RewardError(
                f"{folder}: the reward that is trained is saved there, and what is there is none; move it, or give "
                "another output_dir"
            )


def reward_name(reward: RewardFunc) -> str:
    """What another process knows a reward by: a name, our settings, or a digest of weights or another object's text."""
    if isinstance(reward, PreTrainedModel):
        return model_digest(reward)
    if isinstance(reward, str):
        place = os.path.expanduser(reward)
        return weights_digest(Source(reward, place, "a folder")) if os.path.isdir(place) else reward
    if isinstance(reward, FunctionType):
        return f"{reward.__module__} {reward.__qualname__}"
    if isinstance(reward, ColumnReward | RewardTraining):
        return f"{type(reward).__name__} {vars(reward)}"
    # It may hold a secret.
    return hashlib.sha256(f"{type(reward)} {lasting(reward)}".encode()).hexdigest()


def needs_base(rewards: Iterable[RewardFunc]) -> bool:
    """Whether a reward reads the model that the policy starts from."""
    return any(
        isinstance(reward, RewardTraining) or (isinstance(reward, str) and is_reward_model(reward))
        for reward in rewards
    )


def _named(reward: RewardFunc) -> RewardSettings | None:
    if isinstance(reward, str):
        return (
            RewardSettings(function=reward)
            if ":" in reward and not os.path.exists(reward)
            else RewardSettings(model=reward)
        )
    return RewardSettings(train=reward) if isinstance(reward, RewardTraining) else None


def load_rewards(
    rewards: Sequence[RewardFunc],
    rows: Rows,
    base: Any,
    tokenizer: PreTrainedTokenizerBase,
    source: Source,
    args: AlignmentConfig,
    *,
    token_budget: int,
) -> tuple[Reward | None, list[Trained]]:
    """One reward of all that were given, summed with their weights (None of none); and what was trained for it.

    `base` is the model that the policy starts from, found at `source`. Raises RewardError.
    """
    all_trained: list[Trained] = []

    def load(reward: RewardFunc) -> Reward:
        if isinstance(reward, Reward):
            return reward
        if isinstance(reward, PreTrainedModel):
            named = find_classifier(str(reward.name_or_path))
            return ClassifierReward(named, reward, tokenizer, token_budget=token_budget)
        settings = _named(reward)
        if settings is None:
            assert callable(reward)
            return FunctionReward(reward, tokenizer, timeout=args.reward_timeout)
        trained = None
        if settings.train is not None:
            made = train_reward(
                settings.train, base, tokenizer, source, rows.pairs, rows.first_held_out,
                gamma=None, token_budget=token_budget, seed=args.seed,
            )  # fmt: skip
            all_trained.append(made)
            trained = made.reward
        return make_reward([settings], base=base, tokenizer=tokenizer, token_budget=token_budget, trained=trained)

    if not rewards:
        return None, []
    loaded = [load(reward) for reward in rewards]
    weights = args.reward_weights or [1.0] * len(loaded)
    if len(loaded) == 1 and weights[0] == 1:
        return loaded[0], all_trained
    return WeightedSum(list(zip(weights, loaded, strict=True))), all_trained
