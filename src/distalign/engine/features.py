"""What a model holds after every response token: its hidden states, and ln π from the same pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from distalign.engine.forward import device_of, encode
from distalign.engine.lm_head import HiddenRows, LogitRows, Rows, score_rows
from distalign.engine.packing import Group
from distalign.engine.scoring import _validate
from distalign.engine.selfcheck import check


@dataclass(frozen=True)
class Reading:
    """Every response token of some groups, response after response.

    hidden: last hidden states AFTER reading the token. ids: the tokens. owner: the response that a token belongs to,
    counted over all groups. lengths: tokens of each response. logps: ln π(response | prompt) in nats, if asked for.
    """

    hidden: Float[Tensor, "tokens hidden"]
    ids: Int[Tensor, "tokens"]
    owner: Int[Tensor, "tokens"]
    lengths: Int[Tensor, "responses"]
    logps: Float[Tensor, "responses"] | None = None

    @property
    def last(self) -> Float[Tensor, "responses hidden"]:
        """Hidden states after the whole response."""
        return self.hidden[self.lengths.cumsum(0) - 1]

    def mean(self, values: Float[Tensor, "tokens width"]) -> Float[Tensor, "responses width"]:
        """Mean over the tokens of each response."""
        total = values.new_zeros(len(self.lengths), values.shape[1]).index_add(0, self.owner, values)
        return total / self.lengths[:, None]


def read(model: nn.Module, groups: Sequence[Group], *, logps: bool = False) -> Reading:
    """Hidden states after every response token in one pass, prompts shared where the model allows; differentiable.

    The whole response is read, its last token too, so a sequence needs one position more than `score` does. Raises
    ValueError for groups that cannot be read.
    """
    # Nothing is predicted from the last token of a sequence, so the engine leaves it out: one more, and it is read.
    longer = [Group(group.prompt, [[*response, response[-1]] for response in group.responses]) for group in groups]
    _validate(model, longer)
    device = device_of(model)
    responses = [response for group in groups for response in group.responses]
    lengths = torch.tensor([len(response) for response in responses], device=device)
    ids = torch.tensor([token for response in responses for token in response], device=device)
    owner = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
    hidden, rows = _encode(model, longer)
    # Of T + 1 states the first T predict the tokens, and the last T have read them.
    starts = torch.zeros(len(hidden), dtype=torch.bool, device=device)
    starts[(lengths + 1).cumsum(0) - lengths - 1] = True
    total = None
    if logps:
        values = score_rows(rows.chosen(~starts.roll(-1)), ids).logps
        wide = values.to(torch.float32 if device.type == "mps" else torch.float64)
        total = wide.new_zeros(len(lengths)).index_add(0, owner, wide)
    return Reading(hidden[~starts], ids, owner, lengths, total)


def _encode(model: Any, groups: Sequence[Group]) -> tuple[Float[Tensor, "rows hidden"], Rows]:
    """Hidden states that predict the tokens of `groups`, and what gives their log-probabilities."""
    report = check(model, kernels=torch.is_grad_enabled())
    longest = max(len(group.prompt) + len(response) - 1 for group in groups for response in group.responses)
    if report.path != "plain" and (report.length_limit is None or longest <= report.length_limit):
        rows = encode(model, groups, report.path, 1.0, by_flex=report.by_flex)
        assert isinstance(rows, HiddenRows)
        return rows.hidden, rows
    hidden, logits = [], []
    for group in groups:
        for response in group.responses:
            ids = torch.tensor([[*group.prompt, *response[:-1]]], device=device_of(model))
            out = model(input_ids=ids, use_cache=False, output_hidden_states=True)
            hidden.append(out.hidden_states[-1][0, -len(response) :])
            logits.append(out.logits[0, -len(response) :])
    return torch.cat(hidden), LogitRows(torch.cat(logits))
