"""Responses sampled from a policy: each prompt is encoded once, its cache forked for all responses to it.

Rows that have ended leave the batch; prompts are batched by length. The distribution sampled from is the model's own
(temperature, top-p and length limits as given here; the sampling defaults that a checkpoint may carry are not applied).
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import Cache

from distalign.engine.encoding import evaluating
from distalign.errors import InputError


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


@torch.no_grad()
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
    _check(prompts, n, rows)
    device = model.get_input_embeddings().weight.device
    generator = torch.Generator(device).manual_seed(seed)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    size = max(1, rows // n)
    results: list[list[list[int]]] = [[] for _ in prompts]
    with evaluating(model):
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            flat = _respond(model, [prompts[i] for i in batch], n, rows, drawing, generator)
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
    model: Any, prompts: list[list[int]], n: int, rows: int, drawing: Drawing, generator: torch.Generator
) -> list[list[int]]:
    """`n` responses a prompt, in order: one forward over the prompts, whose cache is forked, at most `rows` at once."""
    device = generator.device
    width = max(len(prompt) for prompt in prompts)
    # Padding on the left, so that every row continues at its end.
    ids = torch.tensor([[drawing.end_id] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    logits, cache = _step(model, ids, mask, None)
    parts = torch.arange(len(prompts), device=device).repeat_interleave(n).split(rows)
    responses: list[list[int]] = []
    for index, fork in enumerate(parts):
        own = cache if index == len(parts) - 1 else copy.deepcopy(cache)
        _reorder(own, fork)
        responses += _decode(model, logits[fork], mask[fork], own, drawing, generator)
    return responses


def _decode(
    model: Any,
    logits: Float[Tensor, "rows vocabulary"],
    mask: Int[Tensor, "rows width"],
    cache: Cache,
    drawing: Drawing,
    generator: torch.Generator,
) -> list[list[int]]:
    """One token a step for the rows not ended, from the prompts' cache and the logits of the first token."""
    responses: list[list[int]] = [[] for _ in range(len(logits))]
    alive = torch.arange(len(responses), device=logits.device)
    for step in range(drawing.max_new_tokens):
        if step < drawing.min_new_tokens:
            logits[:, drawing.end_id] = -math.inf
        tokens = choose(logits, drawing.temperature, drawing.top_p, generator)
        for row, token in zip(alive.tolist(), tokens.tolist(), strict=True):
            responses[row].append(token)
        going = (tokens != drawing.end_id).nonzero().squeeze(1)
        if not len(going) or step == drawing.max_new_tokens - 1:
            break
        if len(going) < len(alive):
            _reorder(cache, going)
            tokens, mask, alive = tokens[going], mask[going], alive[going]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        logits, cache = _step(model, tokens[:, None], mask, cache)
    return responses


def _step(
    model: Any, ids: Int[Tensor, "rows steps"], mask: Int[Tensor, "rows width"], cache: Cache | None
) -> tuple[Float[Tensor, "rows vocabulary"], Cache]:
    """Logits of the next token, and the cache with `ids` in it."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = inspect.signature(inner.forward).parameters
    # State-space models call their cache by another name, and read the mask of the new tokens alone.
    recurrent = "cache_params" in known
    name = "cache_params" if recurrent else "past_key_values"
    extra: dict[str, Any] = {name: cache, "attention_mask": mask[:, -ids.shape[1] :] if recurrent else mask}
    if "position_ids" in known:
        extra["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1, **extra)
    kept, logits = getattr(output, name, None), output.logits[:, -1].float()
    if not isinstance(kept, Cache):
        raise TypeError(
            f"{type(inner).__name__} keeps no cache of transformers' Cache class, so responses cannot be continued; "
            "use a model class of transformers"
        )
    if logits.isnan().any():
        raise InputError(
            f"sample: the logits of {type(inner).__name__} are not numbers; if it was trained, lower the learning "
            'rate, and if it is float64, load it with attn_implementation="sdpa" (eager attention overflows at padding)'
        )
    return logits, kept


def _reorder(cache: Any, rows: Int[Tensor, "rows"]) -> None:
    """Keep these rows of the cache, in this order; a row may appear several times. Every kind of layer can."""
    cache.reorder_cache(rows)


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
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
