"""The benchmarks' sides on a model and a workload that take no time; other processes import it from here."""

from __future__ import annotations

import multiprocessing
from typing import Any

import sides
import tiny
from common import DTYPES, Workload

# Sides start from a process that has imported what is ours: it is most of what they do here.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["distalign.training.trainer", "distalign.rewards"])

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
