"""Judges compare two responses: a reward, a function, a known target, or an endpoint (`docs/judges.md`)."""

from __future__ import annotations

from distalign.judges.base import Comparison, Ids, Judge, JudgeError, Judgement
from distalign.judges.client import BudgetError, EndpointError
from distalign.judges.endpoint import EndpointJudge
from distalign.judges.local import FunctionJudge, RewardJudge
from distalign.judges.make import check_judge, make_judge
from distalign.judges.settings import EndpointSettings, JudgeSettings

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
