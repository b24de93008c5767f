"""Responses that continue encoded prompts, a token at a time: from one copy of a prompt's cache where the model allows.

Two ways with one face: `Shared` (prefix.py) and `Forked`, which copies the cache for every response and serves every
model. A model that misreads the shared cache does so silently, so before its first use the two are compared.
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from transformers.cache_utils import Cache

from distalign.engine.attention import CannotShare, attention_configs, expected_windows
from distalign.engine.forward import device_of, evaluating
from distalign.engine.packing import ReadPrompt
from distalign.engine.selfcheck import sample_groups
from distalign.errors import InputError
from distalign.rollout.prefix import PrefixCache, plain_layers

logger = logging.getLogger("distalign.rollout")


class Caller:
    """Calls a model with a cache, under the names that its class has for things.

    With `watch`, `states` are the hidden states [rows, hidden] from which the head made the latest logits.
    """

    def __init__(self, model: Any, *, watch: bool = False) -> None:
        self.watch, self.states = watch, torch.zeros(0)
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        known = inspect.signature(inner.forward).parameters
        self.model, self.name = model, type(inner).__name__
        # State-space models call their cache by another name, and read the mask of the new tokens alone.
        self.recurrent = "cache_params" in known
        self.cache_name = "cache_params" if self.recurrent else "past_key_values"
        self.takes_positions = "position_ids" in known

    def __call__(
        self,
        ids: Int[Tensor, "rows steps"],
        positions: Int[Tensor, "rows steps"],
        mask: Int[Tensor, "rows width"] | None,
        cache: Cache | None,
    ) -> tuple[Float[Tensor, "rows vocabulary"], Cache]:
        """Logits of the next token, and the cache with `ids` in it."""
        extra: dict[str, Any] = {self.cache_name: cache}
        if mask is not None:
            extra["attention_mask"] = mask[:, -ids.shape[1] :] if self.recurrent else mask
        if self.takes_positions:
            extra["position_ids"] = positions
        with self._watching():
            output = self.model(input_ids=ids, use_cache=True, logits_to_keep=1, **extra)
        kept, logits = getattr(output, self.cache_name, None), output.logits[:, -1]
        if not isinstance(kept, Cache):
            raise TypeError(
                f"{self.name} keeps no cache of transformers' Cache class, so responses cannot be continued; "
                "use a model class of transformers"
            )
        if not logits.amax(-1).isfinite().all():
            raise InputError(
                f"sample: the logits of {self.name} are not numbers; if it was trained, lower the learning rate, and "
                'if it is float64, load it with attn_implementation="sdpa" (eager attention overflows at padding)'
            )
        return logits.to(torch.promote_types(logits.dtype, torch.float32)), kept

    @contextmanager
    def _watching(self) -> Iterator[None]:
        if not self.watch:
            yield
            return

        def note(_: Any, inputs: tuple[Tensor, ...]) -> None:
            self.states = inputs[0][:, -1]

        hook = self.model.get_output_embeddings().register_forward_pre_hook(note)
        try:
            yield
        finally:
            hook.remove()


@dataclass
class Encoded:
    """Prompts after one forward pass: the logits of the first token, the mask of the padding on the left, the cache.

    `states` are the hidden states that gave the logits, if they are watched.
    """

    call: Caller
    states: Float[Tensor, "prompts hidden"] | Float[Tensor, "0"]
    logits: Float[Tensor, "prompts vocabulary"]
    mask: Int[Tensor, "prompts width"]
    cache: Cache

    @property
    def lengths(self) -> Int[Tensor, "prompts"]:
        """Tokens of the prompts."""
        return self.mask.sum(1)

    @property
    def bytes(self) -> int:
        """What the keys and values of all layers take; 0 where a layer keeps something else."""
        tensors = [getattr(layer, name, None) for layer in self.cache.layers for name in ("keys", "values")]
        return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))

    def read(self) -> list[ReadPrompt] | None:
        """What the model has made of each prompt, in memory of its own; None if not every layer has keys of its own.

        The states must be watched. Raises CannotShare if some layer of the cache is not plain keys and values.
        """
        if len(self.cache.layers) != self.call.model.config.get_text_config().num_hidden_layers:
            return None
        pairs = [(layer.keys.clone(), layer.values.clone()) for layer in plain_layers(self.cache)]
        return [
            ReadPrompt(
                [keys[row, :, -length:] for keys, _ in pairs],
                [values[row, :, -length:] for _, values in pairs],
                state.clone(),
            )
            for row, (length, state) in enumerate(zip(self.lengths.tolist(), self.states, strict=True))
        ]


def encode_prompts(model: Any, prompts: Sequence[list[int]], pad_id: int, *, watch: bool = False) -> Encoded:
    """Encode each prompt once, padded on the left so that every row continues at its end."""
    device, width = device_of(model), max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad_id] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    call = Caller(model, watch=watch)
    logits, cache = call(ids, (mask.cumsum(1) - 1).clamp(min=0), mask, None)
    return Encoded(call, call.states, logits, mask, cache)


class Forked:
    """Responses that each carry a copy of their prompt's cache; `parents` is the prompt of every response.

    Takes over the cache of `encoded`, unless `again`: then others will be made from it.
    """

    def __init__(self, encoded: Encoded, parents: Int[Tensor, "rows"], room: int, *, again: bool = False) -> None:
        self.call, self.mask = encoded.call, encoded.mask[parents]
        self.positions = encoded.lengths[parents]
        self.cache: Any = copy.deepcopy(encoded.cache) if again else encoded.cache
        self.cache.reorder_cache(parents)

    def keep(self, rows: Int[Tensor, "kept"]) -> None:
        """Keep these responses, in this order."""
        self.cache.reorder_cache(rows)
        self.mask, self.positions = self.mask[rows], self.positions[rows]

    def step(self, tokens: Int[Tensor, "rows"]) -> Float[Tensor, "rows vocabulary"]:
        """Append a token to every response; the logits of the next one."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        logits, self.cache = self.call(tokens[:, None], self.positions[:, None], self.mask, self.cache)
        self.positions = self.positions + 1
        return logits


class Shared:
    """Responses that read one copy of their prompt's cache. As `Forked`, for models that `shares_prompts` accepts.

    Of the prompts encoded only one may be used `again`. Raises CannotShare as `PrefixCache` does.
    """

    def __init__(self, encoded: Encoded, parents: Int[Tensor, "rows"], room: int, *, again: bool = False) -> None:
        assert not again or len(encoded.mask) == 1
        self.call, self.positions = encoded.call, encoded.lengths[parents]
        self.cache = PrefixCache(encoded.cache, encoded.mask, parents, room)
        self.configs = attention_configs(encoded.call.model)

    def keep(self, rows: Int[Tensor, "kept"]) -> None:
        """Keep these responses, in this order."""
        self.cache.keep(rows)
        self.positions = self.positions[rows]

    def step(self, tokens: Int[Tensor, "rows"]) -> Float[Tensor, "rows vocabulary"]:
        """Append a token to every response; the logits of the next one."""
        with self.cache.attending(self.configs):
            logits, _ = self.call(tokens[:, None], self.positions[:, None], None, self.cache)
        self.positions = self.positions + 1
        return logits


# Largest difference of a log-probability, in nats, that rounding explains. A wrong mask is off by 0.1 to 3 nats.
_TOLERANCES = {torch.float64: 1e-5, torch.float32: 2e-3, torch.float16: 0.1, torch.bfloat16: 0.6}

# What was found, by the weights of the input embeddings: models that share them share their layers.
_FOUND: Any = WeakIdKeyDictionary()


def shares_prompts(model: Any) -> bool:
    """Whether `Shared` serves a model: found out at its first use, by comparing with `Forked`, and remembered.

    A change of dtype, device, attention implementation or autocast repeats it; so does another class, as of an adapter.
    Modes and the random state are left as they were.
    """
    weight, config = model.get_input_embeddings().weight, model.config.get_text_config()
    autocast = torch.is_autocast_enabled(weight.device.type)
    key = type(model), weight.dtype, weight.device, config._attn_implementation, autocast
    found = _FOUND.setdefault(weight, {})
    if key not in found:
        with torch.random.fork_rng([weight.device] if weight.is_cuda else []), evaluating(model):
            reason = _why_not(model, _TOLERANCES.get(torch.bfloat16 if autocast else weight.dtype, 0.6))
        found[key] = reason is None
        if reason is not None:
            logger.warning("%s: a prompt's cache is copied for each of its responses (%s)", config.model_type, reason)
    return found[key]


def _why_not(model: Any, tolerance: float) -> str | None:
    """Why the prompts' cache cannot be shared (None: it can): two steps of three responses, one of them dropped."""
    config = model.config.get_text_config()
    try:
        windows = expected_windows(config)
    except CannotShare as refusal:
        return str(refusal)
    groups = sample_groups(config, len(model.get_input_embeddings().weight))
    device = device_of(model)
    parents, kept = torch.tensor([0, 0, 1], device=device), torch.tensor([0, 2], device=device)
    tokens = torch.tensor([groups[0].responses[0][0], groups[0].responses[1][0], groups[1].responses[0][0]]).to(device)
    prompts, pad_id = [group.prompt for group in groups], groups[0].prompt[0]
    try:
        encoded = encode_prompts(model, prompts, pad_id)
        shared = Shared(encoded, parents, 2)
        found = [shared.step(tokens)]
        asked = list(shared.cache.windows)
        shared.keep(kept)
        found.append(shared.step(tokens[kept]))
    except torch.OutOfMemoryError:
        raise
    except (CannotShare, InputError) as refusal:
        return str(refusal)
    except Exception as problem:
        # Foreign code met a cache it was not written for; whatever it raises means the same: not this way.
        return f"it does not run on a shared cache ({type(problem).__name__}: {problem})"
    if asked != windows:
        return f"its layers ask for windows {asked}, its configuration for {windows}"
    forked = Forked(encoded, parents, 2)
    expected = [forked.step(tokens)]
    forked.keep(kept)
    expected.append(forked.step(tokens[kept]))
    error = max(_distance(a, b) for a, b in zip(found, expected, strict=True))
    return None if error <= tolerance else f"a shared cache changes log-probabilities by {error:.2g} nats"


def _distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference of a log-probability, in nats; infinite for what is not a number."""
    gap = float((found.log_softmax(-1) - expected.log_softmax(-1)).abs().max())
    return math.inf if math.isnan(gap) else gap
