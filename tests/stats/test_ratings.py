"""Ratings and length control: equal to statsmodels and choix, honest intervals, and refusals that say what to do."""

from __future__ import annotations

import math

import choix
import numpy as np
import pytest
import statsmodels.api as sm
import torch

from distalign.stats.logistic import Separable, fit_logistic
from distalign.stats.ratings import bradley_terry_over_prompts, length_controlled_win_rate

TRUE = torch.tensor([0.0, 0.7, -0.4, 1.1], dtype=torch.float64)


def soft_wins(prompts, seed, *, spread=0.0):
    """Wins [prompts, 4, 4]: every pair judged once per prompt, with ties; each prompt has its own ratings."""
    generator = torch.Generator().manual_seed(seed)
    own = TRUE + spread * torch.randn(prompts, 4, generator=generator, dtype=torch.float64)
    probability = (own[:, :, None] - own[:, None, :]).sigmoid()
    uniform = torch.rand(prompts, 4, 4, generator=generator, dtype=torch.float64)
    result = (uniform < probability).double()
    result[torch.rand(prompts, 4, 4, generator=generator) < 0.1] = 0.5
    upper = result.triu(1)
    return upper + ((1 - result).triu(1)).mT


def regression(wins):
    """The same data as statsmodels takes it: outcome, features (policy 0 left out) and prompt of every comparison."""
    rows = [(p, i, j) for p in range(len(wins)) for i in range(4) for j in range(i + 1, 4)]
    features = np.array([[(k == i) - (k == j) for k in range(1, 4)] for _, i, j in rows], dtype=float)
    outcome = np.array([float(wins[p, i, j]) for p, i, j in rows])
    return outcome, features, np.array([p for p, _, _ in rows])


def binomial(outcome, features, **kwargs):
    """A logistic regression with soft outcomes, by statsmodels."""
    return sm.GLM(outcome, features, family=sm.families.Binomial()).fit(tol=1e-14, maxiter=200, **kwargs)


def test_bradley_terry_is_statsmodels():
    """Ratings, and their errors over prompts, equal statsmodels' to 1e-6."""
    wins = soft_wins(50, 0, spread=0.5)
    outcome, features, prompt = regression(wins)
    ours = bradley_terry_over_prompts(wins)
    settings = {"groups": prompt, "use_correction": False}
    theirs = binomial(outcome, features, cov_type="cluster", cov_kwds=settings)
    assert ours.values[1:].numpy() == pytest.approx(theirs.params, abs=1e-6)
    assert ours.covariance[1:, 1:].numpy() == pytest.approx(theirs.cov_params() * 50 / 49, abs=1e-6)


def test_bradley_terry_is_choix():
    """The maximum-likelihood ratings equal choix's three solvers' to 1e-6, however the wins lie over the prompts."""
    generator = np.random.default_rng(0)
    wins = generator.integers(1, 30, (5, 5))
    np.fill_diagonal(wins, 0)
    total = torch.tensor(wins, dtype=torch.float64)
    ours = bradley_terry_over_prompts(torch.stack([0.3 * total, 0.7 * total]), anchor=2).values.numpy()
    pairs = [(i, j) for i in range(5) for j in range(5) for _ in range(wins[i, j])]
    theirs = (
        choix.ilsr_pairwise(5, pairs, alpha=0, tol=1e-12, max_iter=1000),
        choix.mm_pairwise(5, pairs, alpha=0, tol=1e-12, max_iter=100_000),
        choix.opt_pairwise(5, pairs, alpha=0, tol=1e-12),
    )
    for ratings in theirs:
        assert ours == pytest.approx(ratings - ratings[2], abs=1e-6)
    assert ours[2] == 0


def test_the_anchor_moves_nothing_else():
    """Differences, with their intervals, are the same from any anchor."""
    wins = soft_wins(30, 3)
    first, last = (bradley_terry_over_prompts(wins, anchor=anchor) for anchor in (0, 3))
    assert first.difference(1, 2) == pytest.approx(last.difference(1, 2), abs=1e-9)


def test_intervals_over_prompts_cover():
    """With prompts of their own ratings, whose comparisons depend on each other, the sandwich covers at 95 %.

    Ten comparisons a pair and prompt: 60 dependent ones. The truth is the rating of infinitely many prompts.
    """
    spread, hits, runs = 1.5, 0, 120
    truth = bradley_terry_over_prompts(soft_wins(40_000, 999, spread=spread)).values
    for seed in range(runs):
        generator = torch.Generator().manual_seed(seed)
        own = TRUE + spread * torch.randn(40, 4, generator=generator, dtype=torch.float64)
        won = torch.binomial(
            torch.full((40, 4, 4), 10.0).double(), (own[:, :, None] - own[:, None]).sigmoid(), generator
        )
        wins = won.triu(1) + (10 - won).triu(1).mT
        gap = float(truth[3] - truth[1])
        _, low, high = bradley_terry_over_prompts(wins).difference(3, 1)
        hits += low < gap < high
    assert 0.95 * runs - 9 <= hits  # 4 sd


@pytest.mark.parametrize(
    ("wins", "message"),
    [
        ([[0, 1, 0], [2, 0, 0], [0, 0, 0]], r"policies \[0, 1\] were never compared with \[2\]; compare a pair"),
        ([[0, 1, 0], [2, 0, 0], [1, 1, 0]], r"policies \[2\] never lost to \[0, 1\], not even a tie"),
    ],
)
def test_ratings_refuse_what_has_none(wins, message):
    """Disconnected or separable wins are refused, with the policies and what to do."""
    with pytest.raises(ValueError, match=message):
        bradley_terry_over_prompts(torch.tensor([wins], dtype=torch.float64))


def test_a_tie_is_enough_to_keep_a_rating_finite():
    """One half win against the winner of all else makes its rating finite."""
    wins = torch.tensor(
        [
            [
                [
                    0,
                    9,
                ],
                [0, 0],
            ],
            [[0, 0.5], [0.5, 0]],
        ],
        dtype=torch.float64,
    )
    ratings = bradley_terry_over_prompts(wins, anchor=1)
    assert ratings.values[0] == pytest.approx(math.log(19), abs=1e-9)


def lengths_and_wins(prompts, seed, *, effect):
    """Lengths of both sides, and judgements in {0, 0.5, 1} that like length by `effect`."""
    generator = torch.Generator().manual_seed(seed)
    lengths = 300 + 120 * torch.randn(prompts, generator=generator, dtype=torch.float64)
    baseline = 200 + 80 * torch.randn(prompts, generator=generator, dtype=torch.float64)
    difficulty = torch.randn(prompts, generator=generator, dtype=torch.float64)
    gap = lengths - baseline
    logit = -0.5 + effect * torch.tanh(gap / gap.std()) + 0.8 * difficulty
    wins = (torch.rand(prompts, generator=generator, dtype=torch.float64) < logit.sigmoid()).double()
    wins[torch.rand(prompts, generator=generator) < 0.1] = 0.5
    return wins, lengths, baseline


def test_length_control_is_statsmodels():
    """Win rate at equal lengths, its interval and the length effect, from statsmodels' regression, to 1e-6."""
    wins, lengths, baseline = lengths_and_wins(300, 1, effect=1.5)
    result = length_controlled_win_rate(wins, lengths, baseline)
    gap = (lengths - baseline).numpy()
    columns = [np.ones(300), np.tanh(gap / gap.std(ddof=1))]
    theirs = binomial(wins.numpy(), np.stack(columns, 1), cov_type="HC0")
    equal = np.stack([np.ones(300), np.zeros(300)], 1)
    rate = theirs.predict(equal).mean()
    assert result.win_rate.mean == pytest.approx(rate, abs=1e-6)
    assert result.length_effect.mean == pytest.approx(theirs.params[1], abs=1e-6)
    quantile = 1.967956623  # Student's, 298 degrees of freedom
    covariance = theirs.cov_params() * 300 / 298
    assert result.length_effect.high - result.length_effect.mean == pytest.approx(
        quantile * math.sqrt(covariance[1, 1]), abs=1e-6
    )
    # The delta method with a numerical gradient of the log-odds.
    step = 1e-5
    shifts = [theirs.model.predict(theirs.params + step * e, equal).mean() for e in np.eye(len(columns))]
    gradient = np.array([(shifted - rate) / step for shifted in shifts]) / (rate * (1 - rate))
    high = np.log(rate / (1 - rate)) + quantile * math.sqrt(gradient @ covariance @ gradient)
    assert result.win_rate.high == pytest.approx(1 / (1 + np.exp(-high)), abs=1e-5)


def test_length_control_takes_the_length_out_and_covers():
    """A policy that wins by length has a higher raw rate; the interval holds the rate at equal lengths at 95 %."""
    truth = float(torch.sigmoid(-0.5 + 0.8 * torch.randn(10**6, dtype=torch.float64)).mean())
    truth = 0.9 * truth + 0.05  # ties
    wins, _, _ = lengths_and_wins(2000, 5, effect=1.5)
    assert float(wins.mean()) > truth + 0.1
    hits = 0
    for seed in range(200):
        _, low, high = length_controlled_win_rate(*lengths_and_wins(400, seed, effect=1.5)).win_rate
        hits += low < truth < high
    assert 190 - 16 <= hits <= 200


def test_length_control_refuses():
    """Lengths that do not vary, and outcomes that the length predicts, have no controlled win rate."""
    ones = torch.ones(4, dtype=torch.float64)
    with pytest.raises(ValueError, match="do not vary"):
        length_controlled_win_rate(ones, 3 * ones, ones)
    # Two numbers fit two prompts without error; of three the interval may be all.
    with pytest.raises(ValueError, match="2 prompts, and a win rate and the effect of length want three"):
        length_controlled_win_rate(ones[:2] / 2, torch.tensor([1.0, 2.0]), ones[:2])
    few = torch.tensor([0.577, 0.122, 0.729]), torch.tensor([18.0, 17.0, 15.0]), torch.full((3,), 10.0)
    assert length_controlled_win_rate(*few).win_rate.high == pytest.approx(1.0, abs=1e-6)
    gap = torch.tensor([-2.0, -1.0, 1.0, 2.0], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"4 comparisons, 0\.500 of them won: length"):
        length_controlled_win_rate((gap > 0).double(), gap, 0 * ones)
    with pytest.raises(ValueError, match=r"1\.000 of them won"):
        length_controlled_win_rate(ones, gap, 0 * ones)


def test_logistic_fit_is_exact_where_it_can_be():
    """A single rate has a closed form; a collinear design is refused."""
    one = torch.ones(1, 1, dtype=torch.float64)
    fit = fit_logistic(one, torch.tensor([0.3]), torch.tensor([50.0]))
    assert float(fit.coefficients[0]) == pytest.approx(math.log(3 / 7), abs=1e-7)
    assert float(fit.covariance[0, 0]) == pytest.approx(1 / (50 * 0.21), rel=1e-6)
    with pytest.raises(ValueError, match="collinear"):
        fit_logistic(torch.ones(3, 2), torch.tensor([0.0, 1.0, 0.5]))
    with pytest.raises(ValueError, match="one cluster"):
        fit.clustered_covariance(torch.zeros(1, dtype=torch.long))
    # Every outcome is predicted; then all but a win and a loss, whose log-odds stay at zero.
    for feature, outcomes in (([1.0, 2.0], [1.0, 1.0]), ([0.2, -0.9, 0.0, 0.2], [0.0, 0.0, 0.0, 1.0])):
        design = torch.tensor(feature, dtype=torch.float64)
        with pytest.raises(Separable, match="no finite maximum"):
            fit_logistic(torch.stack([torch.ones_like(design), design], 1), torch.tensor(outcomes))
