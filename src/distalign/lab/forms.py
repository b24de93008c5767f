"""The gradient estimators that the lab measures: the library's, and the naive forms that people write."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor

from distalign.lab.gradients import World
from distalign.methods.base import Samples
from distalign.methods.estimators import (
    entropy_full,
    entropy_plain,
    expected_reward,
    kl_full,
    kl_plain,
    leave_one_out,
    sequence_sum,
)
from distalign.methods.ppo import clipped_surrogate
from distalign.methods.rkl import rkl_loss, rkl_split_loss

KL, ENTROPY, REWARD, OBJECTIVE = "KL(π‖π₀)", "H(π)", "E[R]", "RKL objective"
EXPECTATIONS: dict[str, Callable[[World, Tensor], Tensor]] = {
    KL: World.kl,
    ENTROPY: World.entropy,
    REWARD: World.reward,
    OBJECTIVE: World.objective,
}


class Form(NamedTuple):
    """An estimator as it is measured: what it estimates, its name, its surrogate of one response each.

    `grouped`: with a baseline from its group. `stale`: on an earlier policy's responses. `biased`: known to be wrong.
    """

    quantity: str
    name: str
    surrogate: Callable[[Samples], Tensor]
    grouped: bool = False
    stale: bool = False
    biased: bool = False


def term_forms(clip: float) -> list[Form]:
    """Each term by each of the library's estimators: alone, with leave-one-out, and so on weighted stale responses."""
    forms = []
    for quantity, name, surrogate in (
        (KL, "plain", kl_plain),
        (KL, "full vocabulary", kl_full),
        (ENTROPY, "plain", entropy_plain),
        (ENTROPY, "full vocabulary", entropy_full),
        (REWARD, "plain", _reward),
    ):
        forms += [Form(quantity, name, surrogate), Form(quantity, name, surrogate, grouped=True)]
        forms.append(Form(quantity, f"{name}, stale, weighted", surrogate, grouped=True, stale=True))

    def clipped(samples: Samples) -> Tensor:
        advantages = samples.rewards - leave_one_out(samples.rewards, samples.group)
        advantages = advantages[:, None].expand(samples.mask.shape)
        behavior = samples.behavior_token_logps
        tokens = clipped_surrogate(samples.token_logps, behavior, advantages, samples.mask, clip=clip)
        return sequence_sum(tokens, samples.mask)

    forms.append(Form(REWARD, "clipped surrogate", clipped, grouped=True))
    forms.append(Form(REWARD, "clipped surrogate, stale", clipped, grouped=True, stale=True, biased=True))
    return forms


def objective_forms(gamma: float, beta: float) -> list[Form]:
    """RKL's whole objective by the loss of each form, with and without leave-one-out."""
    losses = {"joint": rkl_loss, "split": rkl_split_loss}
    forms = {name: partial(loss, gamma=gamma, beta=beta) for name, loss in losses.items()}
    return [Form(OBJECTIVE, name, form, grouped) for name, form in forms.items() for grouped in (False, True)]


def naive_forms(group_size: int, gamma: float, beta: float) -> list[Form]:
    """No score term, a baseline that has the sample's own value in it, stale responses taken for fresh ones."""

    def own_value(samples: Samples) -> Tensor:
        rewards = samples.rewards
        baseline = rewards.view(-1, group_size).mean(1).repeat_interleave(group_size)
        return sequence_sum(samples.token_logps, samples.mask) * (rewards - baseline)

    def sample_mean(samples: Samples) -> Tensor:
        return gamma * sequence_sum(samples.token_logps, samples.mask) + beta * _log_ratio(samples)

    def fresh(surrogate: Callable[[Samples], Tensor]) -> Callable[[Samples], Tensor]:
        return lambda samples: surrogate(samples.replace(behavior_token_logps=samples.token_logps.detach()))

    mean, no_score = "naive: derivative of the sample mean", "naive: full vocabulary, no score term"
    stale = "naive: stale taken for fresh"
    return [
        Form(KL, mean, _log_ratio, biased=True),
        Form(KL, no_score, lambda s: sequence_sum(s.step_kl, s.mask), biased=True),
        Form(KL, stale, fresh(kl_full), grouped=True, stale=True, biased=True),
        Form(ENTROPY, mean, lambda s: -sequence_sum(s.token_logps, s.mask), biased=True),
        Form(ENTROPY, no_score, lambda s: sequence_sum(s.step_entropy, s.mask), biased=True),
        Form(ENTROPY, stale, fresh(entropy_full), grouped=True, stale=True, biased=True),
        Form(REWARD, "naive: baseline with the own value", own_value, grouped=True, biased=True),
        Form(REWARD, stale, fresh(_reward), grouped=True, stale=True, biased=True),
        Form(OBJECTIVE, mean, sample_mean, biased=True),
    ]


def _reward(samples: Samples) -> Tensor:
    return expected_reward(samples, samples.rewards)


def _log_ratio(samples: Samples) -> Tensor:
    return sequence_sum(samples.token_logps - samples.reference_token_logps, samples.mask)
