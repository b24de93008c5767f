"""FlexAttention for packed rows: one kernel call for a whole row, where a GPU has it.

In a packed row every query sees two spans of places: of its prompt, and of its own piece up to itself. The spans are
data, so that one compiled kernel serves rows of every length and layout and layers with any sliding
window. Nothing of size [tokens, tokens] is built. Scaling and softcap reach the kernel as tensors too: torch 2.13
cannot differentiate through a Python number that it has made symbolic.

The engine compares it with the attention by segments when a model is first trained (`distalign.engine.check`), and does
without it where it raises or disagrees. The first such comparison in a process compiles the kernels: half a minute on
an H100. Passes without gradient wait for that only where they are long (`engine.scoring.worth_compiling`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from distalign.engine.packing import Segment

# Places per side of a block of the mask: torch's default, a multiple of every tile of its kernels.
BLOCK = 128

# Triton's dot takes no fewer than 16 columns; much wider heads than 256 do not fit into the shared memory of a GPU.
_HEAD_SIZES = range(16, 257)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Call(NamedTuple):
    """What a layer asks of its attention. `dtype` is that of `common_dtype`."""

    device: torch.device
    dtype: torch.dtype | None
    tokens: int
    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    window: int | None
    scaling: float | None
    dropout: float
    softcap: float | None
    sinks: bool

    @classmethod
    def of(
        cls,
        query: Float[Tensor, "1 heads tokens dim"],
        key: Float[Tensor, "1 kv_heads tokens dim"],
        value: Float[Tensor, "1 kv_heads tokens value_dim"],
        window: int | None,
        *,
        scaling: float | None,
        dropout: float,
        softcap: float | None,
        sinks: Float[Tensor, "heads"] | None,
    ) -> Call:
        """The call that has these tensors and settings."""
        _, heads, tokens, dim = query.shape
        return cls(
            device=query.device,
            dtype=common_dtype(query, key, value),
            tokens=tokens,
            heads=heads,
            kv_heads=key.shape[1],
            dim=dim,
            value_dim=value.shape[-1],
            window=window,
            scaling=scaling,
            dropout=dropout,
            softcap=softcap,
            sinks=sinks is not None,
        )


def common_dtype(*tensors: Tensor) -> torch.dtype | None:
    """The dtype that attention on these tensors computes in, autocast included; None where they have no common one."""
    kinds = {tensor.dtype for tensor in tensors}
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        # Autocast leaves float64 alone.
        kinds = {kind if kind == torch.float64 else torch.get_autocast_dtype(device) for kind in kinds}
    return kinds.pop() if len(kinds) == 1 else None


def serves(call: Call) -> bool:
    """Whether FlexAttention computes this call: by rule, never by trial.

    It needs a device with its kernels, a row of more than one block, no dropout, one dtype of at most 32 bits, and
    heads of 16 to 256 columns. Everything else is computed segment by segment.
    """
    return (
        has_kernels(call.device)
        and call.tokens > BLOCK
        and call.dropout == 0
        and call.dtype in DTYPES
        and call.dim in _HEAD_SIZES
        and call.value_dim in _HEAD_SIZES
    )


@cache
def has_kernels(device: torch.device) -> bool:
    """Whether torch can compile FlexAttention, with its derivative, for `device`: a GPU with bfloat16, and Triton."""
    return (
        device.type == "cuda" and find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (8, 0)
    )


@cache
def kernel(backend: str | Callable = "inductor") -> Callable:
    """`flex_attention`, compiled for rows of every length: once with and once without gradient per kind of call.

    Raises rather than falls back to its dense form, which keeps [heads, tokens, tokens] scores.
    """
    compiled = torch.compile(flex_attention, dynamic=True, fullgraph=True, backend=backend)
    # Eight compiled forms, torch's own limit, is four kinds of call: too few for several models in one process.
    return torch._dynamo.config.patch(recompile_limit=64)(compiled)


def attend(
    query: Float[Tensor, "1 heads tokens dim"],
    key: Float[Tensor, "1 kv_heads tokens dim"],
    value: Float[Tensor, "1 kv_heads tokens value_dim"],
    mask: BlockMask,
    *,
    scaling: float | None,
    softcap: float | None,
    sinks: Float[Tensor, "heads"] | None,
) -> Float[Tensor, "1 heads tokens value_dim"]:
    """Attention of a packed row under the mask of `block_mask`; `scaling=None` is 1/√dim.

    A sink is a logit that takes its share of the softmax and gives no value. The softmax over the keys alone, with
    log-sum-exp L, is therefore to be multiplied by e^L / (e^L + e^sink) = sigmoid(L − sink).
    """
    dtype = common_dtype(query, key, value)
    # Cast as autocast would, and outside of it, so that one compiled form serves both.
    query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    with torch.autocast(query.device.type, enabled=False):
        out = kernel()(
            query,
            key,
            value,
            score_mod=_score(query, scaling, softcap),
            block_mask=mask,
            enable_gqa=query.shape[1] != key.shape[1],
            return_aux=None if sinks is None else AuxRequest(lse=True),
        )
    if sinks is None:
        return out
    out, aux = out
    share = torch.sigmoid(aux.lse - sinks.to(aux.lse.dtype)[None, :, None])
    return out * share[..., None].to(out.dtype)


def _score(query: Tensor, scaling: float | None, softcap: float | None) -> Callable | None:
    """What becomes of query · key / √dim, or None if it stays."""
    default = query.shape[-1] ** -0.5
    usual = scaling is None or math.isclose(scaling, default, rel_tol=1e-12)
    if usual and softcap is None:
        return None
    accumulate = torch.promote_types(query.dtype, torch.float32)
    # `full` fills on the device; `tensor` would wait for a copy to it, in every layer.
    factor = torch.full((), 1.0 if usual else scaling / default, dtype=accumulate, device=query.device)
    if softcap is None:
        return lambda score, batch, head, q, k: score * factor
    cap = torch.full((), softcap, dtype=accumulate, device=query.device)
    return lambda score, batch, head, q, k: cap * torch.tanh(score * factor / cap)


def block_mask(segments: tuple[Segment, ...], window: int | None, device: torch.device) -> BlockMask:
    """The mask of a packed row for layers with a sliding window of `window` tokens (None: no limit)."""
    # Three tensors, not rows of one: its length of three would be bound to a row of three blocks when it is compiled.
    first, end, own = (span.to(device) for span in spans(segments, window))
    tokens = len(own)
    blocks = -(-tokens // BLOCK)
    edges = torch.arange(blocks + 1, device=device, dtype=torch.int32) * BLOCK

    def seen(low: Tensor, high: Tensor) -> Tensor:
        return (torch.minimum(high[:, None], edges[1:]) - torch.maximum(low[:, None], edges[:-1])).clamp(min=0)

    places = torch.arange(tokens, device=device, dtype=torch.int32)
    counts = F.pad(seen(first, end) + seen(own, places + 1), (0, 0, 0, blocks * BLOCK - tokens))
    counts = counts.view(blocks, BLOCK, blocks).sum(1)
    full = counts == BLOCK * BLOCK

    return BlockMask.from_kv_blocks(
        *_listed((counts > 0) & ~full),
        *_listed(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=lambda batch, head, q, k: ((k >= first[q]) & (k < end[q])) | ((k >= own[q]) & (k <= q)),
        seq_lengths=(tokens, tokens),
    )


def _listed(blocks: Tensor) -> tuple[Int[Tensor, "1 1 blocks"], Int[Tensor, "1 1 blocks blocks"]]:
    """How many blocks are marked in each row of blocks, and their numbers, marked ones first."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]


def spans(segments: tuple[Segment, ...], window: int | None) -> list[Int[Tensor, "tokens"]]:
    """First place and end of the prompt's span, and first place of the own span, of every query.

    The own span ends with the query. For tokens of a prompt, which is its own piece, the prompt's span is empty.
    """
    pieces: list[tuple[int, int, int, int]] = []
    start = 0
    for segment in segments:
        prompt, end = start, start + segment.prompt
        pieces.append((segment.prompt, prompt, prompt, prompt))
        start = end
        for length in segment.responses:
            pieces.append((length, prompt, end, start))
            start += length
    table = torch.tensor(pieces, dtype=torch.int32).T
    first, end, own = (row.repeat_interleave(table[0]) for row in table[1:])
    if window is not None:
        place = torch.arange(len(own), dtype=torch.int32)
        position = place - own + end - first
        first = first + (position - window + 1).clamp(min=0)
        own = torch.maximum(own, place - window + 1)
    return [first, end, own]
