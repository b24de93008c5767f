from __future__ import annotations

import gc
import logging
import time

import pytest
import torch
from engine_models import GROUPS, VOCABULARY, build, direct_token_logps
from peft import PromptTuningConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from distalign.engine import Group, attention, check, score
from distalign.engine.attention import CannotShare, Layout, expected_windows
from distalign.engine.selfcheck import _REPORTS, sample_groups


def assert_exact(model, groups=GROUPS):
    """Scores equal the model's own log-probabilities."""
    with torch.no_grad():
        scores = score(model, groups)
        found = [row[mask] for row, mask in zip(scores.token_logps, scores.mask, strict=True)]
        torch.testing.assert_close(found, direct_token_logps(model, groups), rtol=1e-9, atol=1e-9)


def see_everything(self, queries, keys, window, device):
    """A mask that hides nothing."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device)


def forget_window(self, queries, keys, window, device, mask=Layout.mask):
    """A mask without its window."""
    return mask(self, queries, keys, None, device)


def off_by_one(self, queries, keys, window, device, mask=Layout.mask):
    """A window that is one token too wide."""
    return mask(self, queries, keys, None if window is None else window + 1, device)


@pytest.mark.parametrize(
    ("family", "broken"),
    [("llama", see_everything), ("mistral_window", forget_window), ("gemma3", off_by_one), ("gpt2", see_everything)],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_broken_attention_is_caught(family, broken, dtype, monkeypatch, caplog):
    """A wrong mask is found by the check, in every dtype, and the model is served without it."""
    monkeypatch.setattr(Layout, "mask", broken)
    model = build(family, dtype)
    with caplog.at_level(logging.WARNING, "distalign.engine"):
        report = check(model)
    assert report.path == "padded"
    assert "packed rows differ from separate ones" in report.reason
    assert report.model_type in caplog.text
    if dtype == torch.float64:
        assert_exact(model)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt2", "mistral_window"])
def test_half_precision_is_shared(family):
    """Rounding of bfloat16 is not taken for a wrong mask."""
    assert check(build(family, torch.bfloat16, initializer_range=0.15)).path == "shared"


def test_wrong_scaling_is_caught(monkeypatch):
    """An attention that loses the model's scaling is found by the check."""
    attend = attention._attend
    monkeypatch.setattr(attention, "_attend", lambda *args, scaling, **rest: attend(*args, scaling=1.0, **rest))
    model = build("qwen3")
    assert check(model).path == "padded"
    assert_exact(model)


def test_an_attention_that_gives_no_numbers_is_caught(monkeypatch):
    """NaN is below no tolerance."""
    attend = attention._attend
    monkeypatch.setattr(attention, "_attend", lambda *args, **rest: attend(*args, **rest) * torch.nan)
    assert check(build("qwen3")).path == "padded"


def test_window_that_the_configuration_does_not_name():
    """A window too wide to show in a short sample is still compared with the configuration."""
    model = build("qwen2")
    model.model.layers[1].self_attn.sliding_window = 5000
    report = check(model)
    assert report.path == "padded"
    assert "[None, 5000, None]" in report.reason


def test_expected_windows():
    """Windows by layer from the configuration; other kinds of layer are refused by name."""
    assert expected_windows(build("mistral_window").config) == [5, 5, 5]
    assert expected_windows(build("gemma3").config) == [5, None, 5]
    assert expected_windows(build("llama").config) == [None, None, None]
    with pytest.raises(CannotShare, match="linear_attention"):
        expected_windows(build("qwen3_next").config)
    with pytest.raises(CannotShare, match="attention_chunk_size"):
        expected_windows(build("llama4").config)


def test_position_encoding_that_depends_on_the_longest_row():
    """Long-context phi3 switches its rotation with the longest sequence of a call: longer ones are scored alone."""
    model = build(
        "phi3",
        original_max_position_embeddings=20,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [3.0, 4.0, 5.0, 6.0],
            "factor": 64 / 20,
        },
    )
    report = check(model)
    assert (report.path, report.length_limit) == ("shared", 20)
    assert_exact(model)
    assert_exact(model, [*GROUPS, Group([30] * 18, [[4, 5], [6, 7, 8, 9, 10, 11]])])


def test_head_that_cannot_be_reproduced():
    """Logits changed by code that the configuration does not tell: the model's own logits are used."""
    model = build()
    model.lm_head.register_forward_hook(lambda module, inputs, output: output.sin())
    assert check(model).path == "plain"
    assert "hooks" in check(model).reason
    assert_exact(model)

    model = build()
    forward = model.forward

    def double_logits(**kwargs):
        out = forward(**kwargs)
        out.logits = out.logits * 2
        return out

    model.forward = double_logits
    assert check(model).path == "plain"
    assert_exact(model)


def test_check_is_remembered_until_the_model_changes(caplog):
    """Once a model; again when its head, dtype or attention changes; forgotten with the model."""
    model = build()
    with caplog.at_level(logging.INFO, "distalign.engine"):
        first = check(model)
        assert check(model) is first
        model.lm_head.bias = torch.nn.Parameter(torch.randn(VOCABULARY, dtype=torch.float64))
        assert check(model) is not first
        check(model.float())
        model.set_attn_implementation("eager")
        check(model)
    assert len(caplog.records) == 4
    assert model in _REPORTS
    before = len(_REPORTS)
    del model
    gc.collect()
    assert len(_REPORTS) < before


def test_a_learned_prompt_is_checked_apart_from_the_model_without_it():
    """What holds with the prompt off, as of a reference, does not hold with it."""
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(build(), config).double().eval()
    with model.disable_adapter():
        assert check(model).path == "shared"
    assert check(model).path == "plain"


def test_check_disturbs_nothing():
    """Modes, gradients and the random state are as before; no dropout acts in it."""
    model = build("llama_dropout").train()
    state = torch.random.get_rng_state()
    assert check(model).path == "shared"
    assert model.training
    assert (torch.random.get_rng_state() == state).all()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_sample_has_the_hard_cases():
    """A one-token response, unequal prompts, ids inside the vocabulary and no special ones."""
    groups = sample_groups(build().config, VOCABULARY)
    ids = [token for group in groups for part in [group.prompt, *group.responses] for token in part]
    assert min(len(response) for group in groups for response in group.responses) == 1
    assert len({len(group.prompt) for group in groups}) == 2
    assert set(ids) <= set(range(3, VOCABULARY))


@pytest.mark.slow
def test_check_is_quick():
    """The check of a model of SmolLM2-135M's shape costs less than a second of one thread, the first time."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    start = time.process_time()
    assert check(model).path == "shared"
    # Half a second on a quiet machine; CPU seconds double where others share its caches.
    assert time.process_time() - start < 2.0
