"""Memory of training: what a run will need, what is free, and what the backward pass computes again to need less.

The estimate is one line before the first step, and the advice in an out-of-memory message. What autograd keeps of a
micro-batch is by far the largest part of it: it is measured on two micro-batches of a few tokens, and grows linearly.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from distalign.engine.forward import device_of
from distalign.engine.lm_head import KEPT, output_layer, tile_shape
from distalign.engine.packing import Group

# Tokens of the longest group in the smaller of the two measured micro-batches; the other has twice as many.
_PROBE = 24
# Blocks of logits that are alive at once: with a KL to a reference, both models' and what is derived of them.
_TILES = 4
# A process takes more of a CPU's heap than torch asked for: 1.1 to 2.5 times as much was measured, in gaps.
_GAPS = 1.5
_OUT_OF_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "MPS backend out of memory")
LESS = (
    "less is needed with recompute: selective or full, an adapter (lora), shorter prompts and responses, or dtype "
    "bfloat16"
)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that training needs, and `free`, what there is beside the weights (None if the system does not say).

    weights: all models in memory. gradients, optimizer (None: unknown): of what is trained. per_token, fixed: of a
    micro-batch. tokens: of the largest micro-batch that will come. longest: of the largest group, which is never split.
    """

    weights: int
    gradients: int
    optimizer: int | None
    fixed: float
    per_token: float
    tokens: int
    longest: int
    free: int | None

    def micro_batch(self, tokens: int) -> int:
        """What a micro-batch of that many tokens takes."""
        return round(self.fixed + self.per_token * tokens)

    def needed(self, tokens: int) -> int:
        """All that comes on top of the weights while a micro-batch of that many tokens is trained on."""
        return self.gradients + (self.optimizer or 0) + self.micro_batch(tokens)

    def largest_budget(self) -> int | None:
        """The largest `token_budget` that fits (two digits); 0 if the longest group alone does not; None: unknown."""
        if self.free is None or self.per_token <= 0:
            return None
        most = int((self.free - self.needed(0)) // self.per_token)
        if most < self.longest:
            return 0
        unit = 10 ** max(len(str(most)) - 2, 0)
        return max(most // unit * unit, self.longest)

    def __str__(self) -> str:
        largest = self.largest_budget()
        optimizer = "unknown" if self.optimizer is None else _gb(self.optimizer)
        free = "an unknown number of" if self.free is None else _gb(self.weights + self.free)
        return (
            f"memory: weights {_gb(self.weights)} GB, gradients {_gb(self.gradients)}, "
            f"optimizer {optimizer}, micro-batch of {self.tokens} tokens "
            f"{_gb(self.micro_batch(self.tokens))}: {_gb(self.weights + self.needed(self.tokens))} of {free} GB"
            + (f"; the largest token_budget that fits is {largest:,}" if largest else "")
        )

    def fits(self) -> bool:
        """Whether the largest micro-batch fits; True where that cannot be known."""
        return self.free is None or self.needed(self.tokens) <= self.free

    def advice(self, tokens: int | None = None) -> str:
        """What to set: the budget that fits, or, if `tokens` tokens were too many, at most half of them."""
        largest = self.largest_budget()
        if tokens is not None:
            half = max(tokens // 2, self.longest)
            largest = 0 if tokens <= self.longest else half if largest is None else min(half, largest)
        if largest:
            return f"set token_budget to {largest} or less; {LESS}"
        return (
            f"no token_budget helps: the longest prompt with its responses has {self.longest} tokens by itself; {LESS}"
        )


def estimate(
    model: nn.Module,
    forward: Callable[[list[Group]], Any],
    groups: Sequence[tuple[int, tuple[int, ...]]],
    *,
    token_budget: int,
    batch: int,
    free: int | None,
    state: float | None,
    resident: Sequence[nn.Module] = (),
) -> MemoryEstimate:
    """Measure what training `model` will need; modes, gradients and the random state are left as they were.

    `forward` scores groups as a training step does. `groups` are lengths, (prompt, responses), of those that will come,
    `batch` of them at a time at most. `state` is the optimizer's bytes per byte of trained parameters (None: unknown);
    `resident` are the other models in memory. Of sharded weights this process's share counts.
    Raises ValueError if there are no groups.
    """
    if not groups:
        raise ValueError("estimate: no groups; give the lengths of what will be trained on.")
    sizes = sorted(prompt + sum(responses) for prompt, responses in groups)
    prompt, responses = max(groups, key=lambda group: group[0] + sum(group[1]))
    share = min(1.0, _PROBE / sizes[-1])
    small = (max(1, round(prompt * share)), tuple(max(2, round(length * share)) for length in responses))
    large = (2 * small[0], tuple(2 * length for length in small[1]))
    (few, kept_few), (many, kept_many) = (
        (_size(group), _saved_bytes(model, forward, group)) for group in (small, large)
    )
    per_token = max(0.0, (kept_many - kept_few) / (many - few))
    weight = output_layer(model).weight
    assert isinstance(weight, Tensor)
    device = device_of(model)
    trained = _bytes(parameter for parameter in model.parameters() if parameter.requires_grad)
    tokens = max(sizes[-1], min(token_budget, sum(sizes[-batch:])))
    rows, width = tile_shape(tokens, len(weight), device)
    head = 4 * weight.numel() if weight.requires_grad else 0
    gaps = _GAPS if device.type == "cpu" else 1.0
    return MemoryEstimate(
        weights=_bytes(t for module in (model, *resident) for t in (*module.parameters(), *module.buffers())),
        gradients=trained,
        optimizer=None if state is None else round(state * trained),
        fixed=gaps * max(0.0, kept_few - per_token * few) + head + (KEPT if head else 0) + 4 * _TILES * rows * width,
        per_token=gaps * per_token,
        tokens=tokens,
        longest=sizes[-1],
        free=free,
    )


def _size(lengths: tuple[int, tuple[int, ...]]) -> int:
    return lengths[0] + sum(lengths[1])


def _saved_bytes(model: nn.Module, forward: Callable[[list[Group]], Any], lengths: tuple[int, tuple[int, ...]]) -> int:
    """Bytes that autograd keeps of one pass over a group of these lengths, in training mode, parameters left out."""
    parameters = {_storage(t).data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: list[weakref.ref[Any]] = []

    def pack(tensor: Tensor) -> Tensor:
        # A sparse one has no storage.
        if tensor.layout == torch.strided:
            saved.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    group = Group([0] * lengths[0], [[0] * length for length in lengths[1]])
    device, modes = device_of(model), [(module, module.training) for module in model.modules()]
    try:
        model.train()
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad(), hooks:
            scores = forward([group])
    finally:
        for module, training in modes:
            module.training = training
    # Parts of the graph that lead nowhere are gone by now.
    alive = {storage.data_ptr(): storage.nbytes() for ref in saved if (storage := ref()) is not None}
    del scores
    return sum(size for address, size in alive.items() if address not in parameters)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages, those that are shared once."""
    return sum({storage.data_ptr(): storage.nbytes() for storage in map(_storage, tensors)}.values())


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    """Where a tensor is, or this process's share of it."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()


def _gb(size: int) -> str:
    size_gb = size / 1e9
    return f"{size_gb:.0f}" if size_gb >= 10 else f"{size_gb:.1f}" if size_gb >= 1 else f"{size_gb:.2f}"


def out_of_memory(error: BaseException) -> bool:
    """Whether torch found no memory, on any device."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(s in str(error) for s in _OUT_OF_MEMORY)


def asked_for(error: BaseException) -> str:
    """How much more memory was asked for, in brackets, if the error says so."""
    match = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
    return f" ({match[1]} more were asked for)" if match else ""


# What is free ---------------------------------------------------------------------------------------------------------


def available(device: torch.device, *, root: Path = Path("/")) -> int | None:
    """Bytes that can still be allocated on `device`; None where that is not known.

    An accelerator's free memory and what torch's cache holds unused; on a CPU what the kernel calls available, or what
    the control group leaves of its limit (versions 1 and 2) if that is less. `root` is where /proc and /sys are.
    """
    if device.type == "cpu":
        limits = [_machine(root), *_groups(root)]
        return min((limit for limit in limits if limit is not None), default=None)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    module: Any = torch.get_device_module(device)
    if not hasattr(module, "mem_get_info"):
        return None
    free, _ = module.mem_get_info(device)
    return free + module.memory_reserved(device) - module.memory_allocated(device)


def _machine(root: Path) -> int | None:
    meminfo = root / "proc/meminfo"
    if not meminfo.is_file():
        return None
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else None


def _groups(root: Path) -> list[int]:
    """What every control group that this process is in, and every one above, leaves of its limit."""
    own = root / "proc/self/cgroup"
    if not own.is_file():
        return []
    found: list[int] = []
    for line in own.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts) + 1):
            left = _left(base.joinpath(*parts[:depth]), *names)
            found += [] if left is None else [left]
    return found


def _left(group: Path, limit: str, usage: str, cache: str) -> int | None:
    """Limit − usage, file cache that can be dropped not counted; None where there is no limit."""
    # Inside a container the path of the host is not there; its own limit is at the top.
    if not (group / limit).is_file() or not (group / usage).is_file():
        return None
    most = (group / limit).read_text().strip()
    # Version 1 writes "no limit" as a number close to 2^63.
    if most == "max" or int(most) >= 2**62:
        return None
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(most) - int((group / usage).read_text()) + int(stat.get(cache, 0))


# What the backward pass computes again --------------------------------------------------------------------------------

# Nothing; all but matrix products and attention ("selective"); or whole layers ("full"). Per token and layer a Llama
# keeps about twice as many numbers as its matrix products and attention put out; the rest (norms, rotations, activation
# functions, copies) is cheap to compute again. "full" keeps the input of each layer and pays one more forward pass.
Recompute = Literal["none", "selective", "full"]

_aten = torch.ops.aten
_EXPENSIVE = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten._grouped_mm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.higher_order.flex_attention,
}


def set_recompute(model: Any, recompute: Recompute) -> None:
    """Choose what `model` computes again in its backward pass; it applies while the model is in training mode.

    Raises ValueError if the model's class does not support it.
    """
    switch = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    off = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    if recompute == "none":
        if recomputes(model):
            off()
        return
    switch({"use_reentrant": False, **({"context_fn": _contexts} if recompute == "selective" else {})})
    # The switch makes the embedding's output require a gradient, which the other kind of checkpointing needs; here it
    # would only send the backward pass through frozen layers below an adapter.
    model.disable_input_require_grads()


def recomputes(model: nn.Module) -> bool:
    """Whether some layers of the model are computed again in its backward pass."""
    return any(getattr(m, "gradient_checkpointing", False) or "checkpoint_fn" in vars(m) for m in model.modules())


def _contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: object, operation: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    # Products with 4-bit weights are operations of bitsandbytes.
    expensive = operation in _EXPENSIVE or getattr(operation, "namespace", "") == "bitsandbytes"
    return CheckpointPolicy.MUST_SAVE if expensive else CheckpointPolicy.PREFER_RECOMPUTE
