"""What the backward pass computes again changes memory and time, never a number."""

from __future__ import annotations

import warnings

import pytest
import torch
from engine_models import GROUPS, build, direct_token_logps, gradients, largest_difference
from peft import LoraConfig, get_peft_model

from distalign.engine import score
from distalign.engine.memory import set_recompute

# PEFT 0.21 and transformers' PEFT code read names that transformers 5.23 renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


def step(model):
    """Log-probabilities and gradients of a loss that weights every response differently."""
    scores = score(model, GROUPS, entropy=True)
    weights = torch.linspace(-1, 2, len(scores.mask), dtype=torch.float64)
    assert scores.step_entropy is not None
    ((scores.logps * weights).sum() + scores.step_entropy.sum()).backward()
    return scores.logps.detach(), gradients(model)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_oss", "mixtral", "deepseek_v3"])
def test_same_numbers(family, recompute):
    """Values and gradients are those of the pass that keeps everything; switching it off again leaves no trace."""
    model = build(family).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    logps, expected = step(model)
    for setting in (recompute, "none", "none"):
        set_recompute(model, setting)
        again, found = step(model)
        torch.testing.assert_close(again, logps, rtol=0, atol=1e-12)
        assert largest_difference(found, expected) < 1e-12


def test_with_an_adapter():
    """The same under LoRA, where everything below the adapter is frozen."""
    model = get_peft_model(build(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).train()
    logps, expected = step(model)
    for setting in ("selective", "full", "none"):
        set_recompute(model, setting)
        again, found = step(model)
        torch.testing.assert_close(again, logps, rtol=0, atol=1e-12)
        assert largest_difference(found, expected) < 1e-12


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_frozen_layers_below_an_adapter_stay_out_of_the_backward_pass(recompute):
    """Nothing below the first adapter asks for a gradient, before or after recomputation was switched on and off."""
    model = build(num_hidden_layers=3)
    model = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], layers_to_transform=[2])
    ).train()
    asked = []
    model.get_decoder().layers[0].register_forward_hook(lambda module, inputs, out: asked.append(out.requires_grad))
    for setting in ("none", recompute, "none"):
        set_recompute(model, setting)
        score(model, GROUPS).logps.sum().backward()
    assert not any(asked)


def test_matrix_products_are_not_repeated():
    """Selective recomputes the layers' matrix products and attention calls not at all, the head's once; full, all."""
    from torch.utils.flop_counter import FlopCounterMode

    counted = {}
    for setting in ("none", "selective", "full"):
        model = build(dtype=torch.float32).train()
        score(model, GROUPS)
        set_recompute(model, setting)
        with FlopCounterMode(display=False) as counter:
            score(model, GROUPS).logps.sum().backward()
        counted[setting] = counter.get_total_flops()
    rows = sum(len(response) for group in GROUPS for response in group.responses)
    again = 2 * rows * model.get_output_embeddings().weight.numel()
    assert counted["selective"] == counted["none"] + again
    assert counted["full"] > 1.1 * counted["none"] + again


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize(
    "adapter", [{"target_modules": ["embed_tokens", "q_proj"]}, {"trainable_token_indices": [3, 4, 5]}]
)
def test_an_adapted_embedding(tie, adapter):
    """PEFT's wrappers of an embedding have no `num_embeddings`; gradients of what they train are those of the model."""
    config = LoraConfig(r=2, init_lora_weights=False, **{"target_modules": ["q_proj"], **adapter})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT on adapters of tied weights
        model = get_peft_model(build(tie_word_embeddings=tie), config)
    score(model, GROUPS).logps.sum().backward()
    found = gradients(model)
    model.zero_grad()
    torch.cat(direct_token_logps(model)).sum().backward()
    assert largest_difference(found, gradients(model)) < 1e-6


@pytest.mark.parametrize("tie", [False, True])
def test_a_tied_embedding_gets_both_gradients(tie):
    """Of the head and of the look-up, as the model's own forward gives them."""
    model = build(tie_word_embeddings=tie)
    score(model, GROUPS).logps.sum().backward()
    found = gradients(model)
    model.zero_grad()
    torch.cat(direct_token_logps(model)).sum().backward()
    assert largest_difference(found, gradients(model)) < 1e-6


def test_a_model_that_cannot_says_so():
    """A class without activation checkpointing is refused, not silently trained as it was."""
    model = build()
    type(model).supports_gradient_checkpointing, before = False, type(model).supports_gradient_checkpointing
    try:
        with pytest.raises(ValueError, match="does not support"):
            set_recompute(model, "selective")
    finally:
        type(model).supports_gradient_checkpointing = before
