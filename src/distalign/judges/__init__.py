"""Judges compare two responses: a reward, a function, a known target, or an endpoint (`docs/judges.md`)."""

from __future__ import annotations

from distalign.judges.base import Comparison, Ids, Judge, JudgeError, Judgement
from distalign.judges.endpoint import BudgetError, EndpointError, EndpointJudge, EndpointSettings
from distalign.judges.local import FunctionJudge, RewardJudge
from distalign.judges.make import JudgeSettings, check_judge, make_judge

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
