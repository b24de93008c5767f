"""What the backward pass computes again changes memory and time, never a number; nor does a tied embedding."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
from distalign.engine.tied import Tie, _Rows
from engine_models import GROUPS, VOCABULARY, build, direct_token_logps, gradients, largest_difference
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile

from distalign.engine import score
from distalign.engine.memory import set_recompute
from distalign.engine.scoring import read

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


def test_tied_embedding_gives_no_second_dense_gradient():
    """The embedding's gradient joins the head's: sums are right, it is dense, and the module is left as it was."""
    model = build(tie_word_embeddings=True).train()
    weight = model.get_input_embeddings().weight
    assert weight is model.get_output_embeddings().weight
    score(model, GROUPS)
    # Twice, into a gradient that is there already.
    for _ in range(2):
        logps = score(model, GROUPS).logps.sum()
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
            logps.backward()
    large = [event.name for event in recorded.events() if list(weight.shape) in event.input_shapes]
    assert "aten::add_" in large  # into the gradient of the first pass
    assert not {"aten::add", "aten::copy_", "aten::clone", "aten::zeros_like"} & set(large)
    assert weight.grad is not None
    assert "forward" not in vars(model.get_input_embeddings())
    found = weight.grad.clone()
    model.zero_grad()
    for group in GROUPS:
        for response in group.responses:
            ids = torch.tensor([group.prompt + response])
            logps = model(input_ids=ids, use_cache=False).logits[0, len(group.prompt) - 1 : -1].log_softmax(-1)
            (2 * logps.gather(-1, torch.tensor(response)[:, None]).sum()).backward()
    torch.testing.assert_close(found, weight.grad, rtol=1e-5, atol=1e-5)
    assert found.shape[0] == VOCABULARY


def test_tied_embedding_gives_partial_gradients():
    """Of the embedding alone, of a frozen one, of the values beside the log-probs, of a row that is padding's."""
    model = build(tie_word_embeddings=True).train()
    value_head = torch.nn.Linear(32, 1, dtype=torch.float64)
    embedding = model.get_input_embeddings()

    def gradient(passes):
        scores = passes()
        (found,) = torch.autograd.grad(scores.logps.sum() + scores.values.square().sum(), [embedding.weight])
        return found

    def ours():
        return score(model, GROUPS, value_head=value_head)

    found = gradient(ours)
    with patch("distalign.engine.scoring.tied", lambda model: nullcontext()):
        expected = gradient(ours)
        embedding.padding_idx = GROUPS[0].prompt[0]
        masked = gradient(ours)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient(ours), masked, rtol=0, atol=1e-12)
    assert (masked - expected).abs().max() > 1e-6
    embedding.weight.requires_grad_(False)
    score(model, GROUPS).logps.sum().backward()
    assert embedding.weight.grad is None


@pytest.mark.parametrize("cut", ["embed_tokens", "layers.0"])
def test_tied_head_keeps_its_gradient_where_the_embedding_gets_none(cut):
    """A hook that detaches stops the backward pass before it comes to the embedding."""
    model = build(tie_word_embeddings=True)
    handle = model.model.get_submodule(cut).register_forward_hook(lambda module, inputs, output: output.detach())
    score(model, GROUPS).logps.sum().backward()
    found = gradients(model)
    torch.cat(direct_token_logps(model)).sum().backward()
    handle.remove()
    assert largest_difference(found, gradients(model)) < 1e-6


@pytest.mark.parametrize("broken", [False, True])
def test_tied_embedding_takes_nothing_from_another_backward_pass(broken):
    """A pass that ends before the embedding, or fails there, leaves the head's gradient to no later one."""
    model = build(tie_word_embeddings=True)
    value_head = torch.nn.Linear(32, 1, dtype=torch.float64)
    weight, other = model.get_input_embeddings().weight, model.model.layers[0].mlp.up_proj.weight
    expected = torch.autograd.grad(score(model, GROUPS, value_head=value_head).values.square().sum(), [weight])
    scores = score(model, GROUPS, value_head=value_head)

    def fail(gradient):
        raise ArithmeticError

    if broken:
        other.register_hook(fail)
        with pytest.raises(ArithmeticError):
            scores.logps.sum().backward(retain_graph=True)
    else:
        torch.autograd.grad(scores.logps.sum(), [other], retain_graph=True)
    found = torch.autograd.grad(scores.values.square().sum(), [weight])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_tied_embedding_in_a_compiled_decoder():
    """What is compiled does not carry the tie of one pass into the next."""
    model = build(tie_word_embeddings=True)
    score(model, GROUPS)
    model.get_input_embeddings().compile(backend="eager")
    for groups in (GROUPS[:2], GROUPS):
        model.zero_grad()
        score(model, groups).logps.sum().backward()
    found = gradients(model)
    torch.cat(direct_token_logps(model)).sum().backward()
    assert largest_difference(found, gradients(model)) < 1e-6


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_tied_embedding_sums_a_frequent_token_precisely(dtype, tolerance):
    """Many small rows of one token are not rounded off one by one against the head's gradient."""
    torch.manual_seed(0)
    ids, rows = torch.randint(3, (2000,)), (2e-3 * torch.rand(2000, 16)).to(dtype)
    head = torch.randn(5, 16).to(dtype)
    weight = torch.zeros(5, 16, dtype=dtype, requires_grad=True)
    tie = Tie()
    out = _Rows.apply(weight, ids, tie, None) * 1
    taken = []
    out.register_hook(lambda gradient: taken.append(tie.give(head.clone())))
    out.backward(rows)
    assert taken == [True]
    exact = head.double().index_put((ids,), rows.double(), accumulate=True)
    assert weight.grad is not None
    assert (weight.grad.double() - exact).norm() < tolerance * exact.norm()


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


def test_a_model_that_cannot_says_so():
    """A class without activation checkpointing is refused, not silently trained as it was."""
    model = build()
    type(model).supports_gradient_checkpointing, before = False, type(model).supports_gradient_checkpointing
    try:
        with pytest.raises(ValueError, match="does not support"):
            set_recompute(model, "selective")
    finally:
        type(model).supports_gradient_checkpointing = before


@pytest.mark.parametrize("use", ["values", "hidden"])
def test_tied_embedding_is_dense_where_the_head_is_not_in_the_loss(use):
    """Optimizers and clipping know no sparse gradients: a critic alone, or features alone, leave a dense one."""
    model = build(tie_word_embeddings=True, dtype=torch.float32).train()
    if use == "values":
        values = score(model, GROUPS, value_head=torch.nn.Linear(32, 1)).values
        assert values is not None
        values.sum().backward()
    else:
        read(model, GROUPS).hidden.sum().backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient is not None
    assert gradient.layout == torch.strided
