"""Who samples the responses: this process today; the interface is one function, so that a server fits behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import nn

from distalign.rollout.sample import sample


@runtime_checkable
class Backend(Protocol):
    """Samples `n` responses to every prompt, as token ids: result[prompt][response].

    A response ends with `end_id`, or has `max_new_tokens` tokens and no end, as in `sample`. The model's weights, mode
    and attention and the global random state are afterwards what they were. `progress(done, total)` counts prompts.
    """

    def generate(
        self,
        model: nn.Module,
        prompts: Sequence[list[int]],
        *,
        n: int,
        max_new_tokens: int,
        min_new_tokens: int = 0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        end_id: int,
        seed: int,
        numbers: Sequence[int] | None = None,
        progress: Callable[[int, int], Any] | None = None,
    ) -> list[list[list[int]]]:
        """Raises InputError for settings that this backend cannot honour."""
        ...


@dataclass(frozen=True)
class TransformersBackend:
    """`sample`, on any device; at most `rows` responses are decoded at once."""

    rows: int = 64

    def generate(self, model: nn.Module, prompts: Sequence[list[int]], **settings: Any) -> list[list[list[int]]]:
        """`sample` with these settings."""
        return sample(model, prompts, rows=self.rows, **settings)
