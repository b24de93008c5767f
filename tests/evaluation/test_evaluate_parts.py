"""What an evaluation is made of, part by part: γ from the other half, torn folders, judgements, standings."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from dataclasses import replace

import pytest
import tiny
import torch
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutputWithPast

from distalign.data import EncodedPair, EncodedPrompt
from distalign.engine import Group, score
from distalign.evaluation import answers
from distalign.evaluation.answers import Answers, load_answers
from distalign.evaluation.evaluate import _cross_fitted
from distalign.evaluation.settings import Evaluation
from distalign.evaluation.win_rates import judge_all, standings
from distalign.judges import Judgement
from distalign.stats.calibration import calibrate


def test_the_gamma_of_a_pair_is_fitted_on_the_half_without_its_prompt():
    """A label that is changed moves γ where its prompt is not, and there γ is that of the half with the prompt."""
    torch.manual_seed(0)
    pairs = [EncodedPair([4, i // 2], [5], [6], 0.6 + 0.02 * i, f"pair {i}") for i in range(16)]
    own = Answers("a", "key", [], torch.randn(16, 2).double() + torch.tensor([1.0, 0.0]), {})
    gammas, labels = _cross_fitted(own, pairs)[:, 0], torch.tensor([one.probability for one in pairs])
    assert len(gammas.unique()) == 2
    for pair in pairs:
        changed = [replace(one, probability=0.99) if one is pair else one for one in pairs]
        moved = _cross_fitted(own, changed)[:, 0] != gammas
        assert bool(moved.any())
        assert not any(moved[other] for other, one in enumerate(pairs) if one.prompt == pair.prompt)
        fitted = calibrate(own.pair_logps[~moved], labels[~moved]).gamma.mean
        assert gammas[moved].unique().item() == pytest.approx(fitted)


def test_a_folder_that_was_being_written_again_is_not_believed(tmp_path, monkeypatch):
    """Stopped between two files of the same key: new scores beside old responses are nobody's answers."""
    one = Answers("a", "key", [[[4, 3]]], torch.zeros(0, 2).double(), {"kl": torch.zeros(1).double()})
    one.save(tmp_path)
    assert load_answers(tmp_path, "a", "key") is not None
    assert load_answers(tmp_path, "a", "another key") is None

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("distalign.evaluation.answers.json.dumps", stop)
    with pytest.raises(KeyboardInterrupt):
        replace(one, responses=[[[5, 3]]], scores={"kl": torch.ones(1).double()}).save(tmp_path)
    assert load_answers(tmp_path, "a", "key") is None


@pytest.mark.parametrize(("dtype", "keep"), [("float32", 2**30), ("bfloat16", 0)])
def test_rounded_logits_are_not_kept(dtype, keep, monkeypatch):
    """In half precision the head's logits are coarser than products of its states, which are taken in float32."""
    asked, real = [], answers.sample_in_batches

    def noted(*given, **settings):
        asked.append(settings["keep"])
        return real(*given, **settings)

    monkeypatch.setattr(answers, "sample_in_batches", noted)
    policy, reference = (tiny.model().to(getattr(torch, dtype)) for _ in range(2))
    made = Evaluation(name="a", model="m", prompts="p", max_new_tokens=4)
    answers.draw_answers("a", "key", policy, made, [[5, 6], [7]], [], end_id=3, reference=reference)
    assert asked == [keep]


def multiply_the_head(model):
    """Let the model multiply its head's weight itself, so that nobody who watches the head sees its states."""

    @functools.wraps(model.forward)
    def forward(input_ids, logits_to_keep=0, **settings):
        out = model.model(input_ids=input_ids, **settings)
        logits = F.linear(out.last_hidden_state[:, -logits_to_keep:], model.lm_head.weight)
        return CausalLMOutputWithPast(logits=logits, past_key_values=out.past_key_values)

    model.forward = forward


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("head", ["plain", "not scaled", "not called"])
def test_answers_come_with_their_own_scores(head, threads, monkeypatch):
    """Prompts of several lengths in several batches, two answers each: every score is that of its response.

    Also where the configuration names a scaling of logits that the model does not apply, with none of them kept, and
    where the model multiplies its head's weight by itself. With several threads batches are scored beside the drawing.
    """
    monkeypatch.setattr(answers, "_LOGITS", 0)
    asked, real = [], answers.sample_in_batches
    monkeypatch.setattr(
        answers, "sample_in_batches", lambda *a, **settings: asked.append(settings) or real(*a, **settings)
    )
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    policy, reference = tiny.model(initializer_range=0.3).double(), tiny.model().double()
    if head == "not scaled":
        policy.config.logits_scaling = 4.0
    if head == "not called":
        multiply_the_head(policy)
    prompts = [[5, 6, 9, 11], [7], [8, 4, 5], [9, 9], [12, 4, 6, 7, 8]]
    made = Evaluation(name="a", model="m", prompts="p", max_new_tokens=4, samples=2, rows=4, temperature=0.7)
    one = answers.draw_answers("a", "key", policy, made, prompts, [], end_id=3, reference=reference)
    groups = [Group(prompt, own) for prompt, own in zip(prompts, one.responses, strict=True)]
    with torch.no_grad():
        expected = score(policy, groups, reference=reference, entropy=True, temperature=0.7)
    assert float(expected.step_kl.sum(-1).min()) > 1e-3
    for name, values in {"logps": expected.logps, "entropy": expected.step_entropy, "kl": expected.step_kl}.items():
        whole = values if name == "logps" else values.sum(-1)
        torch.testing.assert_close(one.scores[name], whole, rtol=0, atol=1e-9, msg=name)
    assert [settings["behind"] for settings in asked] == [threads == 2]


@pytest.mark.parametrize("case", ["apart", "one configuration", "autocast", "inference mode"])
def test_what_cannot_run_in_two_threads_does_not(case, monkeypatch):
    """Attention is set in a configuration, and autocast and inference mode are a thread's own."""
    asked, real = [], answers.sample_in_batches
    monkeypatch.setattr(
        answers, "sample_in_batches", lambda *given, **settings: asked.append(settings) or real(*given, **settings)
    )
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    policy, reference = tiny.model(), tiny.model()
    if case == "one configuration":
        reference = type(policy)(policy.config).eval()
    made = Evaluation(name="a", model="m", prompts="p", max_new_tokens=4, rows=1)
    modes = {"autocast": torch.autocast("cpu", torch.bfloat16), "inference mode": torch.inference_mode()}
    with modes.get(case, nullcontext()):
        answers.draw_answers("a", "key", policy, made, [[5, 6], [7], [8]], [], end_id=3, reference=reference)
    assert [settings["behind"] for settings in asked] == [case == "apart"]


class Lookup:
    """A judge that knows a probability for every two responses, and keeps what it was asked."""

    def __init__(self, table):
        self.table, self.asked = table, []

    def __call__(self, comparisons, progress=None):
        """Looked up."""
        self.asked += comparisons
        return [Judgement(self.table[tuple(c.ids.first), tuple(c.ids.second)]) for c in comparisons]

    def counters(self):
        """None."""
        return {}


def test_judgements_go_to_their_prompt_and_pair():
    """Three prompts, two samples, two pairs of opponents: the mean over the samples, the first's response first."""
    texts = ["one", "two", "three"]
    prompts = [EncodedPrompt([2, 10 + i], f"line {i}", None) for i in range(3)]
    given = {
        name: [[[start + 2 * prompt + sample, tiny.END] for sample in range(2)] for prompt in range(3)]
        for name, start in (("a", 7), ("b", 13), ("c", 19))
    }
    opponents = [("a", "b"), ("c", "a")]
    table, wanted = {}, {}
    for number, (first, second) in enumerate(opponents):
        for prompt in range(3):
            own = [0.05 * (1 + 6 * number + 2 * prompt + sample) for sample in range(2)]
            wanted[first, second, prompt] = sum(own) / 2
            for sample in range(2):
                table[tuple(given[first][prompt][sample]), tuple(given[second][prompt][sample])] = own[sample]
    judge = Lookup(table)
    found = judge_all(judge, prompts, texts, given, tiny.tokenizer(), opponents)
    assert list(found) == opponents
    for (first, second, prompt), value in wanted.items():
        assert float(found[first, second][prompt]) == pytest.approx(value)
    words = tiny.SPECIAL + tiny.WORDS
    for one in judge.asked:
        assert (one.first, one.second) == (words[one.ids.first[0]], words[one.ids.second[0]])
        assert texts.index(one.prompt) == one.ids.prompt[1] - 10
    assert judge.asked[0].key == "a against b, prompt 1, sample 1"


@pytest.mark.parametrize("turned", [False, True])
def test_what_length_gains_is_taken_out_with_its_sign(turned):
    """A judge that likes length by 0.9, and the policy else by 0.3: both are found, whoever comes first."""
    torch.manual_seed(0)
    lengths = {"reference": torch.full((40,), 10.0).double(), "a": 12 + 4 * torch.randn(40).double()}
    gap = lengths["a"] - lengths["reference"]
    won = (0.3 + 0.9 * torch.tanh(gap / gap.std())).sigmoid()
    wins = {("a", "reference"): won} if turned else {("reference", "a"): 1 - won}
    found = standings(wins, ["reference", "a"], lengths)
    assert found["length_controlled"]["a"]["length_effect"]["mean"] == pytest.approx(0.9, abs=1e-6)
    assert found["length_controlled"]["a"]["mean"] == pytest.approx(
        float(torch.tensor(0.3).double().sigmoid()), abs=1e-6
    )
    assert found["win_rates"]["matrix"]["a"]["reference"]["mean"] == pytest.approx(float(won.mean()))
    rate = float(won.mean())
    rating = found["ratings"]["a"]
    assert rating["mean"] == pytest.approx(float(torch.tensor(rate).logit()), abs=1e-5)
    assert rating["low"] < rating["mean"] < rating["high"]
    assert found["ratings"]["reference"] == {"mean": 0, "low": 0, "high": 0}
