"""How a pass of the policy runs: inside the forward of whatever wraps it, with whole weights where it needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import Trainer

from distalign.methods import Needs
from distalign.models.policy import Policy
from distalign.training.processes import Processes

T = TypeVar("T")


class WrappedTrainer(Trainer):
    """What `AlignmentTrainer` knows of the wrapper that its policy is trained in, and of the shares of its weights."""

    policy: Policy
    needs: Needs
    processes: Processes

    def run(self, function: Callable[[], T], *, gradient: bool = False) -> T:
        """Run a pass of the policy inside the forward of whatever wraps it, under accelerate's autocast."""
        # Of passes with gradient every process makes as many, and each layer meets the others' in its turn.
        with (
            nullcontext() if gradient else self.whole_weights(),
            torch.set_grad_enabled(gradient and torch.is_grad_enabled()),
        ):
            # accelerate's own autocast is around the forward that is redirected here.
            return redirect(self._wrapper, self.policy.model, function, self.accelerator.autocast())

    @property
    def _wrapper(self) -> nn.Module:
        """The model as it is trained: in whatever wraps it."""
        assert isinstance(self.model_wrapped, nn.Module)
        return self.model_wrapped

    @property
    def is_sharded(self) -> bool:
        """Whether each process has a share of the weights."""
        return isinstance(self.model_wrapped, FSDPModule)

    @property
    def in_zero3(self) -> bool:
        """Whether DeepSpeed deals the weights."""
        plugin = self.args.deepspeed_plugin
        return plugin is not None and plugin.zero_stage == 3 and self._wrapper is not self.policy.model

    def whole_weights(self) -> AbstractContextManager[None]:
        """While it lasts every process has all weights, where each has a share of them otherwise."""
        if self.in_zero3:
            return unpartitioned(self._wrapper, self.policy.model)
        return gathered(self.policy.model, self.policy.reference) if self.is_sharded else nullcontext()

    def _weights_for_gradients(self) -> AbstractContextManager[None]:
        """FSDP2 deals weights layer by layer, in passes and backwards; ZeRO-3 cannot, for the engine reads the head."""
        if self.in_zero3:
            return self.whole_weights()
        # The gradient of a full KL reads the head of the reference again.
        return gathered(self.policy.reference) if self.is_sharded and self.needs.kl else nullcontext()

    @contextmanager
    def _meeting(self, *, last: bool) -> Iterator[None]:
        """Gradients of several processes meet in the last pass of a step; DeepSpeed makes its step there, too."""
        accelerator, before = self.accelerator, self.accelerator.sync_gradients
        if self.processes.count == 1 or (last and before):
            yield
            return
        accelerator.sync_gradients = False
        try:
            # FSDP2 adds to its shares in every pass: until the last one, gradients would be whole on each device.
            with nullcontext() if self.is_sharded else accelerator.no_sync(self._wrapper):
                yield
        finally:
            accelerator.sync_gradients = before


def redirect(
    wrapper: nn.Module, model: nn.Module, function: Callable[[], T], context: AbstractContextManager[object]
) -> T:
    """Call `function` inside the forward of `wrapper`, which is `model` or wraps it, and return what it returns.

    Whatever the wrapper does around a forward (DDP, FSDP2, hooks) it does around the function. `model.forward` is
    itself again while the function runs, in `context`. With gradients, the result must be something in which the
    wrapper finds the tensors (DDP: tensors, sequences, dictionaries and dataclasses of them).
    """
    before = vars(model).get("forward")

    def restore() -> None:
        if before is None:
            vars(model).pop("forward", None)
        else:
            model.forward = before

    def forward(_: None) -> T:
        restore()
        with context:
            return function()

    model.forward = forward
    try:
        # DDP on a GPU cannot do without any argument.
        return wrapper(None)
    finally:
        restore()


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
def unpartitioned(engine: nn.Module, model: nn.Module) -> Iterator[None]:
    """As `gathered`, for `model` in an engine of DeepSpeed's ZeRO-3; its gradients are dealt all the same."""
    from deepspeed.runtime.zero.stage3 import unwrap_model_for_generation  # pyright: ignore[reportMissingImports]

    with unwrap_model_for_generation(engine):
        # Until two passes have ended DeepSpeed compares them between processes, which make as many as they like here.
        for _ in range(2):
            redirect(model, model, lambda: None, nullcontext())
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
