"""`distalign data`: look at preference data."""

from __future__ import annotations

from typing import Annotated

import typer

from distalign.cli.shared import JsonOption, ModelOption, print_rich, quiet, refuse, write_json


def check(
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

        policy = find_model(model)
        tokenizer, max_length = policy.tokenizer(), max_length or policy.max_length()
    inspection = inspect_pairs(source, tokenizer, split=split, drop_ties=drop_ties, limit=limit, max_length=max_length)
    print_rich(inspection.render())
    write_json(json_path, inspection.to_json())
    if inspection.too_long:
        refuse(
            f"{source}: {inspection.too_long} pairs are longer than {max_length} tokens; shorten them, or train "
            "without them: --set data.too_long=drop"
        )
