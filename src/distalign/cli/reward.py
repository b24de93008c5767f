"""`distalign reward`: a reward model on a recipe's pairs."""

from __future__ import annotations

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
    write_json,
)


def reward(
    recipe: RecipeArgument,
    set_: SetOption = None,
    model: ModelOption = None,
    data: DataOption = None,
    json_path: JsonOption = None,
) -> None:
    """Train a reward model on a recipe's pairs; writes it to the run's folder, where a recipe can name it."""
    settings = read_recipe(recipe, set_, model, data)
    check_path(json_path)
    quiet()
    from distalign.experiments.train import train_reward_model

    results = train_reward_model(settings).results
    rows = [[name, f"{one.mean:.3f} ± {one.se:.3f}", one.n] for name, one in results.items()]
    print_table(["held-out pairs", "reward", "n"], rows)
    write_json(json_path, {name: one._asdict() for name, one in results.items()})
    print(f"reward: {settings.run_dir / 'reward'}")
