"""How work is shown: a bar with the time left on a terminal, one line a minute elsewhere; and its log lines."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

# Reports (done, total, note): how much of the work is done, and what to show beside it.
Advance = Callable[..., None]

# Bars and log lines share it, so that no line is written into a bar.
CONSOLE = Console(stderr=True)

# What a bar takes beside its label: the bar, the counts, the times, and the gaps between them.
_BAR, _BESIDE = 12, 48

# The bars on a console, while there are any: work within work is one more bar there, until it is done.
_SHOWN: dict[Console, Progress] = {}


@contextmanager
def progress(label: str, total: int, *, every: float = 60.0, console: Console | None = None) -> Iterator[Advance]:
    """Show work of `total` units; call the function it gives with the number of units done, and perhaps a `note`.

    On a terminal a bar with the time left; elsewhere a line on stderr when the work ends and every `every` seconds.
    """
    console = console or CONSOLE
    if console.is_terminal:
        with _bars(console) as bars:
            task = bars.add_task(label, total=total)

            def show(done: int, total: int = total, note: str = "") -> None:
                noted = f"{label} {note}".rstrip()
                # Whole or not at all: a note that is cut may end in half a number.
                fits = len(noted) + _BESIDE <= console.width
                bars.update(task, completed=done, total=total, description=noted if fits else label)

            outermost = len(bars.tasks) == 1
            yield show
            if not outermost:
                bars.remove_task(task)
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


@contextmanager
def _bars(console: Console) -> Iterator[Progress]:
    """The bars of a console, begun if there are none."""
    if console in _SHOWN:
        yield _SHOWN[console]
        return
    columns = (
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(_BAR),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        _SHOWN[console] = bars
        try:
            yield bars
        finally:
            del _SHOWN[console]


def show_logs(name: str) -> None:
    """Show the log lines of a logger and those below it: above the bars on a terminal, as plain lines elsewhere."""
    handler: logging.Handler
    if CONSOLE.is_terminal:
        from rich.highlighter import NullHighlighter
        from rich.logging import RichHandler

        handler = RichHandler(
            console=CONSOLE, highlighter=NullHighlighter(), show_time=False, show_level=False, show_path=False
        )
    else:
        handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger(name)
    logger.setLevel(logging.INFO)
    logger.handlers[:] = [handler]


def in_words(values: Mapping[str, Any]) -> str:
    """Names and values in one line: "train 256, held out 64"."""
    return ", ".join(
        f"{name.replace('_', ' ')} {f'{value:.3g}' if isinstance(value, float) else value}"
        for name, value in values.items()
    )


def one_line(text: str, size: int, *, last: bool = False) -> str:
    """A text in one line of at most `size` characters, its start or its end; nothing that could steer a terminal."""
    line = "".join(letter if letter.isprintable() else " " for letter in text)
    if len(line) <= size:
        return line
    return "…" + line[1 - size :] if last else line[: size - 1] + "…"
