"""`distalign reward`: a reward model on a recipe's pairs."""

from __future__ import annotations

from distalign.cli.shared import (
    DataOption,
    JsonOption,
    ModelOption,
    OutputOption,
    RecipeArgument,
    SetOption,
    check_path,
    print_words,
    quiet,
    read_recipe,
    write_json,
)


def reward(
    recipe: RecipeArgument,
    set_: SetOption = None,
    model: ModelOption = None,
    data: DataOption = None,
    output_dir: OutputOption = None,
    json_path: JsonOption = None,
) -> None:
    """Train a reward model on a recipe's pairs; writes it to the run's folder, where a recipe can name it."""
    settings = read_recipe(recipe, set_, model=model, data=data, output_dir=output_dir)
    check_path(json_path)
    quiet()
    from distalign.experiments.train import train_reward_model
    from distalign.report.numbers import format_estimate

    results = train_reward_model(settings).results
    rows = [[name, format_estimate(one.mean, one.se), one.n] for name, one in results.items()]
    print_words(["on held-out pairs", "reward", "n"], rows)
    write_json(json_path, {name: one._asdict() for name, one in results.items()})
    print(f"reward: {settings.train_dir / 'reward'}")
