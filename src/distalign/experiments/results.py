"""The record of every method that is done, so that a stopped comparison goes on instead of starting over."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from distalign.data import EncodedPair, EncodedPrompt
from distalign.errors import DAMAGED
from distalign.evaluation.metrics import Measured
from distalign.experiments.recipe import Recipe
from distalign.rewards.base import column_rewards
from distalign.training.run_folder import write_text
from distalign.user_code import files_digests

_TENSORS, FINISHED, _KEY = "finished.safetensors", "finished.json", "run.json"


@dataclass
class ResumeRecord:
    """A method after training: what was measured, the rows of its curve, the step that was kept, seconds."""

    measured: Measured
    curve: list[dict[str, Any]]
    kept_step: int
    seconds: dict[str, float]

    def save(self, folder: Path, key: str) -> None:
        """Write it; the key comes last, so that a torn record is not taken for a whole one."""
        measured = self.measured
        rest = {"curve": self.curve, "kept_step": self.kept_step, "seconds": self.seconds}
        tensors = {f"values/{name}": values for name, values in measured.values.items()}
        tensors |= {"confidence": measured.confidence, "correct": measured.correct}
        if measured.target_logps is not None:
            tensors["target_logps"] = measured.target_logps
        (folder / FINISHED).unlink(missing_ok=True)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / _TENSORS)
        write_text(folder / FINISHED, json.dumps({"key": key, "responses": measured.responses, **rest}))


def load_resume_record(folder: Path, key: str, pairs: list[EncodedPair]) -> ResumeRecord | None:
    """The record in a method's folder, if it is of that key and whole."""
    try:
        rest = json.loads((folder / FINISHED).read_text(encoding="utf-8"))
        if rest["key"] != key or not any((folder / "model").glob("*.safetensors")):
            return None
        tensors: dict[str, Tensor] = load_file(folder / _TENSORS)
        confidence, correct = tensors["confidence"], tensors["correct"]
        responses, curve, kept_step, seconds = (rest[key] for key in ("responses", "curve", "kept_step", "seconds"))
    except (*DAMAGED, SafetensorError):
        return None
    values = {name.removeprefix("values/"): own for name, own in tensors.items() if name.startswith("values/")}
    logps = tensors.get("target_logps")
    return ResumeRecord(Measured(values, responses, confidence, correct, logps, pairs), curve, kept_step, seconds)


def run_key(recipe: Recipe, name: str, seed: int, weights: str, data: str) -> str:
    """Hash of what decides a method's run: its settings, the seed, the model's weights, the pairs and prompts.

    The other methods of the recipe, its name and its place do not count, nor does a reward that the method does not
    take. A reward's and a target's files count by their content, a function's and a method's too, whether named by path
    or by module; files of data by their content alone (`data`).
    """
    rewarded = recipe.method(name).needs.reward
    left_out: dict[str, Any] = dict.fromkeys(("name", "output_dir", "compare", "study"), True)
    left_out |= {"data": {"train", "eval", "prompts"}, "target": {"prompts"}} | ({} if rewarded else {"reward": True})
    settings = recipe.only([name]).model_dump(mode="json", exclude=left_out)
    rewards = recipe.reward if rewarded else ()
    code, models = [recipe.methods[name].get("class")], list[str | None]()
    if recipe.target is not None:
        code.append(recipe.target.class_)
        models.append(recipe.target.model)
    code += [reward.function for reward in rewards]
    models += [reward.model for reward in rewards]
    return _hash([settings, files_digests(code, models), seed, weights, data])


def reward_key(recipe: Recipe, seed: int, weights: str, data: str) -> str:
    """Hash of what decides a reward that is trained on the pairs."""
    return _hash([[one.model_dump(mode="json") for one in recipe.reward], recipe.dtype, seed, weights, data])


def data_key(pairs: list[EncodedPair], prompts: list[EncodedPrompt], held_out: Sequence[list[int]]) -> str:
    """Hash of pairs, and of prompts to answer, with their columns; and of held-out prompts."""
    rows = [[pair.prompt, pair.chosen, pair.rejected, pair.probability, column_rewards(pair.row)] for pair in pairs]
    columns = [one.row and one.row.extra for one in (*pairs, *prompts)]
    return _hash([rows, [one.prompt for one in prompts], list(held_out), columns])


def is_of(folder: Path, key: str) -> bool:
    """Whether what is in a folder was made under this key."""
    try:
        return json.loads((folder / _KEY).read_text(encoding="utf-8"))["key"] == key
    except DAMAGED:
        return False


def claim(folder: Path, key: str) -> None:
    """What is made in a folder from now on is made under this key; what another run had finished there is forgotten."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FINISHED).unlink(missing_ok=True)
    write_text(folder / _KEY, json.dumps({"key": key}))


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
