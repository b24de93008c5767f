"""γ of a policy from held-out pairs: equal to statsmodels, an interval that covers, and words that fit the case."""

from __future__ import annotations

import json
import math
import sys

import pytest
import statsmodels.api as sm
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from distalign import cli
from distalign.cli.calibrate import calibration_table
from distalign.stats.calibration import COIN, calibrate, expected_calibration_error, reliability_table

TRUE = 0.3


def labelled(pairs, seed, *, gamma=TRUE, scale=5.0):
    """Log-probs [pairs, 2] whose column 0 is the response that a label drawn at γ prefers."""
    generator = torch.Generator().manual_seed(seed)
    logps = -60 + scale * torch.randn(pairs, 2, generator=generator, dtype=torch.float64)
    uniform = torch.rand(pairs, generator=generator, dtype=torch.float64)
    swap = uniform > (gamma * (logps[:, 0] - logps[:, 1])).sigmoid()
    return torch.where(swap[:, None], logps.flip(1), logps)


@pytest.mark.parametrize("soft", [False, True])
def test_gamma_is_statsmodels(soft):
    """γ and NLL equal those of a regression with one feature to 1e-6; labels turned round change nothing."""
    logps = labelled(400, 0)
    probability = torch.rand(400, dtype=torch.float64) if soft else torch.ones(400, dtype=torch.float64)
    result = calibrate(logps, probability if soft else None)
    gap = (logps[:, 0] - logps[:, 1]).numpy()
    theirs = sm.GLM(probability.numpy(), gap[:, None], family=sm.families.Binomial()).fit(tol=1e-14, maxiter=200)
    assert result.gamma.mean == pytest.approx(theirs.params[0], abs=1e-6)
    turned = calibrate(logps.flip(1), 1 - probability)
    assert turned.gamma == pytest.approx(result.gamma)
    assert turned.accuracy == pytest.approx(result.accuracy)
    assert turned.ece == pytest.approx(result.ece)
    p = torch.sigmoid(torch.tensor(theirs.params[0] * gap))
    nll = -(probability * p.log() + (1 - probability) * (1 - p).log()).mean()
    assert result.nll.mean == pytest.approx(float(nll), abs=1e-6)
    assert result.nll.mean < COIN
    if not soft:
        assert result.accuracy.mean == pytest.approx((gap > 0).mean())


@pytest.mark.slow
def test_the_interval_covers_and_the_policy_is_calibrated():
    """Over 200 draws of 60 pairs the interval holds the true γ at 95 % (4 sd), and ends where the likelihood says."""
    hits = 0
    for seed in range(200):
        _, low, high = calibrate(labelled(60, seed)).gamma
        hits += low < TRUE < high
    assert 190 - 12 <= hits <= 200
    logps = labelled(2000, 1)
    result = calibrate(logps)
    gap = logps[:, 0] - logps[:, 1]
    best = float(torch.nn.functional.softplus(-result.gamma.mean * gap).sum())
    for end in result.gamma[1:]:
        assert float(torch.nn.functional.softplus(-end * gap).sum()) - best == pytest.approx(1.920729, abs=1e-4)
    assert result.ece < 2 * result.ece_floor
    assert sum(row.n for row in result.reliability) == 2000
    assert "calibrates this policy" in " ".join(result.meaning)


def test_the_floor_is_the_error_of_a_perfect_policy():
    """Averaged over draws at the true γ the calibration error is its floor, within a tenth."""
    results = [calibrate(labelled(500, seed)) for seed in range(100)]
    errors, floors = (torch.tensor([getattr(r, name) for r in results]).mean() for name in ("ece", "ece_floor"))
    assert float(errors / floors) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("logps", "words"),
    [
        (labelled(200, 3, gamma=1e-4), "holds 0"),
        (labelled(200, 3, gamma=-0.3), "the wrong way"),
        (labelled(20_000, 3, gamma=0.05, scale=1.0), "a typical pair is a coin"),
        (labelled(2000, 3, gamma=0.3, scale=50.0), "is certain"),
        (labelled(200, 3), "nats mean odds of e to one"),
    ],
)
def test_words_fit_the_case(logps, words):
    """Nothing, the wrong way, too weak, too strong, as it should be."""
    assert words in calibrate(logps).meaning[0]


def test_a_policy_that_no_gamma_calibrates_is_said_to_be_one():
    """Half the pairs sharp, half reversed noise: the calibration error stands out of its floor."""
    sharp, noise = labelled(2000, 4, gamma=2.0), labelled(2000, 5, gamma=0.0, scale=15.0)
    result = calibrate(torch.cat([sharp, noise]))
    assert result.ece > 2 * result.ece_floor
    assert "no single γ" in result.meaning[-1]


@pytest.mark.parametrize("sign", [1, -1])
def test_separable_pairs_bound_gamma_from_one_side(sign):
    """Every label agreed with (or contradicted): γ is infinite, its bound where the likelihood says, ties apart."""
    gap = sign * torch.tensor([1.0, 2.0, 5.0] * 4 + [0.0], dtype=torch.float64)
    result = calibrate(torch.stack([gap, 0 * gap], 1))
    gamma, low, high = result.gamma
    bound = low if sign > 0 else high
    assert gamma == sign * math.inf == (high if sign > 0 else low)
    fall = torch.nn.functional.softplus(-bound * gap[:-1]).sum()
    assert float(fall) == pytest.approx(1.920729, abs=1e-5)
    assert result.nll.mean == pytest.approx(COIN / 13)
    assert ("agrees with every label" if sign > 0 else "contradicts every label") in result.meaning[0]
    assert f"γ {'>' if sign > 0 else '<'} {bound:.3g}" in result.meaning[0]
    data = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert data["gamma"]["mean"] == ("inf" if sign > 0 else "-inf")
    assert data["coin"] == COIN


@pytest.mark.parametrize(
    ("pairs", "telling", "known"), [(2, 2, False), (9, 9, False), (12, 9, False), (10, 10, True), (13, 10, True)]
)
def test_too_few_pairs_have_no_interval(pairs, telling, known):
    """γ stands alone, between −inf and inf, and the words say that its error is unknown; from ten pairs on it is."""
    logps = labelled(pairs, 7)
    logps[telling:] = -60.0
    result = calibrate(logps)
    assert all(map(math.isfinite, result.gamma[1:])) == known
    assert result.gamma.low <= result.gamma.mean <= result.gamma.high
    if not known:
        assert result.gamma[1:] == (-math.inf, math.inf)
        (words,) = result.meaning
        assert f"Fewer than 10 of these {pairs} pairs" in words
        assert "is unknown" in words
        assert json.loads(json.dumps(result.to_json(), allow_nan=False))["gamma"]["low"] == "-inf"


@pytest.mark.slow
@pytest.mark.parametrize("gamma", [0.0, TRUE])
def test_the_interval_of_few_pairs_covers_nearly(gamma):
    """With as few pairs as have an interval it holds the true γ in 93 % of 100 draws (4 sd), sharp policy or coin."""
    found = [calibrate(labelled(10, 500 + seed, gamma=gamma)).gamma for seed in range(100)]
    assert 93 - 10 <= sum(low < gamma < high for _, low, high in found) <= 100


def test_one_pair_is_refused_before_a_model_is_loaded(tmp_path, tiny_folder, monkeypatch, capsys):
    """distalign calibrate … with a file of one pair, or --limit 1."""
    pairs = tiny.write_pairs(tmp_path / "pairs.jsonl", 4)
    monkeypatch.setattr("distalign.models.load.Source.model", lambda *_: pytest.fail("weights were loaded"))
    monkeypatch.setattr(sys, "argv", ["distalign", "calibrate", str(tiny_folder), str(pairs), "--limit", "1"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert f"{pairs}: γ from 1 labelled pair has no error; give 10 or more" in capsys.readouterr().err


def test_shown_and_refused():
    """A table with its meaning below; numbers that cannot be used are refused."""
    result = calibrate(labelled(50, 0))
    table = calibration_table(result)
    assert (table.row_count, table.caption) == (6, "\n".join(result.meaning))
    with pytest.raises(ValueError, match="the same log-probability"):
        calibrate(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="drop that pair"):
        calibrate(torch.tensor([[math.nan, 1.0], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="outside"):
        calibrate(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([1.5, 1.0]))
    for few, words in ((0, "0 labelled pairs"), (1, "1 labelled pair ")):
        with pytest.raises(ValueError, match=words):
            calibrate(labelled(few, 0))


def test_calibration_of_a_calibrated_and_an_overconfident_predictor():
    """The error is small when outcomes follow the probabilities and about 0.3 when 0.9 is right 60 % of the time."""
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(20_000, generator=generator)
    assert expected_calibration_error(p, torch.bernoulli(p, generator=generator)) < 0.02
    sure, outcome = torch.full((1000,), 0.9), (torch.arange(1000) < 600).float()
    assert expected_calibration_error(sure, outcome) == pytest.approx(0.3, abs=1e-6)


def test_reliability_table():
    """A row per filled bin, with means and counts; probability 1 belongs to the last bin."""
    table = reliability_table(torch.tensor([0.1, 0.2, 1.0]), torch.tensor([0.0, 1.0, 1.0]), bins=2)
    assert [tuple(row) for row in table] == [pytest.approx((0.15, 0.5, 2)), pytest.approx((1.0, 1.0, 1))]
    with pytest.raises(ValueError, match="not log-odds"):
        reliability_table(torch.tensor([1.2]), torch.tensor([1.0]))


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 1)), min_size=1, max_size=40), st.integers(1, 12))
def test_reliability_table_keeps_every_value(rows, bins):
    """Counts add up, and the count-weighted means are the overall means."""
    p = torch.tensor([r[0] for r in rows], dtype=torch.float64)
    y = torch.tensor([float(r[1]) for r in rows], dtype=torch.float64)
    table = reliability_table(p, y, bins=bins)
    assert sum(row.n for row in table) == len(rows)
    assert sum(row.n * row.predicted for row in table) == pytest.approx(p.sum().item())
    assert sum(row.n * row.observed for row in table) == pytest.approx(y.sum().item())
    assert 0 <= expected_calibration_error(p, y, bins=bins) <= 1
