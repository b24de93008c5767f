"""`distalign evaluate`: policies on the same held-out prompts and pairs."""

from __future__ import annotations

from typing import Annotated

import typer

from distalign.cli.shared import (
    EvaluationArgument,
    JsonOption,
    PromptsOption,
    ReferenceOption,
    SetOption,
    check_path,
    overrides,
    print_rich,
    print_table,
    quiet,
    write_json,
)


def evaluate(
    recipe: EvaluationArgument,
    policies: Annotated[
        list[str] | None,
        typer.Argument(help="Policies: name=folder, or folders, adapters, hub ids.", metavar="[NAME=]POLICY"),
    ] = None,
    set_: SetOption = None,
    model: ReferenceOption = None,
    prompts: PromptsOption = None,
    pairs: Annotated[str | None, typer.Option(help="Held-out pairs: a file, a folder or a hub id.")] = None,
    json_path: JsonOption = None,
) -> None:
    """Measure policies on the same held-out prompts and pairs: distances, quality, and who wins."""
    check_path(json_path)
    quiet()
    from distalign.evaluation.evaluate import evaluate as run
    from distalign.evaluation.setup import load_evaluation
    from distalign.report import results_table, write_report

    settings = load_evaluation(
        recipe, [*overrides(model=model, prompts=prompts, pairs=pairs), *(set_ or [])], policies or []
    )
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
