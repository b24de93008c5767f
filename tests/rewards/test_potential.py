"""The potential of a reward: what is said before training against enumeration, and the advice that follows."""

from __future__ import annotations

import json

import pytest
import torch

from distalign.methods import DPO, PD, PMLE, REBEL, RKL, RLHF
from distalign.rewards import RewardError
from distalign.rewards.potential import POTENTIAL, Potential, forward_kl, saved_potential, start_share
from distalign.stats.intervals import Estimate


def test_the_divergence_equals_enumeration():
    """KL(π*‖exp(R)/Z) from samples of a table of twenty responses, over many prompts, within three standard errors."""
    random = torch.Generator().manual_seed(0)
    base, true = (torch.randn(20, generator=random, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    learned = true + 0.5 * torch.randn(20, generator=random, dtype=torch.float64) + 3
    expected = float((true.exp() * (true - learned.log_softmax(-1))).sum())
    prompts, samples = 3000, 8
    drawn = [
        torch.multinomial(p.exp(), prompts * samples, True, generator=random).view(prompts, -1) for p in (base, true)
    ]
    both = torch.cat(drawn, 1)
    values = forward_kl(true[both], learned[both], base[both], samples)
    assert float(values.mean()) == pytest.approx(expected, abs=3 * float(values.std()) / prompts**0.5)
    assert float(values.std()) / prompts**0.5 < 0.1 * expected


def test_the_floor_equals_enumeration():
    """RKL at β > 0 with the target's exact reward: π₀^{β/(β+γ)} π*^{γ/(β+γ)}, normalised, on a table of twenty."""
    random = torch.Generator().manual_seed(1)
    base, true = (torch.randn(20, generator=random, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    prompts, samples, gamma, beta = 3000, 8, 0.3, 0.5
    end = (base * beta / (beta + gamma) + true * gamma / (beta + gamma)).log_softmax(-1)
    expected = float((true.exp() * (true - end)).sum())
    drawn = [
        torch.multinomial(p.exp(), prompts * samples, True, generator=random).view(prompts, -1) for p in (base, true)
    ]
    both = torch.cat(drawn, 1)
    share = start_share(RKL(gamma=gamma, beta=beta), gamma)
    assert share == pytest.approx(beta / (beta + gamma))
    values = forward_kl(true[both], share * base[both] + (1 - share) * true[both], base[both], samples)
    assert float(values.mean()) == pytest.approx(expected, abs=3 * float(values.std()) / prompts**0.5)


@pytest.mark.parametrize(
    "method",
    [RKL(gamma=0.2, beta=0.5), RKL(gamma=0.3, beta=0.0), PMLE(0.3, 0.1), PD(0.3, 0.1), DPO(0.3), RLHF(0.3), REBEL()],
    ids=lambda method: type(method).__name__,
)
def test_an_end_that_is_not_between_target_and_start_has_no_floor(method):
    """Another γ, no β, no closed form, or a maximiser."""
    assert start_share(method, 0.3) is None


def test_noise_that_exceeds_the_signal_is_said_with_the_beta_of_half_the_correction():
    """And where it does not, β is its share of the signal and nothing is said."""
    doubtful, good = Potential(1.0, 0.8, gamma=0.3), Potential(1.0, 0.2, gamma=0.3)
    assert doubtful.beta == 0.3
    assert "0.80 are noise" in str(doubtful.warning)
    assert "beta 0.3" in str(doubtful.warning)
    assert good.warning is None
    assert good.beta == pytest.approx(0.3 * 0.25)


def test_what_was_said_is_read_where_the_reward_is(tmp_path):
    """With the advice, if there was some; nothing of a hub's model."""
    assert saved_potential(None) == saved_potential("org/model") == saved_potential(str(tmp_path)) == []
    for made in (Potential(3.0, 1.0, 0.5), Potential(3.0, 2.0, 0.5)):
        (tmp_path / POTENTIAL).write_text(json.dumps(made.to_json()))
        lines = saved_potential(str(tmp_path))
        assert lines[0].endswith(str(made))
        assert (made.warning is None) == (len(lines) == 1)
    (tmp_path / POTENTIAL).write_text("{")
    with pytest.raises(RewardError, match=r"potential.json: it cannot be read"):
        saved_potential(str(tmp_path))


def test_a_reward_that_leads_away_from_a_known_target_is_told():
    """Whatever its noise is."""
    near, far = Estimate(1.0, 0.1, 32), Estimate(2.0, 0.1, 32)
    assert Potential(3.0, 1.0, 0.5, near, far).warning is None
    assert "farther from the target than π₀ is (2.00 and 1.00 nats)" in Potential(3.0, 1.0, 0.5, far, near).warning
