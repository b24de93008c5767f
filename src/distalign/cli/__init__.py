"""The command line. Each command imports its own part when it is called, so that `distalign --help` is quick.

Exit codes: 0 fine, 2 bad input (the message says where, what was found and what to do), 130 stopped by Ctrl-C,
143 by SIGTERM.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

from distalign.cli.calibrate import calibrate
from distalign.cli.compare import compare
from distalign.cli.data import check
from distalign.cli.env import env
from distalign.cli.evaluate import evaluate
from distalign.cli.frontier import frontier
from distalign.cli.lab import lab
from distalign.cli.merge import merge
from distalign.cli.methods import methods
from distalign.cli.recipes import init, recipes
from distalign.cli.report import report
from distalign.cli.reward import reward
from distalign.cli.shared import stoppable
from distalign.cli.study import study
from distalign.cli.train import train

# In what gloo and NCCL say of a process that is no longer there.
LOST = ("Connection closed by peer", "Connection reset by peer", "remote process exited")

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
data_app = typer.Typer(no_args_is_help=True, help="Look at preference data.")
app.add_typer(data_app, name="data")


def _stoppable(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command, which ends with a line where it is interrupted; a long one has its own line."""

    @wraps(command)
    def run(*args: object, **kwargs: object) -> object:
        if command is not train and os.environ.get("WORLD_SIZE", "1") != "1":
            from distalign.training.processes import refuse_several_processes

            refuse_several_processes(f"distalign {command.__name__}")
        with stoppable("run it again"):
            return command(*args, **kwargs)

    return run


data_app.command()(_stoppable(check))
COMMANDS = (
    *(train, reward, compare, study, evaluate, frontier, calibrate, report, merge),
    *(recipes, init, methods, lab, env),
)
for command in COMMANDS:
    app.command()(_stoppable(command))


def _print_version(wanted: bool) -> bool:
    if wanted:
        from distalign import __version__

        print(f"distalign {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Learn the target language model behind pairwise preferences."""


def main() -> None:
    """Run the command line; what a user can fix is printed as one message, without a traceback."""
    from distalign.errors import InputError

    # Read by OpenMP when torch is loaded: threads that wait spin for some microseconds, then sleep. Without spinning a
    # quiet machine is half as fast, with much of it a busy one several times slower (docs/log.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # PEFT imports it where it is installed, and on some CPUs it warns that it finds no kernel on the hub.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for stream in (sys.stdout, sys.stderr):
        # A terminal that has no ± or γ shows ? instead.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        app(prog_name="distalign")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        # What is left of the others when one of several processes has ended.
        if os.environ.get("WORLD_SIZE", "1") == "1" or not any(words in str(error) for words in LOST):
            raise
        print("error: another process of this run has ended: see its message; go on with --resume", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(0)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and error.filename is None:
            raise
        advice = "make space, and go on with --resume where the command has it" if full else "check this path"
        print(f"error: {error}; {advice}", file=sys.stderr)
        sys.exit(2)
