"""Judges compare two responses: a reward, a function, a known target, or an endpoint (`docs/judges.md`)."""

from __future__ import annotations

from distalign.judge.base import Comparison, Ids, Judge, JudgeError, Judgement
from distalign.judge.client import BudgetError, EndpointError
from distalign.judge.endpoint import EndpointJudge
from distalign.judge.local import FunctionJudge, RewardJudge
from distalign.judge.make import check_judge, make_judge
from distalign.judge.settings import EndpointSettings, JudgeSettings

__all__ = [
    "BudgetError",
    "Comparison",
    "EndpointError",
    "EndpointJudge",
    "EndpointSettings",
    "FunctionJudge",
    "Ids",
    "Judge",
    "JudgeError",
    "JudgeSettings",
    "Judgement",
    "RewardJudge",
    "check_judge",
    "make_judge",
]
