"""A policy measured against a known target: equal to enumeration within its error, and exactly 0 at the target."""

from __future__ import annotations

from itertools import product

import pytest
import tiny
import torch

from distalign import measure_against
from distalign.engine import Group, score
from distalign.errors import InputError
from distalign.models.targets import with_logit_bias

VOCABULARY, PROMPTS, GAMMA = 5, [[1, 2, 4], [2, 1, 4], [4, 4, 1]], 0.5
FREE = [token for token in range(VOCABULARY) if token != tiny.END]
RESPONSES = [[tiny.END], *([a, tiny.END] for a in FREE), *([a, b] for a, b in product(FREE, FREE))]


class Tilted:
    """A bonus on the token 1."""

    def model(self, base, tokenizer, strength=1.0):
        """The model of that strength."""
        return with_logit_bias(base, strength * torch.eye(VOCABULARY)[1])


def measure(policy, prompts=PROMPTS, target=None, **settings):
    """Against the tilt, in responses of two tokens."""
    base = tiny.model(vocab_size=VOCABULARY)
    chat = tiny.tokenizer(chat=False)
    return measure_against(target or Tilted(), policy, base, chat, prompts, gamma=GAMMA, max_new_tokens=2, **settings)


def logps(model):
    """Exact log-probability of every response to every prompt, [prompts, responses]."""
    with torch.no_grad():
        return score(model, [Group(prompt, RESPONSES) for prompt in PROMPTS]).logps.view(len(PROMPTS), -1)


def test_numbers_are_those_of_enumeration():
    """Divergences, entropies and win rates by listing all responses: within four standard errors of the responses."""
    base = tiny.model(vocab_size=VOCABULARY)
    policy = with_logit_bias(base, 2 * torch.eye(VOCABULARY)[2])
    n = 400
    found = measure(policy, samples=n)
    start, here, target = logps(base), logps(policy), logps(Tilted().model(base, None))
    preferred = (GAMMA * (target[:, :, None] - target[:, None])).sigmoid()
    exact = {
        "forward_kl": (target.exp() * (target - here)).sum(1),
        "reverse_kl": (here.exp() * (here - target)).sum(1),
        "kl_reference": (here.exp() * (here - start)).sum(1),
        "entropy": -(here.exp() * here).sum(1),
        "target_entropy": -(target.exp() * target).sum(1),
        "win_rate": torch.einsum("pa,pab,pb->p", here.exp(), preferred, start.exp()),
        "target_win_rate": torch.einsum("pa,pab,pb->p", target.exp(), preferred, start.exp()),
    }
    assert set(found) == set(exact)
    for name, values in exact.items():
        # The values of a response lie within about a nat.
        assert abs(found[name].mean - float(values.mean())) < 4 / (len(PROMPTS) * n) ** 0.5, name
        assert found[name].n == len(PROMPTS)
    assert found["forward_kl"].mean > 0.3


def test_the_target_is_at_distance_zero():
    """Given as a target or as its model: divergences 0, entropy and win rate the target's own."""
    policy = Tilted().model(tiny.model(vocab_size=VOCABULARY), None)
    for target in (None, policy):
        found = measure(policy, target=target, samples=4)
        assert found["forward_kl"].mean == pytest.approx(0.0, abs=1e-5)
        assert found["reverse_kl"].mean == pytest.approx(0.0, abs=1e-5)
        assert found["entropy"].mean == pytest.approx(found["target_entropy"].mean, abs=1e-5)
        assert found["win_rate"].mean == pytest.approx(found["target_win_rate"].mean, abs=1e-5)


def test_a_single_prompt_has_no_standard_error():
    """It is refused."""
    with pytest.raises(InputError, match="1 prompts; standard errors need two"):
        measure(tiny.model(vocab_size=VOCABULARY), PROMPTS[:1])
