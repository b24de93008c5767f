"""Decoding from one copy of a prompt's cache: the same logits and tokens, no prompt stored twice, or not at all."""

from __future__ import annotations

import logging

import pytest
import tiny
import torch
from engine_models import FAMILIES, NEW_CACHE, build, checkpointing
from peft import LoraConfig, get_peft_model
from sampled import sampled

from distalign.errors import InputError
from distalign.rollout import decode
from distalign.rollout.decode import Shared, choose, close_gaps, encode_prompts
from distalign.rollout.sample import sample
from distalign.rollout.trial import way_of

PROMPTS = [[5, 9, 17, 33, 40, 8, 71], [7, 8], [21, 22, 23, 24, 30, 31, 32, 33, 34], [61]]

# Families whose cache or attention is their own: every response gets a copy of the prompt's cache.
COPIED = {"falcon", "mpt", "deepseek_v3", "llama4", "bloom", "mamba", "qwen3_next"} | (set() if NEW_CACHE else {"gptj"})

# Eager attention of gemma2 overflows at padding in float64: there, no prompts of unequal length can be encoded.
SHARED = sorted(FAMILIES.keys() - COPIED - {"gemma2"})


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_served_as_expected(family, caplog):
    """Families that keep plain keys and values share them; any other says why not, once."""
    model = build(family, torch.float32)
    with caplog.at_level(logging.WARNING, "distalign.rollout"):
        assert way_of(model, [], 20) == way_of(model, [], 20)
    assert (way_of(model, [], 20).cache == "shared") == (family not in COPIED)
    assert caplog.text.count("a prompt's cache is copied") == (family in COPIED)


@pytest.mark.parametrize("family", SHARED)
def test_logits_equal_those_of_encoding_alone(family):
    """To 1e-9 in float64: prompts of unequal length, windows, sinks, responses that leave until prompts have none."""
    model, generator = build(family), torch.Generator().manual_seed(0)
    parents = torch.tensor([0, 0, 0, 1, 2, 2, 3])
    rows = [PROMPTS[parent] for parent in parents]
    leave = {2: [0, 1, 2, 4, 5, 6], 4: [0, 5, 2, 3, 4], 5: [0, 4, 3], 6: [2]}
    with torch.no_grad():
        own = Shared(encode_prompts(model, PROMPTS, 0), parents, 8)
        for step in range(8):
            if step in leave:
                own.keep(torch.tensor(leave[step]))
                rows = [rows[row] for row in leave[step]]
            tokens = torch.randint(3, 101, (len(rows),), generator=generator)
            rows = [[*row, token] for row, token in zip(rows, tokens.tolist(), strict=True)]
            alone = [model(torch.tensor([row]), use_cache=False).logits[0, -1] for row in rows]
            with own.decoding():
                logits = own.step(tokens)
            torch.testing.assert_close(logits, torch.stack(alone), rtol=0, atol=1e-9)
    assert own.cache.prompts == 1


def both_ways(monkeypatch, model, prompts, **settings):
    """Responses from shared prompts and from copies."""
    way = way_of(model, [], 20)
    assert way.cache == "shared"
    shared = sample(model, prompts, **settings)
    monkeypatch.setattr("distalign.rollout.sample.way_of", lambda *_: way._replace(cache="copied"))
    return shared, sample(model, prompts, **settings)


# Where the ways of drawing are tried one by one; elsewhere all at once.
APART = ("llama", "gemma3", "gpt2")
TOGETHER = {"n": 4, "rows": 3, "min_new_tokens": 3, "top_p": 0.9}


@pytest.mark.parametrize("family", sampled(SHARED, *APART, "gpt_oss", "mistral_window", "mixtral"))
def test_the_seed_gives_the_same_tokens_either_way(family, monkeypatch):
    """In float64, with responses that end, more responses than rows, an end held back, and top-p."""
    model, prompts = build(family, vocab_size=12), [[5, 9, 3, 7], [4], [7, 8, 10, 11, 5, 6], [9, 9], [3], [11, 3, 4]]
    apart = ({"n": 3}, {"n": 5, "rows": 3}, {"n": 2, "min_new_tokens": 3, "top_p": 0.9})
    for settings in apart if family in APART else (TOGETHER,):
        options = {"max_new_tokens": 8, "temperature": 4.0, "end_id": 2, "seed": 1, **settings}
        with monkeypatch.context() as patch:
            found, expected = both_ways(patch, model, prompts, **options)
        assert found == expected
        lengths = {len(own) for group in found for own in group}
        assert min(lengths) < max(lengths) == 8
        assert min(lengths) > settings.get("min_new_tokens", 0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "gpt_oss", "qwen2_window"])
def test_greedy_equals_generate_for_responses_that_end(family):
    """The same tokens as `model.generate`, from a vocabulary so small that some responses end and others do not."""
    model, prompts = build(family, vocab_size=8), [[3 + (i * k) % 5 for k in range(1, 2 + i % 6)] for i in range(24)]
    found = sample(model, prompts, n=3, max_new_tokens=10, min_new_tokens=1, temperature=0.0, end_id=2, seed=0)
    settings = {"do_sample": False, "max_new_tokens": 10, "min_new_tokens": 1, "pad_token_id": 0}
    for prompt, group in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        assert group == [out[0, len(prompt) :].tolist()] * 3
    assert len({len(own) for group in found for own in group}) > 1


def test_adapters_training_and_checkpointing(monkeypatch):
    """A LoRA policy that is training samples as it does in evaluation; its modes and settings stay as they were."""
    model = get_peft_model(tiny.model(), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2)).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    settings = {"n": 4, "max_new_tokens": 6, "end_id": 3, "seed": 0}
    plain = sample(model.eval(), [[5, 6, 7], [8]], **settings)
    with model.disable_adapter():
        assert sample(model, [[5, 6, 7], [8]], **settings) != plain
    checkpointing(model)()
    model.train()
    state = [(m.training, getattr(m, "gradient_checkpointing", None)) for m in model.modules()]
    attention = model.config._attn_implementation
    shared, copied = both_ways(monkeypatch, model, [[5, 6, 7], [8]], **settings)
    assert shared == copied == plain
    assert [(m.training, getattr(m, "gradient_checkpointing", None)) for m in model.modules()] == state
    assert model.config._attn_implementation == attention


def test_a_prompt_is_stored_once():
    """The cache of 100 responses holds the very tensors of the prompt's, and room for the responses' tokens."""
    with torch.no_grad():
        encoded = encode_prompts(tiny.model(), [[5] * 40, [6] * 30], 0)
        before = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in encoded.cache.layers]
        own = Shared(encoded, torch.tensor([0, 1]).repeat_interleave(50), 3)
        own.step(torch.full((100,), 7))
    for layer, pointers in zip(own.cache.layers, before, strict=True):
        assert (layer.prompt_keys.data_ptr(), layer.prompt_values.data_ptr()) == pointers
        assert layer.own_keys.shape == layer.own_values.shape == (100, 2, 3, 8)


def test_a_cache_that_is_misread_is_not_shared(monkeypatch, caplog):
    """If padding were looked at, the check sees it: one warning, and the responses are those of copies."""
    monkeypatch.setattr(decode, "_restrict", lambda scores, *_: scores)
    model = tiny.model()
    with caplog.at_level(logging.WARNING, "distalign.rollout"):
        assert way_of(model, [], 20).cache == "copied"
    assert "padded and shared: log-probabilities change by" in caplog.text
    settings = {"n": 2, "max_new_tokens": 4, "temperature": 0.0, "end_id": 3, "seed": 0}
    found = sample(model, [[5, 9, 17, 33], [7], [8, 6]], **settings)
    monkeypatch.undo()
    assert found == sample(tiny.model(), [[5, 9, 17, 33], [7], [8, 6]], **settings)


def test_the_trial_is_remembered():
    """A model is not tried again; in another dtype it is."""
    model, calls = tiny.model(), []
    way = way_of(model, [], 20)
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    assert way_of(model, [], 20) == way
    assert not calls
    assert way_of(model.double(), [], 20) == way
    assert calls


def test_gaps_are_closed_from_the_end():
    """Rows that can stay do; as many as are missing in front come from the end."""
    kept = torch.tensor([True, False, True, False, False, True, True])
    assert close_gaps(kept).tolist() == [0, 5, 2, 6]
    assert close_gaps(torch.tensor([True, True, False])).tolist() == [0, 1]
    assert close_gaps(torch.tensor([False])).tolist() == []


@pytest.mark.parametrize("words", [3, 64, 130])
def test_tokens_are_drawn_in_proportion(words):
    """Counts of 40,000 draws within five binomial errors, in blocks that are full or not; what is ruled out never."""
    logits = torch.randn(words, generator=torch.Generator().manual_seed(words)).double() * 2
    logits[words // 2] = -torch.inf
    exact = logits.softmax(-1)
    uniform = torch.rand(40_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = choose(logits.expand(40_000, words), 1.0, 1.0, uniform)
    found = torch.bincount(drawn, minlength=words)
    assert found[words // 2] == 0
    assert ((found / 40_000 - exact).abs() <= 5 * (exact * (1 - exact) / 40_000).sqrt()).all()


def test_infinite_logits_are_refused():
    """As those that are no numbers: no token can be drawn from them."""
    model = tiny.model(tie_word_embeddings=False)
    model.lm_head.weight.data[5] = float("inf")
    with pytest.raises(InputError, match="are not numbers"):
        sample(model, [[5]], max_new_tokens=1, end_id=3, seed=0)
