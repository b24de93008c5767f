"""`distalign evaluate`: policies on the same held-out prompts and pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from distalign.cli.shared import (
    EvaluationArgument,
    HeldOutOption,
    JsonOption,
    OutputOption,
    PromptsOption,
    ReferenceOption,
    SetOption,
    WideOption,
    check_path,
    command_line,
    overrides,
    print_numbers,
    quiet,
    stoppable,
    write_json,
)

if TYPE_CHECKING:
    from distalign.report.terminal import Fitting


def evaluate(
    recipe: EvaluationArgument,
    policies: Annotated[
        list[str] | None,
        typer.Argument(help="Policies: name=folder, or folders, adapters, hub ids.", metavar="[NAME=]POLICY"),
    ] = None,
    set_: SetOption = None,
    model: ReferenceOption = None,
    prompts: PromptsOption = None,
    pairs: HeldOutOption = None,
    output_dir: OutputOption = None,
    wide: WideOption = False,
    json_path: JsonOption = None,
) -> None:
    """Measure policies on the same held-out prompts and pairs: distances, quality, and who wins."""
    check_path(json_path)
    with stoppable(lambda: f"what was answered is kept; go on with: {command_line()}"):
        quiet()
        from distalign.evaluation.evaluate import evaluate as run
        from distalign.evaluation.setup import load_evaluation
        from distalign.report import results_table, write_report

        flags = overrides(model=model, prompts=prompts, pairs=pairs, output_dir=output_dir)
        settings = load_evaluation(recipe, [*flags, *(set_ or [])], policies or [])
        results = run(settings).content
        page = write_report(settings.run_dir)
    print_numbers(results_table(results), wide)
    if matrix := results.get("win_rates", {}).get("matrix", {}):
        print_numbers(_wins(matrix, list(results["methods"]), results["win_rates"]["judge"]), wide)
    write_json(json_path, results)
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
