"""Each policy's responses to the prompts and its log-probabilities of the pairs: drawn once, kept by their content.

A policy's folder holds what it gave and a key made of its weights, the prompts and the settings. With the same key
nothing is run again, so a stopped evaluation goes on where it was, and one more policy costs one policy.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from distalign.engine import Group, score_in_batches
from distalign.engine.drawn import Drawn, score_drawn
from distalign.engine.head import CannotTile, head_of
from distalign.engine.packing import ReadPrompt
from distalign.evaluate.settings import Evaluation
from distalign.policy import Source, weights_digest
from distalign.progress import progress
from distalign.rollout import sample, sample_with_scores, sample_with_states

logger = logging.getLogger("distalign.evaluate")

_STATES = "states.safetensors"
_READ = 2**30  # bytes of the prompts' keys and values that the reference may keep between its answers and its pass
_FORMAT = 3  # of what is kept; another number, and everything is drawn again


@dataclass
class Answers:
    """What a policy gave: responses[prompt][sample] as ids, and sums over their tokens in nats, a value a response.

    `pair_logps` are ln π of the held-out pairs, preferred response first. `drawn` is what the responses are scored
    from; None when they have been. `states` are those of answers that were kept before they were scored: with the
    policy's head they make `drawn`. `read` are the prompts as the reference read them, of its own fresh answers.
    """

    name: str
    key: str
    responses: list[list[list[int]]]
    pair_logps: Float[Tensor, "pairs 2"]
    scores: dict[str, Float[Tensor, "responses"]]
    drawn: Drawn | None = None
    states: Float[Tensor, "tokens hidden"] | None = None
    read: list[ReadPrompt | None] | None = None

    def save(self, folder: Path) -> None:
        """Write it, the states only while they wait to be scored; the key last, so that no torn folder is believed."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "key.json").unlink(missing_ok=True)
        (folder / _STATES).unlink(missing_ok=True)
        if self.drawn is not None:
            save_file({"states": self.drawn.states.cpu().contiguous()}, folder / _STATES)
        save_file({"pair_logps": self.pair_logps, **self.scores}, folder / "scores.safetensors")
        (folder / "responses.json").write_text(json.dumps(self.responses), encoding="utf-8")
        (folder / "key.json").write_text(json.dumps({"key": self.key}), encoding="utf-8")


def load_answers(folder: Path, name: str, key: str) -> Answers | None:
    """What the folder holds, if it is of that key and whole."""
    try:
        if json.loads((folder / "key.json").read_text(encoding="utf-8"))["key"] != key:
            return None
        scores = load_file(folder / "scores.safetensors")
        responses = json.loads((folder / "responses.json").read_text(encoding="utf-8"))
        pair_logps = scores.pop("pair_logps")
        states = None if "kl" in scores else load_file(folder / _STATES)["states"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None
    return Answers(name, key, responses, pair_logps, scores, states=states)


def content_key(
    name: str,
    source: Source,
    reference: Source,
    settings: Evaluation,
    prompts: Sequence[list[int]],
    pairs: Sequence[Group],
    end_id: int,
) -> str:
    """Hash of what decides the answers and their scores: weights, the reference's too, prompts, pairs, sampling."""
    asked = [settings.seed, settings.samples, settings.max_new_tokens, settings.temperature, settings.dtype]
    asked += [settings.rows, [list(prompt) for prompt in prompts], [[g.prompt, g.responses] for g in pairs], end_id]
    digests = [weights_digest(source), weights_digest(reference)]
    return hashlib.sha256(json.dumps([_FORMAT, name, asked, digests]).encode()).hexdigest()


def draw_number(name: str) -> int:
    """A number of its own for every name, so that policies draw with random numbers of their own."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 1_000_003


def draw_answers(
    name: str,
    key: str,
    model: Any,
    settings: Evaluation,
    prompts: Sequence[list[int]],
    pairs: Sequence[Group],
    *,
    end_id: int,
    reference: Any,
) -> Answers:
    """Sample the policy, with random numbers of its name's own, and score the pairs."""
    asked: dict[str, Any] = {"n": settings.samples, "max_new_tokens": settings.max_new_tokens, "rows": settings.rows}
    asked |= {
        "temperature": settings.temperature,
        "end_id": end_id,
        "seed": 1_000_003 * settings.seed + draw_number(name),
    }
    with progress(f"answers of {name}", len(prompts)) as advance:
        found = _draw(model, reference, prompts, asked | {"progress": advance}, settings.token_budget)
    pair_logps = torch.zeros(0, 2, dtype=torch.float64)
    if pairs:
        with progress(f"pairs of {name}", len(pairs)) as advance:
            scores = score_in_batches(model, pairs, token_budget=settings.token_budget, progress=advance)
        pair_logps = scores.logps.double().cpu().view(-1, 2)
    return Answers(name, key, pair_logps=pair_logps, **found)


def _draw(
    model: Any, reference: Any, prompts: Sequence[list[int]], asked: dict[str, Any], token_budget: int
) -> dict[str, Any]:
    """Responses, and their scores or what they are to be scored from, by the names of `Answers`."""
    try:
        head = head_of(model)
    except CannotTile:
        head = None
    if model is reference:
        # Its scores need no pass. On a CPU a second pass over the prompts is dear; elsewhere calls are, not operations.
        keep = _READ if head is not None and model.device.type == "cpu" else 0
        own = sample_with_scores(model, prompts, **asked, keep=keep)
        scores = {"logps": own.logps, "entropy": own.entropy, "kl": torch.zeros_like(own.logps)}
        return {"responses": own.responses, "scores": scores, "read": own.read}
    if head is None:
        responses, temperature = sample(model, prompts, **asked), asked["temperature"]
        groups = [Group(prompt, own) for prompt, own in zip(prompts, responses, strict=True)]
        settings: dict[str, Any] = {"token_budget": token_budget, "temperature": temperature}
        found = score_in_batches(model, groups, reference=reference, entropy=True, **settings)
        assert found.step_entropy is not None
        assert found.step_kl is not None
        scores = {"logps": found.logps, "entropy": found.step_entropy.sum(-1), "kl": found.step_kl.sum(-1)}
        return {"responses": responses, "scores": {key: values.double().cpu() for key, values in scores.items()}}
    responses, states = sample_with_states(model, prompts, **asked)
    return {"responses": responses, "scores": {}, "drawn": Drawn(responses, states, head)}


def score_answers(
    answers: Sequence[Answers],
    reference: Any,
    settings: Evaluation,
    prompts: Sequence[list[int]],
    read: Sequence[ReadPrompt | None] | None = None,
) -> None:
    """Entropy and KL(π ‖ π₀) of every response that has none yet, in one pass of the reference for all policies.

    Prompts that the reference has read before, a value a prompt, are not read again.
    """
    waiting = [one for one in answers if one.drawn is not None]
    if not waiting:
        return
    with progress("KL to the reference", len(prompts)) as advance:
        found = score_drawn(
            [one.drawn for one in waiting if one.drawn is not None],
            prompts,
            reference,
            token_budget=settings.token_budget,
            temperature=settings.temperature,
            read=read,
            progress=advance,
        )
    for one, scores in zip(waiting, found, strict=True):
        one.scores = {"logps": scores.logps, "entropy": scores.entropy, "kl": scores.kl}
        one.drawn = None
