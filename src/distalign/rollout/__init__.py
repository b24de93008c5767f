"""Responses of the current policy: sampled by a backend, corrected where their end is missing, kept for a round."""

from __future__ import annotations

from distalign.rollout.backends import (
    Backend,
    ContinuousBackend,
    TransformersBackend,
    VllmBackend,
    check_backend,
    make_backend,
)
from distalign.rollout.buffer import Buffer
from distalign.rollout.missing_end import apply_missing_end
from distalign.rollout.sampling import choose, sample, sample_in_batches, sample_with_scores

__all__ = [
    "Backend",
    "Buffer",
    "ContinuousBackend",
    "TransformersBackend",
    "VllmBackend",
    "apply_missing_end",
    "check_backend",
    "choose",
    "make_backend",
    "sample",
    "sample_in_batches",
    "sample_with_scores",
]
