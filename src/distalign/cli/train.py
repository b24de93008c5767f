"""`distalign train`: one method, of a recipe or on pairs alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from distalign.cli import shared


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="The settings of a run: a YAML file, or the name of a packaged recipe. Without one, give --model, "
            "--data and --method: the settings are those of the recipe pairs, for a whole epoch.",
            metavar="[RECIPE]",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="The method to train, needed if the recipe has several; file.py:Class is one of your own."),
    ] = None,
    set_: shared.SetOption = None,
    model: shared.ModelOption = None,
    data: shared.DataOption = None,
    output_dir: shared.OutputOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint of the run's folder.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start over in a folder that holds an earlier run.")
    ] = False,
    json_path: shared.JsonOption = None,
) -> None:
    """Train one method; writes a run folder with metrics, model, card and report."""
    source = recipe if recipe is not None else _settings_for(model, data, method)
    settings = shared.read_recipe(source, set_, model=model, data=data, output_dir=output_dir, method=method)
    if len(settings.methods) > 1:
        shared.refuse(f"{recipe}: has the methods {', '.join(settings.methods)}; choose one with --method")
    if resume and overwrite:
        shared.refuse("--resume and --overwrite: give one of them")
    shared.check_path(json_path)
    (name,) = settings.methods
    folder = settings.train_dir / name

    def how_to_go_on() -> str:
        if not any(folder.glob("checkpoint-*")):
            return "no checkpoint was saved yet: run it again"
        return f"go on with: {shared.command_line('--resume', without='--overwrite')}"

    with shared.stoppable(how_to_go_on):
        shared.quiet()
        from distalign.experiments.train import train as run
        from distalign.report import write_report

        held_out = run(settings, name, resume=resume, overwrite=overwrite).held_out
        if not shared.is_first():
            return
        page = write_report(folder)
    if held_out:
        shared.print_words(["on held-out pairs", name], [[key, f"{value:.3g}"] for key, value in held_out.items()])
    shared.write_json(json_path, {"method": name, "held_out": held_out})
    print(f"model: {folder / 'model'}\nreport: {page}")


def _settings_for(model: str | None, data: str | None, method: str | None) -> dict[str, Any]:
    """The settings of a run without a recipe: those of the packaged `pairs`, for a whole epoch, named by the data."""
    from distalign.settings import find_recipe, read_yaml

    given = {"--model": model, "--data": data, "--method": method}
    missing = [option for option, value in given.items() if not value]
    if missing or data is None:
        shared.refuse(
            f"train: there is no recipe and no {', '.join(missing)}; name a recipe (distalign recipes lists those that "
            "are packaged), or give --model, --data and --method"
        )
    settings = read_yaml(find_recipe("pairs"))
    words = re.sub(r"[^\w.-]+", "-", Path(data).name.split(".")[0]).strip("-.")
    whole = {"max_steps": -1, "warmup_steps": 0.05, "eval_steps": 0.1}
    return {**settings, "name": words or "run", "training": {**settings["training"], **whole}}
