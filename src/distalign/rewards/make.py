"""From the recipe's `reward` to a reward: what can be refused without weights is refused first."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distalign.data import EncodedPair
from distalign.methods import Needs
from distalign.rewards.base import ColumnReward, ExactReward, Reward, RewardError, WeightedSum, column_rewards
from distalign.rewards.classifier import ClassifierReward, find_classifier
from distalign.rewards.function import FunctionReward, find_function
from distalign.rewards.reward_model import RewardTraining, is_reward_model, load_reward
from distalign.settings import Count, Positive, Section, several, switch

logger = logging.getLogger("distalign.rewards.make")

_NO_TARGET = "reward.exact: only a known target has an exact reward; add target, or take another reward"

_KINDS = ("model", "train", "function", "exact", "columns")


class RewardSettings(Section):
    """Where rewards come from: a trained model, `train` one on the pairs, a function, a known target, or columns.

    model: a folder or hub id of AutoModelForSequenceClassification with one label, or what `distalign reward` wrote.
    function: `file.py:name` or `module:name`. exact: γ ln π* of the recipe's target. columns: chosen_reward and
    rejected_reward of the data's pairs, `scale` nats for each unit of them. Several rewards are summed with their
    `weight`. `timeout` bounds one call of a function, in seconds.
    """

    model: str | None = None
    train: Annotated[RewardTraining | None, BeforeValidator(switch)] = None
    function: str | None = None
    exact: bool = False
    columns: bool = False
    scale: Positive | None = None
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    max_length: Count | None = None
    timeout: Positive = 60.0

    @model_validator(mode="after")
    def _one_kind(self) -> RewardSettings:
        if len(self.kinds) != 1:
            raise ValueError(f"reward names {len(self.kinds)} of {', '.join(_KINDS)}; give one each")
        if self.columns and self.scale is None:
            raise ValueError(
                "reward.columns has no scale; add scale, the nats that one unit of chosen_reward and rejected_reward "
                "is worth: a difference of R is the log-odds of a preference, which a judge's 1 to 10 is not"
            )
        if self.scale is not None and not self.columns:
            raise ValueError("reward.scale is for columns; other rewards have weight")
        if self.max_length is not None and self.model is None:
            raise ValueError(
                "reward.max_length is the length that a reward classifier reads; only model has one: leave it out"
            )
        return self

    @property
    def kinds(self) -> list[str]:
        """Which kinds are given."""
        return [name for name in _KINDS if getattr(self, name) not in (None, False)]


def _settings(value: object) -> object:
    if isinstance(value, str):
        raise ValueError(f"reward is the text {value!r}; write {{function: FILE.py:NAME}} or {{model: ID}}")
    return several(value)


# As settings have them: one of them, or a list.
Rewards = Annotated[tuple[RewardSettings, ...], BeforeValidator(_settings)]


def check_rewards(
    settings: Sequence[RewardSettings],
    *,
    conversational: bool,
    target: bool = False,
    gamma: bool = False,
    pairs: bool = False,
) -> None:
    """Refuse what cannot work before any weights are loaded. Raises RewardError.

    `conversational` says whether the rows are chats, `target` whether the recipe has a known one, and `gamma` whether a
    reward without a γ of its own is given one. `pairs` says that rewards are of the data's pairs alone.
    """
    if not settings:
        raise RewardError("reward: none is given; name a model, a function, exact: true, or train: true")
    if not pairs and any(part.columns for part in settings):
        raise RewardError("reward.columns: only the data's pairs have them; take another reward for other responses")
    if sum(part.train is not None for part in settings) > 1:
        raise RewardError("reward: two rewards are to be trained on the same pairs; train one")
    for part in settings:
        if part.model is not None and not is_reward_model(part.model):
            source = find_classifier(part.model, max_length=part.max_length)
            if conversational:
                source.require_template()
        if not gamma and _lacks_gamma(part):
            raise RewardError("reward.train: init is policy, which needs gamma; set reward.train.gamma")
        if part.function is not None:
            find_function(part.function)
        if part.exact and not target:
            raise RewardError(_NO_TARGET)


def _lacks_gamma(part: RewardSettings) -> bool:
    """Whether it is trained as γ ln π₀ and a correction, and names no γ."""
    return part.train is not None and part.train.init == "policy" and part.train.gamma is None


def follow_gamma(part: RewardSettings, gamma: float) -> RewardSettings:
    """The settings with this γ, if they lack one."""
    if part.train is None or not _lacks_gamma(part):
        return part
    return part.model_copy(update={"train": part.train.model_copy(update={"gamma": gamma})})


def check_columns(label: str, needs: Needs, pairs: Sequence[EncodedPair]) -> None:
    """Refuse rewards from columns for a method that needs others, or if a pair has none. Raises RewardError."""
    if needs.pairs != "labelled":
        raise RewardError(
            f"reward: {label} needs rewards of drawn responses, and the columns have those of the data's pairs alone; "
            "take a method that reads these (PD with pairs: data), or another reward"
        )
    missing = [pair.where for pair in pairs if column_rewards(pair.row) is None]
    if missing:
        raise RewardError(
            f"reward: {missing[0]} has no chosen_reward and rejected_reward, as {len(missing)} of {len(pairs)} pairs; "
            "add the columns, or take another reward"
        )


def warn_of_columns(label: str, needs: Needs, pairs: Sequence[EncodedPair]) -> None:
    """Say how many pairs have columns that a reward function will not see: a prompt is answered once, as one row."""
    if needs.pairs in ("labelled", "labelled+sampled"):
        return
    kept = {tuple(pair.prompt): pair.row.extra for pair in pairs if pair.row is not None}
    lost = sum(pair.row is not None and pair.row.extra != kept[tuple(pair.prompt)] for pair in pairs)
    if lost:
        logger.warning(
            "%s: %d pairs have the prompt of another and other columns, of which a reward function sees the last row's "
            "alone; give rows of prompt and columns without chosen and rejected to keep each", label, lost,
        )  # fmt: skip


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
        if part.scale is not None:
            return ColumnReward(part.scale)
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
    return WeightedSum(list(zip([part.weight for part in settings], rewards, strict=True)))
