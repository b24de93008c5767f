"""Each policy's responses to the prompts and its log-probabilities of the pairs: computed once and saved.

A policy's folder holds what it gave and a key made of its weights, the prompts and the settings. With the same key
nothing is run again, so a stopped evaluation goes on where it was, and one more policy costs one policy.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from distalign.engine import Group, score_in_batches
from distalign.engine.scoring import total
from distalign.errors import DAMAGED
from distalign.evaluation.metrics import without_end
from distalign.evaluation.setup import EvaluationSetup
from distalign.models.load import weights_digest
from distalign.models.policy import trained_temperature
from distalign.progress import progress
from distalign.rollout.sample import end_ids, sample

logger = logging.getLogger("distalign.evaluation")

_FORMAT = 7  # of the saved files; with another number everything is drawn again


@dataclass
class Answers:
    """What a policy gave: responses[prompt][sample] as ids, and sums over their tokens in nats, one per response.

    `pair_logps` are ln π of the held-out pairs, preferred response first, at the temperature of the policy's training;
    `reference_pair_logps` are π₀'s where the reference's own are of another.
    """

    name: str
    key: str
    responses: list[list[list[int]]]
    pair_logps: Float[Tensor, "pairs 2"]
    scores: dict[str, Float[Tensor, "responses"]]
    reference_pair_logps: Float[Tensor, "pairs 2"] | None = None

    def save(self, folder: Path) -> None:
        """Write it; the key last, so that no torn folder is believed."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "key.json").unlink(missing_ok=True)
        pairs = {"pair_logps": self.pair_logps, "reference_pair_logps": self.reference_pair_logps}
        given = {name: logps for name, logps in pairs.items() if logps is not None}
        save_file({**given, **self.scores}, folder / "scores.safetensors")
        (folder / "responses.json").write_text(json.dumps(self.responses), encoding="utf-8")
        (folder / "key.json").write_text(json.dumps({"key": self.key}), encoding="utf-8")


def policy_answers(setup: EvaluationSetup, name: str, folder: Path, pairs: Sequence[Group]) -> Answers:
    """A policy's answers to the prompts and pairs: from the folder if it holds them, or drawn, scored and saved now."""
    key = content_key(setup, name, pairs)
    answers = load_answers(folder, name, key)
    if answers is not None:
        logger.info("%s: its answers are those of %s", name, folder)
        return answers
    started = time.monotonic()
    answers = draw_answers(setup, name, key, pairs)
    answers.save(folder)
    setup.seconds[f"answers of {name}"] = time.monotonic() - started
    return answers


def is_answered(setup: EvaluationSetup, name: str, folder: Path, pairs: Sequence[Group]) -> bool:
    """Whether the folder holds what `policy_answers` would draw."""
    return load_answers(folder, name, content_key(setup, name, pairs)) is not None


def load_answers(folder: Path, name: str, key: str) -> Answers | None:
    """What the folder holds, if it is of that key and whole."""
    try:
        if json.loads((folder / "key.json").read_text(encoding="utf-8"))["key"] != key:
            return None
        scores = load_file(folder / "scores.safetensors")
        responses = json.loads((folder / "responses.json").read_text(encoding="utf-8"))
        pair_logps, of_reference = scores.pop("pair_logps"), scores.pop("reference_pair_logps", None)
    except (*DAMAGED, SafetensorError):
        return None
    return Answers(name, key, responses, pair_logps, scores, of_reference)


def content_key(setup: EvaluationSetup, name: str, pairs: Sequence[Group]) -> str:
    """Hash of what decides the answers and their scores: weights, the reference's too, prompts, pairs, sampling."""
    settings = setup.settings
    decisive = [settings.seed, settings.samples, settings.max_new_tokens, settings.temperature, settings.dtype]
    decisive += [settings.rows, setup.ids, [[g.prompt, g.responses] for g in pairs], setup.end_id]
    decisive.append(_temperature_of_pairs(setup, name))
    digests = [weights_digest(setup.sources[policy]) for policy in (name, "reference")]
    return hashlib.sha256(json.dumps([_FORMAT, name, decisive, digests]).encode()).hexdigest()


def _temperature_of_pairs(setup: EvaluationSetup, name: str) -> float:
    """Whatever it is sampled at: what a policy says of pairs is of the distribution that it learned."""
    source = setup.sources[name]
    return trained_temperature(str(source.adapter or source.path)) or 1.0


def draw_answers(setup: EvaluationSetup, name: str, key: str, pairs: Sequence[Group]) -> Answers:
    """Sample the policy, then score its responses and the pairs. Every name draws with random numbers of its own.

    The KL of the reference to itself is 0 and is not computed.
    """
    settings, model, prompts = setup.settings, setup.policy(name), setup.ids
    temperature, budget = settings.temperature or 1.0, settings.token_budget
    with progress(f"answers of {name}", len(prompts)) as advance:
        responses = sample(
            model,
            prompts,
            n=settings.samples,
            max_new_tokens=settings.max_new_tokens,
            temperature=temperature,
            end_id=setup.end_id,
            seed=1_000_003 * settings.seed + int(hashlib.sha256(name.encode()).hexdigest(), 16) % 1_000_003,
            rows=settings.rows,
            progress=advance,
        )
    groups = [Group(prompt, own) for prompt, own in zip(prompts, responses, strict=True)]
    with progress(f"scores of {name}", len(groups)) as advance:
        scores = score_in_batches(
            model,
            groups,
            token_budget=budget,
            reference=None if model is setup.base else setup.base,
            entropy=True,
            temperature=temperature,
            progress=advance,
        )
    assert scores.step_entropy is not None
    sums = {"logps": scores.logps, "entropy": total(scores.step_entropy)}
    sums["missing_end"] = without_end(responses, end_ids(model, setup.end_id))
    sums["kl"] = torch.zeros_like(scores.logps) if scores.step_kl is None else total(scores.step_kl)
    pair_logps, of_reference = torch.zeros(0, 2, dtype=torch.float64), None
    if pairs:
        own = _temperature_of_pairs(setup, name)
        with progress(f"pairs of {name}", len(pairs)) as advance:
            pair_scores = score_in_batches(model, pairs, token_budget=budget, temperature=own, progress=advance)
        pair_logps = pair_scores.logps.cpu().double().view(-1, 2)
        if own != _temperature_of_pairs(setup, "reference"):
            at_own = score_in_batches(setup.base, pairs, token_budget=budget, temperature=own)
            of_reference = at_own.logps.cpu().double().view(-1, 2)
    scores_of = {key: values.cpu().double() for key, values in sums.items()}
    return Answers(name, key, responses, pair_logps, scores_of, of_reference)
