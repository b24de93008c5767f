"""From the recipe's `reward` to a reward: each kind checks what it can without weights, and is made with them.

`RewardSettings` holds the settings.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, model_validator

from distalign.rewards.base import Reward, RewardError, WeightedSum
from distalign.rewards.classifier import JudgeReward, find_judge
from distalign.rewards.exact import ExactReward
from distalign.rewards.fit import RewardTraining
from distalign.rewards.function import FunctionReward, find_function
from distalign.rewards.saved import MARK, load_reward
from distalign.settings import Count, Positive, Section, switch


class RewardSettings(Section):
    """Where rewards come from: one of a trained model, `train` one on the pairs, a Python function, or a known target.

    model: a folder or hub id of AutoModelForSequenceClassification with one label, or what `distalign reward` wrote.
    function: `file.py:name` or `module:name`. exact: γ ln π* of the recipe's target. Several rewards are summed with
    their `weight`. `timeout` bounds one call of a function, in seconds.
    """

    model: str | None = None
    train: Annotated[RewardTraining | None, BeforeValidator(switch)] = None
    function: str | None = None
    exact: bool = False
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    max_length: Count | None = None
    timeout: Positive = 60.0

    @model_validator(mode="after")
    def _one_kind(self) -> RewardSettings:
        given = [self.model is not None, self.train is not None, self.function is not None, self.exact]
        if sum(given) != 1:
            raise ValueError(f"reward names {sum(given)} of model, train, function and exact; give one each")
        if self.max_length is not None and self.model is None:
            raise ValueError("reward.max_length is the length that a judge reads; only model has one: leave it out")
        return self


@dataclass(frozen=True)
class Parts:
    """What rewards may be made of: the frozen base model and its tokenizer, a known target and its γ, and a reward that
    was trained on the pairs."""

    base: Any
    tokenizer: Any
    token_budget: int
    target: Any = None
    gamma: float | None = None
    trained: Reward | None = None


class Kind(ABC):
    """One kind of reward. `field` is the setting that asks for it."""

    field: ClassVar[str]

    @abstractmethod
    def check(self, settings: Any, *, conversational: bool, target: bool, gamma: float | None) -> None:
        """Raise RewardError for what can be refused before any weights are loaded."""

    @abstractmethod
    def make(self, settings: Any, parts: Parts) -> Reward:
        """The reward. Raises RewardError."""


class ModelKind(Kind):
    """A folder or hub id of a judge, or a folder that `Trained.save` wrote."""

    field = "model"

    def check(self, settings: Any, *, conversational: bool, target: bool, gamma: float | None) -> None:
        """The folder holds a model with one label, and a template if the rows are chats."""
        if _ours(settings.model):
            return
        judge = find_judge(settings.model, max_length=settings.max_length)
        if conversational and not judge.tokenizer.chat_template:
            raise RewardError(
                f"reward model {judge.name}: the rows are chats and its tokenizer has no chat template; add "
                "chat_template to its folder, or give strings"
            )

    def make(self, settings: Any, parts: Parts) -> Reward:
        """Our own trained reward on the policy's ids, any other on text."""
        base = parts.base
        if _ours(settings.model):
            return load_reward(settings.model, base=base, tokenizer=parts.tokenizer, token_budget=parts.token_budget)
        judge = find_judge(settings.model, max_length=settings.max_length)
        return JudgeReward(
            judge, parts.tokenizer, token_budget=parts.token_budget, device=base.device, dtype=base.dtype
        )


class TrainKind(Kind):
    """A reward trained on the recipe's pairs before the policy is."""

    field = "train"

    def check(self, settings: Any, *, conversational: bool, target: bool, gamma: float | None) -> None:
        """init: policy needs the sharpness of the labels."""
        if settings.train.init == "policy" and settings.train.gamma is None and gamma is None:
            raise RewardError("reward.train: init is policy, which needs gamma; set reward.train.gamma")

    def make(self, settings: Any, parts: Parts) -> Reward:
        """The one that `train_reward` gave."""
        if parts.trained is None:
            raise RewardError("reward.train: no reward was trained; run distalign reward, or name its folder as model")
        return parts.trained


class FunctionKind(Kind):
    """A Python function."""

    field = "function"

    def check(self, settings: Any, *, conversational: bool, target: bool, gamma: float | None) -> None:
        """It can be imported and takes what it will be given."""
        find_function(settings.function)

    def make(self, settings: Any, parts: Parts) -> Reward:
        """The function, called with a timeout."""
        return FunctionReward(settings.function, parts.tokenizer, timeout=settings.timeout)


class ExactKind(Kind):
    """The recipe's known target."""

    field = "exact"

    def check(self, settings: Any, *, conversational: bool, target: bool, gamma: float | None) -> None:
        """There is one."""
        if not target:
            raise RewardError("reward.exact: only a known target has an exact reward; add target, or train a reward")

    def make(self, settings: Any, parts: Parts) -> Reward:
        """γ ln π*."""
        if parts.target is None or parts.gamma is None:
            raise RewardError("reward.exact: only a known target has an exact reward; add target, or train a reward")
        return ExactReward(parts.target, gamma=parts.gamma, token_budget=parts.token_budget)


KINDS: dict[str, Kind] = {kind.field: kind for kind in (ModelKind(), TrainKind(), FunctionKind(), ExactKind())}


def check_rewards(
    settings: Sequence[Any], *, conversational: bool, target: bool = False, gamma: float | None = None
) -> None:
    """Refuse what cannot work before any weights are loaded. Raises RewardError.

    `conversational` says whether the rows are chats, `target` whether the recipe has a known one, and `gamma` is its
    sharpness (None without).
    """
    if not settings:
        raise RewardError("reward: none is given; name a model, a function, exact: true, or train: true")
    if sum(_field(one) == TrainKind.field for one in settings) > 1:
        raise RewardError("reward: two rewards are to be trained on the same pairs; train one")
    for one in settings:
        KINDS[_field(one)].check(one, conversational=conversational, target=target, gamma=gamma)


def make_reward(
    settings: Sequence[Any],
    *,
    base: Any,
    tokenizer: Any,
    token_budget: int,
    target: Any = None,
    gamma: float | None = None,
    trained: Reward | None = None,
) -> Reward:
    """The reward that the settings describe; several are summed with their weights.

    `base` (frozen) and `tokenizer` are the policy's; every model of a reward is put on the device of `base`, in its
    dtype. `target` and `gamma` are the known target and its sharpness; `trained` is `train_reward(...).reward`.
    Raises RewardError.
    """
    parts = Parts(base, tokenizer, token_budget, target, gamma, trained)
    rewards = [KINDS[_field(one)].make(one, parts) for one in settings]
    if len(rewards) == 1 and settings[0].weight == 1:
        return rewards[0]
    fields = [_field(one) for one in settings]
    names = [field if fields.count(field) == 1 else f"{field}_{i}" for i, field in enumerate(fields)]
    return WeightedSum([(name, float(one.weight), r) for name, one, r in zip(names, settings, rewards, strict=True)])


def _field(settings: Any) -> str:
    """Which kind the settings ask for; they name exactly one."""
    return next(name for name in KINDS if getattr(settings, name) not in (None, False))


def _ours(model: str) -> bool:
    return (Path(model).expanduser() / MARK).is_file()
