"""Rows of hidden states (or logits) that predict the response tokens, by each of the three paths.

shared   one packed row, every prompt once
padded   every sequence on its own, padded on the right, by the model's own attention
plain    every sequence on its own, the model's own logits

All three return the rows in the same order: group by group, response by response, token by token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PretrainedConfig

from distalign.engine.attention import shared_hidden
from distalign.engine.lm_head import CannotTile, HiddenRows, LogitRows, Rows, head_of
from distalign.engine.packing import Group, PaddedRows, frame, pack, pad

# Padded tokens of one forward call of the padded path.
_PADDED_TOKENS = 4096


def require_causal_lm(model: nn.Module) -> None:
    """Raise TypeError if `model` is not a causal language model of transformers or PEFT."""
    for name in ("get_decoder", "get_input_embeddings", "get_output_embeddings", "config"):
        if not hasattr(model, name):
            raise TypeError(
                f"{type(model).__name__} has no {name}: the engine scores causal language models of "
                "transformers or PEFT; pass the module inside a wrapper such as DistributedDataParallel."
            )


def embedding_weight(model: nn.Module) -> Float[Tensor, "vocab hidden"]:
    """The weight of the input embeddings."""
    return model.get_input_embeddings().weight  # pyright: ignore[reportCallIssue]


def text_config(model: nn.Module) -> PretrainedConfig:
    """The configuration of the language model, in a model of several kinds of input too."""
    return model.config.get_text_config()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]


def device_of(model: nn.Module) -> torch.device:
    """Where the token ids go: the device of the input embeddings."""
    return embedding_weight(model).device


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """What is saved of a model whose weights are whole, for its `save_pretrained`."""
    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        return model.state_dict()
    # FSDP2 would deal the weights anew before it names them. Which buffers are not saved torch does not say publicly.
    buffers = {
        f"{prefix}.{name}".removeprefix("."): buffer
        for prefix, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }
    return {**dict(model.named_parameters(remove_duplicate=False)), **buffers}


def encode(
    model: nn.Module,
    groups: Sequence[Group],
    path: Literal["shared", "padded", "plain"],
    temperature: float,
    *,
    by_flex: bool = False,
) -> Rows:
    """The rows that predict the response tokens of `groups`, by `path`: "shared", "padded" or "plain".

    On the shared path, `by_flex` leaves the layers that FlexAttention serves to it.
    """
    if path == "plain":
        return LogitRows(_plain(model, groups), temperature)
    if path == "padded":
        hidden = _padded(model, groups)
    else:
        hidden, _ = shared_hidden(decoder_of(model), pack(groups, device_of(model)), by_flex=by_flex)
    return HiddenRows(hidden, head_of(model), temperature)


def decoder_of(model: nn.Module) -> nn.Module:
    """The part of the model that ends in hidden states. Raises CannotTile if it cannot be told from the head."""
    decoder: nn.Module | None = model.get_decoder()  # pyright: ignore[reportCallIssue, reportAssignmentType]
    # Some classes name their decoder so that transformers does not find it, and answers with the whole model.
    if getattr(decoder, "lm_head", None) is not None:
        decoder = getattr(decoder, "model", None)
    elif isinstance(decoder, nn.Linear):  # and some call their head so
        decoder = getattr(model, "model", None)
    if decoder is None:
        raise CannotTile("its decoder cannot be told from its head")
    return decoder


def _padded(model: nn.Module, groups: Sequence[Group]) -> Float[Tensor, "rows hidden"]:
    decoder, device = decoder_of(model), device_of(model)
    batches = pad(groups, device, token_budget=_PADDED_TOKENS)
    # Padding is on the right and the model is causal, so no real token sees it: no attention mask is needed.
    hidden = [
        decoder(input_ids=batch.input_ids, use_cache=False)[0].flatten(0, 1).index_select(0, batch.predictors)
        for batch in batches
    ]
    return _in_order(hidden, batches, groups)


def _plain(model: nn.Module, groups: Sequence[Group]) -> Float[Tensor, "rows vocab"]:
    batches = pad(groups, device_of(model), token_budget=0)
    # Rows are counted from the end: a prompt-tuned model puts positions of its own in front.
    logits = [
        model(input_ids=batch.input_ids, use_cache=False).logits[0, -len(batch.predictors) :] for batch in batches
    ]
    return _in_order(logits, batches, groups)


def _in_order(parts: list[Tensor], batches: list[PaddedRows], groups: Sequence[Group]) -> Tensor:
    lengths = frame(groups, torch.device("cpu")).lengths
    pieces: list[Tensor] = [parts[0]] * len(lengths)
    for part, batch in zip(parts, batches, strict=True):
        for response, piece in zip(batch.responses, part.split([lengths[i] for i in batch.responses]), strict=True):
            pieces[response] = piece
    return torch.cat(pieces)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off and no gradient inside the block; every module gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
