"""The processes of a run: which share of the work is this one's, and what all of them know afterwards.

Every process has all rows, and after a round all of its responses, rewards and log-probabilities; what is dealt is the
work. So what a step is made of is the same for any number of processes, and files hold what one process would write.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, cast

from accelerate import PartialState
from accelerate.utils import gather_object
from torch import distributed

from distalign.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """Process number `rank` of `count`."""

    rank: int = 0
    count: int = 1

    @classmethod
    def here(cls) -> Processes:
        """Those that accelerate or torchrun started, once there are arguments of a training; they part at the end."""
        state = PartialState()
        if state.num_processes > 1:
            atexit.register(_part)
        return cls(state.process_index, state.num_processes)

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files and log lines."""
        return self.rank == 0

    def gather(self, value: Result) -> list[Result]:
        """What each process has, in the order of their numbers."""
        return gather_object([value]) if self.count > 1 else [value]

    @contextmanager
    def together(self) -> Iterator[None]:
        """All processes leave the block without an error, or all with one: none waits for another that has failed."""
        if self.count == 1:
            yield
            return
        failed: Exception | None = None
        try:
            yield
        except Exception as error:
            failed = error
        # An error may hold what cannot be sent: its text goes to the others.
        texts = self.gather(None if failed is None else (isinstance(failed, InputError), str(failed)))
        if failed is not None:
            raise failed
        for number, text in enumerate(texts):
            if text is not None:
                said, message = text
                raise InputError(message) if said else RuntimeError(f"process {number} failed: {message}")

    def from_first(self, function: Callable[[], Result]) -> Result:
        """What `function` gives in the first process, where alone it is called. Its error is raised in all."""
        result: Result | None = None
        with self.together():
            if self.first:
                result = function()
        return cast(Result, self.gather(result)[0])

    def share(self, function: Callable[[list[int]], Sequence[Result]], sizes: Sequence[int]) -> list[Result]:
        """What `function` makes of the places of this process's share, followed by what the others made of theirs.

        An error in one process is raised in all.
        """
        mine, results = self.deal(sizes)[self.rank], list[Result]()
        with self.together():
            results = list(function(mine)) if mine else results
        return [result for part in self.gather(results) for result in part]

    def map(
        self, function: Callable[[list[Item]], Sequence[Result]], items: Sequence[Item], sizes: Sequence[int]
    ) -> list[Result]:
        """What `function` makes of the items, one result for each, in order; each process does its share of them."""

        def each(places: list[int]) -> list[tuple[int, Result]]:
            return list(zip(places, function([items[place] for place in places]), strict=True))

        results = dict(self.share(each, sizes))
        return [results[place] for place in range(len(items))]

    def deal(self, sizes: Sequence[int]) -> list[list[int]]:
        """The places of the items of each process, in order: largest first, each to the one that has least."""
        shares: list[list[int]] = [[] for _ in range(self.count)]
        loads = [0] * self.count
        for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
            least = min(range(self.count), key=lambda rank: (loads[rank], len(shares[rank])))
            shares[least].append(place)
            loads[least] += sizes[place]
        return [sorted(share) for share in shares]


ALONE = Processes()


def refuse_several_processes(what: str) -> None:
    """Raise InputError in one of several processes: training alone runs in them."""
    count = os.environ.get("WORLD_SIZE", "1")
    if count.isdigit() and int(count) > 1:
        raise InputError(
            f"{count} processes were started (WORLD_SIZE), and {what} runs in one: start it without torchrun or "
            "accelerate launch"
        )


def _part() -> None:
    """A process that only ends is aborted by the threads that its group still has."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
