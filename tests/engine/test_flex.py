"""FlexAttention of packed rows on CPU, most of it by torch's dense eager form; no Triton kernel runs here.

torch refuses gradients of FlexAttention on CPU at its public door, for want of a kernel. The tests open that door: what
they differentiate is the operator's own eager derivative, which its authors test their kernels against.
"""

from __future__ import annotations

import logging
import shutil

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
from engine_models import GROUPS, build, checkpointing, direct_token_logps, gradients, largest_difference
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from distalign.engine import check, flex, score, selfcheck
from distalign.engine.attention import Layout, shared_attention, shared_prefix_attention
from distalign.engine.packing import Segment

CPU = torch.device("cpu")
CALL = flex.Call(CPU, torch.float32, 400, 4, 2, 64, 64, None, None, 0.0, None, False)

LAYOUTS = {
    "one_response": (Segment(5, (4,)),),
    "pair": (Segment(3, (6, 2)),),
    "one_token_responses": (Segment(4, (0, 3, 0)), Segment(2, (0,))),
    "eight_responses": (Segment(2, (3, 1, 0, 4, 2, 5, 0, 1)),),
    "unequal_prompts": (Segment(1, (2,)), Segment(9, (1, 3)), Segment(4, (0, 7, 2))),
    "several_blocks": (Segment(140, (60, 0, 1, 37)), Segment(3, (90, 30))),
}
SETTINGS = {
    "plain": {},
    "scaling": {"scaling": 0.7},
    "window": {"sliding_window": 3},
    "window_of_one": {"sliding_window": 1},
    "wide_window": {"sliding_window": 10_000},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "everything": {"scaling": 0.7, "sliding_window": 3, "softcap": 1.5, "sinks": True},
}


def shapes(longest, responses, groups):
    """Lengths of the prompts and responses of a row, as inputs."""
    response = st.lists(st.integers(0, longest), min_size=1, max_size=responses)
    return st.lists(st.tuples(st.integers(1, longest), response), min_size=1, max_size=groups)


@pytest.fixture
def dense(monkeypatch):
    """FlexAttention's eager form, with its derivative, on CPU."""
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "has_kernels", lambda device: True)
    monkeypatch.setattr(flex, "kernel", lambda: torch_flex.flex_attention)


@pytest.fixture
def forced(dense, monkeypatch):
    """Everything without dropout goes to FlexAttention: rows of any length, heads of any size, float64."""
    monkeypatch.setattr(flex, "serves", lambda call: call.dropout == 0)
    monkeypatch.setitem(selfcheck._FLEX_TOLERANCES, torch.float64, 1e-9)


@pytest.fixture
def attended(monkeypatch):
    """The masks of the calls that FlexAttention served."""
    masks = []
    attend = flex.attend

    def counted(query, key, value, mask, **settings):
        masks.append(mask)
        return attend(query, key, value, mask, **settings)

    monkeypatch.setattr(flex, "attend", counted)
    return masks


def engine_messages(caplog):
    """What the engine has logged; transformers has remarks of its own on the tiny models."""
    return [record.getMessage() for record in caplog.records if record.name == "distalign.engine"]


def allowed(segments, window):
    """[queries, keys]: same document, key in the prompt or the query's own piece, causal and windowed by position."""
    document, piece, position = [], [], []
    for number, segment in enumerate(segments):
        for index, length in enumerate((segment.prompt, *segment.responses)):
            start = segment.prompt if index else 0
            document += [number] * length
            piece += [index] * length
            position += range(start, start + length)
    document, piece, position = torch.tensor(document), torch.tensor(piece), torch.tensor(position)
    distance = position[:, None] - position
    same_document = document[:, None] == document
    seen = same_document & ((piece == 0) | (piece[:, None] == piece)) & (distance >= 0)
    return seen if window is None else seen & (distance < window)


def results(segments, settings, dtype, *, by_flex, gradient=True):
    """Output of one layer over a packed row, and gradients of everything that goes in: 6 heads share 2 of keys."""
    settings = dict(settings)
    generator = torch.Generator().manual_seed(3)
    tokens = sum(segment.prompt + sum(segment.responses) for segment in segments)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(gradient)

    inputs = [draw(1, 6, tokens, 8), draw(1, 2, tokens, 8), draw(1, 2, tokens, 12)]
    if settings.pop("sinks", False):
        inputs.append(draw(6))
    weights = draw(1, tokens, 6, 12).detach()
    query, key, value, *sinks = inputs
    module = nn.Module()
    with shared_attention(module, Layout(segments, by_flex=by_flex)):
        s_aux = sinks[0] if sinks else None
        out, _ = shared_prefix_attention(module, query, key, value, None, s_aux=s_aux, **settings)
    return [out.detach(), *(torch.autograd.grad((out * weights).sum(), inputs) if gradient else [])]


@given(shapes(9, 8, 4), st.none() | st.integers(1, 20))
def test_mask_by_enumeration(shapes, window):
    """The kernel's mask is the definition, pair by pair."""
    segments = tuple(Segment(prompt, tuple(responses)) for prompt, responses in shapes)
    mask = flex.block_mask(segments, window, CPU).mask_mod
    places = torch.arange(sum(segment.prompt + sum(segment.responses) for segment in segments))
    seen = mask(torch.tensor(0), torch.tensor(0), places[:, None], places[None, :])
    assert torch.equal(seen, allowed(segments, window))


@hypothesis_settings(deadline=None)
@given(shapes(300, 4, 3), st.none() | st.integers(1, 400))
def test_blocks_are_those_of_the_dense_mask(shapes, window):
    """Which blocks are skipped, full or partial is what torch finds from the whole mask."""
    segments = tuple(Segment(prompt, tuple(responses)) for prompt, responses in shapes)
    ours = flex.block_mask(segments, window, CPU)
    tokens = sum(segment.prompt + sum(segment.responses) for segment in segments)
    theirs = torch_flex.create_block_mask(ours.mask_mod, None, None, tokens, tokens, device="cpu")
    for name, expected in vars(theirs).items():
        found = getattr(ours, name)
        if isinstance(expected, torch.Tensor):
            assert found.dtype == expected.dtype, name
            assert torch.equal(found, expected), name
        elif name != "mask_mod":
            assert found == expected, name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_values_and_gradients_equal_segments(layout, settings, dtype, tolerance, forced, attended):
    """One layer: FlexAttention and the attention by segments agree, in what they give and in every derivative."""
    settings = SETTINGS[settings]
    found = results(LAYOUTS[layout], settings, dtype, by_flex=True)
    expected = results(LAYOUTS[layout], settings, dtype, by_flex=False)
    assert len(attended) == 1
    if settings.get("sinks") or settings.get("softcap"):
        # The attention by segments takes its softmax in one more order of operations.
        tolerance *= 10
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", ["llama", "mistral_window", "gemma2", "gemma3", "qwen3", "gpt_oss", "deepseek_v3"])
def test_models(family, forced, attended):
    """Whole models by FlexAttention: the model's own log-probabilities, and the gradients of the segments."""
    model = build(family)
    by_segments = build(family)
    assert check(model).by_flex
    del attended[:]
    scores = score(model, GROUPS)
    assert len(attended) == model.config.num_hidden_layers
    layers = getattr(model.config, "layer_types", None) or [None]
    assert len({id(mask) for mask in attended}) == len(set(layers)), "one mask for all layers with the same window"

    own = direct_token_logps(model)
    float32_inside = family in ("gemma2", "deepseek_v3")
    for row, mask, tokens in zip(scores.token_logps, scores.mask, own, strict=True):
        torch.testing.assert_close(row[mask].double(), tokens.double(), rtol=0, atol=5e-6 if float32_inside else 1e-9)
    scores.logps.sum().backward()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "serves", lambda call: False)
        assert not check(by_segments).by_flex
        score(by_segments, GROUPS).logps.sum().backward()
    assert largest_difference(gradients(model), gradients(by_segments)) < (1e-4 if float32_inside else 1e-7)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_activation_checkpointing(family, forced, attended):
    """Layers recomputed in the backward pass attend as they did."""
    model, plain = build(family).train(), build(family).train()
    checkpointing(model)({"use_reentrant": False})
    for either in (model, plain):
        score(either, GROUPS).logps.sum().backward()
    assert len(attended) > 3 * 3
    assert largest_difference(gradients(model), gradients(plain)) < 1e-12


def test_dropout_goes_to_segments(forced, attended):
    """FlexAttention has no dropout: layers that drop attention weights are computed by segments."""
    model = build("llama_dropout").train()
    assert check(model).by_flex
    del attended[:]
    score(model, GROUPS)
    assert not attended


@pytest.mark.parametrize(
    ("change", "served"),
    [
        ({}, True),
        ({"dtype": torch.bfloat16}, True),
        ({"dtype": torch.float16, "window": 5, "softcap": 30.0, "scaling": 0.3, "sinks": True}, True),
        ({"heads": 9, "kv_heads": 3, "dim": 192, "value_dim": 128}, True),
        ({"dim": 16, "value_dim": 256, "tokens": 129}, True),
        ({"dtype": torch.float64}, False),
        ({"dtype": None}, False),
        ({"dropout": 0.1}, False),
        ({"dim": 8}, False),
        ({"value_dim": 8}, False),
        ({"dim": 257}, False),
        ({"value_dim": 512}, False),
        ({"tokens": 128}, False),
    ],
)
def test_what_is_served(change, served, monkeypatch):
    """Where FlexAttention has kernels, its documented limits decide."""
    monkeypatch.setattr(flex, "has_kernels", lambda device: True)
    assert flex.serves(CALL._replace(**change)) == served


@pytest.mark.parametrize(
    ("device", "triton", "capability", "found"),
    [
        ("cuda", True, (8, 0), True),
        ("cuda:1", True, (9, 0), True),
        ("cuda", False, (9, 0), False),
        ("cuda", True, (7, 5), False),
        ("cpu", True, (9, 0), False),
        ("mps", True, (9, 0), False),
    ],
)
def test_which_devices_have_kernels(device, triton, capability, found, monkeypatch):
    """A GPU that computes in bfloat16, and Triton; nothing else."""
    monkeypatch.setattr(flex, "find_spec", lambda name: triton or None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert flex.has_kernels.__wrapped__(torch.device(device)) == found
    if not found and device != "cuda":
        assert not flex.serves(CALL._replace(device=torch.device(device)))


def test_mixed_dtypes_are_nobodys():
    """A query in another dtype than its keys has no dtype to choose a kernel by."""
    query, key, value = torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8).double()
    settings = {"scaling": None, "dropout": 0.0, "softcap": None, "sinks": None}
    assert flex.Call.of(query, key, key, None, **settings).dtype == torch.float32
    assert flex.Call.of(query, key, value, None, **settings).dtype is None
    with torch.autocast("cpu", torch.bfloat16):
        assert flex.Call.of(query, key.half(), key, None, **settings).dtype == torch.bfloat16
        assert flex.Call.of(query, key, value, None, **settings).dtype is None


@pytest.fixture
def compilations(monkeypatch):
    """Counts what dynamo compiles, down to torch's operators; the limit of the process is already reached."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = flex.kernel(counter)
    monkeypatch.setattr(flex, "kernel", lambda: compiled)
    monkeypatch.setattr(flex, "serves", lambda call: True)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    with torch._dynamo.config.patch(recompile_limit=1):
        yield counter


def test_one_compilation_for_rows_of_every_length(compilations):
    """Compiled by dynamo with its derivative: lengths, layouts, windows and numbers change data, not code."""
    rows = [(LAYOUTS["several_blocks"], 3, 0.7, 1.5), ((Segment(200, (7, 9)),), None, 0.8, 2.5)]
    rows += [((Segment(130, (2,)), Segment(1, (300, 5))), 9, 0.9, 1.0)]
    for segments, window, scaling, softcap in rows:
        settings = {"scaling": scaling, "sliding_window": window, "softcap": softcap}
        found = results(segments, settings, torch.float32, by_flex=True)
        expected = results(segments, settings, torch.float32, by_flex=False)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert compilations.frame_count == 1


@pytest.mark.slow
def test_one_compilation_with_and_without_autocast(compilations):
    """Tensors in bfloat16, and tensors that autocast takes for them, are served by the same code."""
    pair = LAYOUTS["several_blocks"], {}
    results(*pair, torch.bfloat16, by_flex=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(*pair, torch.float32, by_flex=True)
    assert compilations.frame_count == 1
    assert [tensor.dtype for tensor in found] == [torch.bfloat16, torch.float32, torch.float32, torch.float32]
    exact = results(*pair, torch.float32, by_flex=False)
    torch.testing.assert_close(found, exact, rtol=0.1, atol=0.1, check_dtype=False)
    results(*pair, torch.float32, by_flex=True)
    assert compilations.frame_count == 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for CPU with g++, which is not installed")
def test_compiled_to_code(monkeypatch):
    """The kernel as it is used, but generated for CPU: C++ in place of Triton, values without gradients."""
    monkeypatch.setattr(flex, "serves", lambda call: True)
    for segments, window in ((LAYOUTS["several_blocks"], 9), ((Segment(1, (300, 5)), Segment(400, (2,))), None)):
        settings = {"scaling": 0.7, "sliding_window": window, "softcap": 1.5}
        found = results(segments, settings, torch.float32, by_flex=True, gradient=False)
        expected = results(segments, settings, torch.float32, by_flex=False, gradient=False)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def raises(query, key, value, mask, **settings):
    """What a kernel that does not compile does."""
    raise RuntimeError("no valid triton configs")


def forgets_the_mask(query, key, value, mask, *, attend=flex.attend, **settings):
    """FlexAttention that sees everything."""
    tokens = query.shape[2]
    return attend(query, key, value, flex.block_mask((Segment(tokens, ()),), None, CPU), **settings)


def forgets_a_gradient(query, key, value, mask, *, attend=flex.attend, **settings):
    """Right values, but no gradient of the keys."""
    return attend(query, key.detach() + 0 * key, value, mask, **settings)


def gives_nan(query, key, value, mask, *, attend=flex.attend, **settings):
    """One place that is not a number."""
    out = attend(query, key, value, mask, **settings).clone()
    out[0, 0, 7, 0] = torch.nan
    return out


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (raises, "raised RuntimeError: no valid triton configs"),
        (forgets_the_mask, "differs by"),
        (forgets_a_gradient, "differs by"),
        (gives_nan, "differs by nan"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_broken_kernels_are_left_out(broken, reason, dtype, dense, monkeypatch, caplog):
    """A FlexAttention that raises or is wrong, in values or only in gradients, costs one line in the log, no more."""
    model = build("llama", dtype, head_dim=16)
    monkeypatch.setattr(flex, "attend", broken)
    with caplog.at_level(logging.WARNING, "distalign.engine"):
        report = check(model)
    assert (report.path, report.by_flex) == ("shared", False)
    [message] = engine_messages(caplog)
    assert reason in message
    assert "llama" in message
    score(model, GROUPS).logps.sum().backward()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt_oss", "mistral_window"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sound_kernels_are_used(family, dtype, dense, caplog):
    """Rounding is not taken for an error, by the rules that hold on a GPU."""
    with caplog.at_level(logging.WARNING, "distalign.engine"):
        report = check(build(family, dtype, head_dim=16, initializer_range=0.15))
    assert (report.path, report.by_flex) == ("shared", True)
    assert not engine_messages(caplog)


def test_check_where_gradients_are_off(dense):
    """The gradients of the check do not need those of its caller."""
    with torch.inference_mode():
        assert check(build(dtype=torch.float32, head_dim=16)).by_flex


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_autocast(family, dense, forced, attended):
    """Under autocast FlexAttention computes in the dtype of autocast, like the attention by segments."""
    model = build(family, torch.float32, initializer_range=0.15)
    with torch.autocast("cpu", torch.bfloat16):
        found = score(model, GROUPS)
        assert len(attended) >= model.config.num_hidden_layers
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(flex, "serves", lambda call: False)
            expected = score(model, GROUPS)
    assert (found.token_logps - expected.token_logps).abs().max() < 0.05
    found.logps.sum().backward()
    ours = gradients(model)
    expected.logps.sum().backward()
    assert largest_difference(ours, gradients(model)) < 0.05


def test_without_kernels_nothing_changes():
    """On CPU the check does not try FlexAttention."""
    assert not check(build()).by_flex
