"""The potential of a reward: what is said before training against enumeration, and the advice that follows."""

from __future__ import annotations

import pytest
import torch

from distalign.rewards.potential import Potential, forward_kl


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


def test_noise_that_exceeds_the_signal_is_said_with_the_beta_of_half_the_correction():
    """And where it does not, β is its share of the signal and nothing is said."""
    doubtful, good = Potential(1.0, 0.8, gamma=0.3), Potential(1.0, 0.2, gamma=0.3)
    assert doubtful.beta == 0.3
    assert "0.80 are noise" in str(doubtful.warning)
    assert "beta 0.3" in str(doubtful.warning)
    assert good.warning is None
    assert good.beta == pytest.approx(0.3 * 0.25)
