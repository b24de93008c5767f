"""Whether a run fits in memory: told before its first step, with the token budget that does; and what to do if not."""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from distalign.engine import Group, Scores
from distalign.engine.memory import Memory, Shape, estimate
from distalign.methods import Needs
from distalign.models.policy import Policy
from distalign.rewards import Reward
from distalign.training.rounds import Rollout, TrainingError

logger = logging.getLogger("distalign.training.trainer")

# Where the cache of responses and passes without gradient found no memory.
DRAWING = "out of memory while responses were drawn and scored; lower rollout.rows, token_budget or max_new_tokens"

_OUT_OF_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "MPS backend out of memory")
_LESS = (
    "less is needed with recompute: selective or full, an adapter (lora), shorter prompts and responses, or dtype "
    "bfloat16"
)
_HEAP = "MALLOC_MMAP_THRESHOLD_=65536 in the environment keeps blocks out of a heap with gaps, for some time"


@dataclass(frozen=True)
class Room:
    """What a run needs, and what there is for it: `free` bytes, None if the system does not tell."""

    label: str
    memory: Memory
    free: int | None

    def tell(self) -> None:
        """One line with the parts, in GB (10⁹ bytes); and a warning that names the budget to set if they do not fit.

        Not a refusal: an estimate errs, and the system may make room.
        """
        memory, tokens, free = self.memory, self.memory.tokens, self.free
        optimizer = "unknown" if memory.optimizer is None else _gb(memory.optimizer)
        there = "an unknown number of" if free is None else _gb(memory.weights + free)
        largest = memory.largest_budget(free)
        logger.info(
            "memory: weights %s GB, gradients %s, optimizer %s, micro-batch of %d tokens %s, tiles %s: %s of %s GB%s",
            _gb(memory.weights), _gb(memory.gradients), optimizer, tokens, _gb(memory.micro_batch(tokens)),
            _gb(memory.tiles(tokens)), _gb(memory.weights + memory.needs(tokens)), there,
            f"; the largest token_budget that fits is {largest:,}" if largest else "",
        )  # fmt: skip
        if free is not None and largest is not None and memory.needs(tokens) > free:
            logger.warning("%s is likely to run out of memory: %s", self.label, self._advice(largest))

    def _advice(self, budget: int) -> str:
        less = f"{_LESS}; {_HEAP}" if self.memory.spread > 1 else _LESS
        if budget:
            return f"set token_budget to {budget} or less; {less}"
        longest = self.memory.longest
        return (
            f"no token_budget helps, for the longest prompt with its responses has {longest} tokens by itself; {less}"
        )

    @contextmanager
    def within(self, tokens: int, step: int, keep: Callable[[], str]) -> Iterator[None]:
        """Turn a lack of memory in a micro-batch of `tokens` tokens into a TrainingError that says what to set.

        `keep` saves the run as it was before this step and says where.
        """
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            # What the pass holds is let go, so that there is memory to save with.
            traceback.clear_frames(error.__traceback__)
            raise TrainingError(f"{self._without(error, tokens, step)}; {keep()}: go on with --resume") from error

    def _without(self, error: BaseException, tokens: int, step: int) -> str:
        asked = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
        found = f"{self.label}: out of memory at step {step}, in a micro-batch of {tokens} tokens"
        found += f" ({asked[1]} more were asked for)" if asked else ""
        if tokens <= self.memory.longest:
            return f"{found}; {self._advice(0)}"
        # Whatever the estimate said, this did not fit: half of it is the next to try.
        half, largest = max(tokens // 2, self.memory.longest), self.memory.largest_budget(self.free)
        return f"{found}; {self._advice(half if largest is None else min(half, largest))}"


def measure(
    label: str,
    policy: Policy,
    score: Callable[[list[Group]], Scores],
    rows: Sequence[Any],
    needs: Needs,
    rollout: Rollout | None,
    *,
    args: Any,
    token_budget: int,
    free: int | None,
) -> Room:
    """The room of a run on these rows, found before its first step. `score` scores groups as a step does.

    `args` are the TrainingArguments; `free` is what was available when training began.
    """
    memory = estimate(
        policy.model,
        score,
        expected_shapes(rows, needs, rollout),
        token_budget=token_budget,
        batch=args.per_device_train_batch_size,
        resident=list(_modules([policy.reference, None if rollout is None else rollout.reward])),
        optimizer=_optimizer_state(args, policy.model),
    )
    return Room(label, memory, free)


def expected_shapes(rows: Sequence[Any], needs: Needs, rollout: Rollout | None) -> list[Shape]:
    """The lengths of the groups of a run: labelled pairs as they are, drawn responses as long as they may become."""
    drawn: tuple[int, ...] = ()
    if rollout is not None and (needs.samples or needs.pairs == "sampled"):
        settings = rollout.settings
        # Pairs are made of what was drawn; the KL term may want fresh responses beside.
        sets = 1 + (needs.samples and needs.pairs == "sampled" and settings.stale == "resample")
        drawn = (settings.max_new_tokens,) * (settings.samples * sets)
    if needs.pairs != "labelled":
        return [(len(row.prompt), drawn) for row in rows]
    return [(len(row.prompt), (len(row.chosen), len(row.rejected), *drawn)) for row in rows]


def out_of_memory(error: BaseException) -> bool:
    """Whether torch found no memory, on any device."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(s in str(error) for s in _OUT_OF_MEMORY)


@contextmanager
def explained(label: str) -> Iterator[None]:
    """Turn a lack of memory outside micro-batches into a TrainingError.

    Nothing is saved then: the weights may be half-way through an update.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise TrainingError(
            f"{label}: out of memory outside a micro-batch, for the optimizer's state or in an evaluation "
            f"({' '.join(str(error).split())[:200]}); {_LESS}, or an optimizer with less state (training.optim)"
        ) from error


def _modules(thing: Any) -> Iterator[nn.Module]:
    """Models among some things, and those that rewards among them hold."""
    if isinstance(thing, nn.Module):
        yield thing
    elif isinstance(thing, list | tuple):
        for part in thing:
            yield from _modules(part)
    elif isinstance(thing, Reward):
        yield from _modules(list(getattr(thing, "__dict__", {}).values()))


def _optimizer_state(args: Any, model: nn.Module) -> float | None:
    """Bytes of state per byte of trained parameters, found on one small parameter; None where that cannot be told."""
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)  # pyright: ignore[reportArgumentType]
    whole = {"params", "model", "optimizer_dict"} & set(settings)
    if whole or not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        return None
    like = max((p for p in model.parameters() if p.requires_grad), key=lambda p: p.numel())
    small = nn.Parameter(torch.zeros(128, 128, dtype=like.dtype, device=like.device))
    small.grad = torch.zeros_like(small)
    optimizer = kind([small], **settings)
    optimizer.step()
    state = [value for value in optimizer.state[small].values() if isinstance(value, torch.Tensor)]
    return sum(value.nbytes for value in state if value.numel() > 1) / small.nbytes


def _gb(size: int) -> str:
    size_gb = size / 1e9
    return f"{size_gb:.0f}" if size_gb >= 10 else f"{size_gb:.1f}" if size_gb >= 1 else f"{size_gb:.2f}"
