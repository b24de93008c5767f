"""Reward models trained on pairs: the start, the loss, what stops them, and what they learn."""

from __future__ import annotations

from dataclasses import replace
from statistics import correlation

import pytest
import tiny
import torch
from engine_models import build

from distalign.data import EncodedPair
from distalign.engine import Group, score
from distalign.engine.scoring import read
from distalign.methods.preference import bradley_terry_nll
from distalign.models.load import Source
from distalign.models.targets import with_logit_bias
from distalign.rewards import Request, RewardError, RewardTraining, TrainedReward, train_reward
from distalign.rewards.fit import Fit, measure
from distalign.rewards.heads import Hidden, LastToken, new_head

GROUPS = [Group([2, 4, 9], [[7, 8, 3], [9]]), Group([5], [[1, 2, 3, 4]])]
SOURCE = Source("tiny", "tiny", "made for the tests")
TRAIN, HELD = tiny.encoded_pairs(60), tiny.encoded_pairs(40, seed=1)


def base(**settings):
    """The frozen language model."""
    return tiny.model(**settings).requires_grad_(False)


def train(settings=None, pairs=TRAIN, held=HELD, *, model=None, gamma=0.3, seed=0, **more):
    """A reward trained on tiny pairs."""
    settings = RewardTraining(**(settings or {}))
    where = {"gamma": gamma, "token_budget": 256, "seed": seed, **more}
    return train_reward(settings, model or base(), tiny.tokenizer(), SOURCE, pairs, held, **where)


def requests(pairs) -> list[Request]:
    """Both responses of every pair."""
    return [Request(pair.prompt, [pair.chosen, pair.rejected]) for pair in pairs]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "falcon", "mistral_window"])
def test_reading_equals_the_models_own_pass(family):
    """Hidden states after every token and ln π, by the shared and the padded path, as the model gives them alone."""
    model = build(family)
    with torch.no_grad():
        found = read(model, GROUPS, logps=True)
        expected = []
        for group in GROUPS:
            for response in group.responses:
                ids = torch.tensor([group.prompt + response])
                states = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
                expected.append(states[0, len(group.prompt) :])
        torch.testing.assert_close(found.hidden, torch.cat(expected), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.logps, score(model, GROUPS).logps, rtol=1e-5, atol=1e-4)
    assert found.ids.tolist() == [7, 8, 3, 9, 1, 2, 3, 4]
    assert found.owner.tolist() == [0, 0, 0, 1, 2, 2, 2, 2]
    torch.testing.assert_close(found.last, torch.stack([states[-1] for states in expected]), rtol=1e-4, atol=1e-4)
    means = torch.stack([states.mean(0) for states in expected])
    torch.testing.assert_close(found.mean(found.hidden), means, rtol=1e-4, atol=1e-4)


def test_reading_a_model_on_the_plain_path():
    """Where the engine uses the model's own logits, hidden states come from the model too."""
    model = base()
    model.lm_head.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        found, expected = read(model, GROUPS, logps=True), read(base(), GROUPS, logps=True)
    torch.testing.assert_close(found.hidden, expected.hidden, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.logps, expected.logps, rtol=1e-4, atol=1e-4)


def test_a_policy_initialised_reward_starts_at_the_policys_own():
    """Before training it is γ ln π₀, exactly, with every kind of trunk."""
    model = base()
    expected = 0.3 * score(model, [r.group for r in requests(HELD)]).logps
    for trunk in (model, base()):
        reward = TrainedReward(model, trunk, Hidden(64), gamma=0.3, token_budget=100)
        torch.testing.assert_close(reward(requests(HELD)).double(), expected, rtol=1e-6, atol=1e-5)


def fit(pairs, *, budget=10_000, name="hidden"):
    """The problem of training head and trunk, with weights that are not zero."""
    model, trunk = base(), tiny.model()
    reward = TrainedReward(
        model, trunk, new_head(name, model), gamma=None if name == "last" else 0.3, token_budget=budget
    )
    groups = [Group(pair.prompt, [pair.chosen, pair.rejected]) for pair in pairs]
    offset, features = reward.encode(groups)
    reward.head.standardise(features.view(len(pairs), 2, -1))
    labels = torch.tensor([pair.label for pair in pairs]).double()
    torch.manual_seed(1)
    reward.head.weight.data.normal_()
    return Fit(reward, groups, offset.view(-1, 2), labels, len(pairs), RewardTraining(), precision=1.0)


def test_the_loss_is_equation_9_with_soft_labels():
    """Value and gradient of the whole against bradley_terry_nll of scores computed response by response."""
    pairs = tiny.encoded_pairs(8, soft=True)
    problem = fit(pairs)
    head, model = problem.reward.head, base()
    problem.loss(range(8), 8).backward()
    found, rewards = head.weight.grad.clone(), []
    head.zero_grad()
    for pair in pairs:
        for response in (pair.chosen, pair.rejected):
            reading = read(model, [Group(pair.prompt, [response])], logps=True)
            tokens = torch.cat([reading.hidden, model.get_input_embeddings().weight[response]], -1)
            value = ((tokens.sum(0) / len(response) ** 0.5 - head.shift) / head.scale) @ head.weight
            rewards.append(0.3 * reading.logps[0] + value)
    expected = bradley_terry_nll(torch.stack(rewards).view(8, 2), torch.tensor([p.probability for p in pairs])).mean()
    expected.backward()
    torch.testing.assert_close(problem.loss(range(8), 8), expected.detach(), check_dtype=False, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, head.weight.grad, rtol=1e-4, atol=1e-5)
    assert float(found.norm()) > 1e-3


def test_a_standardised_pair_differs_by_one():
    """Mean squared length of feature differences is 1, and a constant feature says nothing."""
    features = torch.randn(50, 2, 6) * torch.tensor([1.0, 100.0, 1e-3, 5.0, 1.0, 0.0]) + 3
    head = LastToken(6)
    head.standardise(features)
    scaled = (features - head.shift) / head.scale
    assert float((scaled[:, 0] - scaled[:, 1]).square().sum(-1).mean()) == pytest.approx(1.0, rel=1e-4)
    assert float(scaled[..., 5].abs().max()) == 0


@pytest.mark.parametrize("name", ["hidden", "last"])
def test_a_trained_backbone_gives_the_same_in_any_parts(name):
    """Rewards as without gradient, and the same gradients of trunk and head whether a batch fits in one pass or not."""
    whole, parted = fit(TRAIN[:9], name=name), fit(TRAIN[:9], budget=40, name=name)
    torch.testing.assert_close(
        whole.rewards(range(9)).view(-1), whole.reward.values(whole.groups), rtol=1e-4, atol=1e-4
    )
    assert len(whole.parts(range(9))) == 1
    assert len(parted.parts(range(9))) > 3
    gradients = []
    for problem in (whole, parted):
        for part in problem.parts(range(9)):
            problem.loss(part, 9).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in problem.parameters().values() if p.grad is not None]))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)
    assert float(gradients[0].norm()) > 1e-3


@pytest.mark.parametrize("name", ["hidden", "counts", "tilt", "last"])
def test_a_head_is_linear_as_it_says(name):
    """`linearise` gives the values, and their derivative in the weights as by finite differences."""
    model = base()
    reward = TrainedReward(model, model, new_head(name, model), gamma=None if name == "last" else 0.3, token_budget=99)
    groups = [Group(pair.prompt, [pair.chosen, pair.rejected]) for pair in TRAIN[:6]]
    offset, features = reward.encode(groups)
    head = reward.head
    head.standardise(features.view(6, 2, -1))
    torch.manual_seed(0)
    head.weight.data.normal_()
    values, rows = reward.linearise(groups, offset, features)
    torch.testing.assert_close(values, reward.values(groups), rtol=1e-5, atol=1e-4)
    step, move = 1e-2, torch.randn_like(head.weight)
    head.weight.data += step * move
    up = reward.values(groups)
    head.weight.data -= 2 * step * move
    slope = (up - reward.values(groups)) / (2 * step)
    torch.testing.assert_close(slope, (rows @ move).double(), rtol=1e-2, atol=1e-3)
    assert float(slope.std()) > 0.01


def test_a_tilt_is_a_language_model():
    """Over all responses of one or two words exp(R/γ) sums to 1, and at weights of zero it is π₀."""
    model = base(vocab_size=8, eos_token_id=7, pad_token_id=0)
    reward = TrainedReward(model, model, new_head("tilt", model), gamma=0.5, token_budget=999)
    everything = [[7], *([a, 7] for a in range(7)), *([a, b] for a in range(7) for b in range(7))]
    group = Group([1, 2, 6], everything)
    expected = score(model, [group]).logps
    torch.testing.assert_close(reward.values([group]) / 0.5, expected.double(), rtol=1e-5, atol=1e-5)
    reward.head.weight.data.copy_(torch.randn(8, generator=torch.Generator().manual_seed(0)))
    logps = reward.values([group]) / 0.5
    assert float(logps.exp().sum()) == pytest.approx(1.0, abs=1e-5)
    assert float((logps - expected).abs().max()) > 0.1


def test_the_evidence_chooses_the_head():
    """Labels of a tilted model: tilt; labels by a direction of the hidden states, certain ones: hidden."""
    model = base()
    groups = [Group(pair.prompt, [pair.chosen, pair.rejected]) for pair in tiny.encoded_pairs(300)]
    bias = 3 * torch.randn(model.config.vocab_size, generator=torch.Generator().manual_seed(3))
    direction = TrainedReward(model, model, new_head("hidden", model), gamma=0.3, token_budget=999)
    offset, features = direction.encode(groups)
    direction.head.standardise(features.view(300, 2, -1))
    direction.head.weight.data.copy_(8 * torch.randn(64, generator=torch.Generator().manual_seed(4)))
    truths = {
        "tilt": 0.3 * score(with_logit_bias(model, bias), groups).logps.double(),
        "hidden": offset + direction.head(features).detach().double(),
    }
    for name, rewards in truths.items():
        gap = rewards.view(-1, 2)
        pairs = [
            EncodedPair(group.prompt, *group.responses, float(p), f"pair {i}")
            for i, (group, p) in enumerate(zip(groups, (gap[:, 0] - gap[:, 1]).sigmoid(), strict=True))
        ]
        trained = train(pairs=pairs[:260], held=pairs[260:], model=model)
        assert trained.head == name, trained.history


def test_what_is_constant_for_a_prompt_changes_nothing():
    """The loss with a constant added to both rewards of every pair is the loss without."""
    problem = fit(TRAIN[:9])
    before = problem.loss(range(9), 9)
    problem.offset += torch.randn(9, 1)
    torch.testing.assert_close(problem.loss(range(9), 9), before)


@pytest.mark.parametrize("init", ["policy", "scratch"])
def test_it_learns_what_the_pairs_prefer(init):
    """Held-out accuracy beats chance, and the loss the start, by their 95 % intervals; the base is as it was."""
    model = base()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = train({"init": init}, pairs=tiny.encoded_pairs(200), model=model)
    found = trained.results
    assert found["accuracy"].mean - 1.96 * found["accuracy"].se > 0.5
    assert found["nll"].mean + 1.96 * found["nll"].se < found["start_nll"].mean
    assert {estimate.n for estimate in found.values()} == {40}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    if init == "policy":
        again = train({"init": init}, pairs=tiny.encoded_pairs(200), model=model)
        assert torch.equal(again.reward.head.weight, trained.reward.head.weight)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["lora", "full"])
@pytest.mark.parametrize("init", ["policy", "scratch"])
def test_trained_backbones_learn_more_than_nothing(init, backbone):
    """LoRA and full training improve on the frozen head, repeat with the seed, and leave the global random state."""
    settings = {"init": init, "backbone": backbone, "learning_rate": 1e-2, "epochs": 2}
    model = base()
    state = torch.get_rng_state()
    trained = train(settings, model=model)
    head = next(row["held_nll"] for row in trained.history if row.get("epoch") == 0)
    assert trained.results["nll"].mean < head - 0.01
    assert torch.equal(torch.get_rng_state(), state)
    again = train(settings) if (init, backbone) == ("policy", "lora") else trained
    assert torch.equal(again.reward(requests(HELD)), trained.reward(requests(HELD)))
    changed = any(
        float(p.detach().abs().sum()) > 0 for n, p in trained.reward.trained_parameters().items() if "lora_B" in n
    )
    assert changed or backbone == "full"


def test_it_recovers_the_order_of_a_known_target():
    """Every response of one or two tokens over 6 words: the learned reward orders them nearly as γ ln π* does."""
    model, gamma = base(vocab_size=8, eos_token_id=7, pad_token_id=0), 0.5
    bias = torch.tensor([0.0, 3.0, 0.0, -3.0, 0.0, 2.0, 0.0, 0.0])
    target = with_logit_bias(model, bias)
    responses = [[*own, 7] for own in [[a] for a in range(6)] + [[a, b] for a in range(6) for b in range(6)]]
    group = Group([1, 2, 6], responses)
    with torch.no_grad():
        truth, start = (gamma * score(m, [group]).logps for m in (target, model))
    random = torch.Generator().manual_seed(0)
    pairs = []
    for index in range(500):
        a, b = torch.randperm(len(responses), generator=random)[:2].tolist()
        p = float((truth[a] - truth[b]).sigmoid())
        pairs.append(EncodedPair(group.prompt, responses[a], responses[b], p, f"pair {index}"))
    trained = train({"weight_decay": 0.01}, pairs=pairs[:400], held=pairs[400:], model=model, gamma=gamma)
    found = trained.reward([Request(group.prompt, responses)]).double()
    assert correlation(found.tolist(), truth.tolist()) > 0.98
    assert correlation(start.tolist(), truth.tolist()) < 0.9


def test_the_start_is_kept_if_nothing_is_better():
    """Held-out pairs that prefer the opposite: after `patience` epochs it stops, and the trunk is as it was."""
    turned = [replace(pair, probability=0.0) for pair in HELD]
    trained = train({"backbone": "full", "patience": 2, "learning_rate": 1e-2}, held=turned)
    epochs = [row["epoch"] for row in trained.history if "epoch" in row]
    assert epochs == [0, 1, 2]
    assert all(torch.equal(p, q) for p, q in zip(trained.reward.trunk.parameters(), base().parameters(), strict=True))


def test_counts_of_too_many_pairs_are_refused_and_not_tried(monkeypatch):
    """Features of tokens are held in memory: beyond a limit `auto` takes the hidden states, and others are an error."""
    monkeypatch.setattr("distalign.rewards.fit._LARGEST", 100)
    assert train(pairs=TRAIN[:20]).head == "hidden"
    with pytest.raises(
        RewardError, match="head is tilt, whose features are 40 responses by 40 tokens; take head: hidden"
    ):
        train({"head": "tilt"}, pairs=TRAIN[:20])


def test_soft_labels_count_in_the_results():
    """A pair labelled with probability 0 is a pair turned round; one half says nothing in the accuracy."""
    rewards = torch.tensor([[2.0, 0.5], [0.0, 1.0], [3.0, 3.0], [1.0, 0.0]]).double()
    probability = torch.tensor([1.0, 0.2, 0.9, 0.5]).double()
    alone = [[i] for i in range(4)]
    found = measure(rewards, probability, alone)
    turned = measure(rewards.flip(1), 1 - probability, alone)
    for key in found:
        assert found[key] == pytest.approx(turned[key])
    assert found["accuracy"].mean == pytest.approx((1 + 0.8 + 0.5 + 0.5) / 4)
    assert found["nll"].mean == pytest.approx(float(bradley_terry_nll(rewards, probability).mean()))


def test_labels_of_one_half_teach_nothing():
    """The scratch reward stays near zero where certain labels move it far."""
    half = [replace(pair, probability=0.5) for pair in TRAIN]
    sure, unsure = train({"init": "scratch"}), train({"init": "scratch"}, pairs=half, held=half)
    assert float(unsure.reward(requests(HELD)).std()) < 0.05 * float(sure.reward(requests(HELD)).std())


def test_calibration_is_zero_for_the_truth():
    """Sure to degree p and right with frequency p: no error. Always sure and right half the time: one half."""
    logit = torch.linspace(-3, 3, 200).double()
    rewards = torch.stack([logit, torch.zeros(200).double()], -1)
    alone = [[i] for i in range(200)]
    assert measure(rewards, logit.sigmoid(), alone)["ece"].mean < 1e-9
    wrong = measure(rewards * 1000, torch.full((200,), 0.5).double(), alone)["ece"]
    assert wrong.mean == pytest.approx(0.5, abs=0.01)
    assert wrong.n == 200


def test_pairs_of_one_prompt_say_no_more_than_one():
    """Each pair four times: the same numbers, and the same errors."""
    rewards, probability = torch.randn(50, 2).double(), torch.rand(50).double()
    once = measure(rewards, probability, [[i] for i in range(50)])
    often = measure(rewards.repeat(4, 1), probability.repeat(4), [[i, 50 + i, 100 + i, 150 + i] for i in range(50)])
    for key in once:
        assert often[key] == pytest.approx(once[key])


def test_a_correction_levels_off_beyond_what_it_was_trained_on():
    """Linear within the training values, at most twice the largest of them anywhere, and monotone."""
    head = Hidden(2)
    head.weight.data.copy_(torch.tensor([1.0, 0.0]))
    head.finish(torch.tensor([[[1.0, 0.0], [-2.0, 0.0]]]))
    with torch.no_grad():
        inside, outside = (head(torch.tensor([[v, 0.0] for v in values])) for values in ((-2, 0.5, 2), (3, 30, -1e6)))
    assert inside.tolist() == [-2.0, 0.5, 2.0]
    assert outside[0] < outside[1] <= 4.0
    assert 2.9 < outside[0] < 3.0
    assert outside[2] == -4.0


def test_a_longer_response_of_the_same_words_gains_at_most_its_bound():
    """Repeating what it likes best does not pay without end."""
    trained = train({"head": "hidden"}, pairs=tiny.encoded_pairs(200))
    limit = 2 * float(trained.reward.head.bound)
    longest = [[8] * 40 + [tiny.END]]
    offset, features = trained.reward.encode([Group([2, 4, 5], longest)])
    with torch.no_grad():
        assert abs(float(trained.reward.head(features))) <= limit
    expected = offset + trained.reward.head(features).detach().double()
    torch.testing.assert_close(trained.reward([Request([2, 4, 5], longest)]).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"held": HELD[:1]}, "60 training and 1 held-out pairs"),
        ({"pairs": []}, "0 training"),
        ({"gamma": None}, "needs gamma"),
    ],
)
def test_what_cannot_be_trained_is_refused(change, message):
    """With what to do."""
    with pytest.raises(RewardError, match=message):
        train(**change)


def test_a_loss_that_is_no_number_stops_the_training(monkeypatch):
    """At the start the model is to blame, later the learning rate."""
    model = base()
    model.lm_head.weight.data[8] = float("nan")
    with pytest.raises(RewardError, match="the model itself gives no finite"):
        train(model=model)
    epoch = Fit._epoch

    def diverge(self, *args):
        self.reward.head.weight.data.fill_(float("nan"))
        return epoch(self, *args)

    monkeypatch.setattr(Fit, "_epoch", diverge)
    with pytest.raises(RewardError, match=r"nan after 1 epochs; lower reward\.train\.learning_rate"):
        train({"backbone": "full"})


def test_the_settings_gamma_comes_before_the_targets():
    """γ of the recipe's reward section is what ln π₀ is weighted with."""
    assert train({"gamma": 0.7}).reward.gamma == 0.7
    assert train().reward.gamma == 0.3
    assert train({"init": "scratch"}).reward.gamma is None
