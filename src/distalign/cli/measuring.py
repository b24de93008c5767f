"""The commands that measure without training: policies on prompts, a policy's sharpness."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from distalign.cli.shared import (
    JsonOption,
    SetOption,
    check_path,
    print_rich,
    print_table,
    quiet,
    refuse,
    write_json,
)


def evaluate(
    recipe: Annotated[Path, typer.Argument(help="The settings of an evaluation, in YAML.", metavar="RECIPE")],
    policies: Annotated[
        list[str] | None,
        typer.Argument(help="Policies: name=folder, or folders, adapters, hub ids.", metavar="[NAME=]POLICY"),
    ] = None,
    set_: SetOption = None,
    model: Annotated[str | None, typer.Option(help="Another reference: a folder, a hub id or a .gguf file.")] = None,
    prompts: Annotated[str | None, typer.Option(help="Prompts to answer: a file, a folder or a hub id.")] = None,
    pairs: Annotated[str | None, typer.Option(help="Held-out pairs: a file, a folder or a hub id.")] = None,
    json_path: JsonOption = None,
) -> None:
    """Measure policies on the same held-out prompts and pairs: distances, quality, and who wins."""
    import json

    check_path(json_path)
    flags = {"model": model, "prompts": prompts, "pairs": pairs}
    extra = [f"{key}={json.dumps(value)}" for key, value in flags.items() if value]
    quiet()
    from distalign.evaluation.evaluate import evaluate as run
    from distalign.evaluation.settings import load_evaluation
    from distalign.report import results_table, write_report

    settings = load_evaluation(recipe, [*extra, *(set_ or [])], policies or [])
    results = run(settings)
    page = write_report(settings.run_dir)
    print_rich(results_table(results))
    names = list(results["methods"])
    matrix = results.get("win_rates", {}).get("matrix", {})
    if matrix:
        rows = [[one, *(_cell(matrix[one].get(other)) for other in names)] for one in names if one in matrix]
        print_table([f"wins against (by {results['win_rates']['judge']})", *names], rows)
    write_json(json_path, results)
    print(f"results: {settings.run_dir / 'results.json'}\nreport: {page}")


def _cell(estimate: dict[str, float] | None) -> str:
    return "–" if estimate is None else f"{estimate['mean']:.3f} ± {estimate['se']:.3f}"


def frontier(
    recipe: Annotated[Path, typer.Argument(help="The settings of an evaluation, with a reward.", metavar="RECIPE")],
    samples: Annotated[int, typer.Option(help="Responses of the reference to each prompt.", min=2)] = 64,
    betas: Annotated[
        str | None, typer.Option(help="KL weights, with commas; chosen by the rewards if not given.")
    ] = None,
    gammas: Annotated[str | None, typer.Option(help="Entropy weights, with commas; 0 is RLHF.")] = None,
    kl_budget: Annotated[float | None, typer.Option(help="Recommend within this KL, in nats per response.")] = None,
    set_: SetOption = None,
    model: Annotated[str | None, typer.Option(help="Another reference: a folder, a hub id or a .gguf file.")] = None,
    prompts: Annotated[str | None, typer.Option(help="Prompts to answer: a file, a folder or a hub id.")] = None,
    json_path: JsonOption = None,
) -> None:
    """Predict reward, KL and entropy of each (β, γ) before training, from responses of the reference."""
    import json

    check_path(json_path)
    flags = {"model": model, "prompts": prompts}
    extra = [f"{key}={json.dumps(value)}" for key, value in flags.items() if value]
    weights, entropies = _numbers("--betas", betas), _numbers("--gammas", gammas)
    quiet()
    from distalign.evaluation.forecast import forecast
    from distalign.evaluation.settings import load_evaluation

    settings = load_evaluation(recipe, [*extra, f"samples={samples}", *(set_ or [])], [])
    try:
        found = forecast(settings, betas=weights, gammas=entropies)
    except ValueError as error:
        refuse(f"frontier: {error}")
    print_rich(found.table())
    write_json(json_path, found.to_json())
    print(f"frontier: {settings.run_dir / 'frontier.json'}")
    if kl_budget is not None:
        try:
            print(found.recommend(kl_budget))
        except ValueError as error:
            refuse(f"--kl-budget {kl_budget:g}: {error}")


def _numbers(option: str, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        refuse(f"{option} {text}: not numbers; write them with commas, as 0.1,0.5,2")


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
    from distalign.models.policy import find_model
    from distalign.progress import progress
    from distalign.stats.calibration import calibrate as fit
    from distalign.stats.calibration import check_count

    source = find_model(policy)
    data = read_pairs(pairs, limit=limit)
    encoded, _ = encode_pairs(source.tokenizer(), data, max_length=source.max_length())
    groups = [Group(pair.prompt, [pair.chosen, pair.rejected]) for pair in encoded]
    with _about(pairs):
        check_count(len(groups))
    with progress("pairs", len(groups)) as advance:
        scores = score_in_batches(source.model(), groups, token_budget=token_budget, progress=advance)
    labels = scores.logps.new_tensor([1.0 if pair.probability is None else pair.probability for pair in encoded])
    with _about(pairs):
        found = fit(scores.logps.view(-1, 2), labels)
    print_rich(found.table())
    write_json(json_path, found.to_json())


@contextmanager
def _about(place: str) -> Iterator[None]:
    """Say of which file a ValueError is. Raises InputError."""
    from distalign.errors import InputError

    try:
        yield
    except ValueError as error:
        raise InputError(f"{place}: {error}") from None
