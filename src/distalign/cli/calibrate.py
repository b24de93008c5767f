"""`distalign calibrate`: the γ of a policy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from distalign.cli.shared import JsonOption, check_path, print_rich, quiet, write_json


def calibrate(
    policy: Annotated[str, typer.Argument(help="A folder, an adapter, a hub id or a .gguf file.", metavar="POLICY")],
    pairs: Annotated[str, typer.Argument(help="Labelled pairs that it was not trained on.", metavar="PAIRS")],
    limit: Annotated[int | None, typer.Option(help="Read this many pairs only.", min=1)] = None,
    token_budget: Annotated[int, typer.Option(help="Tokens of one pass.", min=1)] = 4096,
    json_path: JsonOption = None,
) -> None:
    """Find the γ at which a policy's log-probabilities predict preferences best, with its interval."""
    check_path(json_path)
    quiet()
    from distalign.data import encode_pairs, read_pairs
    from distalign.engine import Group, score_in_batches
    from distalign.models.load import find_model
    from distalign.progress import progress
    from distalign.stats.calibration import calibrate as fit
    from distalign.stats.calibration import check_count

    source = find_model(policy)
    data = read_pairs(pairs, limit=limit)
    encoded, _ = encode_pairs(source.tokenizer(), data, max_length=source.max_length())
    groups = [Group(pair.prompt, [pair.chosen, pair.rejected]) for pair in encoded]
    with _naming(pairs):
        check_count(len(groups))
    with progress("pairs", len(groups)) as advance:
        scores = score_in_batches(source.model(), groups, token_budget=token_budget, progress=advance)
    labels = scores.logps.new_tensor([1.0 if pair.probability is None else pair.probability for pair in encoded])
    with _naming(pairs):
        result = fit(scores.logps.view(-1, 2), labels)
    print_rich(result.table())
    write_json(json_path, result.to_json())


@contextmanager
def _naming(place: str) -> Iterator[None]:
    """Say of which file a ValueError is. Raises InputError."""
    from distalign.errors import InputError

    try:
        yield
    except ValueError as error:
        raise InputError(f"{place}: {error}") from None
