"""Responses sampled from a policy: each prompt is encoded once for all responses to it.

Rows that have ended leave the batch; prompts are batched by length. The distribution sampled from is the model's own
(temperature, top-p and length limits as given here; the sampling defaults that a checkpoint may carry are not applied).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from distalign.engine.encoding import evaluating
from distalign.rollout.decoding import Forked, Shared, encode_prompts, shares_prompts
from distalign.rollout.prefix import close_gaps


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn. Raises ValueError for settings out of range."""

    max_new_tokens: int
    min_new_tokens: int
    temperature: float
    top_p: float
    end_id: int

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"sample: max_new_tokens is {self.max_new_tokens} and min_new_tokens {self.min_new_tokens}; the first "
                "must be at least 1 and the second between 0 and the first"
            )
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1:
            raise ValueError(
                f"sample: temperature is {self.temperature} and top_p {self.top_p}; take ≥ 0 and above 0 up to 1"
            )


def sample(
    model: Any,
    prompts: Sequence[list[int]],
    *,
    n: int = 1,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    end_id: int,
    seed: int,
    rows: int = 64,
    progress: Callable[[int, int], Any] | None = None,
) -> list[list[list[int]]]:
    """`n` responses to every prompt, as token ids: result[prompt][response].

    A response ends with `end_id`, or has `max_new_tokens` tokens and no end. At least `min_new_tokens` come before the
    end: until then it is not drawn, and the other tokens keep their proportion. Temperature 0 takes the most likely
    token. With `top_p` < 1 only the most likely tokens that together reach it are sampled, renormalised.
    `rows` bounds the responses decoded at once; where `n` exceeds it they are decoded in parts, from one encoding of
    the prompt. The same arguments and seed give the same responses on one machine; the global random state is left
    alone. Raises ValueError for an empty prompt or settings out of range.
    """
    drawing = Drawing(max_new_tokens, min_new_tokens, temperature, top_p, end_id)
    return [[one.ids for one in own] for own in _sample(model, prompts, n, drawing, seed, rows, progress, watch=False)]


def sample_with_states(
    model: Any,
    prompts: Sequence[list[int]],
    *,
    n: int = 1,
    max_new_tokens: int,
    temperature: float = 1.0,
    end_id: int,
    seed: int,
    rows: int = 64,
    progress: Callable[[int, int], Any] | None = None,
) -> tuple[list[list[list[int]]], Float[Tensor, "tokens hidden"]]:
    """As `sample`, with the hidden state that the head saw before each token: what scoring would compute once more.

    The states are in the order of the responses: prompt by prompt, response by response, token by token.
    """
    drawing = Drawing(max_new_tokens, 0, temperature, 1.0, end_id)
    drawn = _sample(model, prompts, n, drawing, seed, rows, progress, watch=True)
    return [[one.ids for one in own] for own in drawn], torch.cat([one.states for own in drawn for one in own])


@dataclass
class _Response:
    """The tokens of a response, and the hidden state before each of them if states are watched."""

    ids: list[int] = field(default_factory=list)
    states: Tensor = field(default_factory=lambda: torch.zeros(0))


@torch.no_grad()
def _sample(
    model: Any,
    prompts: Sequence[list[int]],
    n: int,
    drawing: Drawing,
    seed: int,
    rows: int,
    progress: Callable[[int, int], Any] | None,
    *,
    watch: bool,
) -> list[list[_Response]]:
    _check(prompts, n, rows)
    device = model.get_input_embeddings().weight.device
    generator = torch.Generator(device).manual_seed(seed)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    size = max(1, rows // n)
    results: list[list[_Response]] = [[] for _ in prompts]
    with evaluating(model):
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            flat = _respond(model, [prompts[i] for i in batch], n, rows, drawing, generator, watch=watch)
            for position, index in enumerate(batch):
                results[index] = flat[position * n : (position + 1) * n]
            if progress is not None:
                progress(min(start + size, len(order)), len(order))
    return results


def _check(prompts: Sequence[list[int]], n: int, rows: int) -> None:
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"sample: prompts[{index}] is empty; start it with any token")
    if n < 1 or rows < 1:
        raise ValueError(f"sample: n is {n} and rows {rows}; both must be at least 1")


def _respond(
    model: Any,
    prompts: list[list[int]],
    n: int,
    rows: int,
    drawing: Drawing,
    generator: torch.Generator,
    *,
    watch: bool,
) -> list[_Response]:
    """`n` responses a prompt, in order: one forward over the prompts, then at most `rows` responses at once."""
    encoded = encode_prompts(model, prompts, drawing.end_id, watch=watch)
    kind = Shared if shares_prompts(model) else Forked
    parts = torch.arange(len(prompts), device=generator.device).repeat_interleave(n).split(rows)
    responses: list[_Response] = []
    for index, parents in enumerate(parts):
        own = kind(encoded, parents, drawing.max_new_tokens, again=index < len(parts) - 1)
        states = encoded.states[parents] if watch else None
        responses += _decode(own, encoded.logits[parents], states, drawing, generator)
    return responses


def _decode(
    own: Forked | Shared,
    logits: Float[Tensor, "rows vocabulary"],
    states: Float[Tensor, "rows hidden"] | None,
    drawing: Drawing,
    generator: torch.Generator,
) -> list[_Response]:
    """One token a step for the responses not ended, from the logits of the first token and the states behind them."""
    responses = [_Response() for _ in range(len(logits))]
    alive = torch.arange(len(responses), device=logits.device)
    watched: list[tuple[Tensor, Tensor]] = []
    for step in range(drawing.max_new_tokens):
        if step < drawing.min_new_tokens:
            logits[:, drawing.end_id] = -math.inf
        tokens = choose(logits, drawing.temperature, drawing.top_p, generator)
        for row, token in zip(alive.tolist(), tokens.tolist(), strict=True):
            responses[row].ids.append(token)
        if states is not None:
            watched.append((alive, states))
        going = close_gaps(tokens != drawing.end_id)
        if not len(going) or step == drawing.max_new_tokens - 1:
            break
        if len(going) < len(alive):
            own.keep(going)
            tokens, alive = tokens[going], alive[going]
        logits = own.step(tokens)
        states = own.call.states if states is not None else None
    if watched:
        owners, states = (torch.cat(parts) for parts in zip(*watched, strict=True))
        by_response = states[owners.argsort(stable=True)].split([len(response.ids) for response in responses])
        for response, own_states in zip(responses, by_response, strict=True):
            response.states = own_states
    return responses


def choose(
    logits: Float[Tensor, "rows vocabulary"], temperature: float, top_p: float, generator: torch.Generator
) -> Int[Tensor, "rows"]:
    """A token a row from softmax(logits / temperature), cut to the most likely ones that reach `top_p` together."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits / temperature).softmax(-1)
    if top_p < 1:
        ordered, index = probabilities.sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p
        probabilities = torch.zeros_like(probabilities).scatter(-1, index, ordered.masked_fill(beyond, 0))
    return _draw(probabilities, generator)


def _draw(weights: Float[Tensor, "rows vocabulary"], generator: torch.Generator) -> Int[Tensor, "rows"]:
    """A token a row, in proportion to its weight.

    `torch.multinomial` makes a random number for every token of the vocabulary, which on a CPU costs a fifth of a
    decoding step. There two a row do: for the block of 64 tokens, and for the place in the block.
    """
    if weights.device.type != "cpu":
        return torch.multinomial(weights, 1, generator=generator).squeeze(1)
    spare = -weights.shape[1] % 64
    blocks = (F.pad(weights, (0, spare)) if spare else weights).unflatten(1, (-1, 64))
    block = _invert(blocks.sum(-1), generator)
    return 64 * block + _invert(blocks[torch.arange(len(blocks)), block], generator)


def _invert(weights: Float[Tensor, "rows choices"], generator: torch.Generator) -> Int[Tensor, "rows"]:
    """A choice a row, by the inverse of the cumulative distribution."""
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    uniform = torch.rand(len(weights), 1, dtype=torch.float64, generator=generator)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).squeeze(1)
