"""The reward of a response that was cut before its end."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor


def apply_missing_end(
    rewards: Float[Tensor, "responses"],
    ended: Bool[Tensor, "responses"],
    rule: Literal["none", "penalty", "replace"],
    value: float,
) -> Float[Tensor, "responses"]:
    """Rewards with the missing-end rule: `value` is added (penalty) or taken instead (replace) where `ended` is False.

    In the unit of the rewards; what is given stays as it is. REBEL's own experiments replace by −1. Raises ValueError
    for another rule.
    """
    if rule == "none":
        return rewards
    if rule == "penalty":
        return rewards.where(ended, rewards + value)
    if rule == "replace":
        return rewards.where(ended, rewards.new_tensor(value))
    raise ValueError(f"the rule of missing_end is {rule!r}; take none, penalty or replace")
