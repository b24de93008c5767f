"""How long work is shown: a bar with the time left on a terminal, one line a minute elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# Reports (done, total, note): how much of the work is done, and what to show beside it.
Advance = Callable[..., None]


@contextmanager
def progress(label: str, total: int, *, every: float = 60.0, console: Console | None = None) -> Iterator[Advance]:
    """Show work of `total` units; call the function it gives with the number of units done, and perhaps a `note`.

    On a terminal a bar with the time left; elsewhere a line on stderr when the work ends and every `every` seconds.
    """
    console = console or Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task(label, total=total)

            def show(done: int, total: int = total, note: str = "") -> None:
                bar.update(task, completed=done, total=total, description=f"{label} {note}".rstrip())

            yield show
        return

    start = last = time.monotonic()

    def line(done: int, total: int, note: str) -> None:
        spent = time.monotonic() - start
        left = f", {spent * (total - done) / done:.0f} s left" if 0 < done < total else ""
        print(f"{label}: {done}/{total}, {spent:.0f} s{left} {note}".rstrip(), file=sys.stderr, flush=True)

    state = (0, total, "")

    def report(done: int, total: int = total, note: str = "") -> None:
        nonlocal last, state
        state = (done, total, note)
        if done < total and time.monotonic() - last >= every:
            last = time.monotonic()
            line(*state)

    yield report
    line(*state)
