"""Models whose weights are dealt to processes by FSDP2: whole where passes without gradient need them, and to save."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor


def shard(model: nn.Module) -> None:
    """Deal the weights of a model, layer by layer and then the rest, in place."""
    for layers in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for layer in layers:
            fully_shard(layer)
    fully_shard(model)


@contextmanager
def gathered(*models: object) -> Iterator[None]:
    """Every process has all weights of these models inside the block: its passes wait for nobody.

    A model that is not sharded stays as it is. Memory: the weights of the models, whole.
    """
    parts = [part for model in models if isinstance(model, nn.Module) for part in _parts(model)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part not in models, recurse=False)
            part.reshard()


@contextmanager
def unpartitioned(engine: nn.Module) -> Iterator[None]:
    """As `gathered`, for the model in an engine of DeepSpeed's ZeRO-3; its gradients are dealt all the same."""
    from deepspeed.runtime.zero.stage3 import unwrap_model_for_generation  # pyright: ignore[reportMissingImports]

    with unwrap_model_for_generation(engine):
        yield


def keep_outer_weights(model: nn.Module) -> None:
    """See to it that the weights outside of the layers stay after a forward: the head's gradient reads them again."""
    if isinstance(model, FSDPModule):
        model.set_reshard_after_forward(False, recurse=False)


def _parts(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def local(tensor: Tensor) -> Tensor:
    """A number of a sharded model as an ordinary tensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
