"""Short rows on an accelerator without gradient: one attention call a layer, and no compilation. Here on CPU.

Only the rule that calls are expensive is put in the device's place; the attention and its mask are those of a GPU.
"""

from __future__ import annotations

import pytest
import torch
from engine_models import GROUPS, build, direct_token_logps
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.nn import functional as F

from distalign.engine import attention, flex, score, score_in_batches, scoring, selfcheck
from distalign.engine.attention import Layout
from distalign.engine.packing import Segment

CPU = torch.device("cpu")
CALL = flex.Call(torch.device("cuda"), torch.float32, 400, 4, 2, 64, 64, None, None, 0.0, None, False)


@pytest.fixture
def expensive(monkeypatch):
    """Calls are as expensive here as on an accelerator."""
    monkeypatch.setattr(attention, "_calls_are_expensive", lambda device: True)


@pytest.fixture
def calls(monkeypatch):
    """The masks given to attention."""
    found = []
    attend = F.scaled_dot_product_attention

    def counted(*tensors, attn_mask=None, **settings):
        found.append(attn_mask)
        return attend(*tensors, attn_mask=attn_mask, **settings)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", counted)
    return found


@pytest.mark.parametrize("family", ["llama", "mistral_window", "gemma3", "qwen3", "gemma2", "gpt_oss"])
def test_one_call_a_layer(family, expensive, calls):
    """The model's own log-probabilities, from one call a layer where nothing caps the scores or sinks them."""
    model = build(family, torch.float32, head_dim=16)
    scoring.check(model, kernels=False)
    del calls[:]
    with torch.no_grad():
        scores = score(model, GROUPS)
    tokens = sum(len(g.prompt) + sum(len(r) - 1 for r in g.responses) for g in GROUPS)
    if family in ("gemma2", "gpt_oss"):
        assert not calls, "capped and sunk scores are computed segment by segment, by hand"
    else:
        assert [tuple(mask.shape) for mask in calls] == [(1, 1, tokens, tokens)] * model.config.num_hidden_layers
        assert {mask.stride(2) % 16 for mask in calls} == {0}
        windows = set(attention.expected_windows(model.config.get_text_config()))
        assert len({mask.data_ptr() for mask in calls}) == len(windows), "one mask for layers of the same window"
    own = direct_token_logps(model)
    for row, mask, expected in zip(scores.token_logps, scores.mask, own, strict=True):
        torch.testing.assert_close(row[mask], expected.to(row.dtype), rtol=0, atol=2e-4)


def test_rows_with_gradient_are_cut(expensive, calls):
    """With gradient every layer would keep the mask: segment by segment."""
    model = build("llama", torch.float32, head_dim=16)
    scoring.check(model, kernels=False)
    del calls[:]
    score(model, GROUPS)
    assert len(calls) > model.config.num_hidden_layers * len(GROUPS)


@pytest.mark.parametrize(
    ("change", "whole"),
    [
        ({}, True),
        ({"dtype": torch.bfloat16, "window": 5, "scaling": 0.3, "tokens": 4096}, True),
        ({"tokens": 4097}, False),
        ({"dtype": torch.float64}, False),
        ({"dtype": None}, False),
        ({"dropout": 0.1}, False),
        ({"softcap": 2.0}, False),
        ({"sinks": True}, False),
        ({"dim": 20, "value_dim": 20}, False),
        ({"dim": 64, "value_dim": 32}, False),
        ({"device": CPU}, False),
    ],
)
def test_which_rows(change, whole):
    """Short, plain rows on an accelerator, by the documented limits; never with gradient."""
    call = CALL._replace(**change)
    with torch.no_grad():
        assert attention._in_one_call(call) == whole
    assert not attention._in_one_call(call)


@given(
    st.lists(st.tuples(st.integers(1, 7), st.lists(st.integers(0, 7), min_size=1, max_size=3)), min_size=1, max_size=3),
    st.one_of(st.none(), st.integers(1, 9)),
)
@hypothesis_settings(deadline=None)
def test_whole_mask_is_its_definition(lengths, window):
    """Prompt and own piece, causal, windowed by position."""
    segments = tuple(Segment(prompt, tuple(responses)) for prompt, responses in lengths)
    layout = Layout(segments)
    found = layout.whole_mask(CALL._replace(device=CPU, window=window))[0, 0]
    document, piece, position = [], [], []
    for number, segment in enumerate(segments):
        for index, length in enumerate((segment.prompt, *segment.responses)):
            start = segment.prompt if index else 0
            document += [number] * length
            piece += [index] * length
            position += range(start, start + length)
    for q in range(layout.tokens):
        for k in range(layout.tokens):
            distance = position[q] - position[k]
            seen = document[q] == document[k] and piece[k] in (0, piece[q]) and distance >= 0
            seen = seen and (window is None or distance < window)
            assert float(found[q, k]) == (0.0 if seen else -torch.inf)


@pytest.fixture
def trials(monkeypatch):
    """The models on which FlexAttention was tried; it serves none."""
    found = []
    monkeypatch.setattr(selfcheck, "_try_flex", lambda model_type, calls: found.append(len(calls)) or False)
    return found


def test_kernels_wait_for_training(trials):
    """Scoring without gradient compiles nothing; the first pass with gradient tries the kernels, once."""
    model, reference = build("llama"), build("llama")
    with torch.no_grad():
        score(model, GROUPS, reference=reference)
    score_in_batches(model, GROUPS, token_budget=100)
    assert trials == []
    for _ in range(2):
        score(model, GROUPS, reference=reference)
        assert trials == [model.config.num_hidden_layers] * 2, "the policy's and the reference's"


def test_kernels_for_long_passes(trials, monkeypatch):
    """From so many tokens on that compiling is the smaller part, kernels are tried without gradient too."""
    tokens = sum(group.tokens for group in GROUPS)
    monkeypatch.setattr(scoring, "_WORTH_COMPILING", tokens + 1)
    score_in_batches(build("llama"), GROUPS, token_budget=100)
    assert trials == []
    monkeypatch.setattr(scoring, "_WORTH_COMPILING", tokens)
    score_in_batches(build("llama"), GROUPS, token_budget=100)
    assert len(trials) == 1
