"""`distalign reward`: a reward model on a recipe's pairs."""

from __future__ import annotations

from typing import Annotated

import typer

from distalign.cli import shared


def reward(
    recipe: shared.RecipeArgument,
    set_: shared.SetOption = None,
    model: shared.ModelOption = None,
    data: shared.DataOption = None,
    output_dir: shared.OutputOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a reward that was trained before.")] = False,
    json_path: shared.JsonOption = None,
) -> None:
    """Train a reward model on a recipe's pairs; writes it to the run's folder, where a recipe can name it."""
    settings = shared.read_recipe(recipe, set_, model=model, data=data, output_dir=output_dir)
    shared.check_path(json_path)
    shared.quiet()
    from distalign.experiments.train import train_reward_model
    from distalign.report.numbers import format_estimate

    results = train_reward_model(settings, overwrite=overwrite).results
    rows = [[name, format_estimate(one.mean, one.se), one.n] for name, one in results.items()]
    shared.print_words(["on held-out pairs", "reward", "n"], rows)
    shared.write_json(json_path, {name: one._asdict() for name, one in results.items()})
    print(f"reward: {settings.train_dir / 'reward'}")
