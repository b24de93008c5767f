"""From settings to a judge: what can be refused without weights is refused first."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distalign.judges.base import Judge, JudgeError
from distalign.judges.endpoint import EndpointJudge, EndpointSettings
from distalign.judges.local import FunctionJudge, RewardJudge
from distalign.rewards import Reward, Rewards, RewardSettings, check_rewards, make_reward
from distalign.settings import Positive, Section


class JudgeSettings(Section):
    """Who compares responses: one of `reward`, `function`, `exact` and `endpoint`.

    reward: as in a recipe. function: `file.py:name` or `module:name`, asked in both orders, which are averaged;
    `timeout` bounds one call of it, in seconds. endpoint: asked in both orders, a tie where they disagree. exact:
    P_{π*} of the known target. verdict: what a reward or the target says, the probability σ(ΔR), or its sign.
    """

    reward: Rewards = ()
    function: str | None = None
    exact: bool = False
    endpoint: EndpointSettings | None = None
    verdict: Literal["probability", "sign"] = "probability"
    timeout: Positive = 60.0

    @model_validator(mode="after")
    def _one_kind(self) -> JudgeSettings:
        given = [bool(self.reward), self.function is not None, self.exact, self.endpoint is not None]
        if sum(given) != 1:
            raise ValueError(f"judge names {sum(given)} of reward, function, exact and endpoint; give one")
        if self.verdict == "sign" and not (self.reward or self.exact):
            raise ValueError("judge.verdict is about differences of rewards; leave it out, or judge by reward or exact")
        return self


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
        check_rewards(settings.reward, conversational=conversational, target=target, gamma=gamma is not None)
    elif settings.function is not None:
        FunctionJudge(settings.function, timeout=settings.timeout)
    elif settings.endpoint is not None:
        EndpointJudge(settings.endpoint)


def make_judge(
    settings: JudgeSettings,
    *,
    base: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    token_budget: int = 4096,
    target: nn.Module | None = None,
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
    assert base is not None
    assert tokenizer is not None
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
