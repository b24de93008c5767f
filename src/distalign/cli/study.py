"""`distalign study`: a grid of comparisons on a known target, and how the distance falls with the number of pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from distalign.cli.shared import (
    JsonOption,
    OutputOption,
    RecipeArgument,
    SetOption,
    WideOption,
    check_path,
    command_line,
    print_numbers,
    quiet,
    read_recipe,
    read_seeds,
    stoppable,
    write_json,
)

if TYPE_CHECKING:
    pass


def study(
    recipe: RecipeArgument,
    seeds: Annotated[str | None, typer.Option(help="How many seeds, or which, with commas; the recipe's own.")] = None,
    set_: SetOption = None,
    output_dir: OutputOption = None,
    wide: WideOption = False,
    json_path: JsonOption = None,
) -> None:
    """Run a recipe's grid of comparisons; stopped and called again, it goes on where it was."""
    settings = read_recipe(recipe, set_, model=None, data=None, output_dir=output_dir)
    chosen = None if seeds is None else read_seeds(seeds, settings.seed)
    check_path(json_path)
    with stoppable(lambda: f"go on with: {command_line()}"):
        quiet()
        from distalign.experiments.study import study as run
        from distalign.report.study import study_figures, write_study

        result = run(settings, seeds=chosen)
        written = write_study(settings.run_dir, result, study_figures(result))
    print_numbers(study_table(result), wide)
    write_json(json_path, result)
    print(f"study: {settings.run_dir / 'study.json'}\nreport: {written}")
