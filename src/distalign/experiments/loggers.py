"""Loggers of `training.report_to`: one run for each method and seed, all of a recipe in one group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import TrainingArguments


def run_names(recipe: str, method: str, seed: int) -> dict[str, str]:
    """What `TrainingArguments` tell loggers: the run's name, and the project that trackio puts runs of a recipe into.

    TensorBoard's files are in the run's own folder.
    """
    return {"run_name": f"{recipe}-{method}-seed-{seed}", "project": recipe}


@contextmanager
def one_run(args: TrainingArguments, group: str) -> Iterator[None]:
    """What is logged within is one run. wandb reads its group from WANDB_RUN_GROUP; one that is set already stays."""
    if "wandb" not in (args.report_to or ()):
        yield
        return
    import wandb  # pyright: ignore[reportMissingImports]

    # transformers' callback goes on with a run that is open: the user's own stays, ours is closed before the next.
    users_own, grouped = wandb.run is not None, "WANDB_RUN_GROUP" in os.environ
    os.environ.setdefault("WANDB_RUN_GROUP", group)
    try:
        yield
    finally:
        if not grouped:
            del os.environ["WANDB_RUN_GROUP"]
        if not users_own:
            wandb.finish()
