"""Responses scored from what drew them: the policy is not run again, the reference once.

Sampling has already computed, for every token, the state that the policy's head read and the logits made of it.
Log-probabilities, entropy and the KL to a reference need either, and the reference's: one pass of it over each prompt
and the responses to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from distalign.engine.forward import device_of, evaluating
from distalign.engine.lm_head import Head, HiddenRows, LogitRows, Rows, score_rows
from distalign.engine.packing import Group, ReadPrompt, frame, micro_batches
from distalign.engine.scoring import _rows, _validate
from distalign.engine.selfcheck import check


@dataclass(frozen=True)
class Drawn:
    """Responses that a policy gave to some prompts, responses[prompt][response], and what they were drawn from.

    `states` are what its `head` (`engine.head.head_of`) read before each token, in the order of the responses, token by
    token. `logits` are those that were kept of them, `places` which of them is whose: one a token, −1 where none is.
    """

    responses: list[list[list[int]]]
    states: Float[Tensor, "tokens hidden"]
    head: Head
    logits: Float[Tensor, "kept vocab"]
    places: Int[Tensor, "tokens"]

    def rows(self, tokens: Int[Tensor, "tokens"], temperature: float) -> Iterator[tuple[Int[Tensor, "some"], Rows]]:
        """The rows that predict these tokens, in up to two parts, each with the numbers of its tokens among them."""
        places = self.places[tokens]
        kept, other = (places >= 0).nonzero()[:, 0], (places < 0).nonzero()[:, 0]
        if len(kept):
            yield kept, LogitRows(self.logits, temperature, places[kept])
        if len(other):
            yield other, HiddenRows(self.states[tokens[other]], self.head, temperature)


@dataclass(frozen=True)
class DrawnScores:
    """Sums over the tokens of each response, in nats, in float64, in the order of the responses."""

    logps: Float[Tensor, "responses"]
    entropy: Float[Tensor, "responses"]
    kl: Float[Tensor, "responses"]
    reference_logps: Float[Tensor, "responses"]


@torch.no_grad()
def score_drawn(
    drawn: Drawn,
    prompts: Sequence[list[int]],
    reference: nn.Module,
    *,
    token_budget: int,
    temperature: float = 1.0,
    read: Sequence[ReadPrompt | None] | None = None,
) -> DrawnScores:
    """What `score` says of the responses with that reference.

    Everything is of softmax(logits / temperature). Prompts that the reference has read before, a value a prompt, are
    not read again. Raises ValueError for responses that cannot be scored, states that are not one a token, and a
    reference with another vocabulary.
    """
    lengths = [[len(response) for response in own] for own in drawn.responses]
    per_prompt, per_response = [sum(own) for own in lengths], [length for own in lengths for length in own]
    if len(lengths) != len(prompts) or {len(drawn.states), len(drawn.places)} != {sum(per_prompt)}:
        raise ValueError(
            f"score_drawn: {len(lengths)} prompts answered by {sum(per_prompt)} tokens with {len(drawn.states)} states "
            f"and {len(drawn.places)} places, and {len(prompts)} prompts; give the states and places of all responses"
        )
    groups = [Group(prompt, own) for prompt, own in zip(prompts, drawn.responses, strict=True)]
    _validate(reference, groups)
    tokens = torch.arange(sum(per_prompt)).split(per_prompt)
    owner = torch.arange(len(per_response)).repeat_interleave(torch.tensor(per_response))
    sums = torch.zeros(4, len(per_response), dtype=torch.float64)
    report = check(reference, kernels=False)
    if report.path != "shared" or report.length_limit is not None:
        # Such a reference reads whole sequences, or has keys that depend on the longest one read beside them.
        read = None
    with evaluating(reference):
        for batch in micro_batches(groups, token_budget, read):
            chosen = [groups[index] for index in batch]
            known = None if read is None else [read[index] for index in batch]
            own = torch.cat([tokens[index] for index in batch])
            reference_rows = _rows(reference, chosen, temperature, kernels=False, read=known)
            targets = frame(chosen, device_of(reference)).targets
            for part, rows in drawn.rows(own.to(targets.device), temperature):
                values = score_rows(rows, targets[part], entropy=True, reference=reference_rows.chosen(part))
                parts = (values.logps, values.entropy, values.kl, values.reference_logps)
                found = torch.stack([one.cpu().double() for one in parts if one is not None])
                sums.index_add_(1, owner[own[part.cpu()]], found)
    return DrawnScores(*sums)
