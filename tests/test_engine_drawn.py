"""Responses scored from the states that drew them: the same numbers as scoring them again."""

from __future__ import annotations

import pytest
import torch
from engine_models import FAMILIES, build

from distalign.engine import Group, check, score
from distalign.engine.drawn import Drawn, score_drawn
from distalign.engine.head import CannotTile, head_of
from distalign.rollout import decoding, sample, sample_with_scores, sample_with_states

PROMPTS = [[5, 9, 17, 33, 40, 8, 71], [7, 8], [21, 22, 23, 24, 30, 31, 32, 33, 34], [61]]
SETTINGS = {"n": 3, "max_new_tokens": 6, "end_id": 12, "seed": 3, "rows": 5}

# Eager attention of gemma2 overflows at padding in float64.
UNEVEN = sorted(FAMILIES.keys() - {"gemma2"})


def drawn_by(model, prompts=PROMPTS, **settings):
    """Responses with their states, and the head."""
    responses, states = sample_with_states(model, prompts, **(SETTINGS | settings))
    return Drawn(responses, states, head_of(model))


@pytest.mark.parametrize("family", UNEVEN)
def test_watching_changes_no_response_and_its_states_are_those_of_scoring(family):
    """Every family with a plain head: the states give the engine's log-probabilities and entropy, in float64.

    To 5e-5: some families keep parts of themselves in float32.
    """
    model = build(family)
    try:
        own = drawn_by(model)
    except CannotTile:
        pytest.skip(f"{family}: its head is not a plain linear layer")
    assert own.responses == sample(model, PROMPTS, **SETTINGS)
    groups = [Group(prompt, responses) for prompt, responses in zip(PROMPTS, own.responses, strict=True)]
    expected = score(model, groups, entropy=True)
    (found,) = score_drawn([own], PROMPTS, model, token_budget=64)
    torch.testing.assert_close(found.logps, expected.logps, rtol=0, atol=5e-5)
    torch.testing.assert_close(found.entropy, expected.step_entropy.sum(-1), rtol=0, atol=5e-5)
    assert float(found.kl.abs().max()) < 5e-5
    assert not model.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("budget", [20, 4096])
def test_several_policies_share_one_pass_of_the_reference(temperature, budget):
    """Each policy's KL, log-probabilities and the reference's equal those of scoring it alone."""
    reference, policies = build("llama"), [build(family) for family in ("qwen3", "olmo2", "mistral_window")]
    drawn = [drawn_by(model, temperature=temperature, seed=seed) for seed, model in enumerate(policies)]
    found = score_drawn(drawn, PROMPTS, reference, token_budget=budget, temperature=temperature)
    for model, own, scores in zip(policies, drawn, found, strict=True):
        groups = [Group(prompt, responses) for prompt, responses in zip(PROMPTS, own.responses, strict=True)]
        expected = score(model, groups, reference=reference, entropy=True, temperature=temperature)
        torch.testing.assert_close(scores.logps, expected.logps, rtol=0, atol=1e-9)
        torch.testing.assert_close(scores.kl, expected.step_kl.sum(-1), rtol=0, atol=1e-9)
        torch.testing.assert_close(scores.reference_logps, expected.reference_logps, rtol=0, atol=1e-9)
        assert float(scores.kl.max()) > 1e-3


@pytest.mark.parametrize("family", UNEVEN)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_model_says_of_its_own_responses_what_scoring_does(family, temperature):
    """Log-probabilities and entropy, of every family, from the logits that the tokens were drawn from."""
    model = build(family)
    settings = SETTINGS | {"temperature": temperature}
    own = sample_with_scores(model, PROMPTS, **settings)
    assert own.responses == sample(model, PROMPTS, **settings)
    assert own.read == [None] * len(PROMPTS)
    groups = [Group(prompt, responses) for prompt, responses in zip(PROMPTS, own.responses, strict=True)]
    expected = score(model, groups, entropy=True, temperature=temperature)
    torch.testing.assert_close(own.logps, expected.logps, rtol=0, atol=5e-5)
    torch.testing.assert_close(own.entropy, expected.step_entropy.sum(-1), rtol=0, atol=5e-5)


@pytest.mark.parametrize("family", UNEVEN)
@pytest.mark.parametrize("budget", [30, 4096])
def test_prompts_that_the_reference_has_read_are_not_read_again(family, budget):
    """Another's responses score as with prompts read anew, whatever part of the prompts was kept; fewer tokens run."""
    reference, policy = build(family), build("llama")
    own = sample_with_scores(reference, PROMPTS, **SETTINGS, keep=2**20)
    if own.read == [None] * len(PROMPTS):
        assert not decoding.shares_prompts(reference)
        return
    # Responses of one token only, beside longer ones.
    responses = [[[5]], [[7, 8, 9], [3]], [[4, 4], [6]], [[9]]]
    states = torch.randn(13 - 2, policy.config.hidden_size, dtype=torch.float64)
    tokens = sum(len(one) for each in responses for one in each)
    drawn = [Drawn(responses, states[:tokens], head_of(policy))]
    settings = {"token_budget": budget, "temperature": 0.7}
    (expected,) = score_drawn(drawn, PROMPTS, reference, **settings)
    seen = []
    reference.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numel()))
    for read in (own.read, [*own.read[:2], None, own.read[3]], [None, None, own.read[2], None]):
        del seen[:]
        (found,) = score_drawn(drawn, PROMPTS, reference, read=read, **settings)
        for name in ("logps", "entropy", "kl", "reference_logps"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=5e-5)
        if budget == 4096 and check(reference).path == "shared":
            kept = sum(len(prompt) for prompt, one in zip(PROMPTS, read, strict=True) if one is not None)
            assert sum(seen) == sum(map(len, PROMPTS)) - kept + tokens - sum(map(len, responses))


def test_prompts_whose_keys_depend_on_their_company_are_read_again():
    """Long RoPE turns the keys of short prompts another way beside a long one: what was kept of them is not used."""
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope |= {"original_max_position_embeddings": 16, "partial_rotary_factor": 1.0}
    lengths = {"max_position_embeddings": 64, "original_max_position_embeddings": 16}
    reference = build("phi3", torch.float32, **lengths, rope_parameters=rope)
    prompts = [[5, 9, 17, 33], [7, 8, 3], list(range(20, 40)), [61, 3]]
    own = sample_with_scores(reference, prompts, n=1, max_new_tokens=4, end_id=12, seed=3, keep=2**20)
    assert None not in own.read
    states = torch.randn(13, reference.config.hidden_size)
    drawn = [Drawn([[[4, 5, 6, 7]], [[7, 8, 9]], [[4, 4]], [[9, 3, 3, 3]]], states, head_of(reference))]
    (expected,) = score_drawn(drawn, prompts, reference, token_budget=8)
    (found,) = score_drawn(drawn, prompts, reference, token_budget=8, read=own.read)
    torch.testing.assert_close(found.reference_logps, expected.reference_logps, rtol=0, atol=1e-5)


def test_how_much_of_the_prompts_is_kept():
    """Batch by batch while there is room; nothing where responses do not share their prompts."""
    model = build("llama")
    settings = SETTINGS | {"rows": 3}
    whole = sample_with_scores(model, PROMPTS, **settings, keep=2**20)
    sizes = [sum(part.nbytes for part in [*one.keys, *one.values]) for one in whole.read]
    # Batches of one prompt each, the shortest first.
    some = sample_with_scores(model, PROMPTS, **settings, keep=sizes[3] + sizes[1])
    assert [one is not None for one in some.read] == [False, True, False, True]
    assert some.responses == whole.responses
    with pytest.raises(ValueError, match="above 0"):
        sample_with_scores(model, PROMPTS, **(settings | {"temperature": 0.0}))


def test_states_that_do_not_belong_are_refused():
    """A state too few, a prompt too many."""
    model = build("llama")
    own = drawn_by(model)
    for wrong, prompts in (
        (Drawn(own.responses, own.states[1:], own.head), PROMPTS),
        (own, [*PROMPTS, [3]]),
    ):
        with pytest.raises(ValueError, match="give the states of all responses"):
            score_drawn([wrong], prompts, model, token_budget=64)
