"""What the commands share: their options, and how they read, refuse, print and write."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from distalign.experiments.recipe import Recipe
    from distalign.report.terminal import Fitting

RecipeArgument = Annotated[
    str,
    typer.Argument(help="The settings: a YAML file, or the name of a packaged recipe (quickstart).", metavar="RECIPE"),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a setting of the recipe; may be repeated."),
]
OutputOption = Annotated[
    str | None, typer.Option("--output-dir", help="Folder of the runs, runs by default; each run has its name in it.")
]
WideOption = Annotated[
    bool, typer.Option("--wide", help="All columns of the table, in as many parts as the terminal's width wants.")
]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the numbers of the table to this file, too.")]
MarkdownOption = Annotated[
    Path | None, typer.Option("--markdown", help="Write the table and what separates from what to this file.")
]
PromptsOption = Annotated[
    str | None, typer.Option("--prompts", help="Prompts to answer: a file, a folder or a hub id.")
]
HeldOutOption = Annotated[
    str | None, typer.Option("--pairs", "--data", help="Held-out pairs: a file, a folder or a hub id.")
]
ModelOption = Annotated[str | None, typer.Option("--model", help="Another model: a hub id, a folder or a .gguf file.")]
DataOption = Annotated[
    str | None, typer.Option("--data", help="Your own pairs instead of the recipe's: a file, a folder or a hub id.")
]


def read_recipe(
    source: str | dict[str, Any],
    set_: list[str] | None,
    *,
    model: str | None,
    data: str | None,
    output_dir: str | None,
    method: str | None = None,
) -> Recipe:
    """The recipe with the flags' changes. Raises RecipeError naming every problem."""
    from distalign.experiments.recipe import load_recipe

    # The recipe's split, held-out pairs and prompts are those of its own data.
    nothing = ["target=null", "data.eval=null", "data.eval_split=null", "data.prompts=null"]
    own_data = [*nothing, f"data.train={json.dumps(data)}", "data.split=train"] if data else []
    flags = [*overrides(model=model, output_dir=output_dir), *own_data]
    return load_recipe(source, [*flags, *(set_ or [])], method)


def overrides(**flags: str | None) -> list[str]:
    """Flags that stand for settings of the same name, as `--set` takes them; those not given are left out."""
    return [f"{key}={json.dumps(value)}" for key, value in flags.items() if value]


def read_seeds(text: str | None, default: int) -> list[int]:
    """The seeds of "3" (0, 1, 2) or "0,7"; the default without a text."""
    if text is None:
        return [default]
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        refuse(f'--seeds {text}: not a number; write how many ("3") or which ("0,7")')
    if min(numbers) < 0 or numbers == [0] or len(set(numbers)) < len(numbers):
        refuse(f"--seeds {text}: give at least one seed, none below 0, none twice")
    if max(numbers) >= (2**32 if "," in text else 1000):
        refuse(f"--seeds {text[:200]}: too many, or too large a seed; give less than 1000, or seeds below 2**32")
    return list(range(numbers[0])) if "," not in text else numbers


def is_first() -> bool:
    """Whether this is the process, of several that train together, that speaks."""
    return os.environ.get("RANK", "0") == "0"


def quiet() -> None:
    """Our own messages on stderr, none of the libraries' bars and notices; and no warnings that nobody can heed."""
    import logging
    import warnings

    from distalign.progress import show_logs

    # PEFT 0.21 reads a name that transformers 5.23 renamed; neither has a release that agrees with the other.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    show_logs("distalign")
    if not is_first():
        logging.getLogger("distalign").setLevel(logging.ERROR)
    # How the engine serves a model is worth a line only where it had to fall back.
    logging.getLogger("distalign.engine").setLevel(logging.WARNING)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def refuse(message: str) -> NoReturn:
    """Raise InputError with the message."""
    from distalign.errors import InputError

    raise InputError(message)


@contextmanager
def stoppable(advice: str | Callable[[], str]) -> Iterator[None]:
    """End a command that is stopped (Ctrl-C, SIGTERM) with one line, which says how to go on; exit code 130 or 143."""

    def terminate(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, terminate) if main else None
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        code = stop.code if isinstance(stop, SystemExit) else 130
        if code not in (130, 143):
            from distalign.errors import InputError

            raise InputError(
                f"a sys.exit({code!r}) in code that the command called (a reward, a method) ended it; take it out"
            ) from stop
        # A terminal has shown ^C where the line was.
        start = "\n" if sys.stderr.isatty() else ""
        if is_first():
            print(f"{start}stopped; {advice if isinstance(advice, str) else advice()}", file=sys.stderr)
        raise typer.Exit(code) from None
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def command_line(*more: str, without: str = "") -> str:
    """The command that runs, as a shell takes it, with further flags and without one of its own."""
    from distalign.settings import masked_word

    words = [masked_word(word) for word in sys.argv[1:] if word != without]
    count = os.environ.get("WORLD_SIZE", "1")
    start = ["distalign"] if count == "1" else ["torchrun", "--nproc_per_node", count, "-m", "distalign"]
    return shlex.join([*start, *words, *(word for word in more if word not in words)])


def print_words(columns: list[str], rows: list[list[object]]) -> None:
    """A table of words, broken between words where the terminal is narrow."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.HORIZONTALS)
    for column in columns:
        table.add_column(Text(column))
    for row in rows:
        table.add_row(*(Text(str(value)) for value in row))
    print_rich(table)


def print_numbers(table: Fitting, wide: bool = False) -> None:
    """A table with as many columns as fit, or with all."""
    console = _console(10_000)
    console.print(table.at(console.width, wide=wide))


def print_rich(renderable: RenderableType) -> None:
    """Print something of rich, uncut where no terminal reads it."""
    _console(300).print(renderable, highlight=False)


def _console(width: int) -> Console:
    """The terminal; a pipe, which has no width, gets this one: what is read by a program must not be left out."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=width)


def write_json(path: Path | None, content: object) -> None:
    """Write JSON to a file, if one is given; a number that could not be computed is null."""
    if path is not None:
        from distalign.evaluation.results import finite

        write_text(path, json.dumps(finite(content), indent=1, ensure_ascii=False))


def write_markdown(path: Path | None, content: dict[str, Any], command: str) -> None:
    """Write the table of a comparison to a file, if one is given."""
    from distalign.report import results_markdown

    if path is not None:
        write_text(path, results_markdown(content, command), "--markdown")


def check_path(path: Path | None, option: str = "--json") -> None:
    """Refuse a file that could not be written after the work is done, or that the command line names elsewhere too."""
    if path is None:
        return
    if os.path.isdir(path):
        refuse(f"{option} {path}: is a folder; name a file in it")
    if not os.path.exists(path):
        write_text(path, "", option)
        path.unlink(missing_ok=True)
        return
    words = (word.partition("=")[2] or word for word in sys.argv[1:])
    if sum(os.path.exists(word) and os.path.samefile(word, path) for word in words) > 1:
        refuse(f"{option} {path}: would replace a file that the command reads, or writes too; name another")


def write_text(path: Path, text: str, option: str = "--json") -> None:
    """Write a file; refuses, naming the option, if it cannot be written."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        refuse(f"{option} {str(path)[:200]}: cannot be written ({error.strerror}); choose another place")
