"""What every results.json has: versions and device, numbers as plain data; and how an old one is forgotten."""

from __future__ import annotations

import math
import platform
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Estimates and intervals by name, as dictionaries."""
    return {key: value._asdict() for key, value in values.items()}


def finite(value: Any) -> Any:
    """JSON has no NaN: a number that could not be computed is null."""
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def environment() -> dict[str, str]:
    """Versions and device, for a result to be repeated."""
    packages = ("distalign", "torch", "transformers", "peft", "accelerate")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {"python": platform.python_version(), **{name: version(name) for name in packages}, "device": device}


def forget_results(folder: Path) -> None:
    """Remove the results and the report of an earlier run in this folder: they are not this one's."""
    for name in ("results.json", "samples.jsonl", "report.html"):
        (folder / name).unlink(missing_ok=True)
    for name in ("tables", "figures"):
        shutil.rmtree(folder / name, ignore_errors=True)
