"""The record of every method that is done, so that a stopped comparison goes on instead of starting over."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from distalign.data import EncodedPair
from distalign.errors import DAMAGED
from distalign.evaluation.metrics import Measured
from distalign.experiments.recipe import Recipe
from distalign.rewards.base import column_rewards
from distalign.training.run_folder import write_text
from distalign.user_code import source_file

_TENSORS, _REST, _KEY = "finished.safetensors", "finished.json", "run.json"


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
        (folder / _REST).unlink(missing_ok=True)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / _TENSORS)
        write_text(folder / _REST, json.dumps({"key": key, "responses": measured.responses, **rest}))


def load_resume_record(folder: Path, key: str, pairs: list[EncodedPair]) -> ResumeRecord | None:
    """The record in a method's folder, if it is of that key and whole."""
    try:
        rest = json.loads((folder / _REST).read_text(encoding="utf-8"))
        if rest["key"] != key or not (folder / "model").is_dir():
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
    or by module.
    """
    rewarded = recipe.method(name).needs.reward
    left_out = {"name", "output_dir", "compare", "study", *(() if rewarded else ("reward",))}
    settings = recipe.only([name]).model_dump(mode="json", exclude=left_out)
    files = [*_method(recipe, name), *_target(recipe), *(_rewards(recipe) if rewarded else [])]
    return _hash([settings, _digests(files), seed, weights, data])


def reward_key(recipe: Recipe, seed: int, weights: str, data: str) -> str:
    """Hash of what decides a reward that is trained on the pairs."""
    return _hash([[one.model_dump(mode="json") for one in recipe.reward], recipe.dtype, seed, weights, data])


def data_key(pairs: list[EncodedPair], prompts: list[list[int]]) -> str:
    """Hash of pairs, with the rewards of their columns, and prompts as ids."""
    rows = [
        [pair.prompt, pair.chosen, pair.rejected, pair.probability, *(column_rewards(pair.row) or ())] for pair in pairs
    ]
    return _hash([rows, prompts])


def is_of(folder: Path, key: str) -> bool:
    """Whether what is in a folder was made under this key."""
    try:
        return json.loads((folder / _KEY).read_text(encoding="utf-8"))["key"] == key
    except DAMAGED:
        return False


def claim(folder: Path, key: str) -> None:
    """What is made in a folder from now on is made under this key; what another run had finished there is forgotten."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _REST).unlink(missing_ok=True)
    write_text(folder / _KEY, json.dumps({"key": key}))


def _method(recipe: Recipe, name: str) -> list[Path]:
    """The file of a method that is the user's own."""
    place = recipe.methods[name].get("class")
    file = source_file(place) if place and ":" in place else None
    return [Path(os.path.expanduser(file))] if file else []


def _target(recipe: Recipe) -> list[Path]:
    """The files of a known target that is the user's own class, or a model in a folder."""
    return [] if recipe.target is None else _files(recipe.target.class_, recipe.target.model)


def _rewards(recipe: Recipe) -> list[Path]:
    """The files that rewards are read from."""
    return [file for reward in recipe.reward for file in _files(reward.function, reward.model)]


def _files(code: str | None, model: str | None) -> list[Path]:
    """The file of code by its name, or the files of a model in a folder."""
    place = source_file(code) if code else model
    path = Path(os.path.expanduser(place)) if place else None
    if path is None or not os.path.isdir(path):
        return [path] if path is not None and os.path.isfile(path) else []
    return sorted(file for file in path.rglob("*") if file.suffix in (".safetensors", ".json"))


def _digests(files: list[Path]) -> list[str]:
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
