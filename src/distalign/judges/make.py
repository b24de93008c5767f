"""From settings to a judge: what can be refused without weights is refused first."""

from __future__ import annotations

from typing import Any

from distalign.judges.base import Judge, JudgeError
from distalign.judges.endpoint import EndpointJudge
from distalign.judges.local import FunctionJudge, RewardJudge
from distalign.judges.settings import JudgeSettings
from distalign.rewards import Reward, RewardSettings, check_rewards, make_reward


def check_judge(
    settings: JudgeSettings, *, conversational: bool, target: bool = False, gamma: float | None = None
) -> None:
    """Refuse what cannot work before any weights are loaded. Raises JudgeError, RewardError.

    `conversational` says whether the prompts are chats, `target` whether there is a known one, and `gamma` is its
    sharpness (None without).
    """
    if settings.exact and not target:
        raise JudgeError("judge.exact: only a known target judges exactly; add target, or take another judge")
    if settings.reward:
        check_rewards(settings.reward, conversational=conversational, target=target, gamma=gamma)
    elif settings.function is not None:
        FunctionJudge(settings.function, timeout=settings.timeout)
    elif settings.endpoint is not None:
        EndpointJudge(settings.endpoint)


def make_judge(
    settings: JudgeSettings,
    *,
    base: Any = None,
    tokenizer: Any = None,
    token_budget: int = 4096,
    target: Any = None,
    gamma: float | None = None,
    trained: Reward | None = None,
) -> Judge:
    """The judge that the settings describe. Raises JudgeError, RewardError.

    `reward` and `exact` need `base` (frozen) and `tokenizer`, the policies' own; `target` and `gamma` are the known
    target and its sharpness, `trained` is `train_reward(...).reward`. `function` and `endpoint` need none of them.
    """
    if settings.function is not None:
        return FunctionJudge(settings.function, timeout=settings.timeout)
    if settings.endpoint is not None:
        return EndpointJudge(settings.endpoint)
    reward = make_reward(
        settings.reward or (RewardSettings(exact=True),),
        base=base,
        tokenizer=tokenizer,
        token_budget=token_budget,
        target=target,
        gamma=gamma,
        trained=trained,
    )
    return RewardJudge(reward, tokenizer, verdict=settings.verdict)
