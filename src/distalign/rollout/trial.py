"""How responses of a model are sampled, found out at its first use by comparing with its own logits.

A model that misreads padding or a cache does so silently.
"""

from __future__ import annotations

import logging
from typing import Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from distalign.engine.attention import CannotShare, expected_windows
from distalign.engine.forward import device_of, embedding_weight, evaluating, text_config
from distalign.engine.selfcheck import check, distance, sample_groups, state_of, tolerance_of
from distalign.errors import InputError
from distalign.rollout.decode import Forked, Shared, encode_prompts, numbers

logger = logging.getLogger("distalign.rollout")


class Way(NamedTuple):
    """How responses are sampled.

    prompts: "padded", several lengths at once, or "equal", one length at a time. cache: "shared", one copy of a
    prompt's for all of its responses, "copied" for each, or "none": the whole sequence is read again for each token.
    """

    prompts: Literal["padded", "equal"]
    cache: Literal["shared", "copied", "none"]


# The way of every state of a model, and the length up to which prompts may be padded.
_WAYS: WeakKeyDictionary[nn.Module, dict[tuple, tuple[Way, int | None]]] = WeakKeyDictionary()


def way_of(model: nn.Module, longest: int) -> Way:
    """The fastest way that draws from the model's own distribution, for sequences of up to `longest` tokens.

    A change of dtype, device, attention implementation, autocast or head tries anew. Modes and the random state are
    left as they were. Raises InputError for a model that is not causal.
    """
    ways, state = _WAYS.setdefault(model, {}), state_of(model)
    if state not in ways:
        limit, device = check(model, kernels=False).length_limit, device_of(model)
        with torch.random.fork_rng([device] if device.type == "cuda" else []), evaluating(model):
            ways[state] = _find(model), limit
    way, limit = ways[state]
    return way if limit is None or longest <= limit else way._replace(prompts="equal")


def _find(model: nn.Module) -> Way:
    """The way of a model, with one warning of what it cannot do."""
    kind = text_config(model).model_type
    prompts, reason = _prompts(model)
    if reason:
        how = "its prompts are not padded: they are answered one length at a time"
        if prompts is None:
            how = "its cache is not used: every token reads the whole sequence again, which is slow"
        logger.warning("%s: %s (%s)", kind, how, reason)
    if prompts is None:
        return Way("equal", "none")
    reason = _why_not_shared(model, of_one_length=prompts == "equal")
    if reason:
        logger.warning("%s: a prompt's cache is copied for each of its responses (%s)", kind, reason)
    return Way(prompts, "copied" if reason else "shared")


def _prompts(model: nn.Module) -> tuple[Literal["padded", "equal"] | None, str]:
    """How prompts are encoded (None: with no cache), and why not a faster way: two prompts, two responses to each."""
    groups = sample_groups(text_config(model), len(embedding_weight(model)))
    prompts, after = [group.prompt for group in groups], [group.responses[0][:2] for group in groups]
    truth = torch.stack([_own(model, prompt, own) for prompt, own in zip(prompts, after, strict=True)])
    truth = truth.repeat_interleave(2, 0)
    tolerance, reason = tolerance_of(model), ""
    ways: list[tuple[Literal["padded", "equal"], list[list[int]]]] = [("padded", [[0, 1]]), ("equal", [[0], [1]])]
    for way, batches in ways:
        try:
            logits = [_by_cache(model, [prompts[i] for i in batch], [after[i] for i in batch]) for batch in batches]
        except torch.OutOfMemoryError:
            raise
        except Exception as problem:
            # Foreign code met a cache or a mask it was not written for; whatever it raises means the same.
            reason = reason or f"{type(problem).__name__}: {' '.join(str(problem).split())[:120]}"
            continue
        error = distance(torch.cat(logits), truth)
        if error <= tolerance:
            return way, reason
        reason = reason or f"padding changes log-probabilities by {error:.2g} nats"
    return None, reason


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


def _why_not_shared(model: nn.Module, *, of_one_length: bool) -> str | None:
    """Why a prompt's cache cannot be shared (None: it can): two steps of three responses, one of them dropped."""
    config = text_config(model)
    try:
        windows = expected_windows(config)
    except CannotShare as refusal:
        return str(refusal)
    groups = sample_groups(config, len(embedding_weight(model)))
    device = device_of(model)
    parents, kept = torch.tensor([0, 0, 1], device=device), torch.tensor([0, 2], device=device)
    tokens = torch.tensor([groups[0].responses[0][0], groups[0].responses[1][0], groups[1].responses[0][0]]).to(device)
    prompts, pad_id = [group.prompt for group in groups], groups[0].prompt[0]
    if of_one_length:
        prompts = [prompt[: min(map(len, prompts))] for prompt in prompts]
    try:
        encoded = encode_prompts(model, prompts, pad_id)
        shared = Shared(encoded, parents, 2)
        with shared.decoding():
            logits = [shared.step(tokens)]
            used = list(shared.cache.windows)
            shared.keep(kept)
            logits.append(shared.step(tokens[kept]))
    except torch.OutOfMemoryError:
        raise
    except (CannotShare, InputError) as refusal:
        return str(refusal)
    except Exception as problem:
        # Foreign code met a cache it was not written for; whatever it raises means the same: not this way.
        return f"it does not run on a shared cache ({type(problem).__name__}: {problem})"
    if used != windows:
        return f"its layers ask for windows {used}, its configuration for {windows}"
    forked = Forked(encoded, parents, 2)
    expected = [forked.step(tokens)]
    forked.keep(kept)
    expected.append(forked.step(tokens[kept]))
    error = max(distance(a, b) for a, b in zip(logits, expected, strict=True))
    return None if error <= tolerance_of(model) else f"a shared cache changes log-probabilities by {error:.2g} nats"
