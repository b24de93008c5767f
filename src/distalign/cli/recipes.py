"""`distalign recipes` and `distalign init`: what is packaged, and one of it to edit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distalign.cli import shared

# The folder of the packaged evaluations, by which they are told from those of training.
_EVALUATIONS = "evaluate"


def recipes(json_path: shared.JsonOption = None) -> None:
    """List the packaged recipes, which every command takes by name."""
    from distalign.settings import packaged_recipes

    training, evaluations = packaged_recipes(), packaged_recipes(_EVALUATIONS)
    shared.print_words(["train, compare, reward", ""], [[name, about] for name, about in training.items()])
    shared.print_words(["evaluate, frontier", ""], [[name, about] for name, about in evaluations.items()])
    print("One to edit: distalign init NAME")
    shared.write_json(json_path, {"training": training, "evaluation": evaluations})


def init(
    name: Annotated[str, typer.Argument(help="A packaged recipe (see distalign recipes).", metavar="[NAME]")] = "pairs",
    evaluation: Annotated[bool, typer.Option("--evaluation", help="The packaged evaluation of that name.")] = False,
) -> None:
    """Write a packaged recipe into this folder, to be edited; by default one for pairs of your own."""
    from distalign.settings import RECIPES, packaged_recipes

    kind, name = _EVALUATIONS if evaluation else "", name.removesuffix(".yaml")
    packaged = packaged_recipes(kind)
    if name not in packaged:
        shared.refuse(f'init: no recipe "{name}" is packaged; give one of {", ".join(packaged)}')
    path = Path(f"{name}-evaluation.yaml" if evaluation else f"{name}.yaml")
    if path.exists():
        shared.refuse(f"{path}: is there already; rename or remove it, then run distalign init {name} again")
    shared.write_text(path, (RECIPES / kind / f"{name}.yaml").read_text(encoding="utf-8"), "init")
    command = f"distalign evaluate {path} POLICY" if evaluation else f"distalign compare {path}"
    print(f"recipe: {path}\nEdit it, then: {command}")
