"""Policies on the same held-out prompts and pairs: what they are, how far from the reference, and who wins."""

from __future__ import annotations

from distalign.evaluation.evaluate import evaluate
from distalign.evaluation.forecast import forecast
from distalign.evaluation.settings import Evaluation, load_evaluation

__all__ = ["Evaluation", "evaluate", "forecast", "load_evaluation"]
