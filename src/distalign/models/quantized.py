"""4-bit weights (bitsandbytes), frozen below an adapter: which they are, what is beside an adapter trained on them."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import BitsAndBytesConfig

from distalign.errors import DAMAGED
from distalign.models.verify import ModelError

# What `quantization: 4bit` is. The dtype of the products is the model's.
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}

# The file beside an adapter that says what its base was quantised with: PEFT's own has no field for it.
NOTE = "quantization.json"
_SETTINGS = (*NF4, "bnb_4bit_compute_dtype", "llm_int8_skip_modules")


def check_installed(label: str) -> None:
    """Raise ModelError if bitsandbytes is missing."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f"{label}: 4-bit weights need bitsandbytes; run pip install 'distalign[quantization]'")


def settings_of(config: BitsAndBytesConfig | Mapping[str, Any]) -> dict[str, Any]:
    """What is to be remembered of a BitsAndBytesConfig, or of a dictionary of its arguments."""
    values = config if isinstance(config, Mapping) else config.to_dict()
    kept = {key: values[key] for key in _SETTINGS if values.get(key) is not None}
    return {key: value if isinstance(value, bool | list) else str(value) for key, value in kept.items()}


def is_quantized(model: nn.Module) -> bool:
    """Whether a model, or the one under its adapter, has quantised weights."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return bool(getattr(base, "is_quantized", False))


def quantization_of(model: nn.Module) -> dict[str, Any] | None:
    """How a model's weights, or those under its adapter, are in 4 bits; None if they are not."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    settings = {} if config is None or not is_quantized(model) else settings_of(config)
    return settings if settings.get("load_in_4bit") else None


def write_note(model: nn.Module, folder: Path) -> None:
    """Write beside a saved adapter how its base was quantised, if it was."""
    if (settings := quantization_of(model)) is not None:
        (folder / NOTE).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def read_note(folder: Path) -> dict[str, Any] | None:
    """What `write_note` wrote; None without one. Raises ModelError."""
    if not (folder / NOTE).is_file():
        return None
    try:
        settings = settings_of(json.loads((folder / NOTE).read_text(encoding="utf-8")))
    except DAMAGED as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"model {folder}: its {NOTE} cannot be read ({reason}); fix it") from None
    if not settings.get("load_in_4bit"):
        raise ModelError(f"model {folder}: its {NOTE} names no 4-bit weights; fix it")
    return settings


def keep_exact(label: str, model: nn.Module) -> None:
    """Let 4-bit layers compute the same in evaluation as in training, on any CPU.

    On one with AVX512-BF16 bitsandbytes packs a layer's weights anew at its first pass without gradient: from then on
    it multiplies in bfloat16, whatever the dtype, and passes no gradient through. Raises ModelError if it has done so.
    """
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    for layer in layers:
        if layer.support_avx512bf16_for_cpu:
            layer.support_avx512bf16_for_cpu = False
            if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
                raise ModelError(
                    f"{label}: it has been run before it came here, and on this CPU bitsandbytes then packs 4-bit "
                    "weights in a form without gradients; load it again, and pass it before you run it"
                )
