"""Values by hand, term by term: what a gradient test at one point cannot tell from a multiple of it."""

from __future__ import annotations

import math

import pytest
import tiny
import torch

from distalign import PD, RKL, AlignmentConfig, AlignmentTrainer
from distalign.engine import Group, score
from distalign.methods import Pairs, Samples
from distalign.methods.ppo import gae_credit, ppo_loss

MASK = torch.tensor([[True, True, True], [True, True, False]])


def samples(**more):
    """Two responses, of three tokens and of two."""
    torch.manual_seed(3)
    numbers = {name: torch.randn(2, 3, dtype=torch.float64) for name in ("token_logps", "behavior_token_logps",
               "reference_token_logps", "values", "advantages", "returns")}  # fmt: skip
    return Samples(mask=MASK, group=torch.tensor([0, 0]), rewards=torch.tensor([1.5, -0.5], dtype=torch.float64),
                   **{**numbers, **more})  # fmt: skip


def test_the_ppo_loss_is_its_equation():
    """−Σ min(r A, clip(r) A) + c ½ Σ (V − returns)², row by row (arXiv 1707.06347, eq. 7, 9)."""
    given = samples()
    for row in range(2):
        wanted = 0.0
        for t in range(3):
            if not MASK[row, t]:
                continue
            ratio = math.exp(given.token_logps[row, t] - given.behavior_token_logps[row, t])
            advantage = float(given.advantages[row, t])
            wanted -= min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
            wanted += 0.3 * 0.5 * float(given.values[row, t] - given.returns[row, t]) ** 2
        assert float(ppo_loss(given, clip=0.2, value_coefficient=0.3)[row]) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 1.0])
def test_returns_are_of_advantages_before_they_are_whitened(gae_lambda):
    """A_t = Σ_u λ^{u−t} δ_u by hand; returns A + V; whitened only for the policy, over all tokens of the round."""
    given, gamma, beta = samples(), 0.7, 0.4
    advantages, returns = gae_credit(given, gamma=gamma, beta=beta, gae_lambda=gae_lambda, whiten=True)
    plain = torch.zeros(2, 3, dtype=torch.float64)
    for row, length in enumerate((3, 2)):
        logps, reference = given.behavior_token_logps[row], given.reference_token_logps[row]
        reward = [float(-gamma * logps[t] - beta * (logps[t] - reference[t])) for t in range(length)]
        reward[-1] += float(given.rewards[row])
        value = [*given.values[row, :length].tolist(), 0.0]
        surprise = [reward[t] + value[t + 1] - value[t] for t in range(length)]
        for t in range(length):
            plain[row, t] = sum(gae_lambda ** (u - t) * surprise[u] for u in range(t, length))
    torch.testing.assert_close(returns, (plain + given.values) * MASK)
    tokens = plain[MASK]
    torch.testing.assert_close(advantages[MASK], (tokens - tokens.mean()) / tokens.std(correction=0))
    method = RKL(gamma, beta, estimator="ppo", gae_lambda=gae_lambda, whiten=False)
    torch.testing.assert_close(method.credit(given)[0], plain)


def test_a_value_off_the_mask_reaches_no_gradient():
    """NaN where nothing was drawn."""
    values = torch.randn(2, 3, dtype=torch.float64).masked_fill(~MASK, torch.nan).requires_grad_()
    ppo_loss(samples(values=values), clip=0.2, value_coefficient=0.3).sum().backward()
    assert bool(values.grad.isfinite().all())
    assert float(values.grad[1, 2]) == 0


def test_pd_with_the_kl_in_the_reward_is_its_equation():
    """p̃ = σ(Δ[R̂ − β ln π_t/π₀]) (eq. 9 with REBEL's penalty), and KL(Bern(p̃) ‖ Bern(σ(γ Δ ln π)))."""
    torch.manual_seed(4)
    logps, behavior, reference, rewards = (torch.randn(5, 2, dtype=torch.float64) for _ in range(4))
    pairs = Pairs(logps, behavior_logps=behavior, reference_logps=reference, rewards=rewards)
    wanted = 0.0
    for i in range(5):
        a, b = (float(rewards[i, j] - 0.6 * (behavior[i, j] - reference[i, j])) for j in range(2))
        label = 1 / (1 + math.exp(b - a))
        model = 1 / (1 + math.exp(-0.7 * float(logps[i, 0] - logps[i, 1])))
        wanted += label * math.log(label / model) + (1 - label) * math.log((1 - label) / (1 - model))
    assert float(PD(0.7, 0.6, kl_in="reward").loss(pairs, Samples())) == pytest.approx(wanted / 5, rel=1e-10)


def test_the_trainer_scores_at_its_temperature(tmp_path):
    """Values and gradients of softmax(z / T), not of softmax(z)."""
    args = AlignmentConfig(str(tmp_path), temperature=0.5, max_completion_length=4, token_budget=512, use_cpu=True)
    trainer = AlignmentTrainer(
        tiny.model(), RKL(0.5, 0.3), args, [{"prompt": p} for p in tiny.prompts(4)],
        processing_class=tiny.tokenizer(), reward_funcs=lambda completions, **_: [0.0 for _ in completions],
    )  # fmt: skip
    groups, model = [Group([5, 6, 7], [[8, 9], [10]])], trainer.policy.model
    found = trainer.score(groups)
    torch.testing.assert_close(found.logps, score(model, groups, temperature=0.5).logps)
    own = model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits[0, -2:]
    by_hand = (own.double() / 0.5).log_softmax(-1)[[0, 1], [8, 9]].sum()
    torch.testing.assert_close(found.logps[0], by_hand, rtol=1e-4, atol=1e-5)
    parameters = list(model.parameters())
    gradients = [torch.autograd.grad(value, parameters, allow_unused=True) for value in (found.logps[0], by_hand)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
