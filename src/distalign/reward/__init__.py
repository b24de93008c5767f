"""Rewards: a known target's, a model's, a Python function's, or one trained on the pairs (`docs/rewards.md`)."""

from __future__ import annotations

from distalign.reward.base import Request, Reward, RewardError, WeightedSum
from distalign.reward.exact import ExactReward
from distalign.reward.function import FunctionReward
from distalign.reward.judge import JudgeReward
from distalign.reward.make import check_rewards, make_reward
from distalign.reward.saved import load_reward
from distalign.reward.trained import TrainedReward
from distalign.reward.training import Trained, train_reward

__all__ = [
    "ExactReward",
    "FunctionReward",
    "JudgeReward",
    "Request",
    "Reward",
    "RewardError",
    "Trained",
    "TrainedReward",
    "WeightedSum",
    "check_rewards",
    "load_reward",
    "make_reward",
    "train_reward",
]
