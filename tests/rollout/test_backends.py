"""A backend samples what `sample` samples."""

from __future__ import annotations

import tiny

from distalign.rollout.backends import Backend, TransformersBackend
from distalign.rollout.sample import sample
from distalign.training.rounds import Rollout, RolloutSettings


def test_the_default_backend_is_sample():
    """Token for token, with the rows of the recipe."""
    model, prompts = tiny.model(), [[7, 8]]
    backend = Rollout(RolloutSettings(decode_batch_size=4), 3).backend
    assert isinstance(backend, Backend)
    assert backend == TransformersBackend(rows=4)
    settings = {"n": 3, "max_new_tokens": 5, "min_new_tokens": 1, "temperature": 0.8, "top_p": 0.9, "end_id": 3}
    drawn = backend.generate(model, prompts, seed=2, **settings)
    assert drawn == sample(model, prompts, seed=2, rows=4, **settings)
