"""Responses scored from the hidden states that drew them: the policies are not run again, the reference once for all.

Sampling has already computed, for every token, the state that the policy's head read. Log-probabilities, entropy and
the KL to a reference need that state and the reference's: one pass of the reference over each prompt and the responses
of all policies to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from distalign.engine.encoding import device_of, evaluating
from distalign.engine.head import Head, HiddenRows, score_rows
from distalign.engine.packing import Group, ReadPrompt, frame, micro_batches
from distalign.engine.scoring import _rows, _validate, worth_compiling
from distalign.engine.selfcheck import check


@dataclass(frozen=True)
class Drawn:
    """Responses that one policy gave to some prompts, responses[prompt][response], and what its head read.

    `states` are in the order of the responses, token by token; `head` is the policy's (`engine.head.head_of`).
    """

    responses: list[list[list[int]]]
    states: Float[Tensor, "tokens hidden"]
    head: Head


@dataclass(frozen=True)
class DrawnScores:
    """Sums over the tokens of each response, in nats, in float64, in the order of the responses."""

    logps: Float[Tensor, "responses"]
    entropy: Float[Tensor, "responses"]
    kl: Float[Tensor, "responses"]
    reference_logps: Float[Tensor, "responses"]


@torch.no_grad()
def score_drawn(
    drawn: Sequence[Drawn],
    prompts: Sequence[list[int]],
    reference: nn.Module,
    *,
    token_budget: int,
    temperature: float = 1.0,
    read: Sequence[ReadPrompt | None] | None = None,
    progress: Callable[[int, int], Any] | None = None,
) -> list[DrawnScores]:
    """What `score` says of each policy's responses with that reference, policy by policy.

    Everything is of softmax(logits / temperature). Prompts that the reference has read before, a value a prompt, are
    not read again. `progress(done, total)` counts prompts. Raises ValueError for
    responses that cannot be scored, states that are not one a token, and a reference with another vocabulary.
    """
    for one in drawn:
        tokens = sum(len(response) for own in one.responses for response in own)
        if len(one.responses) != len(prompts) or len(one.states) != tokens:
            raise ValueError(
                f"score_drawn: {len(one.responses)} prompts answered by {tokens} tokens with {len(one.states)} states, "
                f"and {len(prompts)} prompts; give the states of all responses"
            )
    groups = [Group(prompt, [r for one in drawn for r in one.responses[i]]) for i, prompt in enumerate(prompts)]
    _validate(reference, groups)
    places = [_places(one) for one in drawn]
    counts = [sum(len(own) for own in one.responses) for one in drawn]
    sums = [torch.zeros(4, count, dtype=torch.float64) for count in counts]
    kernels, done = worth_compiling(groups), 0
    if check(reference, kernels=False).length_limit is not None:
        # Its keys depend on the longest sequence that was read beside them.
        read = None
    with evaluating(reference):
        for batch in micro_batches(groups, token_budget):
            chosen = [groups[index] for index in batch]
            known = None if read is None else [read[index] for index in batch]
            rows = _rows(reference, chosen, temperature, kernels=kernels, read=known)
            targets = frame(chosen, device_of(reference)).targets
            # The reference's rows go prompt by prompt and within a prompt policy by policy.
            owner = torch.tensor([p for i in batch for p, one in enumerate(drawn) for r in one.responses[i] for _ in r])
            for number, one in enumerate(drawn):
                mine = (owner == number).nonzero()[:, 0].to(targets.device)
                own = torch.cat([places[number][index] for index in batch])
                states = HiddenRows(one.states[own[:, 0]].to(targets.device), one.head, temperature)
                values = score_rows(states, targets[mine], entropy=True, reference=rows.chosen(mine))
                parts = (values.logps, values.entropy, values.kl, values.reference_logps)
                found = torch.stack([part.cpu().double() for part in parts if part is not None])
                sums[number].index_add_(1, own[:, 1], found)
            done += len(batch)
            if progress is not None:
                progress(done, len(groups))
    return [DrawnScores(*total) for total in sums]


def _places(one: Drawn) -> list[Int[Tensor, "tokens 2"]]:
    """For every prompt the places of its tokens among all tokens of the policy, and among its responses."""
    places, token, response = [], 0, 0
    for own in one.responses:
        rows = []
        for each in own:
            rows += [(token + step, response) for step in range(len(each))]
            token, response = token + len(each), response + 1
        places.append(torch.tensor(rows))
    return places
