"""γ and β that the pairs choose, against direct computation."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import tiny
import torch

from distalign.engine import Group, score_in_batches
from distalign.experiments.auto import Evidence, choose_beta, choose_gamma, count_evidence, noise_beta
from distalign.methods import METHODS, PD, PMLE, RKL
from distalign.rewards.fit import fit_head
from distalign.rewards.heads import new_head
from distalign.rewards.potential import moves
from distalign.rewards.reward_model import TrainedReward
from distalign.rollout.sample import sample
from distalign.stats.laplace import fit_posterior

# Labels that a fifth of the people would turn round.
PAIRS = [replace(pair, probability=0.8) for pair in tiny.encoded_pairs(300)]
LABELS = torch.tensor([pair.label for pair in PAIRS]).double()
PROMPTS = [pair.prompt for pair in PAIRS[:12]]


def drawn_labels(gamma, n=4000, spread=20.0, sign=1):
    """Log-probabilities of pairs, the preferred response of each first: with probability σ(γ Δ)."""
    random = torch.Generator().manual_seed(0)
    logps = -50 + spread * torch.randn(n, 2, generator=random, dtype=torch.float64)
    first = torch.bernoulli((sign * gamma * (logps[:, 0] - logps[:, 1])).sigmoid(), generator=random) == 1
    return torch.where(first[:, None], logps, logps.flip(1))


def median_logit(choice, logps):
    """|γ Δ ln π₀| of the middle pair."""
    return float((choice.value * (logps[:, 0] - logps[:, 1])).abs().median())


def test_gamma_is_the_one_that_labelled_the_pairs():
    """Within its interval, which is said with the number of pairs."""
    choice = choose_gamma(drawn_labels(0.07), torch.ones(4000))
    assert choice.value == pytest.approx(0.07, rel=0.1)
    assert "4000 training pairs, 95 % interval [0.0" in choice.reason


@pytest.mark.parametrize(
    ("gamma", "sign", "bound", "side"),
    [(0.07, -1, 0.1, "below"), (0.0005, 1, 0.1, "below"), (math.inf, 1, 8.0, "above")],
    ids=["contradicted", "coins", "separable"],
)
def test_a_gamma_that_makes_labels_say_nothing_is_the_bound(gamma, sign, bound, side):
    """Negative, too small or infinite: the typical pair is left at the bound, and the reason says so."""
    logps = drawn_labels(gamma if math.isfinite(gamma) else 1e6, sign=sign)
    choice = choose_gamma(logps, torch.ones(len(logps)))
    assert median_logit(choice, logps) == pytest.approx(bound, rel=0.01)
    assert f"{side} where labels carry information; the bound is taken" in choice.reason


def test_pairs_that_say_nothing_of_gamma_are_refused():
    """Two responses of one log-probability in each pair."""
    with pytest.raises(ValueError, match="γ has no effect"):
        choose_gamma(torch.zeros(20, 2), torch.ones(20))


@pytest.fixture(scope="module")
def base():
    """The tiny model and its own responses."""
    model = tiny.model().requires_grad_(False)
    return model, sample(model, PROMPTS, n=6, max_new_tokens=5, end_id=tiny.END, seed=3)


def test_the_pull_costs_what_the_prior_costs(base):
    """n β times half the variance of R/γ − ln π₀ on π₀'s responses is λ|w|²/2, both computed from the reward itself."""
    model, responses = base
    gamma, n = 0.3, 500
    evidence = count_evidence(model, PAIRS, PROMPTS, responses, gamma=gamma, n=n, token_budget=512)
    reward = TrainedReward(model, model, new_head("counts", model), gamma=gamma, token_budget=512)
    posterior = fit_head(reward, [Group(p.prompt, [p.chosen, p.rejected]) for p in PAIRS], LABELS, None)
    groups = [Group(prompt, own) for prompt, own in zip(PROMPTS, responses, strict=True)]
    start = score_in_batches(model, groups, token_budget=512).logps.double()
    moved = float((reward.values(groups) / gamma - start).view(len(groups), -1).var(1).mean()) / 2
    prior = posterior.precision * float(reward.head.weight.detach().double().square().sum()) / 2
    beta = choose_beta(PMLE(gamma=gamma).needs, evidence).value
    assert n * beta * moved == pytest.approx(prior, rel=0.01)
    assert moved > 0.01  # there was something to learn
    assert choose_beta(PD(gamma=gamma, pairs="data", beta=0.0).needs, evidence).value == beta


def test_methods_of_a_learned_reward_take_its_share_of_noise(base):
    """γ noise/signal with all n pairs; γ itself where noise is all that there is."""
    model, responses = base
    evidence = count_evidence(model, PAIRS, PROMPTS, responses, gamma=0.3, n=len(PAIRS), token_budget=512)
    assert evidence.noise == pytest.approx(evidence.noise_of_all)
    expected = 0.3 * evidence.noise / (evidence.moved - evidence.noise)
    assert 0.01 < expected < 0.29
    for method in (RKL(), PD(), PD(pairs="reference", beta=0.0)):
        assert choose_beta(method.needs, evidence).value == pytest.approx(expected, rel=0.01)
    assert noise_beta(Evidence(1.0, 0.5, 0.6, 0.6, gamma=0.3, n=10)).value == 0.3


def test_a_beta_that_holds_nothing_is_told(caplog):
    """Where γ is so small that the labels say more than any policy can move."""
    assert choose_beta(PMLE().needs, Evidence(1.0, 5.0, 1.0, 1.0, gamma=0.3, n=10)).value == 0.02
    assert not caplog.text
    choose_beta(PMLE().needs, Evidence(39.0, 28_800.0, 1.0, 1.0, gamma=0.0005, n=1000))
    assert "γ is too small for these pairs" in caplog.text
    # Nor more than γ, where the pairs say next to nothing.
    assert choose_beta(PMLE().needs, Evidence(1.0, 0.0001, 0.0, 0.0, gamma=0.3, n=10)).value == 0.3


@pytest.mark.parametrize("name", ["pmle", "rkl"])
def test_beta_lets_go_as_pairs_grow(base, name):
    """Ten thousand times the pairs: a pull at least a thousand times weaker."""
    model, responses = base
    few, many = (
        choose_beta(
            METHODS[name]().needs,
            count_evidence(model, PAIRS, PROMPTS, responses, gamma=0.3, n=n, token_budget=512),
        ).value
        for n in (len(PAIRS), 10_000 * len(PAIRS))
    )
    assert 0 < many < few / 1000


def test_repeated_rows_have_the_covariance_of_so_many(base):
    """Against the inverse of λI + 3 XᵀDX at the same weights, and on rows that stand there three times."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(40, 5, generator=random, dtype=torch.float64)
    y = torch.bernoulli(x[:, 0].sigmoid(), generator=random)
    found = fit_posterior(x, y, torch.zeros(40), 0.7)
    p = (x @ found.mean).sigmoid()
    data = 3 * x.T @ ((p * (1 - p))[:, None] * x)
    inverse = torch.linalg.inv(data + 0.7 * torch.eye(5, dtype=torch.float64))
    _, noise = found.repeated(3).moved(x)
    torch.testing.assert_close(noise, (x @ inverse @ data @ inverse * x).sum(-1), rtol=1e-6, atol=1e-9)
    reward = TrainedReward(base[0], base[0], new_head("counts", base[0]), gamma=0.3, token_budget=512)
    posterior = fit_head(reward, [Group(q.prompt, [q.chosen, q.rejected]) for q in PAIRS], LABELS, None)
    moved, less = (moves(reward, one, PROMPTS, base[1], gamma=0.3) for one in (posterior, posterior.repeated(50)))
    assert moved[0] == less[0]
    assert less[1] < moved[1]
