"""Attention in which responses share one prompt, for models that take attention functions from transformers.

The row is cut into its segments: a prompt attends to itself, a response to its prompt and to itself. No [tokens,
tokens] mask is built, but for short rows without gradient on an accelerator, which loses more time between many small
calls than in one large one. Sliding windows are applied BY POSITION, because in a packed row the distance between two
places is not the distance between their tokens. Where a layout says so, FlexAttention computes the whole row in one
call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask
from transformers import PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from distalign.engine import flex
from distalign.engine.packing import PackedRow, Segment

NAME = "distalign_shared_prefix"

# Two places keep the function that recomputes a layer under activation checkpointing: transformers, and torch's
# wrapper.
_CHECKPOINT_FUNCTIONS = ("_gradient_checkpointing_func", "checkpoint_fn")

# Settings by which a model restricts attention in a way that no attention function is told about.
_UNKNOWN_RESTRICTIONS = ("attention_chunk_size", "window_size", "attention_window", "local_attention_window")

# Tokens of a row up to which a mask of the whole row is built: 32 MB in half precision.
_SHORT = 4096


class CannotShare(Exception):
    """The model asks for something that this attention does not compute. The message says what."""


class Layout:
    """The segments of one packed row, its masks (made once per window), and what the layers asked for.

    by_flex: leave the calls that FlexAttention serves to it.
    """

    def __init__(self, segments: tuple[Segment, ...], *, by_flex: bool = False) -> None:
        self.segments, self.by_flex = segments, by_flex
        self.pieces = [length for segment in segments for length in (segment.prompt, *segment.responses)]
        self.tokens = sum(self.pieces)
        self.calls: list[flex.Call] = []
        self._masks: dict[tuple[int, int, int | None, torch.device], Tensor] = {}
        self._block_masks: dict[tuple[int | None, torch.device], BlockMask] = {}
        self._whole_masks: dict[tuple[int | None, torch.device, torch.dtype | None], Tensor] = {}

    def mask(self, queries: int, keys: int, window: int | None, device: torch.device) -> Bool[Tensor, "queries keys"]:
        """True where a query may look: the queries are the last of the `keys` consecutive positions."""
        key = (queries, keys, window, device)
        if key not in self._masks:
            distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
            allowed = distance >= 0
            self._masks[key] = allowed if window is None else allowed & (distance < window)
        return self._masks[key]

    def block_mask(self, window: int | None, device: torch.device) -> BlockMask:
        """The mask of the whole row, for FlexAttention."""
        key = (window, device)
        if key not in self._block_masks:
            self._block_masks[key] = flex.block_mask(self.segments, window, device)
        return self._block_masks[key]

    def whole_mask(self, call: flex.Call) -> Float[Tensor, "1 1 tokens tokens"]:
        """What is added to the scores of the whole row: 0 where a query may look, −∞ elsewhere."""
        key = (call.window, call.device, call.dtype)
        if key not in self._whole_masks:
            first, end, own = (span.to(call.device)[:, None] for span in flex.spans(self.segments, call.window))
            place = torch.arange(self.tokens, device=call.device)
            seen = ((place >= first) & (place < end)) | ((place >= own) & (place <= place[:, None]))
            # Rows of memory of whole blocks of 16: kernels copy a mask whose rows are not aligned, in every layer.
            shape = (self.tokens, -(-self.tokens // 16) * 16)
            mask = torch.full(shape, -torch.inf, device=call.device, dtype=call.dtype)
            self._whole_masks[key] = mask[None, None, :, : self.tokens].masked_fill_(seen, 0)
        return self._whole_masks[key]


_LAYOUT: ContextVar[Layout | None] = ContextVar("distalign_layout", default=None)


def shared_prefix_attention(
    module: nn.Module,
    query: Float[Tensor, "1 heads tokens dim"],
    key: Float[Tensor, "1 kv_heads tokens dim"],
    value: Float[Tensor, "1 kv_heads tokens value_dim"],
    attention_mask: object,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Float[Tensor, "1 tokens heads value_dim"], None]:
    """One layer's attention over a packed row; the layout comes from `shared_attention`.

    Honours grouped-query heads, `sliding_window`, `softcap` and attention sinks (`s_aux`). Raises CannotShare on a mask
    or bias of the model's own, a cache, or attention that is not causal.
    """
    layout = _LAYOUT.get()
    if layout is None:
        raise RuntimeError(f"attention {NAME!r} was called outside the engine; set another attention implementation.")
    _refuse_unknown(layout, module, query, key, attention_mask, kwargs)
    window = kwargs.get("sliding_window")
    options = {"scaling": scaling, "softcap": kwargs.get("softcap"), "sinks": kwargs.get("s_aux")}
    call = flex.Call.of(query, key, value, window, dropout=dropout, **options)
    layout.calls.append(call)
    if layout.by_flex and flex.serves(call):
        whole = flex.attend(query, key, value, layout.block_mask(window, query.device), **options)
        return whole.transpose(1, 2).contiguous(), None

    repeat = query.shape[1] // key.shape[1]
    if repeat > 1:
        key, value = key.repeat_interleave(repeat, dim=1), value.repeat_interleave(repeat, dim=1)

    if _in_one_call(call):
        whole = F.scaled_dot_product_attention(query, key, value, attn_mask=layout.whole_mask(call), scale=scaling)
        return whole.transpose(1, 2).contiguous(), None

    # `split` has one concatenation as its backward; slices would each add a zero-padded copy of the row.
    queries, keys, values = (tensor.split(layout.pieces, dim=2) for tensor in (query, key, value))
    options["dropout"] = dropout
    out: list[Tensor] = []
    for segment in layout.segments:
        first = len(out)
        prompt_keys, prompt_values = keys[first], values[first]
        out.append(_attend(layout, queries[first], prompt_keys, prompt_values, window, **options))
        for piece in range(first + 1, first + 1 + len(segment.responses)):
            if layout.pieces[piece] == 0:
                out.append(values[piece])
                continue
            k = torch.cat([prompt_keys, keys[piece]], dim=2)
            v = torch.cat([prompt_values, values[piece]], dim=2)
            out.append(_attend(layout, queries[piece], k, v, window, **options))
    return torch.cat([part.transpose(1, 2) for part in out], dim=1), None


ALL_ATTENTION_FUNCTIONS.register(NAME, shared_prefix_attention)


def _in_one_call(call: flex.Call) -> bool:
    """Whether the row is short and plain enough for one call under one mask, where calls are expensive."""
    plain = call.dropout == 0 and call.softcap is None and not call.sinks
    # Other head sizes, and float64, have no kernel but the one that keeps the scores of all heads.
    aligned = call.dim == call.value_dim and call.dim % 8 == 0
    alone = _calls_are_expensive(call.device) and not torch.is_grad_enabled()
    return alone and plain and aligned and call.dtype in flex.DTYPES and call.tokens <= _SHORT


def _calls_are_expensive(device: torch.device) -> bool:
    """Whether starting a kernel takes longer than running a small one."""
    return device.type != "cpu"


def _attend(
    layout: Layout,
    query: Float[Tensor, "1 heads queries dim"],
    key: Float[Tensor, "1 heads keys dim"],
    value: Float[Tensor, "1 heads keys value_dim"],
    window: int | None,
    *,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    sinks: Float[Tensor, "heads"] | None,
) -> Float[Tensor, "1 heads queries value_dim"]:
    """Causal attention of the last `queries` positions to all `keys` positions."""
    n, m = query.shape[2], key.shape[2]
    if window is not None and window >= m:
        window = None
    if softcap is None and sinks is None:
        if n == m and window is None:
            return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, scale=scaling)
        mask = layout.mask(n, m, window, query.device)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)

    scores = (query @ key.transpose(2, 3)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~layout.mask(n, m, window, query.device), -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(1, -1, n, 1)], dim=-1)
    accumulate = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(dim=-1, dtype=accumulate).to(value.dtype)[..., :m]
    return F.dropout(weights, dropout, training=dropout > 0) @ value


def _refuse_unknown(layout: Layout, module: nn.Module, query: Tensor, key: Tensor, mask: object, kwargs: dict) -> None:
    if mask is not None:
        raise CannotShare("its layers add a mask or bias of their own")
    if kwargs.get("position_bias") is not None or kwargs.get("cache") is not None:
        raise CannotShare("its attention takes a position bias or a cache")
    if not kwargs.get("is_causal", getattr(module, "is_causal", True)):
        raise CannotShare("its attention is not causal")
    if query.shape[0] != 1 or query.shape[2] != layout.tokens or key.shape[2] != layout.tokens:
        raise CannotShare(f"its attention sees rows of shape {tuple(query.shape)} instead of the packed row")


def shared_hidden(
    decoder: nn.Module, row: PackedRow, *, by_flex: bool = False
) -> tuple[Float[Tensor, "rows hidden"], Layout]:
    """Hidden states that predict the response tokens of a packed row, and the layout with what the layers asked for.

    Raises CannotShare where the model asks its attention for something that cannot be shared.
    """
    layout = Layout(row.segments, by_flex=by_flex)
    with shared_attention(decoder, layout):
        out = decoder(input_ids=row.input_ids, position_ids=row.position_ids, use_cache=False)
    return out[0][0].index_select(0, row.predictors), layout


@contextmanager
def shared_attention(model: nn.Module, layout: Layout) -> Iterator[None]:
    """Let `model` attend by `layout` inside the block; it is left as it was found.

    Layers that are recomputed in the backward pass (activation checkpointing) run after the block has ended; they are
    given the same layout again, so that they recompute what they computed.
    """
    configs = attention_configs(model)
    checkpointed = [
        (m, name, vars(m)[name]) for m in model.modules() for name in _CHECKPOINT_FUNCTIONS if name in vars(m)
    ]
    try:
        for module, name, function in checkpointed:
            setattr(module, name, _checkpoint_with(function, configs, layout))
        with _switched(configs, layout):
            yield
    finally:
        for module, name, function in checkpointed:
            setattr(module, name, function)


@contextmanager
def _switched(configs: list[PretrainedConfig], layout: Layout) -> Iterator[None]:
    token = _LAYOUT.set(layout)
    try:
        with attention_set(configs, NAME):
            yield
    finally:
        _LAYOUT.reset(token)


def attention_of(config: PretrainedConfig) -> str | None:
    """The attention implementation that a configuration asks for; transformers has a public setter, but no reader."""
    return config._attn_implementation


@contextmanager
def attention_set(configs: list[PretrainedConfig], name: str) -> Iterator[None]:
    """Let the layers that read these configurations attend by the function registered as `name` inside the block."""
    before = [attention_of(config) for config in configs]
    try:
        for config in configs:
            config._attn_implementation = name
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation


def _checkpoint_with(checkpoint: Callable, configs: list[PretrainedConfig], layout: Layout) -> Callable:
    def wrapped(function: Callable, *args: object, **kwargs: object) -> object:
        def run(*inputs: object, **named: object) -> object:
            with _switched(configs, layout):
                return function(*inputs, **named)

        return checkpoint(run, *args, **kwargs)

    return wrapped


def attention_configs(model: nn.Module) -> list[PretrainedConfig]:
    """Every configuration that a layer may read its attention implementation from, a parent before its parts."""
    found: dict[int, PretrainedConfig] = {}
    queue: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    queue = [config for config in queue if hasattr(config, "sub_configs")]
    while queue:
        config = queue.pop(0)
        if id(config) not in found:
            found[id(config)] = config
            parts = (getattr(config, name, None) for name in config.sub_configs)
            queue += [part for part in parts if part is not None]
    return list(found.values())


def expected_windows(config: PretrainedConfig) -> list[int | None]:
    """The sliding window (in tokens, None: no limit) of each layer, from the configuration.

    Raises CannotShare for layers that are not softmax attention over a prefix or a window of it.
    """
    for name in _UNKNOWN_RESTRICTIONS:
        if getattr(config, name, None):
            raise CannotShare(f"config.{name} restricts its attention")
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        used = getattr(config, "use_sliding_window", True)
        return [window if used else None] * config.num_hidden_layers
    unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
    if unknown:
        raise CannotShare(f"it has layers of type {', '.join(unknown)}")
    return [window if kind == "sliding_attention" else None for kind in types]
