"""How responses of a model are sampled, found out at its first use by comparing with its own logits."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from distalign.engine.forward import device_of, embedding_weight, evaluating, text_config
from distalign.engine.selfcheck import EngineReport, check, distance, sample_groups, tolerance_of
from distalign.rollout.decode import Forked, encode_prompts, numbers

logger = logging.getLogger("distalign.rollout")

# padded: prompts of several lengths at once, each as long as the longest. equal: one length at a time. uncached: one
# length at a time, and the whole sequence read again for each token.
Way = Literal["padded", "equal", "uncached"]

# The way found, and the engine's report at that time: another dtype, device or attention has another.
_WAYS: WeakKeyDictionary[nn.Module, tuple[EngineReport, Way]] = WeakKeyDictionary()


def way_of(model: nn.Module, longest: int) -> Way:
    """The fastest way that draws from the model's own distribution, for sequences of up to `longest` tokens.

    Raises InputError for a model that is not causal.
    """
    report = replace(check(model, kernels=False), by_flex=False)
    known, way = _WAYS.get(model, (None, "padded"))
    if known != report:
        device = device_of(model)
        with torch.random.fork_rng([device] if device.type == "cuda" else []), evaluating(model):
            way, reason = _find(model)
        _WAYS[model] = report, way
        if reason:
            how = "its prompts are not padded: they are answered one length at a time"
            if way == "uncached":
                how = "its cache is not used: every token reads the whole sequence again, which is slow"
            logger.warning("%s: %s (%s)", report.model_type, how, reason)
    beyond = report.length_limit is not None and longest > report.length_limit
    return "equal" if beyond and way == "padded" else way


def _find(model: nn.Module) -> tuple[Way, str]:
    """The way, and why not a faster one: two prompts, two equal responses to each, of two tokens."""
    groups = sample_groups(text_config(model), len(embedding_weight(model)))
    prompts, after = [group.prompt for group in groups], [group.responses[0][:2] for group in groups]
    truth = torch.stack([_own(model, prompt, own) for prompt, own in zip(prompts, after, strict=True)])
    truth = truth.repeat_interleave(2, 0)
    tolerance, reason = tolerance_of(model), ""
    ways: list[tuple[Way, list[list[int]]]] = [("padded", [[0, 1]]), ("equal", [[0], [1]])]
    for way, batches in ways:
        try:
            found = [_by_cache(model, [prompts[i] for i in batch], [after[i] for i in batch]) for batch in batches]
        except torch.OutOfMemoryError:
            raise
        except Exception as problem:
            # Foreign code met a cache or a mask it was not written for; whatever it raises means the same.
            reason = reason or f"{type(problem).__name__}: {' '.join(str(problem).split())[:120]}"
            continue
        error = distance(torch.cat(found), truth)
        if error <= tolerance:
            return way, reason
        reason = reason or f"padding changes log-probabilities by {error:.2g} nats"
    return "uncached", reason


def _own(model: nn.Module, prompt: list[int], after: list[int]) -> Tensor:
    """Logits after the prompt and after each token, by the model alone: places, vocabulary."""
    ids = torch.tensor([[*prompt, *after]], device=device_of(model))
    return numbers(model(input_ids=ids, use_cache=False).logits[0, -len(after) - 1 :], type(model).__name__)


def _by_cache(model: nn.Module, prompts: list[list[int]], after: list[list[int]]) -> Tensor:
    """The same by a cache, for several prompts and twice for each: responses, places, vocabulary."""
    encoded = encode_prompts(model, prompts, prompts[0][0])
    parents = torch.arange(len(prompts), device=device_of(model)).repeat_interleave(2)
    logits = [encoded.logits[parents]]
    decoder = Forked(encoded, parents, len(after[0]))
    for tokens in torch.tensor(after, device=device_of(model))[parents].unbind(1):
        logits.append(decoder.step(tokens))
    return torch.stack(logits, 1)
