"""The predicted frontier against enumeration: bands that cover, no bias, advice that keeps the budget."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import astuple
from pathlib import Path

import pytest
import torch
from enumeration import Enumeration

from distalign.cli.frontier import frontier_table
from distalign.evaluation.frontier import best_of_n, default_grid, forecast, mean_band, predict_frontier
from distalign.evaluation.setup import Evaluation
from distalign.lab.exact import divergence, entropy, optimum
from distalign.lab.tables import random_tables

SHARES = (0.25, 0.5, 1.0, 2.0, 4.0)  # β in units of the rewards' spread
GAMMAS = (0.0, 0.1, 0.3, 1.0)  # γ likewise
QUANTITIES = ("reward", "kl", "entropy")


def table_world(seed, most=25):
    """ln π₀ and rewards [prompts, responses] of single-token responses; the reward is γ ln π* of a target."""
    shape = torch.Generator().manual_seed(seed)
    prompts, responses = (
        int(torch.randint(low, high, (), generator=shape)) for low, high in ((most // 6, most), (5, 200))
    )
    scale = 0.3 + 1.7 * float(torch.rand((), generator=shape))
    world = random_tables(1, prompts, responses, scale=scale, gamma=0.5, seed=seed)
    return world.reference[0], world.gamma * world.target[0]


def sequence_world(seed, most=25):
    """The same for all sequences of at most four of three to five tokens; every prefix has its own next token."""
    shape = torch.Generator().manual_seed(seed)
    prompts, vocabulary = (
        int(torch.randint(low, high, (), generator=shape)) for low, high in ((most // 6, most), (3, 6))
    )
    tree = Enumeration(vocabulary, 4)
    logps = [tree.logps(tree.parameters(1000 * seed + i)).detach() for i in range(2 * prompts)]
    return torch.stack(logps[:prompts]), 0.5 * torch.stack(logps[prompts:])


def draw(reference, rewards, samples, seed):
    """Rewards and ln π₀ [prompts, samples] of responses drawn from π₀."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.multinomial(reference.exp(), samples, replacement=True, generator=generator)
    return rewards.gather(1, index), reference.gather(1, index)


def truth(reference, rewards, point):
    """E[R], KL(π ‖ π₀) and H(π) of the optimum, by enumeration."""
    policy = optimum(rewards, reference, gamma=point.gamma, beta=point.beta)
    reward = (policy.exp() * rewards).sum(-1).mean()
    return [float(x) for x in (reward, divergence(policy, reference), entropy(policy))]


def coverage(seeds, *, samples=(64, 128, 256, 512, 1024), most=25):
    """[ESS, ESS per prompt, trusted, and for each quantity whether the band holds the truth], a row a (β, γ).

    Half the worlds are tables, half sequences, with a sixth of `most` prompts or more.
    """
    rows = []
    for seed in seeds:
        reference, rewards = (table_world, sequence_world)[seed % 2](seed, most)
        drawn = draw(reference, rewards, samples[seed // 2 % len(samples)], seed)
        spread = float(rewards.std())
        betas, gammas = ([spread * share for share in shares] for shares in (SHARES, GAMMAS))
        for point in predict_frontier(*drawn, betas=betas, gammas=gammas).points:
            bands = [getattr(point, name) for name in QUANTITIES]
            held = [b.low <= t <= b.high for b, t in zip(bands, truth(reference, rewards, point), strict=True)]
            rows.append([point.ess, point.ess_per_prompt, point.trusted, *held])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.slow
def test_bands_cover_the_truth_on_200_worlds():
    """The 90 % bands hold the truth in 85-95 % of the points with more than 100 effective samples, each quantity."""
    rows = coverage(range(20_000, 20_200))
    chosen = {
        "ESS > 100 in all": rows[:, 0] > 100,
        "ESS > 100 on each prompt": rows[:, 1] > 100,
        "trusted": rows[:, 2] == 1,
    }
    for name, which in chosen.items():
        held = rows[which, 3:].mean(0)
        shares = ", ".join(f"{quantity} {float(h):.3f}" for quantity, h in zip(QUANTITIES, held, strict=True))
        print(f"{name}: {int(which.sum())} of {len(rows)} points, {shares}")
        assert which.sum() > 1000
        assert bool(((held >= 0.85) & (held <= 0.95)).all()), (name, shares)


@pytest.mark.slow
def test_bands_of_trusted_points_cover_with_few_samples_on_many_prompts():
    """Averaging over 50-300 prompts shrinks the error, not the bias; 20 effective samples a prompt keep that small."""
    rows = coverage(range(40_000, 40_072), samples=(32, 64, 128), most=300)
    held = rows[rows[:, 2] == 1, 3:].mean(0)
    print(f"trusted, many prompts: {int((rows[:, 2] == 1).sum())} of {len(rows)} points, {held.tolist()}")
    assert bool(((held >= 0.85) & (held <= 0.95)).all()), held
    few = rows[(rows[:, 0] > 100) & (rows[:, 1] < 10), 3:].mean(0)
    assert float(few[1]) < 0.75, "fewer than 10 a prompt would do as well, whatever the total"


def test_the_error_over_prompts_is_that_of_other_prompts():
    """For prompts drawn from 3,000 the estimate ± 1.645 `se_prompts` holds all prompts' value at about 90 % (4 sd)."""
    world = random_tables(1, 3000, 30, scale=1.0, gamma=0.5, seed=5)
    reference, rewards = world.reference[0], world.gamma * world.target[0]
    hits, runs = torch.zeros(3), 150
    for seed in range(runs):
        chosen = torch.randperm(3000, generator=torch.Generator().manual_seed(seed))[:50]
        drawn = draw(reference[chosen], rewards[chosen], 128, seed)
        (point,) = predict_frontier(*drawn, betas=[0.5], gammas=[0.1]).points
        for i, (name, true) in enumerate(zip(QUANTITIES, truth(reference, rewards, point), strict=True)):
            band = getattr(point, name)
            hits[i] += abs(band.value - true) < 1.645 * band.se_prompts
    assert bool(((hits >= 0.9 * runs - 15) & (hits <= 0.9 * runs + 14)).all()), hits


@pytest.mark.parametrize("spread", [1.0, 300.0])
def test_the_jackknife_is_its_definition(spread):
    """Bias correction and variance equal those of estimates computed anew without each sample, one heavy weight too."""
    generator = torch.Generator().manual_seed(1)
    rewards, logps = spread * torch.randn(1, 7, generator=generator).double(), -5 + torch.randn(1, 7).double()
    beta, gamma = 0.7, 0.3

    def plain(keep):
        reward, logp = rewards[0, keep], logps[0, keep]
        log_weights = (reward - gamma * logp) / (beta + gamma)
        share = log_weights.softmax(-1)
        kl = (share * log_weights).sum() - (log_weights.logsumexp(-1) - math.log(len(reward)))
        return torch.stack([(share * reward).sum(), kl, -(share * logp).sum() - kl])

    left_out = torch.stack([plain([j for j in range(7) if j != i]) for i in range(7)])
    value = 7 * plain(list(range(7))) - 6 * left_out.mean(0)
    (point,) = predict_frontier(rewards, logps, betas=[beta], gammas=[gamma]).points
    for i, name in enumerate(QUANTITIES):
        band = getattr(point, name)
        assert band.value == pytest.approx(float(value[i]), rel=1e-9, abs=1e-9)
        assert band.low <= band.value <= band.high
        assert math.isnan(band.se_prompts)


def test_limits_and_constants():
    """A large β gives the reference; a constant per prompt moves the reward alone; equal samples have no band."""
    rewards, logps = torch.randn(5, 40).double(), -5 + torch.randn(5, 40).double()
    (far,) = predict_frontier(rewards, logps, betas=[1e7], gammas=[0.0]).points
    assert (far.reward.value, far.kl.value) == pytest.approx((float(rewards.mean()), 0), abs=1e-6)
    assert far.entropy.value == pytest.approx(-float(logps.mean()), abs=1e-6)
    assert (far.ess, far.ess_per_prompt) == pytest.approx((200, 40), rel=1e-6)
    constant = torch.arange(5.0).double()[:, None]
    (first,), (second,) = (
        predict_frontier(r, logps, betas=[2.0], gammas=[0.2]).points for r in (rewards, rewards + constant)
    )
    assert astuple(second.kl) == pytest.approx(astuple(first.kl))
    assert astuple(second.entropy) == pytest.approx(astuple(first.entropy))
    assert second.reward.value == pytest.approx(first.reward.value + 2)
    (flat,) = predict_frontier(0 * rewards + 3, 0 * logps - 5, betas=[1.0], gammas=[0.5]).points
    assert (flat.reward.value, flat.reward.low, flat.reward.high) == pytest.approx((3, 3, 3))
    assert astuple(flat.kl)[:3] == pytest.approx((0, 0, 0), abs=1e-9)


def test_best_of_n():
    """Without bias (all subsets, by hand), exact in an enumerated world, and with a KL below its bound there."""
    few = torch.randn(2, 6).double()
    for best in best_of_n(few, [1, 2, 3]):
        by_hand = [max(subset) for row in few.tolist() for subset in itertools.combinations(row, best.n)]
        assert best.reward.value == pytest.approx(sum(by_hand) / len(by_hand))
    held = 0
    for seed in range(60):
        reference, rewards = table_world(300 + seed)
        (best,) = best_of_n(draw(reference, rewards, 128, seed)[0], [4])
        order = rewards.argsort(-1)
        below = reference.exp().gather(1, order).cumsum(-1).clamp(max=1)
        exact = below.pow(4).diff(dim=-1, prepend=torch.zeros(len(below), 1, dtype=torch.float64))
        held += best.reward.low <= float((exact * rewards.gather(1, order)).sum(-1).mean()) <= best.reward.high
        policy = torch.empty_like(exact).scatter_(1, order, exact).log()
        assert float(divergence(policy, reference)) <= best.kl_bound
    assert 54 - 9 <= held <= 60
    with pytest.raises(ValueError, match="best of 4 from 6 samples a prompt; take n from 1 to 3"):
        best_of_n(few, [4])


@pytest.fixture(scope="module")
def shown():
    """A frontier with near and far points."""
    reference, rewards = sequence_world(41)
    return predict_frontier(*draw(reference, rewards, 256, 0))


def test_advice_keeps_the_budget(shown):
    """What is recommended is trusted, ends within the budget, and nothing that does has more reward."""
    advice = shown.recommend(0.3)
    within = [p for p in shown.points if p.trusted and p.kl.high <= 0.3]
    assert advice.highest_reward in within
    assert advice.highest_reward.reward.value == max(p.reward.value for p in within)
    assert advice.keeps_entropy in within
    assert advice.keeps_entropy.entropy.value >= 0.9 * shown.reference_entropy.value == advice.entropy_floor
    assert {p.gamma for p in advice.by_gamma} == {p.gamma for p in within}
    assert f"β {advice.highest_reward.beta:g}" in str(advice)
    unreachable = shown.recommend(0.3, keep_entropy=10.0)
    assert unreachable.keeps_entropy is None
    assert "None has an entropy of at least" in str(unreachable)
    # A budget within the band of a point leaves it out.
    _, kl, high, _ = sorted((p.kl.low, p.kl.value, p.kl.high, p.beta) for p in shown.points)[12]
    assert all(p.kl.value != kl for p in shown.recommend((kl + high) / 2).by_gamma)
    with pytest.raises(ValueError, match="no point with a KL within 1e-06 nats: the nearest trusted one has"):
        shown.recommend(1e-6)


def test_more_reward_costs_more_kl_along_each_gamma(shown):
    """Along γ = 0, where the frontier of reward against KL lies, both fall as β rises."""
    curve = [p for p in shown.points if p.gamma == 0]
    assert [p.reward.value for p in curve] == sorted((p.reward.value for p in curve), reverse=True)
    assert [p.kl.value for p in curve] == sorted((p.kl.value for p in curve), reverse=True)


def test_far_points_are_not_trusted():
    """Where a few samples hold the weight, the point says so and what to do, and no advice is given on it."""
    rewards, logps = 10 * torch.randn(3, 64).double(), -5 + torch.randn(3, 64).double()
    result = predict_frontier(rewards, logps, betas=[0.5], gammas=[0.0])
    assert not result.points[0].trusted
    assert "raise β or draw more samples per prompt" in result.warnings[0]
    with pytest.raises(ValueError, match="no point is trusted"):
        result.recommend(100.0)


def test_shown_as_data_and_table(shown):
    """JSON without NaN, and a table with a row for every point."""
    data = json.loads(json.dumps(shown.to_json(), allow_nan=False))
    assert len(data["points"]) == len(shown.points) == 24
    assert data["points"][0]["kl"]["value"] == shown.points[0].kl.value
    assert len(frontier_table(shown).names.cells) == 1 + 24 + len(shown.best_of)


def test_frontier_refuses_what_it_cannot_use():
    """A bad number is named by its place; impossible coefficients and too few samples are refused."""
    good = torch.randn(2, 4).double()
    bad = good.clone()
    bad[1, 2] = math.nan
    with pytest.raises(ValueError, match=r"rewards\[1, 2\] is nan; draw that response again"):
        predict_frontier(bad, good, betas=[1.0], gammas=[0.0])
    for beta, gamma in ((0.0, 0.0), (-1.0, 0.5), (1.0, -0.1), (math.nan, 0.1), (math.inf, 0.1)):
        with pytest.raises(ValueError, match=f"beta {beta:g}, gamma {gamma:g}: .* nor both be 0; leave that value out"):
            predict_frontier(good, good, betas=[beta], gammas=[gamma])
    with pytest.raises(ValueError, match="at least one prompt with two samples"):
        predict_frontier(good[:, :1], good[:, :1], betas=[1.0], gammas=[0.0])
    with pytest.raises(ValueError, match="nothing to weigh"):
        default_grid(0 * good, good)


@pytest.mark.parametrize(
    ("betas", "gammas", "found"),
    [
        ([1.0, 0.0], [0.3, 0.0], "beta 0, gamma 0: "),
        ([0.0], None, "beta 0, gamma 0 \\(of the grid taken where no gammas are given\\): "),
        (None, [-1.0], "gamma -1: "),
    ],
)
def test_coefficients_are_refused_before_a_model_is_looked_for(betas, gammas, found):
    """There is neither a model nor a prompt here; the grid that is taken by default counts as given."""
    settings = Evaluation(name="f", model="nowhere", prompts="nowhere.jsonl", samples=2, reward={"function": "a:b"})
    with pytest.raises(ValueError, match=found):
        forecast(settings, betas=betas, gammas=gammas)


def test_the_examples_of_the_docs_run(capsys):
    """The Python blocks of docs/frontier.md, one after the other, as they stand."""
    page = (Path(__file__).parents[2] / "docs" / "frontier.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    names = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 2
    printed = capsys.readouterr().out
    assert "has the highest reward" in printed
    assert "Interval(mean=" in printed


def test_a_skewed_sum_is_not_missed_on_one_side_only():
    """Means of 30 exponential values: above a symmetric band lie over 8 %, above this one at most 6 %, of 2,000."""
    generator = torch.Generator().manual_seed(0)
    values = torch.empty(2000, 1, 30, dtype=torch.float64).exponential_(generator=generator)
    bands = [mean_band(v) for v in values]
    above, below = (sum(misses) / 2000 for misses in ([b.high < 1 for b in bands], [b.low > 1 for b in bands]))
    symmetric = values[:, 0].mean(-1) + 1.699127 * values[:, 0].std(-1) / math.sqrt(30)
    assert float((symmetric < 1).double().mean()) > 0.08
    assert above < 0.06
    assert 0.05 < above + below < 0.11
