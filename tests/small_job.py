"""The benchmarks' sides on a model and a workload that take no time; spawned processes import it from here."""

from __future__ import annotations

from typing import Any

import sides
import tiny
from common import DTYPES, Workload

SHORT = {"tldr": Workload((20, 30), (5, 9)), "group8": Workload((20, 30), (5, 9), responses=8)}


def model() -> Any:
    """A few thousand weights, with more words than a workload's least id."""
    return tiny.model(vocab_size=400, initializer_range=0.1)


class SmallJob(sides.Job):
    """A job whose model and ids are small, whatever their names."""

    def load(self) -> Any:
        """The model, where it is trained."""
        return model().to(self.device, DTYPES[self.dtype])

    @property
    def shape(self) -> Workload:
        """Short prompts and responses."""
        return SHORT["group8" if self.workload == "rounds" else self.workload]
