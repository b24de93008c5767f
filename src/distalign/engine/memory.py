"""What training takes, in bytes: measured on micro-batches of a few tokens, before there is a large one.

    resident    weights
    per step    gradients + optimizer state + tiles of the head
    per token   what autograd keeps of a micro-batch, by far the largest part of a long one

What is kept depends on the family, the attention, adapters, dtypes and activation checkpointing, but on the lengths in
one way only: it is linear in the features of `_features`. A few passes of the very model over a dozen tokens therefore
give the coefficients exactly.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distalign.engine.available import spread
from distalign.engine.forward import device_of
from distalign.engine.packing import Group
from distalign.engine.recompute import recomputes
from distalign.engine.scoring import Scores
from distalign.engine.selfcheck import check
from distalign.engine.tiles import KEPT, tile_shape

# Lengths of a group: its prompt, and each of its responses.
Shape = tuple[int, tuple[int, ...]]

# Prompts and inputs of responses of the probes, in units of a few tokens: as many as tell the features apart.
_PROBES: tuple[tuple[Shape, ...], ...] = (
    ((1, (1,)),),
    ((2, (1,)),),
    ((3, (1,)),),
    ((2, (0,)),),
    ((2, (2,)),),
    ((2, (1, 1)),),
    ((1, (1,)), (1, (1,))),
)
# Blocks of logits that are alive at once: with a KL to a reference, both models' and what is derived of them.
_TILES = 4
# Tokens of the pass that is followed backwards.
_FOLLOWED = 48
_MOST_TOKENS = 10**9


@dataclass(frozen=True)
class Memory:
    """Bytes that training needs. `needs(tokens)` comes on top of `weights`, which are there when it starts.

    weights: all models in memory. gradients: of what is trained. optimizer: its state, None where it is not known.
    head: the gradient of a trained head on its way. kept: logits per token that would wait for the backward pass, were
    there room. fixed, per_token: of a micro-batch. tokens: of the largest micro-batch that will come. longest: of the
    largest group, which is never split. spread: bytes that the process takes for a byte of a micro-batch.
    """

    weights: int
    gradients: int
    optimizer: int | None
    head: int
    kept: float
    fixed: float
    per_token: float
    tokens: int
    longest: int
    vocabulary: int
    device: torch.device
    spread: float = 1.0

    def micro_batch(self, tokens: int) -> int:
        """What autograd keeps of a micro-batch of that many tokens takes."""
        return round((self.fixed + self.per_token * tokens) * self.spread)

    def tiles(self, tokens: int) -> int:
        """Blocks of logits, those that are kept, and the gradient of a trained head on its way."""
        rows, width = tile_shape(tokens, self.vocabulary, self.device)
        tile = rows * min(width, self.vocabulary) * torch.float32.itemsize
        kept = min(KEPT, round(self.kept * tokens))
        # A CPU's memory is taken as it is written, and the gradient is written as the kept blocks go.
        together = max(self.head, kept) if self.device.type == "cpu" else self.head + kept
        return together + _TILES * tile

    def needs(self, tokens: int) -> int:
        """All that is allocated while a micro-batch of that many tokens is trained on."""
        return self.gradients + (self.optimizer or 0) + self.tiles(tokens) + self.micro_batch(tokens)

    def largest_budget(self, available: int | None) -> int | None:
        """The largest `token_budget` that fits, two digits of it; 0 if the longest group alone does not.

        None if what is available is not known.
        """
        if available is None:
            return None
        most = bisect_right(range(1, _MOST_TOKENS), available, key=self.needs)
        if most < self.longest:
            return 0
        unit = 10 ** max(len(str(most)) - 2, 0)
        return max(most // unit * unit, self.longest)


def estimate(
    model: nn.Module,
    forward: Callable[[list[Group]], Scores],
    shapes: Iterable[Shape],
    *,
    token_budget: int,
    batch: int,
    resident: Sequence[nn.Module] = (),
    optimizer: float | None = None,
) -> Memory:
    """Measure what training `model` will need; modes, gradients and the random state are left as they were.

    `forward` scores groups as a training step does. `shapes` are those of the groups that will come, `batch` of them
    at a time at most. `resident` are the other models in memory. `optimizer` is its state in bytes per byte of trained
    parameters (2 for AdamW), None if it is not known. Raises ValueError if there are no shapes.
    """
    known = list(shapes)
    if not known:
        raise ValueError("estimate: no shapes of groups; give the lengths of what will be trained on.")
    sizes = sorted(map(_tokens, known))
    path = check(model).path
    trained = _bytes(p for p in model.parameters() if p.requires_grad)
    head: Any = model.get_output_embeddings()  # pyright: ignore
    tiled = path != "plain" and head.weight.requires_grad
    coefficients = _coefficients(model, forward, path)
    per_token, heaviest = max((_price(coefficients, _features(one, path)) / _tokens(one), one) for one in set(known))
    factor = _recomputed(model, forward, heaviest) if recomputes(model) else 1.0
    return Memory(
        weights=_bytes(tensor for module in (model, *resident) for tensor in _tensors(module)),
        gradients=trained,
        optimizer=None if optimizer is None else round(optimizer * trained),
        head=head.weight.numel() * torch.float32.itemsize if tiled else 0,
        kept=_logits(known, head.weight) if tiled and not recomputes(model) else 0.0,
        fixed=float(coefficients[0]),
        per_token=per_token * factor,
        tokens=max(sizes[-1], min(token_budget, sum(sizes[-batch:]))),
        longest=sizes[-1],
        vocabulary=len(head.weight),
        device=device_of(model),
        spread=spread(device_of(model)),
    )


def _tokens(shape: Shape) -> int:
    return shape[0] + sum(shape[1])


def _logits(shapes: Iterable[Shape], weight: Tensor) -> float:
    """Bytes of logits per token, in the group that has most."""
    return max(sum(shape[1]) / _tokens(shape) for shape in shapes) * len(weight) * torch.float32.itemsize


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages, those that are shared once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


# What autograd keeps --------------------------------------------------------------------------------------------------


def _features(shape: Shape, path: str) -> list[int]:
    """What the bytes of one group are linear in.

    Where the prompt is shared: its tokens, inputs of responses, responses, keys that they attend to (the prompt's
    are copied for each), and areas of attention, theirs and the prompt's. Elsewhere: sequences (padded to the longest
    of the group), their tokens, inputs of responses, areas.
    """
    prompt, inputs = shape[0], [length - 1 for length in shape[1]]
    if path == "shared":
        keys = [(n, prompt + n) for n in inputs if n]
        areas = [sum(n * m for n, m in keys), prompt**2]
        return [prompt, sum(inputs), len(inputs), sum(m for _, m in keys), *areas]
    long = [prompt + (max(inputs) if path == "padded" else n) for n in inputs]
    return [len(long), sum(long), sum(inputs), sum(m * m for m in long)]


def _price(coefficients: Tensor, features: list[int]) -> float:
    return float(coefficients[1:] @ coefficients.new_tensor(features))


def _coefficients(model: nn.Module, forward: Callable[[list[Group]], Scores], path: str) -> Tensor:
    """Bytes per unit of each feature; the first belongs to a micro-batch as a whole."""
    unit, found, kept = _unit(model), [], []
    for probe in _PROBES:
        # A padded batch of one sequence is kept differently from one of several.
        probe *= 2 if path == "padded" else 1
        shapes = [(p * unit, tuple(n * unit + 1 for n in inputs)) for p, inputs in probe]
        kept.append(saved_bytes(model, forward, shapes))
        found.append([1, *(sum(column) for column in zip(*(_features(one, path) for one in shapes), strict=True))])
    a, b = (torch.tensor(values, dtype=torch.float64) for values in (found, kept))
    return torch.linalg.lstsq(a, b[:, None]).solution[:, 0]


def _unit(model: Any) -> int:
    """Tokens of a unit: as few as can be where they cost time, enough for the alignment of an accelerator's kernels."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1024
    return 3 if device_of(model).type == "cpu" else max(3, min(32, positions // 8))


def saved_bytes(model: nn.Module, forward: Callable[[list[Group]], Scores], shapes: Sequence[Shape]) -> int:
    """Bytes that autograd keeps of one pass over groups of these shapes, in training mode, parameters left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in _tensors(model)}
    packed: list[weakref.ref[Any]] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    with _as_trained(model), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        scores = forward(_groups(model, shapes))
        # Parts of the graph that lead nowhere are gone by now.
        kept = {storage.data_ptr(): storage.nbytes() for ref in packed if (storage := ref()) is not None}
        del scores
    return sum(size for address, size in kept.items() if address not in own)


@contextmanager
def _as_trained(model: nn.Module) -> Iterator[None]:
    """Training mode and gradients inside the block; modes and the random state are put back."""
    modes = [(module, module.training) for module in model.modules()]
    device = device_of(model)
    try:
        model.train()
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _groups(model: Any, shapes: Sequence[Shape]) -> list[Group]:
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> list[int]:
        return torch.randint(len(model.get_input_embeddings().weight), (count,), generator=generator).tolist()

    return [Group(draw(prompt), [draw(length) for length in lengths]) for prompt, lengths in shapes]


# What is computed again -----------------------------------------------------------------------------------------------


def _recomputed(model: nn.Module, forward: Callable[[list[Group]], Scores], shape: Shape) -> float:
    """Activation checkpointing: how far what is alive in the backward pass exceeds what was kept, on a smaller group.

    Layers are computed again there one after another, each with all its activations.
    """
    share = min(1.0, _FOLLOWED / _tokens(shape))
    small = (max(1, round(shape[0] * share)), tuple(max(2, round(length * share)) for length in shape[1]))
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = [p.grad for p in trained]
    # Gradients are let go at once: what they take is known, and no room is needed for them here.
    hooks = [p.register_post_accumulate_grad_hook(_forget_gradient) for p in trained]
    try:
        for p in trained:
            p.grad = None
        with _as_trained(model), _Alive(_counted_elsewhere(model, sum(small[1]))) as alive:
            scores = forward(_groups(model, [small]))
            asked = [scores.token_logps, scores.step_entropy, scores.step_kl, scores.values]
            torch.stack([one.sum() for one in asked if one is not None]).sum().backward()
    finally:
        for hook in hooks:
            hook.remove()
        for p, gradient in zip(trained, gradients, strict=True):
            p.grad = gradient
    # Selective checkpointing keeps results that autograd does not know of: they are among what is alive.
    return max(1.0, alive.most / saved_bytes(model, forward, [small]))


def _counted_elsewhere(model: Any, rows: int) -> set[tuple[int, ...]]:
    """Shapes of gradients of parameters, and of a block of logits with its part of the head."""
    weight = model.get_output_embeddings().weight
    vocabulary, hidden = weight.shape
    found = {tuple(sorted(p.shape)) for p in model.parameters() if p.requires_grad}
    if check(model).path != "plain":
        block, width = tile_shape(rows, vocabulary, weight.device)
        for height in {block, rows % block}:
            for columns in {width, vocabulary % width}:
                found |= {tuple(sorted((height, columns))), tuple(sorted((columns, hidden)))}
    return found


def _forget_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class _Alive(TorchDispatchMode):
    """Bytes of tensors that were made inside and still live: `now`, and `most` at any time.

    Tensors of the shapes in `leave_out`, each in ascending order, do not count.
    """

    def __init__(self, leave_out: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._leave_out, self._known = leave_out, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(tensor.untyped_storage()) for tensor in _leaves((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for tensor in _leaves(out):
            storage = tensor.untyped_storage()
            key, size = id(storage), storage.nbytes()
            if key in given or key in self._known or tuple(sorted(tensor.shape)) in self._leave_out:
                continue
            self._known.add(key)
            weakref.finalize(storage, self._gone, key, size)
            self.now += size
            self.most = max(self.most, self.now)
        return out

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _leaves(tree: Any) -> list[Tensor]:
    """Tensors with a storage: an embedding may be set to give sparse gradients."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.layout == torch.strided]
