"""Sampling: the model's own distribution, whatever the batch, and nothing else is touched."""

from __future__ import annotations

from itertools import product

import pytest
import tiny
import torch
from engine_models import FAMILIES, build

from distalign.engine import Group, score
from distalign.errors import InputError
from distalign.rollout.decode import choose
from distalign.rollout.sample import end_ids, sample
from distalign.rollout.trial import way_of

PROMPTS = [[5, 9, 17, 33, 40, 8, 71], [7, 8], [21, 22, 23, 24, 30, 31, 32, 33, 34], [61]]


def one_at_a_time(model, prompt, steps, end_id=2):
    """Greedy decoding without cache, padding or batch."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == end_id:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_in_a_batch_equals_decoding_alone(family):
    """Prompts of unequal length and forked responses change nothing, in any family."""
    model = build(family, torch.float32)
    found = sample(model, PROMPTS, n=2, max_new_tokens=8, temperature=0.0, end_id=2, seed=0)
    with torch.no_grad():
        expected = [one_at_a_time(model, prompt, 8) for prompt in PROMPTS]
    assert found == [[own, own] for own in expected]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "gpt_neox"])
def test_greedy_equals_generate(family):
    """The same tokens as `model.generate(do_sample=False)`."""
    model = build(family)
    model.generation_config.pad_token_id = 0
    found = sample(model, PROMPTS, max_new_tokens=8, temperature=0.0, end_id=2, seed=0, rows=2)
    for prompt, (own,) in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
        assert own == out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_first_two_tokens_have_the_models_distribution(temperature):
    """Chi-square of 20,000 pairs of first tokens against softmax(logits / T), which is computed exactly."""
    model = tiny.model(num_hidden_layers=1, vocab_size=8, eos_token_id=7).double()
    n, prompt = 20_000, [1, 2, 3]
    drawn = sample(model, [prompt], n=n, max_new_tokens=2, temperature=temperature, end_id=7, seed=3, rows=n)[0]
    counts = torch.zeros(8, 8)
    for response in drawn:
        counts[response[0], response[1] if len(response) > 1 else 0] += 1
    with torch.no_grad():
        first = (model(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
        rows = torch.tensor([[*prompt, token] for token in range(8)])
        second = (model(rows).logits[:, -1] / temperature).softmax(-1)
    second[7] = torch.tensor([1.0, *[0.0] * 7])
    expected = n * first[:, None] * second
    cells = expected > 5
    statistic = ((counts - expected)[cells] ** 2 / expected[cells]).sum()
    freedom = int(cells.sum()) - 1
    # A chi-square has mean k and variance 2k: five standard deviations.
    assert abs(float(statistic) - freedom) < 5 * (2 * freedom) ** 0.5
    assert float((counts - expected).abs().sum()) / (2 * n) < 0.03


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    """0.5 + 0.3 reach 0.7, so the third token is never drawn, and the others keep their proportion."""
    logits = torch.tensor([0.3, 0.5, 0.15, 0.05]).log().expand(8000, 4)
    uniform = torch.rand(8000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = choose(logits, 1.0, 0.7, uniform)
    shares = torch.bincount(drawn, minlength=4) / 8000
    assert shares[2] == shares[3] == 0
    assert abs(float(shares[1]) - 0.625) < 0.025
    exact = choose(logits, 1.0, 0.4, uniform)
    assert set(exact.tolist()) == {1}


def test_what_is_drawn_does_not_depend_on_what_is_drawn_beside_it():
    """The responses to a prompt alone, under its number, and the first of more responses to it."""
    model, prompts = tiny.model(vocab_size=8, eos_token_id=7), [[1, 2], [3], [4, 5, 6]]
    settings = {"max_new_tokens": 6, "end_id": 7, "seed": 3}
    together = sample(model, prompts, n=2, **settings)
    assert len({str(responses) for responses in together}) == 3
    for number, prompt in enumerate(prompts):
        (alone,) = sample(model, [prompt], n=3, numbers=[number], **settings)
        assert alone[:2] == together[number]


def test_a_response_ends_at_its_end_token_or_at_the_limit():
    """One end token, last; a response without it has exactly the number of tokens asked for."""
    model = tiny.model(vocab_size=8, eos_token_id=7)
    drawn = sample(model, [[1], [2, 3]], n=200, max_new_tokens=6, end_id=7, seed=0)
    ended = [own for group in drawn for own in group if own[-1] == 7]
    cut = [own for group in drawn for own in group if own[-1] != 7]
    assert ended
    assert cut
    assert all(7 not in own[:-1] for own in ended)
    assert all(len(own) == 6 and 7 not in own for own in cut)
    assert {len(own) for own in ended} == {1, 2, 3, 4, 5, 6}


def test_the_seed_decides_and_nothing_else_is_touched():
    """Same seed, same responses; another seed, others; the global random state and the modes stay."""
    model = tiny.model()
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    first, again, other = (sample(model, [[5, 6], [7]], n=3, max_new_tokens=6, end_id=3, seed=s) for s in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes


def test_order_is_that_of_the_prompts_and_progress_counts_them():
    """Whatever the batches, result[i] answers prompt i; progress ends at the number of prompts."""
    model, seen = build("llama"), []
    found = sample(
        model,
        PROMPTS,
        n=1,
        max_new_tokens=3,
        temperature=0.0,
        end_id=2,
        seed=0,
        rows=3,
        progress=lambda *a: seen.append(a),
    )
    assert seen == [(3, 4), (4, 4)]
    assert found == [sample(model, [p], n=1, max_new_tokens=3, temperature=0.0, end_id=2, seed=0)[0] for p in PROMPTS]


def test_sampled_responses_can_be_scored():
    """Average log-probability of the samples is minus the average step entropy along them: one distribution."""
    model = tiny.model()
    prompts = [[2, 4, 9, 3, 2, 5]]
    drawn = sample(model, prompts, n=2000, max_new_tokens=4, end_id=3, seed=0, rows=2000)
    with torch.no_grad():
        scores = score(model, [Group(prompts[0], drawn[0])], entropy=True)
    gap = scores.logps + scores.step_entropy.sum(-1)
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / 2000**0.5


class Calls:
    """Shapes of the ids of every call of a model."""

    def __init__(self, model):
        self.shapes = []
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module, args, kwargs):
        self.shapes.append(tuple(kwargs["input_ids"].shape))


@pytest.mark.parametrize("family", ["llama", "gemma3", "mamba", "qwen3_next"])
def test_rows_bound_what_is_decoded_at_once(family):
    """Never more than `rows`, every prompt still encoded exactly once, and every response the one it would be alone."""
    model, prompts = build(family, torch.float32), [*PROMPTS[:3], [61, 62]]
    with torch.no_grad():
        expected = [one_at_a_time(model, prompt, 6) for prompt in prompts]
    way_of(model, [], 15)
    calls = Calls(model)
    for rows, prefills in ((3, [1, 1, 1, 1]), (10, [2, 2]), (64, [4])):
        calls.shapes.clear()
        found = sample(model, prompts, n=5, max_new_tokens=6, temperature=0.0, end_id=2, seed=0, rows=rows)
        assert found == [[own] * 5 for own in expected]
        # A call with more than one token a row encodes prompts, the others continue responses.
        assert [count for count, width in calls.shapes if width > 1] == prefills
        assert max(count for count, _ in calls.shapes) <= rows


def test_a_fork_in_parts_has_the_same_distribution():
    """Decoding 4,000 responses 700 at a time gives the frequencies of decoding them at once."""
    model = tiny.model(vocab_size=8, eos_token_id=7)
    settings = {"n": 4000, "max_new_tokens": 2, "end_id": 7, "seed": 0}
    whole, parts = (sample(model, [[1, 2]], rows=rows, **settings)[0] for rows in (4000, 700))
    assert len(parts) == 4000
    for response in {tuple(own) for own in whole}:
        p = whole.count(list(response)) / 4000
        assert abs(parts.count(list(response)) / 4000 - p) <= 5 * (2 * p * (1 - p) / 4000) ** 0.5


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.0, 1.0), (1.0, 0.5)])
def test_the_end_is_held_back(temperature, top_p):
    """Responses have at least min_new_tokens before their end, even of a model that wants to end at once."""
    model = tiny.model(vocab_size=8, eos_token_id=7, tie_word_embeddings=False)
    hidden = model.model(input_ids=torch.tensor([[1]])).last_hidden_state[0, -1]
    model.lm_head.weight.data[7] = hidden
    settings = {"max_new_tokens": 5, "temperature": temperature, "top_p": top_p, "end_id": 7, "seed": 0}
    assert [7] in sample(model, [[1]], n=50, **settings)[0]
    drawn = sample(model, [[1]], n=50, min_new_tokens=2, **settings)[0]
    assert all(len(own) > 2 and 7 not in own[:2] for own in drawn)
    assert all(7 not in own for own in sample(model, [[1]], n=50, min_new_tokens=5, **settings)[0])


def test_without_the_end_the_other_tokens_keep_their_proportion():
    """First tokens have the distribution of the model given that it does not end, within five binomial errors."""
    model, n = tiny.model(vocab_size=8, eos_token_id=7), 8000
    drawn = sample(model, [[1, 2]], n=n, max_new_tokens=1, min_new_tokens=1, end_id=7, seed=0, rows=n)[0]
    with torch.no_grad():
        exact = model(torch.tensor([[1, 2]])).logits[0, -1].softmax(-1)
    assert exact[7] > 0.02
    exact = exact[:7] / exact[:7].sum()
    found = torch.bincount(torch.tensor(drawn).flatten(), minlength=8)
    assert found[7] == 0
    assert ((found[:7] / n - exact).abs() <= 5 * (exact * (1 - exact) / n).sqrt()).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_scores_at_the_temperature_are_those_of_the_distribution_sampled_from(temperature):
    """Every response of up to three tokens, enumerated: its frequency is exp(score) within five binomial errors."""
    model, end, n = tiny.model(vocab_size=6, eos_token_id=5).double(), 5, 30_000
    words = range(5)
    cut = [list(own) for own in product(words, repeat=3)]
    responses = [[*own, end] for length in range(3) for own in product(words, repeat=length)] + cut
    with torch.no_grad():
        exact = score(model, [Group([1, 2, 3], responses)], temperature=temperature).logps.exp()
    assert abs(float(exact.sum()) - 1) < 1e-6
    settings = {"n": n, "max_new_tokens": 3, "temperature": temperature, "end_id": end, "seed": 5, "rows": n}
    place = {tuple(own): i for i, own in enumerate(responses)}
    drawn = torch.tensor([place[tuple(own)] for own in sample(model, [[1, 2, 3]], **settings)[0]])
    found = torch.bincount(drawn, minlength=len(responses)) / n
    assert ((found - exact).abs() <= 5 * (exact * (1 - exact) / n).sqrt() + 1 / n).all()
    # The test sees a wrong temperature: at another one, some frequency is far outside.
    with torch.no_grad():
        other = score(model, [Group([1, 2, 3], responses)], temperature=1.2 * temperature).logps.exp()
    assert ((found - other).abs() > 5 * (other * (1 - other) / n).sqrt() + 1 / n).any()


def test_logits_that_are_no_numbers_are_refused():
    """A model that diverged is not sampled from as if it preferred token 0."""
    model = tiny.model()
    model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(InputError, match="lower the learning rate"):
        sample(model, [[5]], max_new_tokens=1, temperature=0.0, end_id=3, seed=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [[1], []]}, r"prompts\[1\] is empty"),
        ({"n": 0}, "at least 1"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"rows": 0}, "rows 0"),
        ({"min_new_tokens": -1}, "min_new_tokens -1"),
        ({"min_new_tokens": 3}, "max_new_tokens is 2 and min_new_tokens 3"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p 0"),
    ],
)
def test_what_cannot_be_sampled_is_refused(change, message):
    """Each with what was found."""
    settings = {"prompts": [[1]], "n": 1, "max_new_tokens": 2, "end_id": 3, "seed": 0, **change}
    with pytest.raises(ValueError, match=message):
        sample(tiny.model(), settings.pop("prompts"), **settings)


def test_any_end_token_of_the_model_ends_a_response():
    """generation_config lists several for chat models; a response that another one ends is whole, too."""
    model = tiny.model()
    head = torch.nn.Linear(32, 40)
    torch.nn.init.zeros_(head.weight)
    head.bias.data = torch.zeros(40).index_fill(0, torch.tensor(5), 50.0)
    model.lm_head = head
    assert sample(model, [[7, 8]], max_new_tokens=6, end_id=tiny.END, seed=0) == [[[5] * 6]]
    model.generation_config.eos_token_id = [tiny.END, 5]
    assert end_ids(model, tiny.END) == (tiny.END, 5)
    assert sample(model, [[7, 8]], max_new_tokens=6, end_id=tiny.END, seed=0) == [[[5]]]
    cut = sample(model, [[7, 8]], max_new_tokens=6, min_new_tokens=2, end_id=tiny.END, seed=0)
    assert cut[0][0][-1] == 5
    assert not {tiny.END, 5} & set(cut[0][0][:2])
