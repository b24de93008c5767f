"""What the backward pass computes again instead of keeping: nothing, all but matrix products and attention, or layers.

Per token and layer a Llama keeps about twice as many numbers as its matrix products and attention put out; the rest
(norms, rotations, activation functions, copies) is cheap to compute again. "selective" keeps only what was expensive.
"full" keeps only the input of each layer and pays one more forward pass.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

Recompute = Literal["none", "selective", "full"]

_aten: Any = torch.ops.aten
_EXPENSIVE = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten._grouped_mm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.higher_order.flex_attention,
}


def set_recompute(model: Any, recompute: Recompute) -> None:
    """Choose what `model` computes again in its backward pass; it applies while the model is in training mode.

    Raises ValueError if the model's class does not support it.
    """
    switch = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    off = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    if recompute == "none":
        if recomputes(model):
            off()
        return
    switch({"use_reentrant": False, **({"context_fn": _contexts} if recompute == "selective" else {})})
    # The switch makes the embedding's output require a gradient, which the other kind of checkpointing needs; here it
    # would only send the backward pass through frozen layers below an adapter.
    model.disable_input_require_grads()


def recomputes(model: nn.Module) -> bool:
    """Whether some layers of the model are computed again in its backward pass."""
    return any(getattr(m, "gradient_checkpointing", False) or "checkpoint_fn" in vars(m) for m in model.modules())


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE
