"""`distalign evaluate`: policies on the same held-out prompts and pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from distalign.cli import shared

if TYPE_CHECKING:
    from distalign.report.terminal import Fitting


def evaluate(
    recipe: shared.RecipeArgument,
    policies: Annotated[
        list[str] | None,
        typer.Argument(help="Policies: name=folder, or folders, adapters, hub ids.", metavar="[NAME=]POLICY"),
    ] = None,
    set_: shared.SetOption = None,
    model: shared.ModelOption = None,
    prompts: shared.PromptsOption = None,
    pairs: shared.HeldOutOption = None,
    output_dir: shared.OutputOption = None,
    wide: shared.WideOption = False,
    json_path: shared.JsonOption = None,
) -> None:
    """Measure policies on the same held-out prompts and pairs: distances, quality, and who wins."""
    shared.check_path(json_path)
    with shared.stoppable(lambda: f"what was answered is kept; go on with: {shared.command_line()}"):
        shared.quiet()
        from distalign.evaluation.evaluate import evaluate as run
        from distalign.evaluation.setup import load_evaluation
        from distalign.report import results_table, write_report

        flags = shared.overrides(model=model, prompts=prompts, pairs=pairs, output_dir=output_dir)
        settings = load_evaluation(recipe, [*flags, *(set_ or [])], policies or [])
        results = run(settings).content
        page = write_report(settings.run_dir)
    shared.print_numbers(results_table(results), wide)
    if matrix := results.get("win_rates", {}).get("matrix", {}):
        shared.print_numbers(_wins(matrix, list(results["methods"]), results["win_rates"]["judge"]), wide)
    shared.write_json(json_path, results)
    print(f"results: {settings.run_dir / 'results.json'}\nreport: {page}")


def _wins(matrix: dict[str, Any], names: list[str], judge: str) -> Fitting:
    """Who is preferred to whom, how often."""
    from distalign.report.numbers import format_estimate
    from distalign.report.terminal import Fitting, Texts

    rows = [name for name in names if name in matrix]

    def cell(row: str, column: str) -> str:
        rate = matrix[row].get(column)
        return "–" if rate is None else format_estimate(rate["mean"], rate["se"])

    columns = [Texts(column, [cell(row, column) for row in rows]) for column in names]
    return Fitting(Texts("", rows), columns, title=f"P(row is preferred to column), judged by {judge}")
