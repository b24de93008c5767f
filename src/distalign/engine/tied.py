"""An embedding that is also the head gets one gradient: the head makes it, the embedding adds its rows in place.

autograd would make a gradient of the size of the vocabulary twice, and a third tensor for their sum.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Tie:
    """Carries the head's gradient of the weight to a look-up of the embedding, whose backward pass comes after."""

    def __init__(self) -> None:
        self.lookups: list[weakref.ref[Any]] = []

    def give(self, gradient: Float[Tensor, "vocab hidden"]) -> bool:
        """Hand the gradient over; False if no look-up follows in this backward pass (cut off, or not asked for)."""
        for lookup in (reference() for reference in self.lookups):
            if lookup is not None and torch._C._will_engine_execute_node(lookup):  # pyright: ignore
                lookup.given = torch._C._current_graph_task_id(), gradient
                return True
        return False


@contextmanager
def tied(model: Any) -> Iterator[Tie | None]:
    """Inside the block a plain embedding that is also the plain head, and is trained, looks up its rows through a tie.

    None if the model has no such embedding, and nothing is changed.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    plain = type(embedding) is nn.Embedding and type(head) is nn.Linear and "forward" not in vars(embedding)
    plain = plain and embedding.max_norm is None and not embedding.scale_grad_by_freq and not embedding.sparse
    if not plain or embedding.weight is not head.weight or not embedding.weight.requires_grad:
        yield None
        return
    tie = Tie()

    def forward(input: Tensor) -> Any:
        if torch.compiler.is_compiling():  # what is compiled once serves every later pass, and no tie but this one
            return nn.functional.embedding(input, embedding.weight, embedding.padding_idx)
        return _Rows.apply(embedding.weight, input, tie, embedding.padding_idx)

    embedding.forward = forward
    try:
        yield tie
    finally:
        vars(embedding).pop("forward", None)


class _Rows(torch.autograd.Function):
    """weight, ids → weight[ids]; its gradient is added to what the tie gave."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Int[Tensor, "..."], tie: Tie, padding: int | None) -> Tensor:
        tie.lookups.append(weakref.ref(ctx))
        ctx.save_for_backward(ids)
        ctx.shape, ctx.padding, ctx.given = weight.shape, padding, (None, None)
        return nn.functional.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows: Tensor) -> tuple[Tensor, None, None, None]:
        (ids,) = ctx.saved_tensors
        (task, gradient), ctx.given = ctx.given, (None, None)
        if gradient is None or task != torch._C._current_graph_task_id():  # the loss does not see the head
            gradient = d_rows.new_zeros(ctx.shape)
        if ctx.padding is not None:
            d_rows = d_rows.masked_fill((ids == ctx.padding)[..., None], 0)
        if gradient.itemsize < torch.float32.itemsize:
            # A token's rows are summed first: one by one they would be rounded off against the head's gradient.
            ids, places = ids.unique(return_inverse=True)
            sums = d_rows.new_zeros(len(ids), d_rows.shape[-1], dtype=torch.float32)
            d_rows = sums.index_put_((places,), d_rows.to(torch.float32), accumulate=True)
        return gradient.index_put_((ids,), d_rows.to(gradient.dtype), accumulate=True), None, None, None
