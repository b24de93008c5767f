"""What a comparison keeps of every method that is done, so that a stopped one goes on instead of starting over."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from distalign.data import EncodedPair
from distalign.measure import Measured
from distalign.recipe import Recipe

_TENSORS, _REST = "finished.safetensors", "finished.json"


@dataclass
class Finished:
    """A method after training: what was measured, the rows of its curve, the step that was kept, seconds by part."""

    measured: Measured
    curve: list[dict[str, Any]]
    kept_step: int
    seconds: dict[str, float]

    def save(self, folder: Path, key: str) -> None:
        """Write it; the key comes last, so that a torn record is not taken for a whole one."""
        one = self.measured
        rest = {"responses": one.responses, "curve": self.curve, "kept_step": self.kept_step, "seconds": self.seconds}
        tensors = {f"values/{name}": values for name, values in one.values.items()}
        tensors |= {"confidence": one.confidence, "correct": one.correct}
        if one.target_logps is not None:
            tensors["target_logps"] = one.target_logps
        (folder / _REST).unlink(missing_ok=True)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / _TENSORS)
        (folder / _REST).write_text(json.dumps({"key": key, **rest}), encoding="utf-8")


def load_finished(folder: Path, key: str, pairs: list[EncodedPair]) -> Finished | None:
    """The record in a method's folder, if it is of that key and whole."""
    try:
        rest = json.loads((folder / _REST).read_text(encoding="utf-8"))
        if rest["key"] != key:
            return None
        tensors: dict[str, Tensor] = load_file(folder / _TENSORS)
    except (OSError, ValueError, KeyError, SafetensorError):
        return None
    values = {name.removeprefix("values/"): own for name, own in tensors.items() if name.startswith("values/")}
    logps = tensors.get("target_logps")
    measured = Measured(values, rest["responses"], tensors["confidence"], tensors["correct"], logps, pairs)
    return Finished(measured, rest["curve"], rest["kept_step"], rest["seconds"])


def run_key(recipe: Recipe, name: str, seed: int, pairs: list[EncodedPair], prompts: list[list[int]]) -> str:
    """Hash of what decides a method's run: its settings, the seed, the pairs and prompts as ids.

    The other methods of the recipe, its name and its place do not count.
    """
    settings = recipe.only([name]).model_dump(mode="json", exclude={"name", "output_dir", "compare"})
    ids = [[pair.prompt, pair.chosen, pair.rejected, pair.probability] for pair in pairs]
    return hashlib.sha256(json.dumps([settings, seed, ids, prompts], sort_keys=True).encode()).hexdigest()


def same_run(recipe: Recipe, name: str, folder: Path) -> bool:
    """Whether the checkpoints of a folder are of these settings, so that its training can go on."""
    from distalign.recipe import RecipeError, load_recipe

    if not any(folder.glob("checkpoint-*")):
        return False
    try:
        old = load_recipe(folder / "recipe.yaml").only([name])
    except (RecipeError, KeyError):
        return False
    left_out = {"name", "output_dir", "compare"}
    return old.model_dump(exclude=left_out) == recipe.only([name]).model_dump(exclude=left_out)
