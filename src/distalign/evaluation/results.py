"""What every run folder with results has: results.json, samples.jsonl, versions and device; and how an old one goes."""

from __future__ import annotations

import json
import math
import platform
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from distalign.data import Tokenizer


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Write results.json."""
    text = json.dumps(finite(results), indent=1, ensure_ascii=False)
    (folder / "results.json").write_text(text, encoding="utf-8")


def write_samples(
    folder: Path, tokenizer: Tokenizer, prompts: Sequence[str], responses: Mapping[str, Sequence[Sequence[list[int]]]]
) -> None:
    """Write samples.jsonl: for every prompt the first response of each policy, as text."""
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        for index, prompt in enumerate(prompts):
            texts = {
                name: tokenizer.decode(by_prompt[index][0], skip_special_tokens=True)
                for name, by_prompt in responses.items()
            }
            file.write(json.dumps({"prompt": prompt, "responses": texts}, ensure_ascii=False) + "\n")


def finite(value: object) -> object:
    """JSON has no NaN: a number that could not be computed is null."""
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions() -> dict[str, str]:
    """Versions of Python and of what results depend on."""
    packages = ("distalign", "torch", "transformers", "peft", "accelerate")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def environment() -> dict[str, str]:
    """Versions and device, for a result to be repeated."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {**versions(), "device": device}


def forget_results(folder: Path) -> None:
    """Remove the results and the report of an earlier run in this folder."""
    for name in ("results.json", "samples.jsonl", "report.html"):
        (folder / name).unlink(missing_ok=True)
    for name in ("tables", "figures"):
        shutil.rmtree(folder / name, ignore_errors=True)
