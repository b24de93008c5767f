"""The command line. Each command imports its own part when it is called, so that `distalign --help` is quick.

Exit codes: 0 fine, 2 bad input (the message says where, what was found and what to do).
"""

from __future__ import annotations

import sys

import typer

from distalign.cli.calibrate import calibrate
from distalign.cli.compare import compare
from distalign.cli.data import check
from distalign.cli.env import env
from distalign.cli.evaluate import evaluate
from distalign.cli.frontier import frontier
from distalign.cli.lab import lab
from distalign.cli.methods import methods
from distalign.cli.report import report
from distalign.cli.reward import reward
from distalign.cli.train import train

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Learn the target language model behind pairwise preferences.",
)
data_app = typer.Typer(no_args_is_help=True, help="Look at preference data.")
data_app.command()(check)
app.add_typer(data_app, name="data")
for command in (train, reward, compare, evaluate, frontier, calibrate, report, methods, lab, env):
    app.command()(command)


def main() -> None:
    """Run the command line; what a user can fix is printed as one message, without a traceback."""
    from distalign.errors import InputError

    try:
        app()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(0)
