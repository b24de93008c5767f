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
from distalign.engine.drawn import Drawn, score_drawn, score_own
from distalign.engine.head import CannotTile, head_of
from distalign.evaluate.settings import Evaluation
from distalign.policy import Source
from distalign.progress import progress
from distalign.rollout import sample, sample_with_states

logger = logging.getLogger("distalign.evaluate")


@dataclass
class Answers:
    """What a policy gave: responses[prompt][sample] as ids, and sums over their tokens in nats, a value a response.

    `pair_logps` are ln π of the held-out pairs, preferred response first. `drawn` is what the responses are scored
    from; None when they have been. `own_reference`: they are the reference's own.
    """

    name: str
    key: str
    responses: list[list[list[int]]]
    pair_logps: Float[Tensor, "pairs 2"]
    scores: dict[str, Float[Tensor, "responses"]]
    drawn: Drawn | None = None
    own_reference: bool = False

    def save(self, folder: Path) -> None:
        """Write everything but the states; the key last, so that a torn folder is not taken for a whole one."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "key.json").unlink(missing_ok=True)
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
    except (OSError, ValueError, KeyError, SafetensorError):
        return None
    return Answers(name, key, responses, scores.pop("pair_logps"), scores)


def content_key(source: Source, settings: Evaluation, prompts: Sequence[list[int]], pairs: Sequence[Group]) -> str:
    """Hash of what decides the answers: weights, prompts, pairs, and how they are sampled."""
    asked = [settings.seed, settings.samples, settings.max_new_tokens, settings.temperature, settings.dtype]
    asked += [settings.rows, [list(prompt) for prompt in prompts], [[g.prompt, g.responses] for g in pairs]]
    digest = hashlib.sha256(json.dumps([asked, weights_digest(source)]).encode())
    return digest.hexdigest()


def weights_digest(source: Source) -> str:
    """Hash of a folder's weights and configuration; of a hub model its commit, and its name where that is unknown."""
    digest = hashlib.sha256()
    for place in (source.path, source.adapter):
        folder = Path(place) if place else None
        if folder is None:
            continue
        if not folder.is_dir():
            commit = getattr(source.config(), "_commit_hash", None)
            digest.update(f"{source.path}@{commit}".encode())
            continue
        for file in sorted(folder.iterdir()):
            if file.suffix == ".safetensors" or file.name in ("config.json", "adapter_config.json"):
                digest.update(file.name.encode())
                with file.open("rb") as opened:
                    while block := opened.read(1 << 24):
                        digest.update(block)
    return digest.hexdigest()


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
    own_draw: int,
) -> Answers:
    """Sample the policy, and score the pairs. `own_draw` keeps policies from drawing with the same random numbers."""
    asked: dict[str, Any] = {"n": settings.samples, "max_new_tokens": settings.max_new_tokens, "rows": settings.rows}
    asked |= {"temperature": settings.temperature, "end_id": end_id, "seed": 1_000_003 * settings.seed + own_draw}
    scores: dict[str, Tensor] = {}
    drawn = None
    with progress(f"answers of {name}", len(prompts)) as advance:
        try:
            head = head_of(model)
            responses, states = sample_with_states(model, prompts, **asked, progress=advance)
            drawn = Drawn(responses, states, head)
        except CannotTile:
            responses = sample(model, prompts, **asked, progress=advance)
    if drawn is None:
        groups = [Group(prompt, own) for prompt, own in zip(prompts, responses, strict=True)]
        budget = settings.token_budget
        found = score_in_batches(
            model, groups, token_budget=budget, reference=reference, entropy=True, temperature=settings.temperature
        )
        assert found.step_entropy is not None
        assert found.step_kl is not None
        scores = {"logps": found.logps, "entropy": found.step_entropy.sum(-1), "kl": found.step_kl.sum(-1)}
        scores = {key: values.double().cpu() for key, values in scores.items()}
    pair_logps = torch.zeros(0, 2, dtype=torch.float64)
    if pairs:
        with progress(f"pairs of {name}", len(pairs)) as advance:
            found = score_in_batches(model, pairs, token_budget=settings.token_budget, progress=advance)
        pair_logps = found.logps.double().cpu().view(-1, 2)
    return Answers(name, key, responses, pair_logps, scores, drawn, own_reference=model is reference)


def score_answers(
    answers: Sequence[Answers], reference: Any, settings: Evaluation, prompts: Sequence[list[int]]
) -> None:
    """Entropy and KL(π ‖ π₀) of every response that has none yet, in one pass of the reference for all policies.

    Answers drawn by the reference itself need no pass: their states are the reference's.
    """
    waiting = [(one, one.drawn) for one in answers if one.drawn is not None]
    own = [one for one in waiting if one[0].own_reference]
    others = [one for one in waiting if not one[0].own_reference]
    found = [score_own(drawn, temperature=settings.temperature) for _, drawn in own]
    if others:
        with progress("KL to the reference", len(prompts)) as advance:
            found += score_drawn(
                [drawn for _, drawn in others],
                prompts,
                reference,
                token_budget=settings.token_budget,
                temperature=settings.temperature,
                progress=advance,
            )
    for (one, _), scores in zip([*own, *others], found, strict=True):
        one.scores = {"logps": scores.logps, "entropy": scores.entropy, "kl": scores.kl}
        one.drawn = None
