"""How responses of a model are sampled, found out at its first use by comparing with its own logits.

A model that misreads padding or a cache does so silently.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from distalign.engine.attention import CannotShare, expected_windows
from distalign.engine.forward import device_of, embedding_weight, evaluating, text_config
from distalign.engine.selfcheck import check, distance, rope_switch, sample_groups, state_of, tolerance_of
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


# What is said of parts of a way that are not the fastest.
_SLOWER = {
    "equal": "prompts are answered one length at a time",
    "copied": "a prompt's cache is copied for each of its responses",
    "none": "every token reads the whole sequence again, which is slow",
}

# The way of every state of a model, and the length up to which prompts may be padded.
_WAYS: WeakKeyDictionary[nn.Module, dict[tuple, tuple[Way, int | None]]] = WeakKeyDictionary()


def way_of(model: nn.Module, prompts: Sequence[list[int]], max_new_tokens: int) -> Way:
    """The fastest way that draws from the model's own distribution, for responses of up to `max_new_tokens`.

    A change of dtype, device, attention implementation, autocast or head tries anew. Modes and the random state are
    left as they were. Raises InputError for a model that is not causal, and for prompts whose responses may pass a
    length from which all positions are rotated otherwise (dynamic and long RoPE): tokens drawn before it are of another
    model than the one that scores the whole sequence.
    """
    ways, state = _WAYS.setdefault(model, {}), state_of(model)
    if state not in ways:
        limit, device = check(model, kernels=False).length_limit, device_of(model)
        with torch.random.fork_rng([device] if device.type == "cuda" else []), evaluating(model):
            ways[state] = _find(model), limit
    way, limit = ways[state]
    if limit is None or max(map(len, prompts), default=0) + max_new_tokens <= limit:
        return way
    _check_positions(model, prompts, max_new_tokens)
    return way._replace(prompts="equal")


def _check_positions(model: nn.Module, prompts: Sequence[list[int]], max_new_tokens: int) -> None:
    switch = rope_switch(text_config(model))
    if switch is None:
        return
    kind, limit = switch
    # Long RoPE has two sets of rotations, and longer prompts are read by the second from the start.
    crossing = [n for n in map(len, prompts) if n + max_new_tokens > limit and (n <= limit or kind == "dynamic")]
    if crossing:
        raise InputError(
            f"{text_config(model).model_type}: positions are rotated otherwise from {limit + 1} tokens on (rope_type "
            f"{kind}), and prompts of up to {max(crossing)} tokens with responses of up to {max_new_tokens} pass that; "
            "draw shorter responses, or leave out such prompts"
        )


def _find(model: nn.Module) -> Way:
    """The first way that agrees with the model's own logits, with one warning of what it cannot do.

    Tried on two responses to each of two prompts.
    """
    config = text_config(model)
    first, second = sample_groups(config, len(embedding_weight(model)))
    as_long = [*second.prompt, *second.responses[0]][: len(first.prompt)]
    responses = [first.responses[0][:2], first.responses[2][:2], second.responses[0][:2], second.responses[0][2:4]]
    found, problems = Way("equal", "none"), []
    for way in (Way("padded", "shared"), Way("padded", "copied"), Way("equal", "shared"), Way("equal", "copied")):
        prompts = [first.prompt, second.prompt if way.prompts == "padded" else as_long]
        problem = _why_not(model, way.cache == "shared", prompts, responses)
        if problem is None:
            found = way
            break
        problems.append(f"{way.prompts} and {way.cache}: {problem}")
    if problems:
        slower = "; ".join(_SLOWER[part] for part in found if part in _SLOWER)
        logger.warning("%s: %s (%s)", config.model_type, slower, "; ".join(problems))
    return found


def _own(model: nn.Module, prompt: list[int], after: list[int]) -> Tensor:
    """Logits after the prompt and after each token, by the model alone: places, vocabulary."""
    ids = torch.tensor([[*prompt, *after]], device=device_of(model))
    return numbers(model(input_ids=ids, use_cache=False).logits[0, -len(after) - 1 :], type(model).__name__)


def _why_not(model: nn.Module, shared: bool, prompts: list[list[int]], responses: list[list[int]]) -> str | None:
    """Why the prompts' cache does not serve two responses to each of them, of which one leaves (None: it does)."""
    device = device_of(model)
    parents, tokens = torch.tensor([0, 0, 1, 1], device=device), torch.tensor(responses, device=device)
    kept = torch.tensor([0, 2, 3], device=device)
    truth = [_own(model, prompts[parent], own) for parent, own in zip(parents.tolist(), responses, strict=True)]
    after_prompt, after_one, after_two = torch.stack(truth, 1)
    try:
        windows = expected_windows(text_config(model)) if shared else []
        encoded = encode_prompts(model, prompts, prompts[0][0])
        errors = [distance(encoded.logits[parents], after_prompt)]
        decoder = (Shared if shared else Forked)(encoded, parents, 2)
        with decoder.decoding():
            errors.append(distance(decoder.step(tokens[:, 0]), after_one))
            if isinstance(decoder, Shared) and (used := list(decoder.cache.windows)) != windows:
                return f"its layers ask for windows {used}, its configuration for {windows}"
            decoder.keep(kept)
            errors.append(distance(decoder.step(tokens[kept, 1]), after_two[kept]))
    except torch.OutOfMemoryError:
        raise
    except (CannotShare, InputError) as refusal:
        return str(refusal)
    except Exception as problem:
        # Foreign code met a cache or a mask it was not written for; whatever it raises means the same: not this way.
        return f"{type(problem).__name__}: {' '.join(str(problem).split())[:120]}"
    return None if max(errors) <= tolerance_of(model) else f"log-probabilities change by {max(errors):.2g} nats"
