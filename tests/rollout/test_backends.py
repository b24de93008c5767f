"""Every backend samples the same distribution, leaves the model as it was, and refuses what it cannot do."""

from __future__ import annotations

import logging

import pytest
import tiny
import torch
from engine_models import FAMILIES, build
from peft import LoraConfig, get_peft_model

from distalign.errors import InputError
from distalign.rollout.backends import (
    Backend,
    ContinuousBackend,
    TransformersBackend,
    VllmBackend,
    check_backend,
    make_backend,
)
from distalign.rollout.sample import sample
from distalign.training.rounds import RolloutSettings

PROMPTS = [[5, 9, 17, 33, 40, 8, 71], [7, 8], [21, 22, 23, 24, 30, 31, 32, 33, 34], [61]]
# The families whose layers go through transformers' attention interface, and whose cache is a plain one.
PAGED = ["llama", "qwen2", "mistral_window", "gemma2", "gemma3", "gpt2", "gpt_neox", "opt", "mixtral"]


@pytest.fixture(autouse=True)
def _quiet():
    """What generate_batch logs about failures is tested by what is raised."""
    logger = logging.getLogger("ContinuousBatchingLogger")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


@pytest.mark.parametrize("backend", ["transformers", "continuous"])
def test_a_backend_is_made_from_a_recipe(backend):
    """The rollout section names it and bounds its rows."""
    made = make_backend(RolloutSettings(backend=backend, rows=5))
    assert isinstance(made, Backend)
    assert made == {"transformers": TransformersBackend, "continuous": ContinuousBackend}[backend](rows=5)


def test_the_default_backend_is_sample():
    """Token for token."""
    model = tiny.model()
    settings = {"n": 3, "max_new_tokens": 5, "min_new_tokens": 1, "temperature": 0.8, "top_p": 0.9, "end_id": 3}
    found = TransformersBackend(rows=4).generate(model, PROMPTS[1:2], seed=2, **settings)
    assert found == sample(model, PROMPTS[1:2], seed=2, rows=4, **settings)


@pytest.mark.parametrize("family", PAGED)
def test_continuous_batching_decodes_the_same(family):
    """Greedy, prompts of unequal length, fewer rows than responses: token for token what `sample` decodes."""
    model = build(family, torch.float32)
    settings = {"n": 2, "max_new_tokens": 6, "temperature": 0.0, "end_id": 2, "seed": 0}
    assert ContinuousBackend(rows=3).generate(model, PROMPTS, **settings) == sample(model, PROMPTS, **settings)


@pytest.mark.parametrize("family", ["gptj", "mpt", "bloom", "falcon", "mamba", "qwen3_next", "deepseek_v3"])
def test_continuous_batching_refuses_models_that_it_would_sample_wrongly(family):
    """The first three would run without their past, and say nothing."""
    assert family in FAMILIES
    with pytest.raises(InputError, match=r"continuous cannot sample from .*; take rollout\.backend: transformers"):
        ContinuousBackend().generate(build(family, torch.float32), PROMPTS, n=1, max_new_tokens=3, end_id=2, seed=0)


@pytest.mark.parametrize(("temperature", "top_p"), [(0.6, 1.0), (1.0, 0.7)])
def test_continuous_batching_has_the_distribution_of_sample(temperature, top_p):
    """Frequencies of whole responses within five binomial errors of each other, temperature and top-p included."""
    model = tiny.model(num_hidden_layers=1, vocab_size=8, eos_token_id=7)
    n, settings = 2000, {"max_new_tokens": 3, "temperature": temperature, "top_p": top_p, "end_id": 7, "seed": 1}
    ours = sample(model, [[1, 2, 3]], n=10 * n, rows=10 * n, **settings)[0]
    paged = ContinuousBackend(rows=100).generate(model, [[1, 2, 3]], n=n, **settings)[0]
    assert len(paged) == n
    for response in {tuple(own) for own in ours}:
        expected = ours.count(list(response)) / len(ours)
        error = (expected * (1 - expected) * (1 / n + 0.1 / n)) ** 0.5
        assert abs(paged.count(list(response)) / n - expected) <= 5 * error + 1 / n, response


def test_continuous_batching_leaves_everything_as_it_was():
    """Modes, attention, dtype, the sampling defaults of the checkpoint and the global random state."""
    model = tiny.model(attn_implementation="eager")
    model.train()
    model.model.layers[0].eval()
    model.generation_config.temperature = 0.1
    modes, defaults = [module.training for module in model.modules()], model.generation_config.to_dict()
    state, weights = torch.get_rng_state(), [weight.clone() for weight in model.parameters()]
    found = ContinuousBackend().generate(model, [[5, 6], [7]], n=2, max_new_tokens=4, end_id=3, seed=0)
    assert [len(group) for group in found] == [2, 2]
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == "eager"
    assert model.dtype == torch.float32
    assert model.generation_config.to_dict() == defaults
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_continuous_batching_samples_from_the_adapter():
    """A policy's adapter is on unless it is switched off."""
    model = get_peft_model(tiny.model(), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=3.0)
    settings = {"n": 1, "max_new_tokens": 6, "temperature": 0.0, "end_id": 3, "seed": 0}
    tuned = ContinuousBackend().generate(model, [[5, 6], [7]], **settings)
    assert tuned == sample(model, [[5, 6], [7]], **settings)
    with model.disable_adapter():
        plain = ContinuousBackend().generate(model, [[5, 6], [7]], **settings)
        assert plain == sample(model, [[5, 6], [7]], **settings)
    assert plain != tuned


def test_lost_responses_are_an_error(monkeypatch):
    """generate_batch logs a failed request and returns the rest; that must not shift responses to other prompts."""
    model = tiny.model()
    whole = type(model).generate_batch
    monkeypatch.setattr(
        type(model), "generate_batch", lambda *a, **k: dict(list(whole(*a, **k).items())[1:]), raising=True
    )
    with pytest.raises(InputError, match="1 of 4 responses are lost"):
        ContinuousBackend().generate(model, [[5, 6], [7]], n=2, max_new_tokens=2, end_id=3, seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "vllm"}, "vllm is not in this version; take transformers"),
        ({"backend": "vllm", "url": "http://localhost:8000"}, "not in this version"),
        ({"url": "http://localhost:8000"}, r"rollout\.url is http://localhost:8000 but the backend is transformers"),
        ({"backend": "continuous", "min_new_tokens": 2}, r"min_new_tokens is 2: .* set it to 0, or"),
    ],
)
def test_what_a_backend_cannot_do_is_refused_before_a_model_is_loaded(settings, message):
    """From the settings alone."""
    with pytest.raises(InputError, match=message):
        check_backend(RolloutSettings(**settings))
    with pytest.raises(InputError, match=message):
        make_backend(RolloutSettings(**settings))


def test_what_a_backend_cannot_do_is_refused_when_called():
    """Also where no recipe was checked."""
    settings = {"n": 1, "max_new_tokens": 3, "end_id": 3, "seed": 0}
    with pytest.raises(InputError, match="min_new_tokens is 1"):
        ContinuousBackend().generate(tiny.model(), [[5]], min_new_tokens=1, **settings)
    with pytest.raises(InputError, match="not in this version"):
        VllmBackend("http://localhost:8000").generate(None, [[5]], **settings)
    with pytest.raises(ValueError, match="temperature is -1"):
        ContinuousBackend().generate(tiny.model(), [[5]], temperature=-1.0, **settings)
