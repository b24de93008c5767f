"""What the commands share: their options, and how they read, refuse, print and write."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType

    from distalign.experiments.recipe import Recipe

RecipeArgument = Annotated[
    str,
    typer.Argument(
        help="The settings of a run: a YAML file, or the name of a packaged recipe (quickstart).", metavar="RECIPE"
    ),
]
EvaluationArgument = Annotated[
    Path,
    typer.Argument(
        help="The settings of an evaluation: a YAML file, or the name of a packaged one (quickstart).", metavar="RECIPE"
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a setting of the recipe; may be repeated."),
]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the numbers of the table to this file, too.")]
MarkdownOption = Annotated[
    Path | None, typer.Option("--markdown", help="Write the table and what separates from what to this file.")
]
ReferenceOption = Annotated[
    str | None, typer.Option("--model", help="Another reference: a folder, a hub id or a .gguf file.")
]
PromptsOption = Annotated[
    str | None, typer.Option("--prompts", help="Prompts to answer: a file, a folder or a hub id.")
]
ModelOption = Annotated[str | None, typer.Option("--model", help="Another model: a hub id, a folder or a .gguf file.")]
DataOption = Annotated[
    str | None, typer.Option("--data", help="Your own pairs instead of the recipe's: a file, a folder or a hub id.")
]


def read_recipe(
    path: str, set_: list[str] | None, model: str | None, data: str | None, method: str | None = None
) -> Recipe:
    """The recipe with the flags' changes. Raises RecipeError naming every problem."""
    from distalign.experiments.recipe import load_recipe

    own_data = ["target=null", f"data.train={json.dumps(data)}"] if data else []
    return load_recipe(path, [*overrides(model=model), *own_data, *(set_ or [])], method)


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
    return list(range(numbers[0])) if "," not in text else numbers


def quiet() -> None:
    """Our own messages on stderr, none of the libraries' bars and notices; and threads that wait without spinning."""
    import logging
    import warnings

    # Read by OpenMP when torch is loaded: two spinning threads on a busy machine are ten times slower than none.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # PEFT 0.21 reads a name that transformers 5.23 renamed; neither has a release that agrees with the other.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours = logging.getLogger("distalign")
    ours.setLevel(logging.INFO)
    ours.handlers[:] = [handler]
    # How the engine serves a model is worth a line only where it had to fall back.
    logging.getLogger("distalign.engine").setLevel(logging.WARNING)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def refuse(message: str) -> NoReturn:
    """Raise InputError with the message."""
    from distalign.errors import InputError

    raise InputError(message)


def print_table(columns: list[str], rows: list[list[Any]]) -> None:
    """A table of texts."""
    from rich.table import Table

    table = Table(*columns)
    for row in rows:
        table.add_row(*(str(value) for value in row))
    print_rich(table)


def print_rich(renderable: RenderableType) -> None:
    """Print something of rich, uncut where no terminal reads it."""
    from rich.console import Console

    console = Console()
    # A pipe has no width: what is read by a program must not be cut.
    if not console.is_terminal:
        console = Console(width=300)
    console.print(renderable)


def write_json(path: Path | None, content: object) -> None:
    """Write JSON to a file, if one is given."""
    if path is not None:
        write_text(path, json.dumps(content, indent=1, ensure_ascii=False))


def write_markdown(path: Path | None, content: dict[str, Any], command: str) -> None:
    """Write the table of a comparison to a file, if one is given."""
    from distalign.report import results_markdown

    if path is not None:
        write_text(path, results_markdown(content, command), "--markdown")


def check_path(path: Path | None, option: str = "--json") -> None:
    """Refuse a file that could not be written after the work is done."""
    if path is not None and path.is_dir():
        refuse(f"{option} {path}: is a folder; name a file in it")
    if path is not None and not path.exists():
        write_text(path, "", option)
        path.unlink()


def write_text(path: Path, text: str, option: str = "--json") -> None:
    """Write a file; refuses, naming the option, if it cannot be written."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        refuse(f"{option} {path}: cannot be written ({error.strerror}); choose another place")
