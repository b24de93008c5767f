"""Rewards: a known target's, a model's, a Python function's, or one trained on the pairs (`docs/rewards.md`)."""

from __future__ import annotations

from distalign.rewards.base import ColumnReward, ExactReward, Request, Reward, RewardError, WeightedSum
from distalign.rewards.classifier import ClassifierReward
from distalign.rewards.fit import train_reward
from distalign.rewards.function import FunctionReward
from distalign.rewards.make import (
    Rewards,
    RewardSettings,
    check_columns,
    check_rewards,
    follow_gamma,
    make_reward,
    warn_of_columns,
)
from distalign.rewards.reward_model import RewardTraining, Trained, TrainedReward, UnreadableReward, load_reward

__all__ = [
    "ClassifierReward",
    "ColumnReward",
    "ExactReward",
    "FunctionReward",
    "Request",
    "Reward",
    "RewardError",
    "RewardSettings",
    "RewardTraining",
    "Rewards",
    "Trained",
    "TrainedReward",
    "UnreadableReward",
    "WeightedSum",
    "check_columns",
    "check_rewards",
    "follow_gamma",
    "load_reward",
    "make_reward",
    "train_reward",
    "warn_of_columns",
]
