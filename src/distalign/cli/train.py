"""`distalign train`: one method of a recipe."""

from __future__ import annotations

from typing import Annotated

import typer

from distalign.cli.shared import (
    DataOption,
    JsonOption,
    ModelOption,
    RecipeArgument,
    SetOption,
    check_path,
    print_table,
    quiet,
    read_recipe,
    refuse,
    write_json,
)


def train(
    recipe: RecipeArgument,
    method: Annotated[str | None, typer.Option(help="The method to train; needed if the recipe has several.")] = None,
    set_: SetOption = None,
    model: ModelOption = None,
    data: DataOption = None,
    resume: Annotated[bool, typer.Option(help="Continue from the last checkpoint of the run's folder.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Start over in a folder that holds an earlier run.")] = False,
    json_path: JsonOption = None,
) -> None:
    """Train one method of a recipe; writes a run folder with metrics, model, card and report."""
    settings = read_recipe(recipe, set_, model, data, method)
    if len(settings.methods) > 1:
        refuse(f"{recipe}: has the methods {', '.join(settings.methods)}; choose one with --method")
    check_path(json_path)
    quiet()
    from distalign.experiments.train import train as run
    from distalign.report import write_report

    (name,) = settings.methods
    held_out = run(settings, name, resume=resume, overwrite=overwrite)
    page = write_report(settings.run_dir)
    print_table(["held-out pairs", name], [[key, f"{value:.4g}"] for key, value in held_out.items()])
    write_json(json_path, {"method": name, "held_out": held_out})
    print(f"model: {settings.run_dir / 'model'}\nreport: {page}")
