"""Responses sampled from a policy: each prompt is encoded once for all responses to it.

Rows that have ended leave the batch; prompts are batched by length. The distribution sampled from is the model's own
(temperature, top-p and length limits as given here; the sampling defaults that a checkpoint may carry are not applied).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from distalign.engine.forward import device_of, evaluating
from distalign.rollout.decode import Sampling, respond
from distalign.rollout.trial import way_of


def end_ids(model: nn.Module, end_id: int) -> tuple[int, ...]:
    """The tokens that end a response: `end_id`, then the others that the model's generation_config lists."""
    config = getattr(model, "generation_config", None)
    listed = getattr(config, "eos_token_id", None)
    listed = [] if listed is None else [listed] if isinstance(listed, int) else list(listed)
    vocabulary = model.config.get_text_config().vocab_size if listed else 0  # pyright: ignore
    return tuple(dict.fromkeys([end_id, *(index for index in listed if 0 <= index < vocabulary)]))


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
    numbers: Sequence[int] | None = None,
    rows: int = 64,
    progress: Callable[[int, int], Any] | None = None,
) -> list[list[list[int]]]:
    """`n` responses to every prompt, as token ids: result[prompt][response].

    A response ends with one of `end_ids(model, end_id)`, or has `max_new_tokens` tokens and no end. At least
    `min_new_tokens` come before the end: until then it is not drawn, and the other tokens keep their proportion.
    Temperature 0 takes the most likely token. With `top_p` < 1 only the most likely tokens that together reach it are
    sampled, renormalised. `rows` bounds the responses decoded at once; where `n` exceeds it they are decoded in parts,
    from one encoding of the prompt. Each response has random numbers of its own, by `seed`, the number of its prompt
    (`numbers`; its place, if not given) and its own: what is drawn does not depend on what is drawn beside it, but for
    rounding.
    The global random state is left alone. Raises ValueError for an empty prompt or settings out of range, and
    InputError where positions are rotated otherwise before a response may end (dynamic and long RoPE).
    """
    settings = Sampling(max_new_tokens, min_new_tokens, temperature, top_p, end_ids(model, end_id))
    _check(prompts, n, rows)
    numbers, device = range(len(prompts)) if numbers is None else numbers, device_of(model)
    way = way_of(model, prompts, max_new_tokens)
    results: list[list[list[int]]] = [[] for _ in prompts]
    done = 0
    with evaluating(model):
        for batch in _batches(prompts, max(1, rows // n), of_one_length=way.prompts == "equal"):
            chosen = [prompts[i] for i in batch]
            uniform = torch.cat([_uniform(seed, numbers[i], n, max_new_tokens, device) for i in batch])
            responses = respond(model, chosen, n, rows, settings, uniform, way.cache)
            for position, index in enumerate(batch):
                results[index] = responses[position * n : (position + 1) * n]
            done += len(batch)
            if progress is not None:
                progress(done, len(prompts))
    return results


def _uniform(seed: int, number: int, n: int, steps: int, device: torch.device) -> Float[Tensor, "responses steps 2"]:
    """Random numbers from 0 to 1 for the responses to one prompt; the same on every device."""
    drawn = np.stack([np.random.default_rng((seed, number, one)).random((steps, 2)) for one in range(n)])
    return torch.from_numpy(drawn).to(device, torch.float32 if device.type == "mps" else torch.float64)


def _batches(prompts: Sequence[list[int]], size: int, *, of_one_length: bool) -> list[list[int]]:
    """Indices of prompts that are decoded together, shortest first."""
    batches: list[list[int]] = []
    for index in sorted(range(len(prompts)), key=lambda index: len(prompts[index])):
        last = batches[-1] if batches else []
        other = of_one_length and last and len(prompts[last[0]]) != len(prompts[index])
        if not last or len(last) == size or other:
            batches.append([index])
        else:
            last.append(index)
    return batches


def _check(prompts: Sequence[list[int]], n: int, rows: int) -> None:
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"sample: prompts[{index}] is empty; start it with any token")
    if n < 1 or rows < 1:
        raise ValueError(f"sample: n is {n} and rows {rows}; both must be at least 1")
