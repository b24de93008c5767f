"""What every results.json has: versions and device, numbers as plain data."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from importlib.metadata import version
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
