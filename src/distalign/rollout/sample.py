"""Responses sampled from a policy: each prompt is encoded once for all responses to it.

Rows that have ended leave the batch; prompts are batched by length. The distribution sampled from is the model's own
(temperature, top-p and length limits as given here; the sampling defaults that a checkpoint may carry are not applied).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from distalign.engine.forward import device_of, evaluating
from distalign.rollout.decode import Encoded, Forked, Shared, close_gaps, encode_prompts, shares_prompts


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled. Raises ValueError for settings out of range."""

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


@torch.no_grad()
def sample(
    model: nn.Module,
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
    settings = Sampling(max_new_tokens, min_new_tokens, temperature, top_p, end_id)
    _check(prompts, n, rows)
    generator = torch.Generator(device_of(model)).manual_seed(seed)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    size = max(1, rows // n)
    results: list[list[list[int]]] = [[] for _ in prompts]
    with evaluating(model):
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            encoded = encode_prompts(model, [prompts[i] for i in batch], end_id)
            responses = _respond(model, encoded, n, rows, settings, generator)
            for position, index in enumerate(batch):
                results[index] = responses[position * n : (position + 1) * n]
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
    model: nn.Module, encoded: Encoded, n: int, rows: int, settings: Sampling, generator: torch.Generator
) -> list[list[int]]:
    """`n` responses to each prompt, in order, at most `rows` at once."""
    kind = Shared if shares_prompts(model) else Forked
    parts = torch.arange(len(encoded.mask), device=generator.device).repeat_interleave(n).split(rows)
    responses: list[list[int]] = []
    for index, parents in enumerate(parts):
        decoder = kind(encoded, parents, settings.max_new_tokens, again=index < len(parts) - 1)
        responses += _decode(decoder, encoded.logits[parents], settings, generator)
    return responses


def _decode(
    decoder: Forked | Shared, logits: Float[Tensor, "rows vocabulary"], settings: Sampling, generator: torch.Generator
) -> list[list[int]]:
    """One token per step for each response that has not ended, from the logits of the first token on."""
    responses: list[list[int]] = [[] for _ in range(len(logits))]
    alive = torch.arange(len(responses), device=logits.device)
    for step in range(settings.max_new_tokens):
        if step < settings.min_new_tokens:
            logits[:, settings.end_id] = -math.inf
        tokens = choose(logits, settings.temperature, settings.top_p, generator)
        for row, token in zip(alive.tolist(), tokens.tolist(), strict=True):
            responses[row].append(token)
        going = close_gaps(tokens != settings.end_id)
        if not len(going) or step == settings.max_new_tokens - 1:
            break
        if len(going) < len(alive):
            decoder.keep(going)
            tokens, alive = tokens[going], alive[going]
        logits = decoder.step(tokens)
    return responses


def choose(
    logits: Float[Tensor, "rows vocabulary"], temperature: float, top_p: float, generator: torch.Generator
) -> Int[Tensor, "rows"]:
    """A token for each row, from softmax(logits / temperature), cut to the most likely that reach `top_p` together."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits / temperature).softmax(-1)
    if top_p < 1:
        ordered, index = probabilities.sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p
        probabilities = torch.zeros_like(probabilities).scatter(-1, index, ordered.masked_fill(beyond, 0))
    return _draw(probabilities, generator)


def _draw(weights: Float[Tensor, "rows vocabulary"], generator: torch.Generator) -> Int[Tensor, "rows"]:
    """A token for each row, in proportion to its weight.

    `torch.multinomial` makes a random number for every token of the vocabulary, which on a CPU costs a fifth of a
    decoding step. Here two for each row do: for the block of 64 tokens, and for the place in the block.
    """
    if weights.device.type != "cpu":
        return torch.multinomial(weights, 1, generator=generator).squeeze(1)
    spare = -weights.shape[1] % 64
    blocks = (F.pad(weights, (0, spare)) if spare else weights).unflatten(1, (-1, 64))
    block = _invert(blocks.sum(-1), generator)
    return 64 * block + _invert(blocks[torch.arange(len(blocks)), block], generator)


def _invert(weights: Float[Tensor, "rows choices"], generator: torch.Generator) -> Int[Tensor, "rows"]:
    """A choice for each row, by the inverse of the cumulative distribution."""
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    uniform = torch.rand(len(weights), 1, dtype=torch.float64, generator=generator)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).squeeze(1)
