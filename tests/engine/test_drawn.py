"""Responses scored from the states and logits that drew them: the same numbers as scoring them again."""

from __future__ import annotations

import gc
import threading
from dataclasses import replace

import pytest
import torch
from engine_models import FAMILIES, build

from distalign.engine import Group, check, score
from distalign.engine.drawn import Drawn, DrawnScores, score_drawn
from distalign.engine.lm_head import CannotTile, head_of
from distalign.rollout import decode as decoding
from distalign.rollout.sample import sample, sample_in_batches, sample_with_scores

PROMPTS = [[5, 9, 17, 33, 40, 8, 71], [7, 8], [21, 22, 23, 24, 30, 31, 32, 33, 34], [61]]
SETTINGS = {"n": 3, "max_new_tokens": 6, "end_id": 12, "seed": 3, "rows": 5}

# Eager attention of gemma2 overflows at padding in float64.
UNEVEN = sorted(FAMILIES.keys() - {"gemma2"})

# Of the logits none is kept, those of a few steps, or all.
KEEP = [0, 12_000, 2**20]


def draw(model, reference, *, keep=0, change=lambda drawn: drawn, **settings):
    """Responses, their scores in order, batch by batch as they were drawn, and the places of all kept logits."""
    settings = SETTINGS | settings
    parts, places = {}, []

    def each(numbers, drawn):
        own, temperature = [PROMPTS[i] for i in numbers], settings.get("temperature", 1.0)
        found = score_drawn(change(drawn), own, reference, token_budget=20, temperature=temperature)
        by_prompt = (values.split([len(one) for one in drawn.responses]) for values in vars(found).values())
        parts.update(zip(numbers, zip(*by_prompt, strict=True), strict=True))
        places.append(drawn.places)

    responses = sample_in_batches(model, PROMPTS, each, keep=keep, **settings)
    in_order = zip(*(parts[index] for index in range(len(PROMPTS))), strict=True)
    return responses, DrawnScores(*map(torch.cat, in_order)), places


def of_states(responses, states, model):
    """Responses without kept logits."""
    places = torch.full((len(states),), -1)
    return Drawn(responses, states, head_of(model), states.new_zeros(0, head_of(model).weight.shape[0]), places)


def close(found, expected, *, atol):
    """Sums that drawing found against those of scoring."""
    torch.testing.assert_close(found.logps, expected.logps, rtol=0, atol=atol)
    torch.testing.assert_close(found.entropy, expected.step_entropy.sum(-1), rtol=0, atol=atol)
    torch.testing.assert_close(found.kl, expected.step_kl.sum(-1), rtol=0, atol=atol)
    torch.testing.assert_close(found.reference_logps, expected.reference_logps, rtol=0, atol=atol)


@pytest.mark.parametrize("family", UNEVEN)
@pytest.mark.parametrize("keep", KEEP)
def test_watching_changes_no_response_and_what_was_seen_is_what_scoring_finds(family, keep):
    """Every family with a plain head: states and logits give the engine's numbers, in float64, against themselves.

    To 5e-5: some families keep parts of themselves in float32.
    """
    model = build(family)
    try:
        responses, found, _ = draw(model, model, keep=keep)
    except CannotTile:
        pytest.skip(f"{family}: its head is not a plain linear layer")
    assert responses == sample(model, PROMPTS, **SETTINGS)
    groups = [Group(prompt, own) for prompt, own in zip(PROMPTS, responses, strict=True)]
    close(found, score(model, groups, entropy=True, reference=model), atol=5e-5)
    assert float(found.kl.abs().max()) < 5e-5
    assert not model.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("family", ["qwen3", "olmo2", "mistral_window"])
@pytest.mark.parametrize("rows", [2, 5, 12])
def test_a_policy_is_as_far_from_the_reference_as_scoring_says(family, temperature, keep, rows):
    """KL, log-probabilities and the reference's, whatever part of the logits was kept.

    Prompts answered in two parts, one by one, and together, where the reference reads them in several passes.
    """
    reference, model = build("llama"), build(family)
    responses, found, places = draw(model, reference, keep=keep, temperature=temperature, rows=rows)
    groups = [Group(prompt, own) for prompt, own in zip(PROMPTS, responses, strict=True)]
    close(found, score(model, groups, reference=reference, entropy=True, temperature=temperature), atol=1e-9)
    assert float(found.kl.max()) > 1e-3
    kept = torch.cat(places) >= 0
    assert bool(kept.any()) == (keep > 0)
    assert bool(kept.all()) == (keep == KEEP[-1])


def test_kept_logits_spare_the_head():
    """With all of them kept a head that is lost is not missed; the places of a batch are its own, from 0 on."""
    reference, model = build("llama"), build("qwen3")

    def lose(drawn):
        return replace(drawn, head=replace(drawn.head, weight=torch.full_like(drawn.head.weight, torch.nan)))

    _, expected, places = draw(model, reference)
    _, found, places = draw(model, reference, keep=2**20, change=lose)
    torch.testing.assert_close(found.kl, expected.kl, rtol=0, atol=1e-9)
    assert [sorted(own.tolist()) for own in places] == [list(range(len(own))) for own in places]
    assert len(places) == len(PROMPTS)
    _, lost, _ = draw(model, reference, keep=KEEP[1], change=lose)
    assert bool(lost.kl.isnan().any())


def test_what_was_noted_of_a_batch_goes_with_it():
    """Memory is that of a batch, however many there are."""
    model, sizes = build("llama"), []

    def each(_, drawn):
        width = drawn.states.shape[1]
        found = (one for one in gc.get_objects() if type(one) is torch.Tensor and one.shape[1:] == (width,))
        storages = (one.untyped_storage() for one in found)
        sizes.append(sum({one.data_ptr(): one.nbytes() for one in storages}.values()))

    sample_in_batches(model, [[7, 8]] * 12, each, **SETTINGS)
    assert len(sizes) == 12
    assert max(sizes) < 2 * min(sizes)


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("rows", [2, 5])
def test_batches_scored_behind_the_drawing_have_the_same_scores(keep, rows):
    """To the last bit, and the same responses."""
    reference, model = build("llama"), build("qwen3")
    check(reference)
    responses, expected, _ = draw(model, reference, keep=keep, rows=rows)
    again, found, _ = draw(model, reference, keep=2 * keep, rows=rows, behind=True)
    assert again == responses
    for name, values in vars(expected).items():
        assert torch.equal(getattr(found, name), values)


def test_a_batch_is_handed_on_while_the_next_is_drawn_and_keeps_its_logits():
    """In order, one at a time, each after all steps of the next batch, whose logits are in another buffer."""
    model, calls, passed, batches = build("llama"), [], threading.Condition(), []

    def count(*_):
        with passed:
            calls.append(threading.current_thread())
            passed.notify_all()

    def each(numbers, drawn):
        batches.append(numbers)
        with passed:
            # A batch has as many calls of the model as a response has tokens; the last one has no next.
            assert passed.wait_for(lambda: len(calls) >= 5 * min(len(batches) + 1, 4), timeout=30)
        assert threading.current_thread() not in calls
        with torch.no_grad():
            logits = drawn.states @ drawn.head.weight.T
        torch.testing.assert_close(drawn.logits[drawn.places], logits)

    check(model)
    decoding.shares_prompts(model)
    model.get_input_embeddings().register_forward_hook(count)
    settings = {"max_new_tokens": 5, "end_id": 10**6, "seed": 3, "rows": 1, "keep": 2**20, "behind": True}
    sample_in_batches(model, [[5, 6], [7, 8], [9, 11], [4, 4]], each, **settings)
    assert [list(numbers) for numbers in batches] == [[0], [1], [2], [3]]


@pytest.mark.parametrize("last", [False, True])
def test_what_goes_wrong_behind_the_drawing_is_raised(last):
    """By the batch before the end, and by the last one."""
    model, seen = build("llama"), []

    def each(numbers, _):
        seen.append(numbers)
        if len(seen) == (4 if last else 1):
            raise ArithmeticError("lost")

    with pytest.raises(ArithmeticError, match="lost"):
        sample_in_batches(model, PROMPTS, each, **SETTINGS | {"rows": 3, "behind": True})
    assert len(seen) == (4 if last else 1)


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
    drawn = of_states(responses, states[:tokens], policy)
    settings = {"token_budget": budget, "temperature": 0.7}
    expected = score_drawn(drawn, PROMPTS, reference, **settings)
    seen = []
    reference.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numel()))
    for read in (own.read, [*own.read[:2], None, own.read[3]], [None, None, own.read[2], None]):
        del seen[:]
        found = score_drawn(drawn, PROMPTS, reference, read=read, **settings)
        for name in ("logps", "entropy", "kl", "reference_logps"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=5e-5)
        if budget == 4096 and check(reference).path == "shared":
            kept = sum(len(prompt) for prompt, one in zip(PROMPTS, read, strict=True) if one is not None)
            assert sum(seen) == sum(map(len, PROMPTS)) - kept + tokens - sum(map(len, responses))


def test_prompts_that_were_read_take_no_room_in_a_pass():
    """Of a pass's tokens: with all prompts read before, the responses alone fill it, and one pass takes them all."""
    reference = build("llama")
    own = sample_with_scores(reference, PROMPTS, **SETTINGS, keep=2**20)
    states = torch.randn(8, reference.config.hidden_size, dtype=torch.float64)
    drawn = of_states([[[5, 6]], [[7, 8]], [[4, 4]], [[9, 9]]], states, reference)
    check(reference)
    seen = []
    reference.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numel()))
    for read, passes in ((own.read, [4]), (None, [10, 8, 5])):
        del seen[:]
        score_drawn(drawn, PROMPTS, reference, token_budget=11, read=read)
        assert seen == passes


def test_prompts_that_are_read_again_take_their_room():
    """Of responses of one token each: a row of nothing else would be empty, so their prompts are in it, and counted."""
    reference = build("llama")
    own = sample_with_scores(reference, PROMPTS, **SETTINGS, keep=2**20)
    drawn = of_states([[[5]], [[7]], [[4]], [[9]]], torch.randn(4, reference.config.hidden_size).double(), reference)
    check(reference)
    seen = []
    reference.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numel()))
    score_drawn(drawn, PROMPTS, reference, token_budget=11, read=own.read)
    assert seen == [9, 9, 1]


def test_a_reference_that_reads_whole_sequences_counts_whole_sequences():
    """One whose prompts cannot be shared is given what it asks for, not what another would be spared."""
    reference = build("llama")
    own = sample_with_scores(reference, PROMPTS, **SETTINGS, keep=2**20)
    bloom = build("bloom")
    assert check(bloom).path == "padded"
    states = torch.randn(8, bloom.config.hidden_size, dtype=torch.float64)
    drawn = of_states([[[5, 6]], [[7, 8]], [[4, 4]], [[9, 9]]], states, bloom)
    seen = []
    bloom.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numel()))
    score_drawn(drawn, PROMPTS, bloom, token_budget=11, read=own.read)
    assert len(seen) == 3


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
    drawn = of_states([[[4, 5, 6, 7]], [[7, 8, 9]], [[4, 4]], [[9, 3, 3, 3]]], states, reference)
    expected = score_drawn(drawn, prompts, reference, token_budget=8)
    found = score_drawn(drawn, prompts, reference, token_budget=8, read=own.read)
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
    """A state with its place too few, a prompt too many."""
    model = build("llama")
    own = of_states([[[5, 6], [7]], [[8]]], torch.zeros(4, model.config.hidden_size, dtype=torch.float64), model)
    for wrong, prompts in (
        (replace(own, states=own.states[1:], places=own.places[1:]), PROMPTS[:2]),
        (own, PROMPTS[:3]),
    ):
        with pytest.raises(ValueError, match="give the states and places of all responses"):
            score_drawn(wrong, prompts, model, token_budget=64)
