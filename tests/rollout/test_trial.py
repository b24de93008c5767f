"""Which way a model is sampled: padded, one length at a time, or without its cache; always its own distribution."""

from __future__ import annotations

import functools
import logging

import pytest
import tiny
import torch
from engine_models import build
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertLMHeadModel

from distalign.engine import Group, score
from distalign.errors import InputError
from distalign.rollout.sample import end_ids, sample
from distalign.rollout.trial import way_of

PROMPTS = [[5, 9, 17, 33, 40, 8, 71], [7, 8], [21, 22, 23, 24, 30, 31, 32, 33, 34], [61]]


@torch.no_grad()
def greedy(model, prompt, steps):
    """The most likely tokens, the whole sequence read again for each."""
    ids = list(prompt)
    for _ in range(steps):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        logits[list(end_ids(model, 1))] = -torch.inf
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


def drawn(model, steps=5):
    """The same by `sample`; no token ends."""
    responses = sample(model, PROMPTS, max_new_tokens=steps, temperature=0, end_id=1, min_new_tokens=steps, seed=0)
    return [own[0] for own in responses]


def test_a_model_that_reads_its_padding_is_sampled_one_length_at_a_time(monkeypatch, caplog):
    """As with learned positions counted from the left edge: the first token would depend on the longest prompt."""
    model = build("llama")
    own = type(model).forward

    @functools.wraps(own)
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **more):
        return own(self, input_ids=input_ids, attention_mask=None, **more)

    monkeypatch.setattr(type(model), "forward", forward)
    with caplog.at_level(logging.WARNING, logger="distalign"):
        assert way_of(model, [], 20).prompts == "equal"
        assert drawn(model) == [greedy(model, prompt, 5) for prompt in PROMPTS]
    assert "answered one length at a time (padded and shared: log-probabilities change by" in caplog.text


def test_a_model_whose_cache_is_of_its_own_kind_is_sampled_without(caplog):
    """RWKV keeps a state that is no Cache."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("rwkv", vocab_size=96, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32)
    model = AutoModelForCausalLM.from_config(config).eval()
    with caplog.at_level(logging.WARNING, logger="distalign"):
        assert way_of(model, [], 20).cache == "none"
    assert "every token reads the whole sequence again" in caplog.text
    assert drawn(model) == [greedy(model, prompt, 5) for prompt in PROMPTS]


def test_a_cache_that_does_not_follow_its_rows_is_not_used():
    """MiniMax's linear layers keep theirs, whatever rows are asked for."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4, "initializer_range": 0.3,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("minimax", **sizes)).eval()
    assert way_of(model, [], 20) == ("equal", "none")
    prompts = [PROMPTS[0], PROMPTS[0][::-1]]
    found = sample(model, prompts, n=2, max_new_tokens=5, temperature=0, end_id=1, min_new_tokens=5, seed=0)
    assert found == [[greedy(model, prompt, 5)] * 2 for prompt in prompts]


def test_padding_is_the_usual_way(caplog):
    """Nothing is said of it."""
    with caplog.at_level(logging.WARNING, logger="distalign"):
        assert way_of(tiny.model(), [], 20) == ("padded", "shared")
    assert not caplog.text


def test_sparse_attention_is_served_alone_beyond_its_keys():
    """Scores do not depend on what else is scored, nor does the first token on other prompts."""
    torch.manual_seed(1)
    sizes = {
        "vocab_size": 131, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16,
        "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "index_topk": 24,
        "index_n_heads": 2, "index_head_dim": 16, "initializer_range": 0.3, "max_position_embeddings": 256,
    }  # fmt: skip
    config = AutoConfig.for_model("deepseek_v32", **sizes)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").double().eval()
    generator = torch.Generator().manual_seed(5)
    prompt, short, long = (torch.randint(3, 131, (n,), generator=generator).tolist() for n in (40, 1, 31))
    with torch.no_grad():
        own = model(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)[short[0]]
        for responses in ([short], [short, long]):
            torch.testing.assert_close(score(model, [Group(prompt, responses)]).token_logps[0, 0], own)
    assert way_of(model, [], 20).prompts == "padded"
    assert way_of(model, [], 60).prompts == "equal"


def test_a_model_that_sees_the_future_is_refused():
    """BERT is loaded as a causal model without a word."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model = BertLMHeadModel(BertConfig(vocab_size=96, **sizes)).eval()
    with pytest.raises(InputError, match="so it is no causal language model"):
        score(model, [Group([5, 6, 7], [[8, 9]])])
    with pytest.raises(InputError, match="so it is no causal language model"):
        sample(model, [[5, 6]], max_new_tokens=2, end_id=1, seed=0)


LONG = {"rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [3.0, 4.0, 5.0, 6.0], "factor": 4.0}


@pytest.mark.parametrize(
    ("rope", "prompts", "message"),
    [
        ({"rope_type": "longrope", **LONG}, [[5] * 14, [5] * 20], "prompts of up to 14 tokens.*pass that"),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, [[5] * 4, [5] * 20], "prompts of up to 20 tokens"),
    ],
    ids=["longrope", "dynamic"],
)
def test_responses_that_pass_a_switch_of_positions_are_refused(rope, prompts, message):
    """What is drawn before it is of another model than the one that scores the whole; beside it all is well."""
    original = {"original_max_position_embeddings": 16, "max_position_embeddings": 64}
    kind, sizes = ("phi3", original) if rope["rope_type"] == "longrope" else ("llama", {"max_position_embeddings": 16})
    model = build(kind, rope_parameters=rope, **sizes)
    with pytest.raises(InputError, match=message):
        sample(model, prompts, max_new_tokens=4, temperature=1.0, end_id=1, seed=0)
    fine = [[5] * 4, [5] * 12, *([[5] * 20] if rope["rope_type"] == "longrope" else [])]
    responses = sample(model, fine, max_new_tokens=4, temperature=0, end_id=1, min_new_tokens=4, seed=0)
    assert [own[0] for own in responses] == [greedy(model, prompt, 4) for prompt in fine]
