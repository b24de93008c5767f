"""Responses scored from the states that drew them: the same numbers as scoring them again."""

from __future__ import annotations

import pytest
import torch
from engine_models import FAMILIES, build

from distalign.engine import Group, score
from distalign.engine.drawn import Drawn, score_drawn, score_own
from distalign.engine.head import CannotTile, head_of
from distalign.rollout import sample, sample_with_states

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


def test_the_reference_itself_needs_no_pass():
    """Its log-probabilities and entropy from its states alone."""
    model = build("llama")
    own = drawn_by(model, temperature=0.7)
    found = score_own(own, temperature=0.7)
    (expected,) = score_drawn([own], PROMPTS, model, token_budget=4096, temperature=0.7)
    torch.testing.assert_close(found.logps, expected.logps, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.entropy, expected.entropy, rtol=0, atol=1e-9)
    assert not found.kl.any()


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
