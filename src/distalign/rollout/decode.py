"""Responses that continue encoded prompts, a token at a time: from one copy of a prompt's cache where the model allows.

Three ways with one face: `Shared`; `Forked`, which copies the cache for every response; `Uncached`. Which of them
serves a model is found out in rollout/trial.py.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from distalign.engine.attention import CannotShare, attention_configs, attention_set
from distalign.engine.forward import device_of
from distalign.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled. Raises ValueError for settings out of range."""

    max_new_tokens: int
    min_new_tokens: int
    temperature: float
    top_p: float
    end_ids: tuple[int, ...]

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


class Caller:
    """Calls a model with a cache, under the names that its class has for things."""

    def __init__(self, model: nn.Module) -> None:
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore[reportCallIssue]
        known = inspect.signature(inner.forward).parameters
        self.model, self.name = model, type(inner).__name__
        # transformers 5.24 calls it cache everywhere; before, state-space models had a name of their own.
        self.cache_name = next((name for name in ("cache", "cache_params") if name in known), "past_key_values")
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
            extra["attention_mask"] = mask[:, -ids.shape[1] :] if _recurrent(cache) else mask
        if self.takes_positions:
            extra["position_ids"] = positions
        output = self.model(input_ids=ids, use_cache=True, logits_to_keep=1, **extra)
        cache, logits = getattr(output, self.cache_name, None), output.logits[:, -1]
        if not isinstance(cache, Cache):
            raise TypeError(
                f"{self.name} keeps no cache of transformers' Cache class, so responses cannot be continued; "
                "use a model class of transformers"
            )
        return numbers(logits, self.name), cache


def _recurrent(cache: Cache | None) -> bool:
    """Whether no layer keeps keys: such a model reads the mask of the new tokens alone."""
    return cache is not None and not any(hasattr(layer, "keys") for layer in cache.layers)


def numbers(logits: Float[Tensor, "rows vocabulary"], name: str) -> Float[Tensor, "rows vocabulary"]:
    """The logits in at least single precision. Raises InputError if a row has none."""
    if not logits.amax(-1).isfinite().all():
        raise InputError(
            f"sample: the logits of {name} are not numbers; if it was trained, lower the learning rate, and if it is "
            'float64, load it with attn_implementation="sdpa" (eager attention overflows at padding)'
        )
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@dataclass
class Encoded:
    """Prompts after one forward pass: the logits of the first token, the mask of the padding on the left, the cache."""

    call: Caller
    logits: Float[Tensor, "prompts vocabulary"]
    mask: Int[Tensor, "prompts width"]
    cache: Cache

    @property
    def lengths(self) -> Int[Tensor, "prompts"]:
        """Tokens of the prompts."""
        return self.mask.sum(1)


def encode_prompts(model: nn.Module, prompts: Sequence[list[int]], pad_id: int) -> Encoded:
    """Encode each prompt once, padded on the left so that every row continues at its end."""
    device, width = device_of(model), max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad_id] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    call = Caller(model)
    logits, cache = call(ids, (mask.cumsum(1) - 1).clamp(min=0), mask, None)
    return Encoded(call, logits, mask, cache)


class Forked:
    """Responses that each carry a copy of their prompt's cache; `parents` is the prompt of every response.

    Takes over the cache of `encoded`, unless `again`: then others will be made from it.
    """

    def __init__(self, encoded: Encoded, parents: Int[Tensor, "rows"], space: int, *, again: bool = False) -> None:
        self.call, self.mask = encoded.call, encoded.mask[parents]
        self.positions = encoded.lengths[parents]
        self.cache: Any = copy.deepcopy(encoded.cache) if again else encoded.cache
        self.cache.reorder_cache(parents)

    def decoding(self) -> AbstractContextManager[None]:
        """The model attends as it always does."""
        return nullcontext()

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
    """Responses that read one copy of their prompt's cache. As `Forked`, for models that are found to allow it.

    Of the prompts encoded only one may be used `again`. Raises CannotShare as `PrefixCache` does.
    """

    def __init__(self, encoded: Encoded, parents: Int[Tensor, "rows"], space: int, *, again: bool = False) -> None:
        assert not again or len(encoded.mask) == 1
        self.call, self.positions = encoded.call, encoded.lengths[parents]
        self.cache = PrefixCache(encoded.cache, encoded.mask, parents, space)

    def decoding(self) -> AbstractContextManager[None]:
        """The model attends through the shared cache while this context lasts."""
        return self.cache.attending(attention_configs(self.call.model))

    def keep(self, rows: Int[Tensor, "kept"]) -> None:
        """Keep these responses, in this order."""
        self.cache.keep(rows)
        self.positions = self.positions[rows]

    def step(self, tokens: Int[Tensor, "rows"]) -> Float[Tensor, "rows vocabulary"]:
        """Append a token to every response; the logits of the next one."""
        logits, _ = self.call(tokens[:, None], self.positions[:, None], None, self.cache)
        self.positions = self.positions + 1
        return logits


class Uncached:
    """Responses of a model whose cache cannot be used: the whole sequence is read again for each token.

    The prompts have one length.
    """

    def __init__(self, model: nn.Module, ids: Int[Tensor, "rows steps"]) -> None:
        self.model, self.ids = model, ids

    def decoding(self) -> AbstractContextManager[None]:
        """The model attends as it always does."""
        return nullcontext()

    def keep(self, rows: Int[Tensor, "kept"]) -> None:
        """Keep these responses, in this order."""
        self.ids = self.ids[rows]

    def step(self, tokens: Int[Tensor, "rows"] | None) -> Float[Tensor, "rows vocabulary"]:
        """Append a token to every response; the logits of the next one."""
        if tokens is not None:
            self.ids = torch.cat([self.ids, tokens[:, None]], 1)
        return numbers(self.model(input_ids=self.ids, use_cache=False).logits[:, -1], type(self.model).__name__)


def respond(
    model: nn.Module,
    prompts: Sequence[list[int]],
    n: int,
    rows: int,
    settings: Sampling,
    uniform: Float[Tensor, "responses steps 2"],
    cache: Literal["shared", "copied", "none"],
) -> list[list[int]]:
    """`n` responses to each prompt, in order, at most `rows` at once; without a cache the prompts have one length.

    `uniform` holds the random numbers of each response, from 0 to 1, two for each of its tokens.
    """
    parts = torch.arange(len(prompts), device=uniform.device).repeat_interleave(n).split(rows)
    numbers = uniform.split(rows)
    responses: list[list[int]] = []
    if cache == "none":
        ids = torch.tensor(prompts, device=uniform.device)
        for parents, own in zip(parts, numbers, strict=True):
            decoder = Uncached(model, ids[parents])
            responses += _decode(decoder, decoder.step(None), settings, own)
        return responses
    encoded = encode_prompts(model, prompts, settings.end_ids[0])
    kind = Shared if cache == "shared" else Forked
    for index, parents in enumerate(parts):
        decoder = kind(encoded, parents, settings.max_new_tokens, again=index < len(parts) - 1)
        responses += _decode(decoder, encoded.logits[parents], settings, numbers[index])
    return responses


def _decode(
    decoder: Forked | Shared | Uncached,
    logits: Float[Tensor, "rows vocabulary"],
    settings: Sampling,
    uniform: Float[Tensor, "rows steps 2"],
) -> list[list[int]]:
    """One token per step for each response that has not ended, from the logits of the first token on."""
    responses: list[list[int]] = [[] for _ in range(len(logits))]
    alive = torch.arange(len(responses), device=logits.device)
    ends = torch.tensor(settings.end_ids, device=logits.device)
    with decoder.decoding():
        for step in range(settings.max_new_tokens):
            if step < settings.min_new_tokens:
                logits[:, settings.end_ids] = -math.inf
            tokens = choose(logits, settings.temperature, settings.top_p, uniform[alive, step])
            for row, token in zip(alive.tolist(), tokens.tolist(), strict=True):
                responses[row].append(token)
            going = close_gaps(~torch.isin(tokens, ends))
            if not len(going) or step == settings.max_new_tokens - 1:
                break
            if len(going) < len(alive):
                decoder.keep(going)
                tokens, alive = tokens[going], alive[going]
            logits = decoder.step(tokens)
    return responses


def choose(
    logits: Float[Tensor, "rows vocabulary"], temperature: float, top_p: float, uniform: Float[Tensor, "rows 2"]
) -> Int[Tensor, "rows"]:
    """A token for each row, from softmax(logits / temperature), cut to the most likely that reach `top_p` together."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits / temperature).softmax(-1)
    if top_p < 1:
        ordered, index = probabilities.sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p
        probabilities = torch.zeros_like(probabilities).scatter(-1, index, ordered.masked_fill(beyond, 0))
    return _draw(probabilities, uniform)


def _draw(weights: Float[Tensor, "rows vocabulary"], uniform: Float[Tensor, "rows 2"]) -> Int[Tensor, "rows"]:
    """A token for each row, in proportion to its weight.

    `torch.multinomial` makes a random number for every token of the vocabulary, which on a CPU costs a fifth of a
    decoding step. Here two for each row do: for the block of 64 tokens, and for the place in the block.
    """
    spare = -weights.shape[1] % 64
    blocks = (F.pad(weights, (0, spare)) if spare else weights).unflatten(1, (-1, 64))
    block = _invert(blocks.sum(-1), uniform[:, :1])
    return 64 * block + _invert(blocks[torch.arange(len(blocks), device=block.device), block], uniform[:, 1:])


def _invert(weights: Float[Tensor, "rows choices"], uniform: Float[Tensor, "rows 1"]) -> Int[Tensor, "rows"]:
    """A choice for each row, by the inverse of the cumulative distribution."""
    cumulative = weights.cumsum(-1, dtype=uniform.dtype)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).squeeze(1)


# One copy of a prompt's keys and values -------------------------------------------------------------------------------
#
# The queries of a prompt's responses, and of all heads that share a key, are the rows of one matrix product with the
# prompt's keys; each response multiplies its few keys besides, and one softmax joins the two. Nothing is copied or
# repeated for a response but the keys and values of its tokens.

NAME = "distalign_prefix_decoding"


class PrefixLayer(DynamicLayer):
    """One layer: keys and values of the prompts, once each, and space for those of the responses' own tokens."""

    def __init__(
        self,
        prompt_keys: Float[Tensor, "prompts kv_heads width dim"],
        prompt_values: Float[Tensor, "prompts kv_heads width value_dim"],
        rows: int,
        space: int,
    ) -> None:
        super().__init__()
        self.prompt_keys, self.prompt_values = prompt_keys, prompt_values
        heads, dim, value_dim = prompt_keys.shape[1], prompt_keys.shape[3], prompt_values.shape[3]
        self.own_keys = prompt_keys.new_empty(rows, heads, space, dim)
        self.own_values = prompt_values.new_empty(rows, heads, space, value_dim)
        self.own = 0
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """Tokens of prompt (padding included) and response."""
        return self.prompt_keys.shape[2] + self.own

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Add one token to each response. Returns keys and values of the responses' own tokens alone."""
        self.own_keys[:, :, self.own : self.own + 1] = key_states
        self.own_values[:, :, self.own : self.own + 1] = value_states
        self.own += 1
        return self.own_keys[:, :, : self.own], self.own_values[:, :, : self.own]


class PrefixCache(Cache):
    """The cache of responses that share prompts, and which prompt is whose.

    `parents` is the prompt of every response, `space` the tokens that a response may have. Takes over the tensors of
    `cache`, in which the prompts lie padded on the left by `mask`: prompts whose responses have all been dropped are
    overwritten. Raises CannotShare if some layer of `cache` is not plain keys and values of a prompt or of its end.
    """

    def __init__(
        self, cache: Cache, mask: Int[Tensor, "prompts width"], parents: Int[Tensor, "rows"], space: int
    ) -> None:
        plain = plain_layers(cache)
        for layer in plain:
            if layer.keys.shape[0] != mask.shape[0] or layer.keys.shape[2] > mask.shape[1]:
                raise CannotShare(f"its cache has keys of shape {tuple(layer.keys.shape)}")
        super().__init__(layers=[PrefixLayer(layer.keys, layer.values, len(parents), space) for layer in plain])
        self.padding: Bool[Tensor, "prompts width"] | None = mask == 0 if bool((mask == 0).any()) else None
        self.parents = parents
        self.windows: list[int | None] = []
        self.current: Any = None
        self._arrange(len(mask))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """As in every cache; the attention that follows is told whose prompts it needs."""
        self.current = self.layers[layer_idx]
        return self.current.update(key_states, value_states)

    def keep(self, rows: Int[Tensor, "kept"]) -> None:
        """Keep these responses, in this order, and the prompts that they need."""
        self.parents = self.parents[rows]
        layers: list[Any] = self.layers
        for layer in layers:
            layer.own_keys = _take(layer.own_keys, rows, layer.own)
            layer.own_values = _take(layer.own_values, rows, layer.own)
        needed = torch.bincount(self.parents, minlength=self.prompts) > 0
        if not bool(needed.all()):
            order = close_gaps(needed)
            for layer in layers:
                layer.prompt_keys = _take(layer.prompt_keys, order)
                layer.prompt_values = _take(layer.prompt_values, order)
            if self.padding is not None:
                self.padding = self.padding[order]
            place = torch.empty_like(needed, dtype=torch.int64)
            place[order] = torch.arange(len(order), device=order.device)
            self.parents = place[self.parents]
        self._arrange(int(needed.sum()))

    def _arrange(self, prompts: int) -> None:
        """Give every response a slot in a table of prompts × the most responses of one of them."""
        counts = torch.bincount(self.parents, minlength=prompts)
        self.prompts, self.most = prompts, int(counts.max())
        order = self.parents.argsort(stable=True)
        rank = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[self.parents[order]]
        slots = torch.empty_like(order)
        slots[order] = self.parents[order] * self.most + rank
        in_order = torch.arange(self.prompts * self.most, device=slots.device)
        self.slots = None if torch.equal(slots, in_order) else slots

    def stack(self, x: Float[Tensor, "rows kv_heads group width"]) -> Float[Tensor, "prompt_heads stacked width"]:
        """The rows of each prompt and key head below each other; zeros where a prompt has fewer than another."""
        if self.slots is not None:
            x = x.new_zeros(self.prompts * self.most, *x.shape[1:]).index_copy_(0, self.slots, x)
        _, heads, group, width = x.shape
        x = x.view(self.prompts, self.most, heads, group, width).transpose(1, 2)
        return x.reshape(self.prompts * heads, self.most * group, width)

    def unstack(
        self, x: Float[Tensor, "prompt_heads stacked width"], group: int
    ) -> Float[Tensor, "rows kv_heads group width"]:
        """What `stack` did, undone; `group` heads share a key head."""
        x = x.view(self.prompts, -1, self.most, group, x.shape[2]).transpose(1, 2)
        x = x.reshape(self.prompts * self.most, *x.shape[2:])
        return x if self.slots is None else x[self.slots]

    @contextmanager
    def attending(self, configs: list[Any]) -> Iterator[None]:
        """Let the model of these configurations attend through this cache inside the block."""
        token = _CACHE.set(self)
        try:
            with attention_set(configs, NAME):
                yield
        finally:
            _CACHE.reset(token)


_CACHE: ContextVar[PrefixCache | None] = ContextVar("distalign_prefix_cache", default=None)


def plain_layers(cache: Cache) -> list[Any]:
    """The layers of a cache of keys and values. Raises CannotShare if one keeps something else."""
    layers: list[Any] = cache.layers
    for layer in layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.keys is None:
            raise CannotShare(f"its cache has layers of type {type(layer).__name__}")
    return layers


def close_gaps(kept: Bool[Tensor, "rows"]) -> Int[Tensor, "kept"]:
    """An order of the rows kept in which the last ones fill the gaps and all others stay where they are."""
    count = int(kept.sum())
    order = torch.arange(count, device=kept.device)
    order[~kept[:count]] = kept[count:].nonzero().squeeze(1) + count
    return order


def _take(x: Tensor, rows: Int[Tensor, "kept"], width: int | None = None) -> Tensor:
    """`x[rows]` without a new tensor: only rows that change places are copied, up to `width` tokens."""
    moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero().squeeze(1)
    if len(moved):
        x[moved, :, :width] = x[rows[moved], :, :width]
    return x[: len(rows)]


def prefix_attention(
    module: nn.Module,
    query: Float[Tensor, "rows heads 1 dim"],
    key: Float[Tensor, "rows kv_heads own dim"],
    value: Float[Tensor, "rows kv_heads own value_dim"],
    attention_mask: object,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Float[Tensor, "rows 1 heads value_dim"], None]:
    """One layer's attention of one new token of each response, to its prompt and to its own tokens.

    Honours grouped-query heads, `sliding_window`, `softcap` and attention sinks (`s_aux`). Raises CannotShare on a mask
    or bias of the model's own, and on dropout.
    """
    cache = _CACHE.get()
    if cache is None:
        raise RuntimeError(f"attention {NAME!r} was called outside `sample`; set another attention implementation.")
    if attention_mask is not None or kwargs.get("position_bias") is not None or dropout > 0:
        raise CannotShare("its layers add a mask, a bias or dropout of their own")
    layer, window = cache.current, kwargs.get("sliding_window")
    cache.windows.append(window)
    prompt_keys, prompt_values = layer.prompt_keys, layer.prompt_values
    if window is not None and window < layer.get_seq_length():
        width = max(0, window - layer.own)
        start = prompt_keys.shape[2] - width
        prompt_keys, prompt_values = prompt_keys[:, :, start:], prompt_values[:, :, start:]
        key, value = key[:, :, -window:], value[:, :, -window:]

    (rows, heads, _, dim), (kv_heads, own), width = query.shape, key.shape[1:3], prompt_keys.shape[2]
    group = heads // kv_heads
    query = query.reshape(rows * kv_heads, group, dim) * (dim**-0.5 if scaling is None else scaling)
    to_own = torch.bmm(query, key.flatten(0, 1).mT).view(rows, kv_heads, group, own)
    stacked = cache.stack(query.view(rows, kv_heads, group, dim))
    scores = torch.cat([torch.bmm(stacked, prompt_keys.flatten(0, 1).mT), cache.stack(to_own)], -1)
    scores = _restrict(scores, cache, width, kv_heads, kwargs.get("softcap"), kwargs.get("s_aux"))
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    of_prompt = cache.unstack(torch.bmm(weights[..., :width], prompt_values.flatten(0, 1)), group)
    own_weights = cache.unstack(weights[..., width : width + own], group).reshape(rows * kv_heads, group, own)
    out = torch.baddbmm(of_prompt.flatten(0, 1), own_weights, value.flatten(0, 1))
    return out.view(rows, 1, heads, -1), None


def _restrict(
    scores: Float[Tensor, "prompt_heads stacked keys"],
    cache: PrefixCache,
    width: int,
    kv_heads: int,
    softcap: float | None,
    sinks: Float[Tensor, "heads"] | None,
) -> Tensor:
    """Cap the scores, rule out padding among the first `width` keys, and add the sinks as a last key."""
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if cache.padding is not None:
        hidden = cache.padding[:, None, None, cache.padding.shape[1] - width :]
        scores[..., :width].unflatten(0, (-1, kv_heads)).masked_fill_(hidden, -torch.inf)
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, kv_heads, 1, -1).expand(cache.prompts, -1, cache.most, -1)
        scores = torch.cat([scores, sink.reshape(*scores.shape[:2], 1)], -1)
    return scores


ALL_ATTENTION_FUNCTIONS.register(NAME, prefix_attention)
