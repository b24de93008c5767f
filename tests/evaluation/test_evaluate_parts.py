"""What an evaluation is made of, part by part: γ from the other half, torn folders, judgements, win rates."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch

from distalign.data import EncodedPair, EncodedPrompt
from distalign.engine import Group, score
from distalign.evaluation import answers
from distalign.evaluation.answers import Answers, load_answers
from distalign.evaluation.evaluate import _cross_fitted, judge_all, win_rates
from distalign.evaluation.setup import Evaluation, EvaluationSetup
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


def test_answers_come_with_their_own_scores(monkeypatch):
    """Prompts of several lengths in several batches, two answers each: every score is that of its response."""
    policy, reference = tiny.model(initializer_range=0.3).double(), tiny.model().double()
    prompts = [[5, 6, 9, 11], [7], [8, 4, 5], [9, 9], [12, 4, 6, 7, 8]]
    made = Evaluation(name="a", model="m", prompts="p", max_new_tokens=4, samples=2, rows=4, temperature=0.7)
    encoded = [EncodedPrompt(prompt) for prompt in prompts]
    setup = EvaluationSetup(made, {}, tiny.tokenizer(), encoded, [], 3, {}, reference, None)
    monkeypatch.setattr(EvaluationSetup, "policy", lambda self, name: policy)
    one = answers.draw_answers(setup, "a", "key", [])
    groups = [Group(prompt, own) for prompt, own in zip(prompts, one.responses, strict=True)]
    with torch.no_grad():
        expected = score(policy, groups, reference=reference, entropy=True, temperature=0.7)
    assert float(expected.step_kl.sum(-1).min()) > 1e-3
    for name, values in {"logps": expected.logps, "entropy": expected.step_entropy, "kl": expected.step_kl}.items():
        whole = values if name == "logps" else values.sum(-1)
        torch.testing.assert_close(one.scores[name], whole, rtol=0, atol=1e-9, msg=name)
    own = answers.draw_answers(replace(setup, base=policy), "a", "key", [])
    assert own.responses == one.responses
    assert own.scores["kl"].tolist() == [0.0] * 10


class Lookup:
    """A judge that knows a probability for every two responses, and keeps what it was asked."""

    def __init__(self, table):
        self.table, self.asked = table, []

    def __call__(self, comparisons, progress=None):
        """Looked up."""
        self.asked += comparisons
        return [Judgement(self.table[tuple(c.ids.first), tuple(c.ids.second)]) for c in comparisons]


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
    found = win_rates(wins, ["reference", "a"], lengths)
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
