"""An embedding that is also the head gets one gradient: the head makes it, the embedding adds its rows in place.

autograd would make a gradient of the size of the vocabulary twice, and a third tensor for their sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Tie:
    """Carries the head's gradient of the weight to the embedding, whose backward pass always comes after the head's.

    `waits`: an embedding is there to take it.
    """

    def __init__(self) -> None:
        self.waits = False
        self.gradient: Float[Tensor, "vocab hidden"] | None = None

    def take(self) -> Tensor | None:
        """What the head gave in this backward pass, once."""
        gradient, self.gradient = self.gradient, None
        return gradient


@contextmanager
def tied(model: Any) -> Iterator[Tie | None]:
    """Inside the block a plain embedding that is also the plain head, and is trained, looks up its rows through a tie.

    None if the model has no such embedding, and nothing is changed.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    plain = type(embedding) is nn.Embedding and type(head) is nn.Linear and "forward" not in vars(embedding)
    if not plain or embedding.weight is not head.weight or not embedding.weight.requires_grad:
        yield None
        return
    if embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse:
        yield None
        return
    tie = Tie()
    embedding.forward = lambda input: _Rows.apply(embedding.weight, input, tie, embedding.padding_idx)
    try:
        yield tie
    finally:
        del embedding.forward


class _Rows(torch.autograd.Function):
    """weight, ids → weight[ids]; its gradient is added to what the tie carries."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Int[Tensor, "..."], tie: Tie, padding: int | None) -> Tensor:
        tie.waits |= ctx.needs_input_grad[0]
        ctx.save_for_backward(ids)
        ctx.shape, ctx.tie, ctx.padding = weight.shape, tie, padding
        return nn.functional.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows: Tensor) -> tuple[Tensor, None, None, None]:
        (ids,) = ctx.saved_tensors
        gradient = ctx.tie.take()
        if gradient is None:  # the loss does not see the head
            gradient = d_rows.new_zeros(ctx.shape)
        if ctx.padding is not None:
            d_rows = d_rows.masked_fill((ids == ctx.padding)[..., None], 0)
        return gradient.index_put_((ids,), d_rows.to(gradient.dtype), accumulate=True), None, None, None
