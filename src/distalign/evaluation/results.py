"""What every run folder with results has: results.json, samples.jsonl, versions and device; and how an old one goes."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distalign.data import Text, Tokenizer, decode_after
from distalign.training.run_folder import remove, write_text

if TYPE_CHECKING:
    from distalign.evaluation.metrics import Measured


# What an earlier run leaves in its folder, and another removes there.
RESULTS = ("results.json", "samples.jsonl", "report.html", "tables", "figures")


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Write results.json."""
    text = json.dumps(finite(results), indent=1, ensure_ascii=False)
    write_text(folder / "results.json", text)


@dataclass(frozen=True)
class Results:
    """What a comparison or an evaluation measured: `content` is what `folder`/results.json holds.

    methods: policy → measure → {"mean", "se", "n"}. paired: policy → measure → its difference from the reference on the
    same prompts, {"mean", "low", "high", …} at 95 %.
    """

    folder: Path
    content: dict[str, Any]

    @property
    def methods(self) -> dict[str, dict[str, Any]]:
        """The numbers of every policy."""
        return self.content["methods"]

    @property
    def paired(self) -> dict[str, dict[str, Any]]:
        """The differences from the reference."""
        return self.content["paired"]


def write_samples(
    folder: Path, tokenizer: Tokenizer, prompts: Sequence[Text], measured: Mapping[str, Measured]
) -> None:
    """Write samples.jsonl: for every prompt, as it was read, the first response of each policy, as text.

    Beside it, where they are known: the mean reward of the policy's responses to the prompt, and the share of
    judgements that prefer them to the reference's.
    """
    numbers = {"rewards": "reward", "verdicts": "win_rate"}
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        for index, prompt in enumerate(prompts):
            line: dict[str, Any] = {"prompt": prompt, "responses": {}}
            for name, policy in measured.items():
                line["responses"][name] = decode_after(tokenizer, policy.responses[index][0])
                for key, value in numbers.items():
                    if value in policy.values:
                        line.setdefault(key, {})[name] = float(policy.values[value][index])
            file.write(json.dumps(finite(line), ensure_ascii=False) + "\n")


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
    for name in RESULTS:
        remove(folder / name)
