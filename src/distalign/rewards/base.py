"""What a reward is: requests in the policy's token ids go in, one number per response comes out."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from distalign.data import Pair, Prompt, Text, decode_after
from distalign.engine import Group, score_in_batches
from distalign.errors import InputError
from distalign.methods.preference import induced_reward


class RewardError(InputError):
    """A reward that cannot be made or gave no number: says which, what was found, and what to do."""


@dataclass(frozen=True)
class Request:
    """One prompt and the responses to be rewarded, as ids of the POLICY's tokenizer.

    `row` is what the prompt was made of: rewards that read text take it from there, and functions its other columns.
    Without it the ids are decoded. Raises ValueError for an empty prompt, no responses, or an empty one.
    """

    prompt: list[int]
    responses: list[list[int]]
    row: Prompt | Pair | None = None

    def __post_init__(self) -> None:
        if not self.prompt or not self.responses or not all(self.responses):
            raise ValueError("a reward is asked for an empty prompt or response, or for none; leave it out")

    @property
    def group(self) -> Group:
        """The same ids as the engine takes them."""
        return Group(self.prompt, self.responses)


class Reward(ABC):
    """R(x, a), in nats where it stands for a preference model; defined up to a constant per prompt."""

    @abstractmethod
    def __call__(self, requests: Sequence[Request]) -> Float[Tensor, "responses"]:
        """Rewards of all responses in order: request by request, float32, on the CPU, constants. Raises RewardError."""


@dataclass(frozen=True)
class TextResponse:
    """One response as text: strings, or lists of messages where the row is a chat. `columns` are the row's others."""

    prompt: Text
    completion: Text
    ids: list[int]
    columns: dict[str, Any]


def as_text(requests: Sequence[Request], tokenizer: PreTrainedTokenizerBase) -> list[TextResponse]:
    """Every response as text, without special tokens, in order. `tokenizer` is the policy's."""
    responses: list[TextResponse] = []
    for request in requests:
        for ids in request.responses:
            # Copies, one for each response: a function may change what it is given.
            row = copy.deepcopy(request.row)
            prompt = str(tokenizer.decode(request.prompt, skip_special_tokens=True)) if row is None else row.prompt
            columns = {} if row is None else row.extra
            if isinstance(row, Pair):
                columns = {**columns, "chosen": row.chosen, "rejected": row.rejected}
            text = decode_after(tokenizer, ids)
            completion = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            responses.append(TextResponse(prompt, completion, list(ids), columns))
    return responses


# Nats. Beyond, sums and squares of single precision overflow, and so would the loss or the length of its gradient.
LARGEST = 1e15


def finite(values: Tensor, name: str) -> Float[Tensor, "responses"]:
    """Rewards as the protocol promises them. Raises RewardError if one is not a number within ± `LARGEST`."""
    values = values.detach().to("cpu", torch.float32)
    wrong = (~(values.abs() < LARGEST)).nonzero().flatten().tolist()
    if wrong:
        raise RewardError(
            f"reward {name}: {len(wrong)} of {len(values)} rewards are not finite, or beyond {LARGEST:g}; first "
            f"response {wrong[0]} ({float(values[wrong[0]])}); a model that diverged or overflows in half precision "
            "cannot reward"
        )
    return values


def checked(values: object, responses: int, name: str) -> Float[Tensor, "responses"]:
    """What a reward gave, if it is what the protocol promises. Raises RewardError."""
    if not isinstance(values, Tensor) or values.shape != (responses,) or values.is_complex():
        found = f"a tensor of shape {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise RewardError(f"reward {name}: gave {found}; give a tensor of one number for each of {responses} responses")
    return finite(values, name)


class ExactReward(Reward):
    """R(x, a) = γ ln π*(a|x), in nats: the reward of a known target, without error (eq. 8)."""

    def __init__(self, target: nn.Module, *, gamma: float, token_budget: int) -> None:
        self.target, self.gamma, self.token_budget = target, gamma, token_budget

    def __call__(self, requests: Sequence[Request]) -> Float[Tensor, "responses"]:
        """γ times the target's sequence log-probabilities."""
        scores = score_in_batches(self.target, [r.group for r in requests], token_budget=self.token_budget)
        return finite(induced_reward(scores.logps, gamma=self.gamma), "exact")


class ColumnReward(Reward):
    """R = scale · chosen_reward and scale · rejected_reward of the data's own pairs; drawn responses have none.

    `scale` is what one unit of the columns is worth, in nats of preference: P(a ≻ b | x) = σ(R(x, a) − R(x, b)). Raises
    RewardError for a scale that is not above 0.
    """

    def __init__(self, scale: float) -> None:
        if not (math.isfinite(scale) and scale > 0):
            raise RewardError(f"ColumnReward: scale is {scale}; give the nats that one unit of the columns is worth")
        self.scale = scale

    def __call__(self, requests: Sequence[Request]) -> Float[Tensor, "responses"]:
        """Rewards of the pairs, chosen and rejected in turn. Raises RewardError for a row without them."""
        values = []
        for request in requests:
            both = column_rewards(request.row)
            if both is None or len(request.responses) != 2:
                raise RewardError("rewards from columns: only the data's pairs have them; take another reward")
            values += both
        return finite(self.scale * torch.tensor(values), "columns")


def column_rewards(row: Prompt | Pair | None) -> tuple[float, float] | None:
    """(chosen_reward, rejected_reward) of a row, in the unit of its data; None if it has none."""
    if not isinstance(row, Pair) or row.chosen_reward is None or row.rejected_reward is None:
        return None
    return row.chosen_reward, row.rejected_reward


class WeightedSum(Reward):
    """Σ_k weight_k R_k(x, a): several rewards as one."""

    def __init__(self, parts: Sequence[tuple[float, Reward]]) -> None:
        self.parts = list(parts)

    def __call__(self, requests: Sequence[Request]) -> Float[Tensor, "responses"]:
        """The sum over the parts."""
        return finite(torch.stack([weight * reward(requests) for weight, reward in self.parts]).sum(0), "sum")
