"""The layers that a model shares with its reference run once: every number stays, bit by bit, and so does the model."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import tiny
import torch
from engine_models import GROUPS, build, gradients
from torch import nn

from distalign.engine import encoding, score, score_in_batches
from distalign.engine.recompute import set_recompute
from distalign.models.policy import Source, make_policy

# PEFT 0.21 still asks transformers 5.23 by the old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

NO_DROPOUT = {"gpt2": {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}}
LINEAR = {"gpt2": ["c_attn", "c_proj"]}


def adapted(base, *, top, dropout=0.0, family="llama"):
    """A policy on `base` with an adapter on its top layers that changes it a lot."""
    targets = LINEAR.get(family, ["q_proj", "v_proj", "up_proj", "down_proj"])
    lora = SimpleNamespace(r=4, alpha=8, dropout=dropout, layers=top, target_modules=targets)
    policy = make_policy(base, tiny.tokenizer(), Source("tiny", "", ""), lora=lora, reference=True)
    policy.model.double()
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.5 * torch.randn_like(parameter))
    return policy


def layers_of(model):
    """The three layers of a tiny model."""
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 3)


@pytest.fixture
def passes(monkeypatch):
    """How many layers attended in each packed pass; those computed again in its backward pass count too."""
    layouts = []

    class Counted(encoding.Layout):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            layouts.append(self)

    monkeypatch.setattr(encoding, "Layout", Counted)

    def taken():
        found = [len(layout.calls) for layout in layouts]
        layouts.clear()
        return found

    return taken


def results(model, reference, *, groups=GROUPS, backward=True, **settings):
    """All scores and the gradients of their sum, with the same random numbers whenever it is called."""
    torch.manual_seed(3)
    scores = score(model, groups, reference=reference, entropy=True, **settings)
    values = [scores.token_logps, scores.step_entropy, scores.step_kl, scores.reference_token_logps]
    if backward:
        (scores.logps.sum() + 2 * scores.step_kl.sum() - 3 * scores.step_entropy.sum()).backward()
    return [value.detach() for value in values], gradients(model)


def assert_identical(ours, theirs):
    """Not one bit differs, and something has a gradient."""
    (values, found), (expected, wanted) = ours, theirs
    assert all(torch.equal(a, b) for a, b in zip(values, expected, strict=True))
    assert found.keys() == wanted.keys()
    assert found
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma2"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full", "reentrant"])
def test_equals_two_passes(family, recompute, passes):
    """Below the adapter layers run once, and again in no backward pass; every number is that of two whole passes."""
    base = build(family, **NO_DROPOUT.get(family, {}))
    policy = adapted(base, top=1, dropout=0.3, family=family)
    if recompute == "reentrant":
        policy.model.base_model.model.activation_checkpointing_enable({"use_reentrant": True})
    else:
        set_recompute(policy.model, recompute)
    policy.model.train()
    results(policy.model, policy.reference)
    passes()
    ours = results(policy.model, policy.reference)
    assert passes() == [3, 1 if recompute == "none" else 2]
    theirs = results(policy.model, base)
    # Frozen layers are not computed again, except by the kind of checkpointing that makes their input want a gradient.
    assert passes()[-2:] == [3, {"none": 3, "reentrant": 6}.get(recompute, 4)]
    assert_identical(ours, theirs)


@pytest.mark.parametrize("top", [1, 2])
def test_first_use_tries(top, passes):
    """The first use compares a pass without the shared layers with a whole one; later ones do not."""
    base = build()
    policy = adapted(base, top=top)
    first = results(policy.model, policy.reference)
    assert passes()[-4:] == [3, 3, top, top]
    assert_identical(first, results(policy.model, base))
    passes()
    assert_identical(
        results(policy.model, policy.reference, groups=GROUPS[:2]), results(policy.model, base, groups=GROUPS[:2])
    )
    assert passes() == [3, top, 3, 3]


def hook(model):
    """Watch a part of the lowest layer."""
    layers_of(model)[0].mlp.register_forward_hook(lambda *_: None)


def own_forward(model):
    """Give the lowest layer a forward of its own."""
    layer = layers_of(model)[0]
    layer.forward = layer.forward


def trained_below(model):
    """Train a norm of the lowest layer."""
    layers_of(model)[0].input_layernorm.weight.requires_grad_(True)


def trained_around(model):
    """Train the norm after the layers."""
    model.get_decoder().norm.weight.requires_grad_(True)


def dropout_below(model):
    """Attention dropout in the lowest layer."""
    layers_of(model)[0].self_attn.attention_dropout = 0.3


def jitter_around(model):
    """Noise of the decoder's own."""
    model.get_decoder().jitter_noise = 0.3


def compiled(model):
    """Let the lowest layer be called as a compiled one."""
    layer = layers_of(model)[0]
    layer._compiled_call_impl = layer._call_impl


CHANGES = [hook, own_forward, compiled, trained_below, trained_around, dropout_below, jitter_around]


def assert_two_passes(policy, base, passes):
    """Once tried, policy and reference each run all three layers, and the numbers are those of separate models."""
    results(policy.model, policy.reference)
    passes()
    ours = results(policy.model, policy.reference)
    assert passes() == [3, 3]
    assert_identical(ours, results(policy.model, base))


@pytest.mark.parametrize("change", CHANGES)
def test_two_passes_where_a_layer_cannot_be_left_out(change, passes):
    """Who watches, trains or randomises the lowest layer, or what is around the layers, gets the two whole passes."""
    base = build()
    policy = adapted(base, top=1)
    policy.model.train()
    change(policy.model)
    assert_two_passes(policy, base, passes)


def test_two_passes_where_all_layers_are_adapted(passes):
    """An adapter on every layer leaves nothing to share."""
    base = build()
    assert_two_passes(adapted(base, top=3), base, passes)


def test_two_passes_for_a_copy(passes):
    """A frozen copy beside a fully trained policy is another model, though it has the same weights."""
    base = build()
    policy = make_policy(base, tiny.tokenizer(), Source("tiny", "", ""), reference=True)
    policy.model.train()
    results(policy.model, policy.reference)
    passes()
    values, found = results(policy.model, policy.reference)
    assert passes() == [3, 3]
    assert values[2].abs().max() < 1e-12
    assert len(found) == len(list(policy.model.parameters()))


@pytest.mark.parametrize("shared", [0, 1])
def test_what_the_context_changes_is_not_shared(shared, passes):
    """A context of any kind that changes a frozen layer is noticed from that layer up."""
    base, other = build(), build()
    policy = adapted(base, top=1)
    with torch.no_grad():
        layers_of(other)[shared].mlp.up_proj.weight.mul_(1.5)

    @contextlib.contextmanager
    def changed():
        layer, theirs = layers_of(policy.model)[shared], layers_of(other)[shared]
        own, layer.mlp = layer.mlp, theirs.mlp
        with policy.reference() as model:
            yield model
        layer.mlp = own

    results(policy.model, changed)
    passes()
    ours = results(policy.model, changed)
    assert passes() == [3, 3 - shared]
    assert_identical(ours, results(policy.model, other))


@pytest.mark.parametrize("side", ["missing", "different"])
def test_two_passes_where_layers_talk_past_each_other(side, passes, caplog):
    """A layer that needs more of a lower one than its output is found out at the first use."""
    base = build()
    policy = adapted(base, top=1)
    layers, notes = layers_of(policy.model), []
    kind = type(layers[0])

    class Tells(kind):
        def forward(self, hidden, *args, **settings):
            notes.append(hidden)
            return kind.forward(self, hidden, *args, **settings)

    class Hears(kind):
        def forward(self, hidden, *args, **settings):
            told = notes.pop() if notes or side == "missing" else 0
            return kind.forward(self, hidden + told, *args, **settings)

    layers[0].__class__, layers[2].__class__ = Tells, Hears
    with caplog.at_level("INFO", "distalign.engine"):
        first = results(policy.model, policy.reference)
    assert ("IndexError" if side == "missing" else "the result differs") in caplog.text
    passes()
    ours = results(policy.model, policy.reference)
    assert passes() == [3, 3]
    assert_identical(first, ours)
    plain = score(policy.model, GROUPS)
    assert torch.equal(plain.token_logps, ours[0][0])


@pytest.mark.parametrize("broken", [False, True], ids=["reference", "policy"])
def test_model_is_left_as_found_after_an_error(broken, passes):
    """Whichever pass fails, no layer keeps a hook or a forward of the engine, and the next score is right."""
    base = build()
    policy = adapted(base, top=1)
    policy.model.train()
    results(policy.model, policy.reference)
    layers = layers_of(policy.model)

    def fail(module, inputs):
        if module.training == broken:
            raise RuntimeError("broken")

    handle = layers[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        score(policy.model, GROUPS, reference=policy.reference)
    handle.remove()
    assert all(module.training for module in policy.model.modules())
    assert not any("forward" in vars(m) or m._forward_hooks for layer in layers for m in layer.modules())
    passes()
    ours = results(policy.model, policy.reference)
    assert passes() == [3, 1]
    assert_identical(ours, results(policy.model, base))


@pytest.mark.parametrize("budget", [1, 10_000])
def test_batches_share_too(budget, passes):
    """Without gradient, in micro-batches, with values."""
    base = build()
    policy = adapted(base, top=1)
    head = nn.Linear(32, 1, dtype=torch.float64)
    settings = {"token_budget": budget, "entropy": True, "temperature": 0.7, "value_head": head}
    score_in_batches(policy.model, GROUPS, reference=policy.reference, **settings)
    passes()
    ours = score_in_batches(policy.model, GROUPS, reference=policy.reference, **settings)
    assert passes() == [3, 1] * (3 if budget == 1 else 1)
    theirs = score_in_batches(policy.model, GROUPS, reference=base, **settings)
    for name in ("token_logps", "step_entropy", "step_kl", "reference_token_logps", "values"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))


def test_a_reference_made_by_writing_into_frozen_weights_is_seen():
    """After a pass that shared layers, a reference that changes one of them in place shares it no more."""
    base = build("llama")
    policy = adapted(base, top=1, dropout=0.0, family="llama")
    weight = next(base.get_decoder().layers[0].parameters())

    @contextlib.contextmanager
    def other():
        with policy.model.disable_adapter(), torch.no_grad():
            kept = weight.clone()
            weight.mul_(1.5)
            try:
                yield policy.model
            finally:
                weight.copy_(kept)

    expected = score(policy.model, GROUPS, reference=policy.reference).logps
    found = score(policy.model, GROUPS, reference=other)
    torch.testing.assert_close(found.logps, expected, rtol=0, atol=1e-12)
    with other() as changed, torch.no_grad():
        own = score(changed, GROUPS).logps
    torch.testing.assert_close(found.reference_logps, own, rtol=0, atol=1e-12)
