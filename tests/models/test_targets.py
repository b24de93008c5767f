"""Known targets: the tilt is exactly what it says, and pairs are coins with the target's own preference."""

from __future__ import annotations

import pytest
import tiny
import torch

from distalign.engine import Group, score
from distalign.errors import InputError
from distalign.models.load import find_model
from distalign.models.targets import ModelTarget, TargetSettings, Tilt, make_pairs, make_target, with_logit_bias
from distalign.rollout.sample import sample

TILT = Tilt(("happy", "kind", "warm"), bonus=2.0, end_bonus=0.5)
IDS = torch.tensor([[2, 4, 9, 12, 3, 2, 5, 8, 7]])
PROMPTS = [[2, 4, 10, i, 3, 2, 5] for i in range(10, 30)]


def draw(model, n=64, gamma=0.5, seed=0, **more):
    """Pairs of the tilt on the tiny model."""
    settings = {"strengths": [0.0, 1.0], "temperature": 1.0, "max_new_tokens": 4, "token_budget": 4096, **more}
    return make_pairs(TILT, model, tiny.tokenizer(), PROMPTS, n=n, gamma=gamma, seed=seed, **settings)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 1.5])
def test_logits_are_the_bases_plus_the_bonus(tied, strength):
    """z* = z₀ + strength · bonus at every step; strength 0 is the base; the base stays as it was."""
    base = tiny.model(tie_word_embeddings=tied)
    with torch.no_grad():
        before = base(IDS).logits
        tilted = TILT.model(base, tiny.tokenizer(), strength)(IDS).logits
        after = base(IDS).logits
    bias = torch.zeros(before.shape[-1])
    bias[[7, 8, 9]], bias[tiny.END] = 2.0, 0.5
    torch.testing.assert_close(tilted, before + strength * bias, rtol=0, atol=1e-6)
    assert torch.equal(before, after)


def test_scores_are_those_of_the_tilted_softmax():
    """The engine's log-probabilities equal log_softmax(z₀ + bonus), and a target shares the memory of its base."""
    base = tiny.model()
    target = TILT.model(base, tiny.tokenizer())
    prompt, response = IDS[0, :7].tolist(), [8, 7, 20, 3]
    with torch.no_grad():
        found = score(target, [Group(prompt, [response])]).token_logps[0]
        logits = base(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        exact = (logits + TILT.bias(tiny.tokenizer(), 40)).log_softmax(-1).gather(1, torch.tensor(response)[:, None])
    torch.testing.assert_close(found, exact[:, 0], rtol=0, atol=1e-5)
    assert target.model.layers[0].mlp.up_proj.weight is base.model.layers[0].mlp.up_proj.weight


def test_a_bias_adds_to_the_one_that_the_head_has():
    """A tilt of a tilt has both bonuses."""
    base, bias = tiny.model(), torch.arange(40.0) / 10
    with torch.no_grad():
        twice = with_logit_bias(with_logit_bias(base, bias), bias)(IDS).logits
        torch.testing.assert_close(twice, base(IDS).logits + 2 * bias, rtol=0, atol=1e-5)


@pytest.mark.parametrize("word", ["umbrella", "tell me"])
def test_a_word_that_is_no_single_token_is_refused(word):
    """Neither an unknown word, which would tilt the token of all unknown words, nor two tokens."""
    with pytest.raises(InputError, match=f'target: "{word}" is no single token'):
        Tilt((word,)).bias(tiny.tokenizer(), 40)


def test_a_head_whose_logits_are_changed_afterwards_is_refused():
    """Where the model caps or scales its logits, a bias on the head is not a bonus on the logits."""
    capped = tiny.model("gemma2", final_logit_softcapping=3.0, query_pre_attn_scalar=8, head_dim=8)
    with pytest.raises(InputError, match="caps or scales"):
        TILT.model(capped, tiny.tokenizer())


def test_labels_are_coins_with_the_targets_preference():
    """Of 2,000 pairs, those with |logit| around l are labelled the likelier way σ(l) of the time, in every bin."""
    drawn = draw(tiny.model(), n=2000, gamma=0.6)
    agrees, sure = (drawn.logit > 0).double(), drawn.logit.abs().double().sigmoid()
    order = sure.argsort()
    for part in order.chunk(5):
        expected = float(sure[part].mean())
        error = float((sure[part] * (1 - sure[part])).sum()) ** 0.5 / len(part)
        assert abs(float(agrees[part].mean()) - expected) < 3.5 * error
    assert float(sure.quantile(0.9)) > 0.7


def test_numbers_belong_to_the_chosen_and_the_rejected_response():
    """logit = γ[ln π*(chosen) − ln π*(rejected)] and the reference's log-probabilities, found again pair by pair."""
    base = tiny.model()
    drawn = draw(base, gamma=0.5)
    groups = [Group(pair.prompt, [pair.chosen, pair.rejected]) for pair in drawn.pairs]
    with torch.no_grad():
        target = score(TILT.model(base, tiny.tokenizer()), groups).logps.view(-1, 2)
        reference = score(base, groups).logps.view(-1, 2)
    torch.testing.assert_close(drawn.logit, 0.5 * (target[:, 0] - target[:, 1]), rtol=0, atol=1e-5)
    torch.testing.assert_close(drawn.reference_logps, reference, rtol=0, atol=1e-5)
    assert all(pair.chosen != pair.rejected for pair in drawn.pairs)
    assert {tuple(pair.prompt) for pair in drawn.pairs} == {tuple(prompt) for prompt in PROMPTS}


def test_the_seed_decides_the_pairs():
    """The same seed draws the same pairs and labels, another seed others."""
    base = tiny.model()
    first, again, other = draw(base, seed=1), draw(base, seed=1), draw(base, seed=2)
    assert first.pairs == again.pairs
    assert torch.equal(first.logit, again.logit)
    assert [p.chosen for p in first.pairs] != [p.chosen for p in other.pairs]


def test_responses_come_from_every_strength():
    """With a strength of −50 and one of +50, responses without and with the words are both there."""
    drawn = draw(tiny.model(), strengths=[-50.0, 50.0])
    words = [any(token in (7, 8, 9) for token in r) for p in drawn.pairs for r in (p.chosen, p.rejected)]
    assert 0.3 < sum(words) / len(words) < 0.7


def test_ties_are_drawn_again_and_counted_or_refused():
    """At a temperature where two responses often come out the same; where they always do, it says what to change."""
    assert draw(tiny.model(), temperature=0.35, max_new_tokens=2).ties > 0
    with pytest.raises(InputError, match="raise the temperature"):
        draw(tiny.model(), temperature=1e-4, strengths=[0.0])


def test_a_pair_that_is_always_a_tie_is_dropped_and_counted(monkeypatch, caplog):
    """One prompt with a single answer: its pairs are left out, with a warning, and the others are as ever."""

    def one_answer(model, prompts, **settings):
        drawn = sample(model, prompts, **settings)
        return [[[9, tiny.END]] if prompt == PROMPTS[0] else own for prompt, own in zip(prompts, drawn, strict=True)]

    monkeypatch.setattr("distalign.models.targets.sample", one_answer)
    drawn = draw(tiny.model(), n=20)
    assert (len(drawn.pairs), drawn.dropped) == (19, 1)
    assert len(drawn.logit) == len(drawn.reference_logps) == 19
    assert PROMPTS[0] not in [pair.prompt for pair in drawn.pairs]
    assert "target: 1 of 20 pairs had the same response twice, 20 times: they are dropped" in caplog.text
    monkeypatch.setattr(f"{__name__}.PROMPTS", PROMPTS[:1])
    with pytest.raises(InputError, match="target: 3 of 3 pairs had the same response twice, 20 times; raise the temp"):
        draw(tiny.model(), n=3)


def test_information_is_the_fisher_information_of_the_strength():
    """E[σ(1 − σ)(dl/ds)²] with dl/ds = l(s=1) − l(s=0), the difference that the definition takes, found by scoring."""
    base, gamma = tiny.model(), 0.5
    drawn = draw(base, gamma=gamma)
    groups = [Group(pair.prompt, [pair.chosen, pair.rejected]) for pair in drawn.pairs]
    with torch.no_grad():
        ends = [
            score(TILT.model(base, tiny.tokenizer(), s), groups).logps.view(-1, 2)
            @ torch.tensor([gamma, -gamma]).double()
            for s in (0.0, 1.0)
        ]
    chance = ends[1].sigmoid()
    exact = (chance * (1 - chance) * (ends[1] - ends[0]) ** 2).mean()
    assert drawn.information(gamma) == pytest.approx(float(exact), rel=1e-4)


def test_progress_counts_responses_and_pairs_up_to_the_end():
    """Never backwards, never beyond the total, and the last call says that all is done."""
    seen = []
    draw(tiny.model(), n=30, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert {total for _, total in seen} == {90}
    assert seen[-1] == (90, 90)


# A model, or a class of the user's ------------------------------------------------------------------------------------


def made(folder, **settings):
    """The target of these settings, for the model in a folder."""
    source = find_model(str(folder))
    return make_target(TargetSettings(**settings), source, source.tokenizer())


def test_a_fine_tuned_model_is_a_target(tmp_path, tiny_folder):
    """Strength 1 is the model, 0 the base; there is nothing between."""
    tuned = tiny.save(tmp_path / "tuned", initializer_range=0.3)
    target = made(tiny_folder, model=str(tuned))
    assert isinstance(target, ModelTarget)
    base = tiny.model()
    with torch.no_grad():
        expected = tiny.model(initializer_range=0.3)(IDS).logits
        torch.testing.assert_close(target.model(base, tiny.tokenizer())(IDS).logits, expected)
    assert target.model(base, tiny.tokenizer()) is target.model(base, tiny.tokenizer())
    assert target.model(base, tiny.tokenizer(), 0.0) is base
    with pytest.raises(InputError, match=r"strength is 0.5; a model as target has the strengths 0 .* write a class"):
        target.model(base, tiny.tokenizer(), 0.5)


def test_a_model_of_other_tokens_is_no_target(tmp_path, tiny_folder):
    """It could not be compared token by token."""
    other = tiny.save(tmp_path / "other", vocab_size=48)
    with pytest.raises(InputError, match=r"its tokens are not those of .* \(48 and 40\); a target is compared token"):
        made(tiny_folder, model=str(other))


MY_TARGET = """
class Colder:
    def __init__(self, factor=2.0):
        if factor <= 0:
            raise ValueError(f"factor is {factor}; give one above 0")
        self.factor = factor

    def model(self, base, tokenizer, strength=1.0):
        import copy
        model = copy.deepcopy(base)
        model.lm_head.weight.data *= 1 + strength * (self.factor - 1)
        return model


class Nothing:
    pass
"""


def test_a_class_of_the_users_is_a_target(tmp_path, tiny_folder):
    """By its file, with its settings; what is none says what a target has."""
    (tmp_path / "my_target.py").write_text(MY_TARGET)
    place = f"{tmp_path}/my_target.py"
    target = made(tiny_folder, **{"class": f"{place}:Colder", "settings": {"factor": 3.0}})
    base = tiny.model()
    with torch.no_grad():
        torch.testing.assert_close(target.model(base, tiny.tokenizer())(IDS).logits, 3 * base(IDS).logits)
    for name, settings, message in (
        ("Colder", {"factor": 0}, "factor is 0; give one above 0; change target.settings"),
        ("Colder", {"speed": 0}, "unexpected keyword argument 'speed'; change target.settings"),
        ("Nothing", {}, r"it has no method model\(base, tokenizer, strength\)"),
        ("Coldr", {}, 'has no Class "Coldr"; did you mean "Colder"'),
    ):
        with pytest.raises(InputError, match=message):
            made(tiny_folder, **{"class": f"{place}:{name}", "settings": settings})


@pytest.mark.parametrize(
    ("parameters", "body", "message"),
    [
        ("base, tokenizer, strength", "1 / 0", "raised ZeroDivisionError: division by zero; fix it"),
        ("base, tokenizer", "", r"raised TypeError: Mine.model\(\) takes 3 positional arguments but 4 were given; fix"),
        ("base, tokenizer, strength", "return None", "returned a NoneType; return a PreTrainedModel"),
        ("base, tokenizer, strength", "return base.config", "returned a LlamaConfig; return a PreTrainedModel"),
        ("base, tokenizer, strength", "return tiny.model(vocab_size=48)", "of 48 tokens, and the base has 40"),
        ("base, tokenizer, strength", "raise InputError('by word')", "^by word$"),
    ],
)
def test_what_a_class_of_the_users_gives_is_checked(tmp_path, tiny_folder, parameters, body, message):
    """Its model raises, is no model or has other tokens: one message that names the class."""
    start = "import tiny\nfrom distalign import InputError\n"
    code = f"{start}class Mine:\n    def model(self, {parameters}):\n        {body or 'return base'}\n"
    (tmp_path / "my_target.py").write_text(code)
    target = made(tiny_folder, **{"class": f"{tmp_path}/my_target.py:Mine"})
    with pytest.raises(InputError, match=message) as refused:
        target.model(tiny.model(), tiny.tokenizer(), 0.5)
    assert "by word" in message or "my_target.py:Mine: " in str(refused.value)
