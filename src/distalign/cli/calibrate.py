"""`distalign calibrate`: the γ of a policy."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Annotated

import typer

from distalign.cli import shared

if TYPE_CHECKING:
    from rich.table import Table

    from distalign.stats.calibration import Calibration

logger = logging.getLogger("distalign.cli.calibrate")


def calibrate(
    policy: Annotated[str, typer.Argument(help="A folder, an adapter, a hub id or a .gguf file.", metavar="POLICY")],
    pairs: Annotated[str, typer.Argument(help="Labelled pairs that it was not trained on.", metavar="PAIRS")],
    limit: Annotated[int | None, typer.Option(help="Read this many pairs only.", min=1)] = None,
    token_budget: Annotated[int, typer.Option(help="Tokens of one pass.", min=1)] = 4096,
    json_path: shared.JsonOption = None,
) -> None:
    """Find the γ at which a policy's log-probabilities predict preferences best, with its interval."""
    shared.check_path(json_path)
    shared.quiet()
    import torch

    from distalign.data import encode_pairs, read_pairs
    from distalign.engine import Group, score_in_batches
    from distalign.models.load import check_token_ids, find_model
    from distalign.models.policy import trained_temperature
    from distalign.progress import progress
    from distalign.stats.calibration import calibrate as fit
    from distalign.stats.calibration import check_count

    source = find_model(policy)
    data = read_pairs(pairs, limit=limit)
    encoded, _ = encode_pairs(source.tokenizer(), data, max_length=source.max_length())
    groups = [Group(pair.prompt, [pair.chosen, pair.rejected]) for pair in encoded]
    # An adapter may bring embeddings of its own.
    if source.adapter is None:
        check_token_ids(source.name, source.config(), (ids for one in groups for ids in (one.prompt, *one.responses)))
    try:
        check_count(len(groups))
    except ValueError as error:
        shared.refuse(f"{pairs}: {error}")
    # A policy that was trained here says at which temperature: that is the distribution it learned.
    temperature = trained_temperature(str(source.adapter or source.path)) or 1.0
    with progress("pairs", len(groups)) as advance:
        scores = score_in_batches(
            source.model(), groups, token_budget=token_budget, temperature=temperature, progress=advance
        )
    labels = torch.tensor([pair.label for pair in encoded]).double()
    prompts = len({pair.question for pair in encoded})
    if prompts < len(encoded):
        logger.warning(
            "%d pairs of %d prompts count as independent: the intervals are too narrow", len(encoded), prompts
        )
    try:
        result = fit(scores.logps.view(-1, 2), labels)
    except ValueError as error:
        shared.refuse(f"{pairs}: {error}")
    shared.print_rich(calibration_table(result))
    shared.write_json(json_path, result.to_json())


def calibration_table(result: Calibration) -> Table:
    """The numbers for a terminal, with what they mean below."""
    from rich.table import Table

    from distalign.stats.calibration import COIN

    table = Table(title=f"Calibration on {result.pairs} held-out pairs", caption="\n".join(result.meaning))
    table.add_column("quantity", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_row("γ (95 %)", f"{result.gamma.mean:.3g} [{result.gamma.low:.3g}, {result.gamma.high:.3g}]")
    table.add_row("NLL at γ, nats per pair", f"{result.nll.mean:.4f} ± {result.nll.se:.4f}")
    table.add_row("NLL at γ = 0 (a coin)", f"{COIN:.4f}")
    table.add_row("accuracy", f"{100 * result.accuracy.mean:.1f} ± {100 * result.accuracy.se:.1f} %")
    table.add_row("calibration error (ECE)", f"{result.ece:.3f}, by chance {result.ece_floor:.3f}")
    table.add_row("median |γ Δ ln π|, nats", f"{result.median_logit:.3g}")
    return table
