from __future__ import annotations

import logging

import pytest
import torch
from engine_models import FAMILIES, GROUPS, build, direct_token_logps, gradients, largest_difference

from distalign.engine import check, score
from distalign.engine.attention import Layout

# Where a family's own code computes in float32 inside a float64 model, float64 agrees only to float32 rounding.
FLOAT32_INSIDE = {"bloom", "gemma2", "deepseek_v3", "gptj", "mpt", "mamba", "llama4"}


SHARED = [family for family, (_, _, path) in FAMILIES.items() if path == "shared"]


def test_families():
    """The families below are cases here: exact when packed blindly, or silently wrong, or failing, each in its way."""
    exact = {"llama", "qwen2", "qwen3", "gpt_neox", "phi3", "olmo2", "granite", "gpt2", "opt", "starcoder2"}
    experts = {"mixtral", "deepseek_v3"}
    attention_ignored = {"falcon", "gptj"}
    windowed = {"mistral", "gemma2", "gemma3_text", "gpt_oss"}
    positions_or_state = {"bloom", "mpt", "mamba", "qwen3_next"}
    assert exact | experts | attention_ignored | windowed | positions_or_state <= {
        kind for kind, _, _ in FAMILIES.values()
    }
    assert {build(family).config.sliding_window for family in ("mistral", "mistral_window")} == {None, 5}


@pytest.mark.parametrize("family", FAMILIES)
def test_path_values_and_gradients_equal_separate_encoding(family):
    """Each family takes the path it should, with the model's own log-probabilities and gradients."""
    model = build(family)
    weights = torch.linspace(-1, 1, 6, dtype=torch.float64)
    scores = score(model, GROUPS)
    assert check(model).path == FAMILIES[family][2]
    (scores.logps * weights).sum().backward()
    ours = gradients(model)

    own = direct_token_logps(model)
    (torch.stack([tokens.sum() for tokens in own]).double() * weights).sum().backward()
    worst = max(
        (row[mask] - tokens).abs().max().item()
        for row, mask, tokens in zip(scores.token_logps, scores.mask, own, strict=True)
    )
    assert worst < (5e-6 if family in FLOAT32_INSIDE else 1e-9)
    assert largest_difference(ours, gradients(model)) < (1e-4 if family in FLOAT32_INSIDE else 1e-6)


@pytest.mark.parametrize("family", SHARED)
def test_wrong_mask_is_caught(family, monkeypatch):
    """In every family that shares prompts, responses that see the future are found and not used."""
    monkeypatch.setattr(Layout, "mask", lambda self, queries, keys, *rest: torch.ones(queries, keys, dtype=torch.bool))
    model = build(family)
    report = check(model)
    assert report.path == "padded"
    assert "packed rows differ from separate ones" in report.reason
    with torch.no_grad():
        scores = score(model, GROUPS)
        own = direct_token_logps(model)
    for row, mask, tokens in zip(scores.token_logps, scores.mask, own, strict=True):
        assert (row[mask] - tokens).abs().max() < (5e-6 if family in FLOAT32_INSIDE else 1e-9)


@pytest.mark.parametrize("family", ["llama", "mistral_window", "gemma3", "gpt2", "mixtral", "falcon"])
def test_float32_sums(family):
    """In float32 the sum of each sequence agrees to 1e-4 nats."""
    model = build(family, torch.float32)
    with torch.no_grad():
        own = torch.stack([tokens.double().sum() for tokens in direct_token_logps(model)])
        logps = score(model, GROUPS).logps
    assert logps.dtype == torch.float64
    assert (logps - own).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["mistral_window", "gemma3", "qwen2_window", "gpt_oss"])
def test_window_matters(family):
    """The window is shorter than the rows, so leaving it out would be seen."""
    model = build(family)
    with torch.no_grad():
        narrow = score(model, GROUPS).logps
        wide = score(build(family, sliding_window=64), GROUPS).logps
    assert (narrow - wide).abs().max() > 0.1


def test_ignored_attention_is_detected(caplog):
    """Falcon takes the name of our attention and uses its own; one log line says so."""
    model = build("falcon")
    with caplog.at_level(logging.INFO, "distalign.engine"):
        score(model, GROUPS)
        score(model, GROUPS)
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "falcon" in message
    assert "padded" in message
