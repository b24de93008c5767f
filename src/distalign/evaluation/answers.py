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

from distalign.engine import Group, check, score_in_batches
from distalign.engine.attention import attention_configs
from distalign.engine.drawn import Drawn, score_drawn
from distalign.engine.lm_head import CannotTile
from distalign.engine.memory import available
from distalign.engine.packing import ReadPrompt
from distalign.evaluation.settings import Evaluation
from distalign.models.load import Source, weights_digest
from distalign.progress import progress
from distalign.rollout.sample import sample, sample_in_batches, sample_with_scores

logger = logging.getLogger("distalign.evaluation")

# On a CPU operations are dear, and what is kept spares some. Bytes of the prompts' keys and values that the reference
# keeps for the other policies' responses, and of a batch's logits, if a quarter of the free memory is as much.
_READ, _LOGITS = 2**32, 2**30
_FORMAT = 4  # of what is kept; another number, and everything is drawn again


@dataclass
class Answers:
    """What a policy gave: responses[prompt][sample] as ids, and sums over their tokens in nats, a value a response.

    `pair_logps` are ln π of the held-out pairs, preferred response first. `read` are the prompts as the reference read
    them, of its own fresh answers.
    """

    name: str
    key: str
    responses: list[list[list[int]]]
    pair_logps: Float[Tensor, "pairs 2"]
    scores: dict[str, Float[Tensor, "responses"]]
    read: list[ReadPrompt | None] | None = None

    def save(self, folder: Path) -> None:
        """Write it; the key last, so that no torn folder is believed."""
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
        pair_logps = scores.pop("pair_logps")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None
    return Answers(name, key, responses, pair_logps, scores)


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
    read: Sequence[ReadPrompt | None] | None = None,
    keep_read: bool = False,
) -> Answers:
    """Sample the policy, with random numbers of its name's own, and score responses and pairs.

    Prompts that the reference has read before, a value a prompt, are not read again for their responses' KL. With
    `keep_read` the answers of the reference itself have them.
    """
    asked: dict[str, Any] = {"n": settings.samples, "max_new_tokens": settings.max_new_tokens, "rows": settings.rows}
    asked |= {
        "temperature": settings.temperature,
        "end_id": end_id,
        "seed": 1_000_003 * settings.seed + draw_number(name),
    }
    with progress(f"answers of {name}", len(prompts)) as advance:
        asked["progress"] = advance
        found = _draw(model, reference, prompts, asked, settings.token_budget, read=read, keep_read=keep_read)
    pair_logps = torch.zeros(0, 2, dtype=torch.float64)
    if pairs:
        with progress(f"pairs of {name}", len(pairs)) as advance:
            scores = score_in_batches(model, pairs, token_budget=settings.token_budget, progress=advance)
        pair_logps = scores.logps.double().cpu().view(-1, 2)
    return Answers(name, key, pair_logps=pair_logps, **found)


def _draw(
    model: Any,
    reference: Any,
    prompts: Sequence[list[int]],
    asked: dict[str, Any],
    token_budget: int,
    *,
    read: Sequence[ReadPrompt | None] | None,
    keep_read: bool,
) -> dict[str, Any]:
    """Responses and their scores, by the names of `Answers`."""
    on_cpu, spare = model.device.type == "cpu", (available(model.device) or 2**32) // 4
    if model is reference:
        keep = min(_READ, spare) if keep_read and on_cpu and check(model, kernels=False).path == "shared" else 0
        own = sample_with_scores(model, prompts, **asked, keep=keep)
        scores = {"logps": own.logps, "entropy": own.entropy, "kl": torch.zeros_like(own.logps)}
        return {"responses": own.responses, "scores": scores, "read": own.read}
    settings: dict[str, Any] = {"token_budget": token_budget, "temperature": asked["temperature"]}
    n = asked["n"]
    sums = torch.zeros(3, len(prompts), n, dtype=torch.float64)

    def score_batch(numbers: Sequence[int], drawn: Drawn) -> None:
        own, known = [prompts[i] for i in numbers], None if read is None else [read[i] for i in numbers]
        found = score_drawn(drawn, own, reference, read=known, **settings)
        sums[:, numbers] = torch.stack([found.logps, found.entropy, found.kl]).view(3, -1, n)

    # In half precision the head computed logits that are rounded; products of its states are not.
    keep = min(_LOGITS, spare) if on_cpu and model.dtype.itemsize >= 4 else 0
    # Drawing leaves cores idle: small matrices, one after another.
    behind = on_cpu and torch.get_num_threads() > 1 and _apart(model, reference)
    check(reference, kernels=False)  # Which sets the random state back when it has run: here, not beside the drawing.
    try:
        responses = sample_in_batches(model, prompts, score_batch, **asked, keep=keep, behind=behind)
    except CannotTile:
        responses = None  # And the frames of the exception, with a batch in them, are gone.
    if responses is None:
        return _draw_and_score(model, reference, prompts, asked, settings)
    return {"responses": responses, "scores": dict(zip(("logps", "entropy", "kl"), sums.flatten(1), strict=True))}


def _apart(model: Any, reference: Any) -> bool:
    """Whether both can run at once: they have no configuration in common, and the thread no mode of its own."""
    configs = [{id(config) for config in attention_configs(one)} for one in (model, reference)]
    return configs[0].isdisjoint(configs[1]) and not (
        torch.is_autocast_enabled(model.device.type) or torch.is_inference_mode_enabled()
    )


def _draw_and_score(
    model: Any, reference: Any, prompts: Sequence[list[int]], asked: dict[str, Any], settings: dict[str, Any]
) -> dict[str, Any]:
    """As `_draw`, of a model whose logits cannot be told from its states."""
    responses = sample(model, prompts, **asked)
    groups = [Group(prompt, own) for prompt, own in zip(prompts, responses, strict=True)]
    found = score_in_batches(model, groups, reference=reference, entropy=True, **settings)
    assert found.step_entropy is not None
    assert found.step_kl is not None
    scores = {"logps": found.logps, "entropy": found.step_entropy.sum(-1), "kl": found.step_kl.sum(-1)}
    return {"responses": responses, "scores": {key: values.double().cpu() for key, values in scores.items()}}
