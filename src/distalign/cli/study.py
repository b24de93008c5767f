"""`distalign study`: a grid of comparisons on a known target, and how the distance falls with the number of pairs."""

from __future__ import annotations

from typing import Annotated

import typer

from distalign.cli import shared


def study(
    recipe: shared.RecipeArgument,
    seeds: Annotated[str | None, typer.Option(help="How many seeds, or which, with commas; else the recipe's.")] = None,
    set_: shared.SetOption = None,
    output_dir: shared.OutputOption = None,
    json_path: shared.JsonOption = None,
) -> None:
    """Run a recipe's grid of comparisons; stopped and called again, it goes on where it was."""
    settings = shared.read_recipe(recipe, set_, model=None, data=None, output_dir=output_dir)
    chosen = None if seeds is None else shared.read_seeds(seeds, settings.seed)
    shared.check_path(json_path)
    with shared.stoppable(lambda: f"go on with: {shared.command_line()}"):
        shared.quiet()
        from distalign.lab.study import study as run
        from distalign.report import write_report

        result = run(settings, seeds=chosen)
        page = write_report(settings.run_dir)
    for table in result["shown"]["tables"]:
        shared.print_words(
            list(table["columns"]), [["" if v is None else str(v) for v in row] for row in table["rows"]]
        )
    shared.write_json(json_path, result)
    print(f"results: {settings.run_dir / 'lab.json'}\nreport: {page}")
