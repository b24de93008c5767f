from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from engine_models import (
    GROUPS,
    VOCABULARY,
    build,
    checkpointing,
    direct_logits,
    direct_token_logps,
    gradients,
    largest_difference,
)
from peft import LoraConfig, PeftModel, get_peft_model

from distalign.engine import Group, check, score, score_in_batches
from distalign.engine.attention import NAME

# PEFT 0.21 still asks transformers 5.23 by the old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

PATHS = {"shared": "llama", "padded": "falcon", "plain": "llama"}


def with_lora(
    model, *, dropout=0.0, targets=("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj")
):
    """An adapter that changes the model a lot, in its dtype."""
    dtype = next(model.parameters()).dtype
    torch.manual_seed(5)
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=list(targets)))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.5 * torch.randn_like(parameter))
    return wrapped.to(dtype)


def served_by(path):
    """A tiny model that the engine serves by `path`."""
    model = build(PATHS[path])
    if path == "plain":
        model = with_lora(model, targets=("lm_head", "q_proj"))
    assert check(model).path == path
    return model


def rows(scores, values):
    """Response tokens only, response by response."""
    return [row[mask] for row, mask in zip(values, scores.mask, strict=True)]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("reference_path", PATHS)
def test_entropy_and_kl(path, reference_path):
    """Entropy, full-vocabulary KL and their gradients equal the direct computation, on every pair of paths."""
    model, reference = served_by(path), served_by(reference_path)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(0.9)
    scores = score(model, GROUPS, reference=reference, entropy=True, temperature=0.7)
    log_p = [(z / 0.7).log_softmax(-1) for z in direct_logits(model)]
    with torch.no_grad():
        log_q = [(z / 0.7).log_softmax(-1) for z in direct_logits(reference)]
        own = direct_token_logps(reference, temperature=0.7)
    entropy = [-(p.exp() * p).sum(-1) for p in log_p]
    kl = [(p.exp() * (p - q)).sum(-1) for p, q in zip(log_p, log_q, strict=True)]
    torch.testing.assert_close(rows(scores, scores.step_entropy), entropy, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(rows(scores, scores.step_kl), kl, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(rows(scores, scores.reference_token_logps), own, rtol=1e-9, atol=1e-9)
    assert not scores.reference_token_logps.requires_grad

    (scores.logps.sum() + 2 * scores.step_kl.sum() - 3 * scores.step_entropy.sum()).backward()
    assert all(parameter.grad is None for parameter in reference.parameters())
    ours = gradients(model)
    logps = sum(tokens.sum() for tokens in direct_token_logps(model, temperature=0.7))
    (logps + 2 * sum(x.sum() for x in kl) - 3 * sum(x.sum() for x in entropy)).backward()
    assert largest_difference(ours, gradients(model)) < 1e-6


def test_adapter_off_is_the_base_model():
    """The reference may be the policy with its adapter off; dropout and gradients stay off in it."""
    base, model = build("llama_dropout"), with_lora(build("llama_dropout"), dropout=0.3)

    @contextlib.contextmanager
    def adapter_off():
        with model.disable_adapter():
            yield model

    model.train()
    scores = score(model, GROUPS, reference=adapter_off)
    assert all(module.training for module in model.modules())
    with torch.no_grad():
        expected = score(base, GROUPS)
    torch.testing.assert_close(scores.reference_token_logps, expected.token_logps, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(scores.reference_logps, expected.logps)
    assert check(model).path == "shared"
    model.eval()
    same = score(model, GROUPS, reference=model)
    assert same.step_kl.abs().max() < 1e-10
    assert (scores.logps - scores.reference_logps).abs().min() > 0.1


def test_lora_gradients():
    """Gradients of the adapter equal separate encoding; the frozen base gets none."""
    model = with_lora(build())
    assert isinstance(model, PeftModel)
    score(model, GROUPS).logps.sum().backward()
    ours = gradients(model)
    sum(tokens.sum() for tokens in direct_token_logps(model)).backward()
    assert all("lora_" in name for name in ours)
    assert largest_difference(ours, gradients(model)) < 1e-6


def test_head_with_bias():
    """A head whose bias tilts some tokens is served by the shared path, its bias gradient included."""
    model = build()
    model.lm_head.bias = torch.nn.Parameter(torch.randn(VOCABULARY, dtype=torch.float64))
    scores = score(model, GROUPS)
    assert check(model).path == "shared"
    scores.logps.sum().backward()
    ours = gradients(model)
    own = direct_token_logps(model)
    torch.testing.assert_close(rows(scores, scores.token_logps), own, rtol=1e-10, atol=1e-10)
    sum(tokens.sum() for tokens in own).backward()
    theirs = gradients(model)
    assert "lm_head.bias" in theirs
    assert largest_difference(ours, theirs) < 1e-6


def test_temperature():
    """Log-probabilities of softmax(logits / T); T = 0 is refused."""
    model = build()
    with torch.no_grad():
        scores = score(model, GROUPS, temperature=1.7)
        torch.testing.assert_close(rows(scores, scores.token_logps), direct_token_logps(model, temperature=1.7))
    with pytest.raises(ValueError, match="temperature is 0"):
        score(model, GROUPS, temperature=0.0)


def test_groups_do_not_see_each_other():
    """A group's scores do not depend on the others in its row; padding is zero and masked."""
    model = build("gemma3")
    with torch.no_grad():
        whole = score(model, GROUPS)
        alone = torch.cat([score(model, [group]).logps for group in GROUPS])
    torch.testing.assert_close(whole.logps, alone, rtol=1e-12, atol=1e-12)
    assert (whole.token_logps[~whole.mask] == 0).all()
    assert whole.group.tolist() == [0, 0, 0, 1, 2, 2]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("budget", [1, 20, 10_000])
def test_batches_keep_order(path, budget):
    """Micro-batches of any size give what one pass gives, in the callers' order, without gradient."""
    model = served_by(path)
    heard = []
    whole = score(model, GROUPS, reference=model, entropy=True)
    parts = score_in_batches(
        model,
        GROUPS,
        token_budget=budget,
        reference=model,
        entropy=True,
        progress=lambda done, total: heard.append((done, total)),
    )
    for name in ("token_logps", "step_entropy", "step_kl", "reference_token_logps", "mask", "group"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name).detach(), rtol=1e-9, atol=1e-9)
    assert not parts.token_logps.requires_grad
    assert heard[-1] == (3, 3)
    assert len(heard) == {1: 3, 20: 3, 10_000: 1}[budget]


def test_every_micro_batch_is_a_part_of_the_gradient():
    """Gradients of micro-batches add up to that of the whole batch."""
    model = build("qwen3")
    score(model, GROUPS).logps.sum().backward()
    whole = gradients(model)
    for group in GROUPS:
        score(model, [group]).logps.sum().backward()
    assert largest_difference(gradients(model), whole) < 1e-6


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral_window"])
def test_model_is_left_as_found(family):
    """Attention implementation, modes, random state, plain forward and generation are the same after a score."""
    model = build(family)
    ids = torch.tensor([[5, 6, 7, 8]])
    implementation = model.config._attn_implementation
    before = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    logits = model(ids).logits
    model.model.layers[0].train()
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    score(model, GROUPS).logps.sum().backward()
    assert (torch.random.get_rng_state() == state).all()
    assert [module.training for module in model.modules()] == modes
    model.eval()
    assert model.config._attn_implementation == implementation
    assert (model(ids).logits == logits).all()
    after = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert (after == before).all()


def test_model_is_left_as_found_after_an_error(monkeypatch):
    """An exception in the middle of the model leaves its attention implementation alone."""
    model = build()
    check(model)
    implementation = model.config._attn_implementation

    def fail(*_, **__):
        assert model.config._attn_implementation == NAME
        raise ArithmeticError

    monkeypatch.setattr(model.model.layers[1].mlp, "forward", fail)
    with pytest.raises(ArithmeticError):
        score(model, GROUPS)
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_activation_checkpointing(family, reentrant):
    """Layers recomputed in the backward pass, after the call has ended, use the same attention: same gradient."""
    model = build(family).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    score(model, GROUPS).logps.sum().backward()
    expected = gradients(model)
    checkpointing(model)({"use_reentrant": reentrant})
    scores = score(model, GROUPS)
    scores.logps.sum().backward()
    assert largest_difference(gradients(model), expected) < 1e-6
    own = direct_token_logps(model)
    sum(tokens.sum() for tokens in own).backward()
    assert largest_difference(gradients(model), expected) < 1e-6


def test_wrapped_checkpointing():
    """The same for torch's own checkpoint wrapper, which FSDP uses."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = build().train()
    score(model, GROUPS).logps.sum().backward()
    expected = gradients(model)
    model.model.layers = torch.nn.ModuleList([checkpoint_wrapper(layer) for layer in model.model.layers])
    score(model, GROUPS).logps.sum().backward()
    found = {name.replace("_checkpoint_wrapped_module.", ""): grad for name, grad in gradients(model).items()}
    assert largest_difference(found, expected) < 1e-6


def test_dropout_is_honoured():
    """In training mode dropout acts, in attention too; in evaluation mode it does not."""
    model = build("llama_dropout")
    with torch.no_grad():
        still = score(model, GROUPS).logps
        model.train()
        torch.manual_seed(3)
        moved = score(model, GROUPS).logps
        again = score(model, GROUPS).logps
        torch.manual_seed(3)
        same = score(model, GROUPS).logps
    assert (moved - still).abs().min() > 1e-3
    assert (moved - again).abs().min() > 1e-3
    assert (moved == same).all()


def test_errors():
    """Mistakes are refused with the place and the remedy."""
    model = build()
    with pytest.raises(ValueError, match="no groups"):
        score(model, [])
    with pytest.raises(ValueError, match="the model has 64"):
        score_in_batches(model, [Group([1] * 60, [[2] * 6])], token_budget=100)
    with pytest.raises(ValueError, match=r"reference: its vocabulary has 90 tokens"):
        score(model, [Group([1], [[2]])], reference=build(vocab_size=90))
    with pytest.raises(TypeError, match="pass the module inside"):
        score(torch.nn.Sequential(model), GROUPS)
    with pytest.raises(TypeError, match="must give the reference model"):
        score(model, GROUPS, reference=contextlib.nullcontext)


def test_reference_that_differs_in_the_head_alone_costs_no_second_pass():
    """Two models with the very same body: the decoder runs once, and the values equal those of a separate copy."""
    model = build("llama")
    other = copy.deepcopy(model, {id(tensor): tensor for tensor in model.parameters()})
    head = torch.nn.Linear(model.config.hidden_size, VOCABULARY).to(model.dtype)
    head.weight = model.lm_head.weight
    other.set_output_embeddings(head)
    apart = copy.deepcopy(other)
    with torch.no_grad():
        expected = score(model, GROUPS, reference=apart)
    check(other)
    calls = []
    for either in (model, other):
        either.get_decoder().register_forward_hook(lambda *_: calls.append(1))
    found = score(model, GROUPS, reference=other)
    assert len(calls) == 1
    assert torch.equal(found.step_kl.detach(), expected.step_kl)
    assert torch.equal(found.reference_token_logps, expected.reference_token_logps)
    assert float(found.step_kl.detach().max()) > 1e-3
    model.train()
    calls.clear()
    score(model, GROUPS, reference=other)
    assert len(calls) == 2


@pytest.mark.parametrize("path", ["shared", "padded"])
def test_values_are_of_the_state_before_each_token(path):
    """A value head reads the hidden state that predicts the token, on both paths, in one pass or in batches."""
    model = served_by(path)
    torch.manual_seed(3)
    head = torch.nn.Linear(model.config.hidden_size, 1).double()
    wanted = []
    for group in GROUPS:
        for response in group.responses:
            ids = torch.tensor([group.prompt + response[:-1]])
            hidden = model.get_decoder()(input_ids=ids, use_cache=False)[0][0]
            wanted.append(head(hidden[-len(response) :].double()).squeeze(-1))
    scores = score(model, GROUPS, value_head=head)
    batched = score_in_batches(model, GROUPS, token_budget=30, value_head=head)
    for found, again, exact in zip(rows(scores, scores.values), rows(batched, batched.values), wanted, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(again, exact.detach(), rtol=1e-5, atol=1e-5)
    scores.values.sum().backward()
    assert head.weight.grad is not None
    assert any(parameter.grad is not None for parameter in model.parameters())


def test_values_need_hidden_states():
    """A model that is served by its logits has no hidden states to read; the error says so."""
    with pytest.raises(ValueError, match="it has no value head"):
        score(served_by("plain"), GROUPS, value_head=torch.nn.Linear(4, 1))
