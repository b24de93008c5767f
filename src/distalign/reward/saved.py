"""Trained rewards in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distalign.reward.base import Reward, RewardError

# The file by which a folder of ours is known.
MARK = "reward.json"


def load_reward(folder: str | Path, *, base: Any, tokenizer: Any, token_budget: int = 2048) -> Reward:
    """The reward that `Trained.save` wrote."""
    raise RewardError(f"{folder}: rewards trained here cannot be read yet")
