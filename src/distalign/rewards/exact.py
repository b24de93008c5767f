"""The reward that a language model stands for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from distalign.engine import score_in_batches
from distalign.methods.preference import induced_reward
from distalign.rewards.base import Request, constants


class ExactReward:
    """R(x, a) = γ ln π*(a|x), in nats: the reward of a known target, without error (eq. 8)."""

    def __init__(self, target: Any, *, gamma: float, token_budget: int) -> None:
        self.target, self.gamma, self.token_budget = target, gamma, token_budget
        self.responses = 0

    def __call__(self, requests: Sequence[Request]) -> Float[Tensor, "responses"]:
        """γ times the target's sequence log-probabilities."""
        scores = score_in_batches(self.target, [r.group for r in requests], token_budget=self.token_budget)
        self.responses += len(scores.mask)
        return constants(induced_reward(scores.logps, gamma=self.gamma), "exact")

    def facts(self) -> dict[str, float]:
        """Responses rewarded."""
        return {"responses": float(self.responses)}
