"""Who samples the responses: this process, or a server (`rollout/vllm.py`) behind the same two functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from distalign.rollout.sample import sample


@runtime_checkable
class Backend(Protocol):
    """Samples `n` responses to every prompt, as token ids: result[prompt][response].

    A response ends with `end_id`, or has `max_new_tokens` tokens and no end, as in `sample`. The model's weights, mode
    and attention and the global random state are afterwards what they were. `progress(done, total)` counts prompts.
    """

    @property
    def constants(self) -> dict[str, Tensor]:
        """What the backend itself says of the responses drawn last: tensors with a row for each."""
        ...

    def sync(self, model: nn.Module, version: int | None) -> None:
        """Make ready to sample from `model`, whose weights are `version` of the run; None: they are the reference's."""
        ...

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
    constants: dict[str, Tensor] = field(default_factory=dict, init=False)

    def sync(self, model: nn.Module, version: int | None) -> None:
        """Nothing: the model is here."""

    def generate(self, model: nn.Module, prompts: Sequence[list[int]], **settings: Any) -> list[list[list[int]]]:
        """`sample` with these settings."""
        return sample(model, prompts, rows=self.rows, **settings)
