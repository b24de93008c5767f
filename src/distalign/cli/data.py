"""`distalign data`: look at preference data."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from distalign.cli import shared

if TYPE_CHECKING:
    from rich.console import Group

    from distalign.data import Inspection


def check(
    source: Annotated[str, typer.Argument(help="JSON lines (.gz too), CSV, Parquet, a folder or a hub id.")],
    model: shared.ModelOption = None,
    split: Annotated[str | None, typer.Option(help="Split of a dataset.")] = None,
    drop_ties: Annotated[bool, typer.Option(help="Count pairs whose responses are the same, and go on.")] = False,
    limit: Annotated[int | None, typer.Option(help="Read this many pairs only.", min=1)] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of prompt and response together.", min=1)] = None,
    json_path: shared.JsonOption = None,
) -> None:
    """Check preference pairs: format, counts, lengths, duplicates, ties, and one example as the model reads it."""
    from distalign.data import inspect_pairs

    shared.check_path(json_path)
    if model is None and max_length is not None:
        shared.refuse("--max-length counts a model's tokens: it needs --model")
    tokenizer = None
    if model is not None:
        shared.quiet()
        from distalign.models.load import find_model

        policy = find_model(model)
        tokenizer, max_length = policy.tokenizer(), max_length or policy.max_length()
    inspection = inspect_pairs(source, tokenizer, split=split, drop_ties=drop_ties, limit=limit, max_length=max_length)
    shared.print_rich(describe_pairs(inspection))
    shared.write_json(json_path, asdict(inspection))
    if inspection.too_long:
        shared.refuse(
            f"{source}: {inspection.too_long} pairs are longer than {max_length} tokens; shorten them, or train "
            "without them: --set data.too_long=drop"
        )


def describe_pairs(counts: Inspection) -> Group:
    """What an inspection counted, for a terminal: one pair, the lengths, and the summary last."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from distalign.data.inspect import QUANTILES

    pair = Table(title="the first pair, shortened", show_header=False, title_justify="left", box=box.HORIZONTALS)
    for name, text in _first_pair(counts).items():
        pair.add_row(Text(name), Text(text))
    heads = ("length", *(f"{100 * q:g} %" for q in QUANTILES))
    lengths = Table(*heads, title="quantiles", title_justify="left", box=box.HORIZONTALS)
    for unit, columns in counts.lengths.items():
        for column, values in columns.items():
            lengths.add_row(f"{column}, {unit}", *(f"{value:,.0f}" for value in values))
    summary = Table(title=Text(counts.source), show_header=False, title_justify="left", box=box.HORIZONTALS)
    prompt = "cut from the responses" if counts.implicit_prompt else "a column of its own"
    summary.add_row("format", f"{counts.format}, prompt: {prompt}")
    summary.add_row("pairs", f"{counts.pairs:,} of {counts.rows:,} rows ({counts.ties:,} ties)")
    summary.add_row("prompts", f"{counts.prompts:,} different ({counts.same_prompts:,} rows repeat one)")
    summary.add_row("repeated pairs", f"{counts.same_pairs:,}, and {counts.swapped_pairs:,} with the opposite label")
    if counts.chosen_longer is not None and counts.chosen_longer_se is not None:
        rate = (
            f"{100 * counts.chosen_longer:.1f} ± {196 * counts.chosen_longer_se:.1f} % (95 %, in {counts.length_unit})"
        )
        summary.add_row("chosen is longer", rate)
    if counts.soft_labels:
        summary.add_row("soft labels", f"{counts.soft_label_count:,}, median p_chosen {counts.soft_labels[2]:.3f}")
    if counts.rewards:
        summary.add_row("rewards", f"{counts.rewards:,} pairs; only PD reads them, with a scale (docs/rewards.md)")
    if counts.too_long is not None:
        summary.add_row("too long", f"{counts.too_long:,} pairs exceed max_length")
    if counts.extra_columns:
        summary.add_row("other columns", Text(", ".join(counts.extra_columns)))
    for warning in counts.warnings:
        summary.add_row("labels", warning)
    return Group(pair, lengths, summary)


def _first_pair(counts: Inspection) -> dict[str, str]:
    """Prompt and responses of the example, the end of the prompt and the beginnings of the responses."""
    from distalign.data.inspect import BOUNDARY
    from distalign.progress import one_line

    texts = {name: text.replace("\r\n", "\n").replace("\n", "⏎") for name, text in counts.example.items()}
    prompt = one_line(texts["chosen"].partition(BOUNDARY)[0], 240, last=True)
    responses = {name: one_line(text.rpartition(BOUNDARY)[2], 240) for name, text in texts.items()}
    return {"prompt": prompt + BOUNDARY, **responses}
