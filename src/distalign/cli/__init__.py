"""The command line. Each command imports its own part when it is called, so that `distalign --help` is quick.

Exit codes: 0 fine, 2 bad input (the message says where, what was found and what to do).
"""

from __future__ import annotations

import sys

import typer

from distalign.cli.lab import lab
from distalign.cli.looking import data_check, env, list_methods, report
from distalign.cli.measuring import calibrate, evaluate, frontier
from distalign.cli.training import compare, reward, train

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Learn the target language model behind pairwise preferences.",
)
data_app = typer.Typer(no_args_is_help=True, help="Look at preference data.")
data_app.command("check")(data_check)
app.add_typer(data_app, name="data")
for command in (train, reward, compare, evaluate, frontier, calibrate, report, lab, env):
    app.command()(command)
app.command("methods")(list_methods)


def main() -> None:
    """Run the command line; what a user can mend is printed as one message, without a traceback."""
    from distalign.errors import InputError

    try:
        app()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(0)
