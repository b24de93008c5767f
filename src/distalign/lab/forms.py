"""The gradient estimators that the lab measures: the library's, and the naive forms that people write."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from distalign.lab.gradients import World
from distalign.methods.base import Samples, declared
from distalign.methods.estimators import (
    clipped_surrogate,
    entropy_full,
    entropy_plain,
    kl_full,
    kl_plain,
    leave_one_out,
    reward_plain,
    sequence_sum,
)
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
        (KL, "plain", _kl_plain),
        (KL, "full vocabulary", _kl_full),
        (ENTROPY, "plain", _entropy_plain),
        (ENTROPY, "full vocabulary", _entropy_full),
        (REWARD, "plain", _reward),
    ):
        forms += [Form(quantity, name, surrogate), Form(quantity, name, surrogate, grouped=True)]
        forms.append(Form(quantity, f"{name}, stale, weighted", surrogate, grouped=True, stale=True))

    def clipped(samples: Samples) -> Tensor:
        rewards = _rewards(samples)
        advantages = (rewards - leave_one_out(rewards, samples.group))[:, None].expand(samples.mask.shape)
        behavior = samples.behavior_token_logps
        behavior = samples.token_logps.detach() if behavior is None else behavior
        tokens = clipped_surrogate(samples.token_logps, behavior, advantages, samples.mask, clip=clip)
        return sequence_sum(tokens, samples.mask)

    forms.append(Form(REWARD, "clipped surrogate", clipped, grouped=True))
    forms.append(Form(REWARD, "clipped surrogate, stale", clipped, grouped=True, stale=True, biased=True))
    return forms


def objective_forms(gamma: float, beta: float) -> list[Form]:
    """RKL's whole objective by the loss of each form, with and without leave-one-out."""

    def joint(samples: Samples) -> Tensor:
        reference, rest = samples.reference_token_logps, _rest(samples)
        return rkl_loss(samples.token_logps, reference, _rewards(samples), *rest, gamma=gamma, beta=beta)

    def split(samples: Samples) -> Tensor:
        steps, rest = (samples.step_kl, samples.step_entropy), _rest(samples)
        return rkl_split_loss(samples.token_logps, *steps, _rewards(samples), *rest, gamma=gamma, beta=beta)

    forms = {"joint": joint, "split": split}
    return [Form(OBJECTIVE, name, form, grouped) for name, form in forms.items() for grouped in (False, True)]


def naive_forms(group_size: int, gamma: float, beta: float) -> list[Form]:
    """No score term, a baseline that has the sample's own value in it, stale responses taken for fresh ones."""

    def own_value(samples: Samples) -> Tensor:
        rewards = _rewards(samples)
        baseline = rewards.view(-1, group_size).mean(1).repeat_interleave(group_size)
        return sequence_sum(samples.token_logps, samples.mask) * (rewards - baseline)

    def sample_mean(samples: Samples) -> Tensor:
        return gamma * sequence_sum(samples.token_logps, samples.mask) + beta * _log_ratio(samples)

    def fresh(surrogate: Callable[..., Tensor], values: str) -> Callable[[Samples], Tensor]:
        return lambda s: surrogate(s.token_logps, getattr(s, values), s.mask, s.group)

    mean, no_score = "naive: derivative of the sample mean", "naive: full vocabulary, no score term"
    stale = "naive: stale taken for fresh"
    return [
        Form(KL, mean, _log_ratio, biased=True),
        Form(KL, no_score, lambda s: sequence_sum(declared(s.step_kl, "step_kl"), s.mask), biased=True),
        Form(KL, stale, fresh(kl_full, "step_kl"), grouped=True, stale=True, biased=True),
        Form(ENTROPY, mean, lambda s: -sequence_sum(s.token_logps, s.mask), biased=True),
        Form(ENTROPY, no_score, lambda s: sequence_sum(declared(s.step_entropy, "step_entropy"), s.mask), biased=True),
        Form(ENTROPY, stale, fresh(entropy_full, "step_entropy"), grouped=True, stale=True, biased=True),
        Form(REWARD, "naive: baseline with the own value", own_value, grouped=True, biased=True),
        Form(REWARD, stale, fresh(reward_plain, "rewards"), grouped=True, stale=True, biased=True),
        Form(OBJECTIVE, mean, sample_mean, biased=True),
    ]


def _kl_plain(samples: Samples) -> Tensor:
    reference = declared(samples.reference_token_logps, "reference_token_logps")
    return kl_plain(samples.token_logps, reference, *_rest(samples))


def _kl_full(samples: Samples) -> Tensor:
    return kl_full(samples.token_logps, declared(samples.step_kl, "step_kl"), *_rest(samples))


def _entropy_plain(samples: Samples) -> Tensor:
    return entropy_plain(samples.token_logps, *_rest(samples))


def _entropy_full(samples: Samples) -> Tensor:
    return entropy_full(samples.token_logps, declared(samples.step_entropy, "step_entropy"), *_rest(samples))


def _reward(samples: Samples) -> Tensor:
    return reward_plain(samples.token_logps, _rewards(samples), *_rest(samples))


def _rewards(samples: Samples) -> Tensor:
    return declared(samples.rewards, "rewards")


def _log_ratio(samples: Samples) -> Tensor:
    reference = declared(samples.reference_token_logps, "reference_token_logps")
    return sequence_sum(samples.token_logps - reference, samples.mask)


def _rest(samples: Samples) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return samples.mask, samples.group, samples.behavior_token_logps
