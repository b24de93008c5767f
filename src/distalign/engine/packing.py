"""Prompt groups as rows of tokens: `[prompt | response 1 | … | response G]`, several groups in one row.

A prompt appears once. Position ids of every response restart at the length of its prompt, and the last token of a
response is never an input, because nothing is predicted from it. The last prompt token predicts the FIRST token of each
response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

# Tokens of a batch that is scored without gradient, where nothing else is set.
FORWARD_BUDGET = 4096


@dataclass(frozen=True)
class Group:
    """One prompt and the responses to it, as token ids.

    The prompt has at least one token and so has every response; the end-of-sequence token is part of a response that
    ended.
    """

    prompt: list[int]
    responses: list[list[int]]

    @property
    def tokens(self) -> int:
        """Number of tokens of the group when its prompt is shared."""
        return len(self.prompt) + sum(len(response) for response in self.responses)


@dataclass(frozen=True)
class Segment:
    """Where one group lies in a packed row: input tokens of the prompt, then of each response (possibly none)."""

    prompt: int
    responses: tuple[int, ...]


@dataclass(frozen=True)
class PackedRow:
    """All groups in one row. `predictors`: for every response token in order, the input position that predicts it."""

    input_ids: Int[Tensor, "1 tokens"]
    position_ids: Int[Tensor, "1 tokens"]
    predictors: Int[Tensor, "rows"]
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class PaddedRows:
    """Some sequences, encoded separately and padded on the right; `responses` numbers them among all responses.

    `predictors` are positions in the flattened [sequences * steps] inputs.
    """

    input_ids: Int[Tensor, "sequences steps"]
    predictors: Int[Tensor, "rows"]
    responses: list[int]


@dataclass(frozen=True)
class Frame:
    """The rectangle [responses, steps] that results are laid out in, and the response tokens in reading order."""

    targets: Int[Tensor, "rows"]
    mask: Bool[Tensor, "responses steps"]
    group: Int[Tensor, "responses"]
    lengths: list[int]


def frame(groups: Sequence[Group], device: torch.device) -> Frame:
    """Response tokens of all groups in order, and the mask that lays them out, one row for each response."""
    responses = [response for group in groups for response in group.responses]
    lengths = [len(response) for response in responses]
    owner = [index for index, group in enumerate(groups) for _ in group.responses]
    steps = torch.arange(max(lengths), device=device)
    return Frame(
        targets=torch.tensor([token for response in responses for token in response], device=device),
        mask=steps[None, :] < torch.tensor(lengths, device=device)[:, None],
        group=torch.tensor(owner, device=device),
        lengths=lengths,
    )


def pack(groups: Sequence[Group], device: torch.device) -> PackedRow:
    """Put all groups into one row, each prompt once."""
    ids: list[int] = []
    positions: list[int] = []
    predictors: list[int] = []
    for group in groups:
        size = len(group.prompt)
        ids += group.prompt
        positions += range(size)
        last_of_prompt = len(ids) - 1
        for response in group.responses:
            inputs = len(response) - 1
            predictors.append(last_of_prompt)
            predictors += range(len(ids), len(ids) + inputs)
            ids += response[:-1]
            positions += range(size, size + inputs)
    return PackedRow(
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.tensor([positions], device=device),
        predictors=torch.tensor(predictors, device=device),
        segments=tuple(Segment(len(g.prompt), tuple(len(r) - 1 for r in g.responses)) for g in groups),
    )


def pad(groups: Sequence[Group], device: torch.device, *, token_budget: int) -> list[PaddedRows]:
    """Sequences `[prompt | response]` on their own, the longest first, in batches of at most `token_budget` padded
    tokens.

    A sequence longer than the budget is a batch of its own; `token_budget=0` therefore gives single sequences.
    """
    sequences = [(group.prompt + response[:-1], len(response)) for group in groups for response in group.responses]
    order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index][0]))
    batches: list[list[int]] = []
    for index in order:
        if batches and (len(batches[-1]) + 1) * len(sequences[batches[-1][0]][0]) <= token_budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return [_pad_batch(sequences, batch, device) for batch in batches]


def _pad_batch(sequences: list[tuple[list[int], int]], batch: list[int], device: torch.device) -> PaddedRows:
    width = len(sequences[batch[0]][0])
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    predictors: list[int] = []
    for row, index in enumerate(batch):
        inputs, response_length = sequences[index]
        ids[row, : len(inputs)] = torch.tensor(inputs)
        end = row * width + len(inputs)
        predictors += range(end - response_length, end)
    return PaddedRows(ids.to(device), torch.tensor(predictors, device=device), batch)


def micro_batches(groups: Sequence[Group], token_budget: int) -> list[list[int]]:
    """Split groups into micro-batches: lists of indices into `groups`, each group into the first that has room for it.

    The longest groups choose first. Tokens are counted with the prompt shared. A group is never split; one that exceeds
    the budget is alone in its batch. Raises ValueError if `token_budget` is below 1.
    """
    if token_budget < 1:
        raise ValueError(
            f"micro_batches: token_budget is {token_budget}; give the number of tokens of one batch, at least 1."
        )
    batches: list[list[int]] = []
    space: list[int] = []
    for index in sorted(range(len(groups)), key=lambda index: -groups[index].tokens):
        size = groups[index].tokens
        place = next((place for place, free in enumerate(space) if free >= size), len(space))
        if place == len(space):
            batches.append([])
            space.append(token_budget)
        batches[place].append(index)
        space[place] -= size
    return batches


def validate(groups: Sequence[Group], *, vocabulary: int, max_positions: int | None, source: str = "groups") -> None:
    """Check that every group can be scored.

    Raises ValueError, naming the group, for: no groups, an empty prompt, no or empty responses, a token id outside the
    vocabulary, a sequence longer than the positions of the model.
    """
    if not groups:
        raise ValueError(f"{source}: no groups to score; pass at least one Group(prompt, responses).")
    for index, group in enumerate(groups):
        where = f"{source}[{index}]"
        if not group.prompt:
            raise ValueError(
                f"{where}: the prompt is empty; start it with the beginning-of-sequence token or any text."
            )
        if not group.responses:
            raise ValueError(f"{where}: no responses; give at least one, or leave the group out.")
        _validate_ids(group.prompt, f"{where}.prompt", vocabulary)
        for number, response in enumerate(group.responses):
            place = f"{where}.responses[{number}]"
            if not response:
                raise ValueError(f"{place}: the response is empty; it needs at least the end-of-sequence token.")
            _validate_ids(response, place, vocabulary)
            length = len(group.prompt) + len(response) - 1
            if max_positions is not None and length > max_positions:
                raise ValueError(
                    f"{place}: {len(group.prompt)} prompt and {len(response)} response tokens need {length} positions, "
                    f"but the model has {max_positions}; shorten the prompt or the response."
                )


def _validate_ids(ids: list[int], place: str, vocabulary: int) -> None:
    low, high = min(ids), max(ids)
    if low < 0 or high >= vocabulary:
        wrong = low if low < 0 else high
        raise ValueError(
            f"{place}: token id {wrong} at position {ids.index(wrong)} is outside the vocabulary "
            f"(0 … {vocabulary - 1}); tokenise with the model's own tokenizer, or drop padding ids."
        )
