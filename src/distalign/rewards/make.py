"""From the recipe's `reward` to a reward: what can be refused without weights is refused first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distalign.rewards.base import ExactReward, Reward, RewardError, WeightedSum
from distalign.rewards.classifier import ClassifierReward, find_classifier
from distalign.rewards.function import FunctionReward, find_function
from distalign.rewards.reward_model import RewardTraining, is_reward_model, load_reward
from distalign.settings import Count, Positive, Section, several, switch

_NO_TARGET = "reward.exact: only a known target has an exact reward; add target, or train a reward"


class RewardSettings(Section):
    """Where rewards come from: one of a trained model, `train` one on the pairs, a Python function, or a known target.

    model: a folder or hub id of AutoModelForSequenceClassification with one label, or what `distalign reward` wrote.
    function: `file.py:name` or `module:name`. exact: γ ln π* of the recipe's target. Several rewards are summed with
    their `weight`. `timeout` bounds one call of a function, in seconds.
    """

    model: str | None = None
    train: Annotated[
        RewardTraining | None, BeforeValidator(switch, json_schema_input_type=RewardTraining | bool | None)
    ] = None
    function: str | None = None
    exact: bool = False
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    max_length: Count | None = None
    timeout: Positive = 60.0

    @model_validator(mode="after")
    def _one_kind(self) -> RewardSettings:
        if len(self.kinds) != 1:
            raise ValueError(f"reward names {len(self.kinds)} of model, train, function and exact; give one each")
        if self.max_length is not None and self.model is None:
            raise ValueError(
                "reward.max_length is the length that a reward classifier reads; only model has one: leave it out"
            )
        return self

    @property
    def kinds(self) -> list[str]:
        """Which of model, train, function and exact are given."""
        return [name for name in ("model", "train", "function", "exact") if getattr(self, name) not in (None, False)]


# As settings have them: one of them, or a list.
Rewards = Annotated[
    tuple[RewardSettings, ...],
    BeforeValidator(several, json_schema_input_type=RewardSettings | list[RewardSettings] | None),
]


def check_rewards(
    settings: Sequence[RewardSettings], *, conversational: bool, target: bool = False, gamma: float | None = None
) -> None:
    """Refuse what cannot work before any weights are loaded. Raises RewardError.

    `conversational` says whether the rows are chats, `target` whether the recipe has a known one, and `gamma` is its
    sharpness (None without).
    """
    if not settings:
        raise RewardError("reward: none is given; name a model, a function, exact: true, or train: true")
    if sum(part.train is not None for part in settings) > 1:
        raise RewardError("reward: two rewards are to be trained on the same pairs; train one")
    for part in settings:
        if part.model is not None and not is_reward_model(part.model):
            source = find_classifier(part.model, max_length=part.max_length)
            if conversational:
                source.require_template()
        if part.train is not None and part.train.init == "policy" and part.train.gamma is None and gamma is None:
            raise RewardError("reward.train: init is policy, which needs gamma; set reward.train.gamma")
        if part.function is not None:
            find_function(part.function)
        if part.exact and not target:
            raise RewardError(_NO_TARGET)


def make_reward(
    settings: Sequence[RewardSettings],
    *,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    token_budget: int,
    target: nn.Module | None = None,
    gamma: float | None = None,
    trained: Reward | None = None,
) -> Reward:
    """The reward that the settings describe; several are summed with their weights.

    `base` (frozen) and `tokenizer` are the policy's; every model of a reward is put on the device of `base`, in its
    dtype. `target` and `gamma` are the known target and its sharpness; `trained` is `train_reward(...).reward`.
    Raises RewardError.
    """

    def make(part: RewardSettings) -> Reward:
        if part.function is not None:
            return FunctionReward(part.function, tokenizer, timeout=part.timeout)
        if part.exact:
            if target is None or gamma is None:
                raise RewardError(_NO_TARGET)
            return ExactReward(target, gamma=gamma, token_budget=token_budget)
        if part.model is None:
            if trained is None:
                raise RewardError(
                    "reward.train: no reward was trained; run distalign reward, or name its folder as model"
                )
            return trained
        if is_reward_model(part.model):
            return load_reward(part.model, base=base, tokenizer=tokenizer, token_budget=token_budget)
        source = find_classifier(part.model, max_length=part.max_length)
        model: Any = source.load(base.dtype)  # transformers declares .to too loosely
        return ClassifierReward(source, model.to(base.device), tokenizer, token_budget=token_budget)

    rewards = [make(part) for part in settings]
    if len(rewards) == 1 and settings[0].weight == 1:
        return rewards[0]
    kinds = [part.kinds[0] for part in settings]
    names = [kind if kinds.count(kind) == 1 else f"{kind}_{i}" for i, kind in enumerate(kinds)]
    weights = [float(part.weight) for part in settings]
    return WeightedSum(list(zip(names, weights, rewards, strict=True)))
