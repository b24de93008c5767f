"""The layers below the first one that a model does not share with its reference: they run once for both.

Where the reference is the model in another state (its adapter off) and only the top layers are adapted, all below them
computes the same for both. The reference's pass comes first and keeps what leaves these layers; the model's pass takes
it and leaves them out, with all that activation checkpointing would compute of them again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distalign.engine.forward import decoder_of, device_of
from distalign.engine.lm_head import HiddenRows

logger = logging.getLogger("distalign.engine")

# Whether a model gave the very same rows with so many layers left out, in training mode or not.
_TRIED: WeakKeyDictionary[nn.Module, dict[tuple[int, bool], bool]] = WeakKeyDictionary()


class Below:
    """The lower layers that a model shares with its reference: `keep` in the reference's pass, `take` in the model's.

    A layer is shared if it, all layers below it and all that is not in a layer (embeddings, the last norm) are frozen,
    draw no random numbers in the mode they are in, and hold in the reference's context what they held when this object
    was made. A layer that is watched (hooks), replaced (a `forward` of its own) or compiled is never left out.
    """

    def __init__(self, model: Any) -> None:
        self.layers: list[nn.Module] = []
        self.output: Float[Tensor, "1 tokens hidden"] | None = None
        self.model = model
        decoder, count = decoder_of(model), model.config.get_text_config().num_hidden_layers
        lists = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
        layers = list(lists[0]) if len(lists) == 1 else []
        inside = {id(module) for layer in layers for module in layer.modules()}
        self._around = [module for module in decoder.modules() if id(module) not in inside]
        frozen = list(takewhile(_can_be_left_out, layers)) if _is_constant(self._around) else []
        self._before = [(layer, _held(layer.modules())) for layer in frozen]
        self._before_around = _held(self._around)

    @contextmanager
    def keep(self) -> Iterator[None]:
        """Keep what leaves the shared layers in the pass inside the block, in the context of a reference."""

        def keep(layer: nn.Module, inputs: Any, output: Any) -> None:
            self.output = output if isinstance(output, Tensor) else None

        if _same(self._before_around, _held(self._around)):
            shared = takewhile(lambda pair: _same(pair[1], _held(pair[0].modules())), self._before)
            self.layers = [layer for layer, _ in shared]
        handles = [layer.register_forward_hook(keep) for layer in self.layers[-1:]]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def take(self, rows: Callable[[], Any]) -> Any:
        """What `rows()` gives, the model's own pass over the same row, without the shared layers.

        Whether it can do without is tried at first: not a bit of the result may change.
        """
        if self.output is None:
            return rows()
        tried = _TRIED.setdefault(self.model, {})
        key = (len(self.layers), self.model.training)
        if key not in tried:
            tried[key] = self._try(rows)
        if not tried[key]:
            return rows()
        with self._left_out(self.output):
            return rows()

    def _try(self, rows: Callable[[], HiddenRows]) -> bool:
        device = device_of(self.model)

        def hidden() -> Tensor:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                return rows().hidden.detach()

        expected = hidden()
        assert self.output is not None
        try:
            with self._left_out(self.output):
                same = torch.equal(hidden(), expected)
            reason = "the result differs"
        except torch.OutOfMemoryError:
            raise
        except Exception as problem:
            # Foreign code missed what a lower layer was to leave for a later one; whatever it raises means the same.
            same, reason = False, f"{type(problem).__name__}: {problem}"
        if not same:
            logger.info("the reference shares no layers with the policy: without them, %s", reason)
        return same

    @contextmanager
    def _left_out(self, output: Tensor) -> Iterator[None]:
        def forward(*inputs: Any, **named: Any) -> Tensor:
            # Reentrant checkpointing above finds no gradient unless its input asks for one.
            wanted = any(isinstance(value, Tensor) and value.requires_grad for value in inputs)
            return output.detach().requires_grad_(wanted)

        try:
            for layer in self.layers:
                layer.forward = forward
            yield
        finally:
            for layer in self.layers:
                vars(layer).pop("forward", None)


def _can_be_left_out(layer: nn.Module) -> bool:
    watched = any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules())
    return not watched and "forward" not in vars(layer) and _is_constant(layer.modules())


def _is_constant(modules: Iterable[nn.Module]) -> bool:
    """Whether nothing in these modules is trained, compiled or random in its mode."""
    return not any(
        module._compiled_call_impl is not None
        or any(p is not None and p.requires_grad for p in module._parameters.values())
        or (module.training and any(_is_rate(module, name, value) for name, value in vars(module).items()))
        for module in modules
    )


def _is_rate(module: nn.Module, name: str, value: Any) -> bool:
    named = "drop" in name or "jitter" in name or (name == "p" and "Dropout" in type(module).__name__)
    return named and isinstance(value, (int, float)) and value > 0


def _held(modules: Iterable[nn.Module]) -> list[Any]:
    """Every object that the modules hold, by name, but the mode they are in; how often each tensor was written to."""
    found: list[Any] = []
    for module in modules:
        for name, value in vars(module).items():
            if name != "training":
                found.append(name)
                found.extend(value.values() if isinstance(value, dict) else [value])
                found.extend(value if isinstance(value, (list, tuple, set)) else [])
    return found + [o._version for o in found if isinstance(o, Tensor) and not o.is_inference()]


def _same(before: list[Any], now: list[Any]) -> bool:
    # Numbers are equal where they are not the same object.
    return len(before) == len(now) and all(
        a is b or (type(a) is type(b) is int and a == b) for a, b in zip(before, now, strict=True)
    )
