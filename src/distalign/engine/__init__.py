"""The engine: ln π(response | prompt) of a causal language model, each prompt encoded once where the model allows."""

from __future__ import annotations

from distalign.engine.packing import Group, micro_batches
from distalign.engine.scoring import Reference, Scores, join, score, score_in_batches
from distalign.engine.selfcheck import EngineReport, check

__all__ = [
    "EngineReport",
    "Group",
    "Reference",
    "Scores",
    "check",
    "join",
    "micro_batches",
    "score",
    "score_in_batches",
]
