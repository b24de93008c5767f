"""What is loaded is what the files hold: every tensor of the model was in them, and every number is finite."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import load_peft_weights
from torch import nn
from transformers import PreTrainedModel

from distalign.errors import InputError

logger = logging.getLogger("distalign.models.verify")


# What families call their input embeddings, which PEFT saves with an adapter where they were resized.
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight")


# Types of adapters, by PEFT's names, whose layers have no whole `merge`.
_NOT_MERGED = ("ADAPTION_PROMPT", "LILY", "BEFT")


class ModelError(InputError):
    """A model that cannot be loaded or used: says which, what was found, and what to do."""


def load_verified(kind: Any, label: str, path: str, *, later: tuple[str, ...] = (), **settings: Any) -> PreTrainedModel:
    """`kind.from_pretrained(path)`, from safetensors only; tensors whose names start with `later` come with an adapter.

    `label` begins every message. Raises ModelError for tensors that the files lack, which transformers would fill with
    random numbers, and for numbers that are not finite. Tensors that the model has no place for are named in a warning.
    """
    model, report = kind.from_pretrained(path, use_safetensors=True, output_loading_info=True, **settings)
    missing = [key for key in report["missing_keys"] if not key.startswith(later)]
    if beyond := _layers_beyond(model, report["unexpected_keys"]):
        raise ModelError(
            f"{label}: its files hold layers that its config.json leaves out ({_few(beyond)}); put the config.json "
            "that belongs to them beside them"
        )
    check_complete(label, missing, report["unexpected_keys"])
    check_finite(label, model)
    return model


def load_adapter(label: str, model: PreTrainedModel, folder: str) -> PeftModel:
    """The model with the adapter that PEFT saved in `folder`, verified as `load_verified` does. Raises ModelError.

    A model whose embeddings the adapter was trained with after resizing them is resized too.
    """
    check_adapter(label, PeftConfig.from_pretrained(folder))
    saved = load_peft_weights(folder, device="cpu")
    rows = [value.shape[0] for key, value in saved.items() if key.endswith(_EMBEDDINGS)]
    if rows and rows[0] != (own_rows := model.get_input_embeddings().num_embeddings):
        logger.info("%s: its %d embeddings become %d, as in the adapter", label, own_rows, rows[0])
        model.resize_token_embeddings(rows[0], mean_resizing=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # an error below
        warnings.filterwarnings("ignore", ".*a tied layer is part of the adapter")  # it is then not merged
        adapted = PeftModel.from_pretrained(model, folder)
    own = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    check_complete(
        label,
        own - saved.keys(),
        {key for key in saved.keys() - own if not key.endswith((*_EMBEDDINGS, "lm_head.weight"))},
    )
    check_finite(label, adapted)
    return adapted


def check_adapter(label: str, config: PeftConfig) -> None:
    """Raise ModelError for an adapter that is more than its layers, which cannot be merged or scored by them."""
    if config.is_prompt_learning:
        raise ModelError(f"{label}: its adapter is a learned prompt, which cannot be merged; train a LoRA adapter")
    if getattr(config, "alora_invocation_tokens", None) or config.peft_type == PeftType.POLY:
        what = "has alora_invocation_tokens" if config.peft_type == PeftType.LORA else "is of the type Poly"
        raise ModelError(
            f"{label}: its adapter {what}: PEFT tells its layers what to work on only in the whole model's forward, "
            "which is not what trains and scores it; train a plain LoRA adapter"
        )
    if (kind := str(config.peft_type).rpartition(".")[2]) in _NOT_MERGED:
        raise ModelError(
            f"{label}: its adapter is of the type {kind}, which PEFT does not merge into every layer "
            "that it adapts: it could be trained and not be loaded again; train a LoRA adapter"
        )
    if getattr(config, "layer_replication", None):
        raise ModelError(
            f"{label}: its adapter has layer_replication, by which layers share one weight and each has an adapter of "
            "its own: merged, all would go into that weight, which gives another model; train one without it"
        )


def adapts_tied(model: nn.Module) -> bool:
    """Whether an adapter is on the input or output embeddings of a model in which both are one weight.

    Merged into that weight it would change the other end of the model too.
    """
    ends: Any = (model.get_input_embeddings(), model.get_output_embeddings())  # pyright: ignore[reportCallIssue]
    own = [end.get_base_layer() if isinstance(end, BaseTunerLayer) else end for end in ends]
    weights = [getattr(layer, "weight", None) for layer in own]
    return weights[0] is not None and weights[0] is weights[1] and any(isinstance(end, BaseTunerLayer) for end in ends)


def check_mergeable(label: str, model: nn.Module) -> None:
    """Raise ModelError for an adapter that cannot be merged, because it is on tied embeddings."""
    if adapts_tied(model):
        raise ModelError(
            f"{label}: its adapter is on the output or input embeddings (lm_head, embed_tokens), and in this model "
            "both are one weight (tie_word_embeddings): merged into it, the adapter would change both, which gives "
            "another model; keep it as an adapter, or train one without them (target_modules)"
        )


def _layers_beyond(model: PreTrainedModel, unexpected: Iterable[str]) -> list[str]:
    """The unexpected tensors, if all are as those of the layers; a layer that predicts further tokens is not."""
    own = {re.sub(r"\.\d+\.", ".N.", key) for key in model.state_dict()}
    keys = list(unexpected)
    return keys if all(re.sub(r"\.\d+\.", ".N.", key) in own for key in keys) else []


def check_complete(label: str, missing: Collection[str], unexpected: Collection[str] = ()) -> None:
    """Raise ModelError if tensors of the model are not in its files; warn of tensors that have no place in it."""
    if missing:
        instead = f", and hold {_few(unexpected)}, which the model does not have" if unexpected else ""
        raise ModelError(
            f"{label}: its files lack {len(missing)} of its tensors ({_few(missing)}){instead}; they would be "
            "random numbers. Save the whole causal language model again with save_pretrained, without a wrapper "
            "(torch.compile, DDP) and with its head"
        )
    if unexpected:
        logger.warning("%s: %d tensors of its files are not used: %s", label, len(unexpected), _few(unexpected))


def check_finite(label: str, weights: nn.Module | Mapping[str, torch.Tensor]) -> None:
    """Raise ModelError if a weight is NaN or infinite."""
    named: Iterable[tuple[str, torch.Tensor]] = (
        weights.named_parameters() if isinstance(weights, nn.Module) else weights.items()
    )
    for key, tensor in named:
        parts = [part for part in _parts(tensor) if part.is_floating_point() and part.device.type != "meta"]
        # torch cannot ask float8 itself.
        if not all((part.float() if part.element_size() == 1 else part).isfinite().all() for part in parts):
            raise ModelError(f"{label}: the tensor {key} holds NaN or infinite numbers; take another checkpoint")


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensor; of 4-bit weights the scales too, in which NaN and infinite numbers of a block are found."""
    state = getattr(tensor, "quant_state", None)
    scales = (state, getattr(state, "state2", None))
    found = [tensor, getattr(state, "offset", None), *(getattr(one, "absmax", None) for one in scales)]
    return [part for part in found if isinstance(part, torch.Tensor)]


def _few(names: Collection[str], most: int = 4) -> str:
    shown = ", ".join(sorted(names)[:most])
    return shown if len(names) <= most else f"{shown}, …"
