"""Rewards: a known target's, a model's, a Python function's, or one trained on the pairs (`docs/rewards.md`)."""

from __future__ import annotations

from distalign.rewards.base import Request, Reward, RewardError, WeightedSum
from distalign.rewards.classifier import JudgeReward
from distalign.rewards.exact import ExactReward
from distalign.rewards.fit import RewardTraining, Trained, train_reward
from distalign.rewards.function import FunctionReward
from distalign.rewards.make import RewardSettings, check_rewards, make_reward
from distalign.rewards.reward_model import TrainedReward
from distalign.rewards.saved import load_reward

__all__ = [
    "ExactReward",
    "FunctionReward",
    "JudgeReward",
    "Request",
    "Reward",
    "RewardError",
    "RewardSettings",
    "RewardTraining",
    "Trained",
    "TrainedReward",
    "WeightedSum",
    "check_rewards",
    "load_reward",
    "make_reward",
    "train_reward",
]
