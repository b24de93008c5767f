"""Which path serves a model, found out once by comparing it with the model's own logits.

A model that ignores or misreads the shared-prefix attention does so silently, with log-probabilities that are wrong by
whole nats. So before a model is first used, a small sample is scored both ways. Where FlexAttention could serve its
layers, it is compared with the attention by segments on the same terms, values and gradients.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from distalign.engine import flex
from distalign.engine.attention import (
    CannotShare,
    Layout,
    attention_of,
    expected_windows,
    shared_attention,
    shared_hidden,
    shared_prefix_attention,
)
from distalign.engine.forward import (
    decoder_of,
    device_of,
    embedding_weight,
    encode,
    evaluating,
    require_causal_lm,
    text_config,
)
from distalign.engine.lm_head import CannotTile, HiddenRows, LogitRows, head_of, score_rows
from distalign.engine.packing import Group, Segment, frame, pack
from distalign.errors import InputError

logger = logging.getLogger("distalign.engine")

Path = Literal["shared", "padded", "plain"]


@dataclass(frozen=True)
class EngineReport:
    """How a model is served.

    path: "shared" (prompt encoded once), "padded" (sequences on their own, tiled head) or "plain" (the model's own
    logits). reason: one sentence. length_limit: sequences longer than this are served "plain", because what is computed
    of one depends on the others of a call, or on their padding; None where there is no such limit. by_flex: on the
    shared path, FlexAttention computes what it serves (`distalign.engine.flex`), the attention by segments the rest.
    """

    path: Path
    reason: str
    model_type: str
    length_limit: int | None = None
    by_flex: bool = False


# Largest and mean difference of a log-probability, in nats, that rounding explains. Float64 leaves room for norms that
# compute in float32 inside. A wrong mask is off by 0.1 to 3 nats on average.
_TOLERANCES = {
    torch.float64: (1e-5, 1e-5),
    torch.float32: (2e-3, 5e-4),
    torch.float16: (0.1, 0.02),
    torch.bfloat16: (0.6, 0.1),
}

# Largest difference of an output or a gradient, relative to its norm, between two orders of rounding. A wrong mask is
# off by 0.1 or more.
_FLEX_TOLERANCES: dict[torch.dtype | None, float] = {torch.float32: 5e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}

# More than two blocks of the mask, none of whose edges is the edge of a piece; a piece of no tokens and one of one.
_FLEX_SAMPLE = (Segment(140, (60, 0, 1, 37)), Segment(3, (90,)))

# What configurations call the number of keys that a query reads, at most (DeepSeek 3.2, Qwen 4, Doge).
SPARSE = ("index_topk", "index_topk_blocks", "indexer_budget", "keep_window_size")

# The report of every state of a model, and the calls of its layers on which FlexAttention has not been tried yet.
_REPORTS: WeakKeyDictionary[nn.Module, dict[tuple, tuple[EngineReport, list[flex.Call]]]] = WeakKeyDictionary()


def check(model: nn.Module, *, kernels: bool = True) -> EngineReport:
    """Find the fastest path on which `model` gives the log-probabilities of its own logits, and remember it.

    Run at the first use of a model, and again after a change of dtype, device, attention implementation or head.
    Without `kernels` FlexAttention, whose first use in a process compiles for half a minute, is left untried: `by_flex`
    then says what an earlier trial found. Modes and the random state are left as they were.
    Raises TypeError if `model` is not a causal language model of transformers or PEFT.
    """
    if model not in _REPORTS:
        require_causal_lm(model)
    reports = _REPORTS.setdefault(model, {})
    key = state_of(model)
    if key not in reports:
        device = device_of(model)
        with torch.random.fork_rng([device] if device.type == "cuda" else []), evaluating(model):
            reports[key] = _find_path(model)
        _log(reports[key][0])
    report, untried = reports[key]
    if kernels and untried:
        report = replace(report, by_flex=_try_flex(report.model_type, untried))
        reports[key] = report, []
    return report


def state_of(model: Any) -> tuple:
    """What the way of serving a model depends on, besides its class; read for every pass."""
    head, weight = model.get_output_embeddings(), model.get_input_embeddings().weight
    autocast = torch.is_autocast_enabled(weight.device.type)
    bias = getattr(head, "bias", None) is None
    # PEFT turns a learned prompt off by calling the forward of the model below.
    own = getattr(model.forward, "__self__", model) is model
    return type(head), bias, own, weight.dtype, weight.device, autocast, attention_of(model.config.get_text_config())


def _find_path(model: nn.Module) -> tuple[EngineReport, list[flex.Call]]:
    """How the model is served, and what its layers ask for where it is served by packed rows."""
    config = text_config(model)
    groups = sample_groups(config, len(embedding_weight(model)))
    truth = encode(model, groups, "plain", 1.0)
    assert isinstance(truth, LogitRows)
    lengths = [len(response) for response in groups[0].responses]
    _require_causal(model, truth.logits[: sum(lengths)], lengths)
    targets = frame(groups, device_of(model)).targets
    expected = score_rows(truth, targets).logps
    limits = _tolerances(model)
    report = EngineReport("plain", "", config.model_type, _length_limit(config))
    try:
        reason, calls = _try_shared(model, groups, targets, expected, limits)
        if reason is None:
            return replace(report, path="shared", reason="agrees with separate encoding"), calls
        padded = score_rows(encode(model, groups, "padded", 1.0), targets).logps
    except CannotTile as refusal:
        return replace(report, reason=f"{refusal}; log-probabilities come from the model's own logits"), []
    error, wrong = _compare(padded, expected, limits)
    if not wrong:
        return replace(report, path="padded", reason=f"{reason}; prompts are not shared"), []
    return replace(report, reason=f"{reason}; padded rows differ from its own logits too, by {error:.2g} nats"), []


def _require_causal(model: nn.Module, logits: Tensor, lengths: Sequence[int]) -> None:
    """Raise InputError if what is said after a prompt depends on the response: BERT, or a decoder loaded as an encoder.

    `logits` are the rows of several responses to one prompt, of these lengths, one response after the other.
    """
    first = torch.stack([part[0] for part in logits.float().split(list(lengths))])
    rounding = 1e-4 if _precision(model) in (torch.float32, torch.float64) else 0.02
    if (first - first[0]).abs().max() > rounding * first.abs().max():
        raise InputError(
            f"{type(model).__name__}: a token changes the log-probabilities of the tokens before it, so it is no "
            "causal language model; take a decoder (BERT and its family: a checkpoint trained with is_decoder: true)"
        )


def _try_shared(
    model: nn.Module, groups: Sequence[Group], targets: Tensor, expected: Tensor, limits: tuple[float, float]
) -> tuple[str | None, list[flex.Call]]:
    """Why the prompt cannot be shared (None: it can), and what the layers asked for."""
    head = head_of(model)
    try:
        windows = expected_windows(text_config(model))
        hidden, layout = shared_hidden(decoder_of(model), pack(groups, device_of(model)))
    except CannotShare as refusal:
        return str(refusal), []
    except (CannotTile, torch.OutOfMemoryError):
        raise
    except Exception as problem:
        # Foreign code met an attention it was not written for; whatever it raises means the same: not this path.
        return f"it does not run on packed rows ({type(problem).__name__}: {problem})", []
    used = [call.window for call in layout.calls]
    if len(used) != len(windows):
        return f"{len(used)} of its {len(windows)} layers used the shared-prefix attention", []
    if used != windows:
        return f"its layers ask for windows {used}, its configuration for {windows}", []
    error, wrong = _compare(score_rows(HiddenRows(hidden, head), targets).logps, expected, limits)
    return (f"packed rows differ from separate ones by {error:.2g} nats" if wrong else None), layout.calls


def _try_flex(model_type: str, calls: list[flex.Call]) -> bool:
    """Whether FlexAttention may serve a model whose layers make these calls; one warning if it should and does not."""
    served = [call for call in {_in_sample(call) for call in calls} if flex.serves(call)]
    try:
        differences = [_flex_difference(call) / _FLEX_TOLERANCES[call.dtype] for call in served]
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:
        # What a compiler of kernels raises is nowhere listed; it means the same: not on this device, or not this call.
        reason = f"it raised {type(problem).__name__}: {problem}"
    else:
        wrong = [difference for difference in differences if not difference <= 1]
        if not wrong:
            return len(served) > 0
        reason = f"it differs by {wrong[0]:.2g} times its tolerance"
    logger.warning("%s: attention segment by segment instead of FlexAttention (%s)", model_type, reason)
    return False


def _in_sample(call: flex.Call) -> flex.Call:
    """The call in the row _FLEX_SAMPLE, with a window and a softcap that show there; to the kernel both are data."""
    return call._replace(
        tokens=Layout(_FLEX_SAMPLE).tokens,
        window=None if call.window is None else 17,
        softcap=None if call.softcap is None else 2.0,
    )


@torch.inference_mode(False)
def _flex_difference(call: flex.Call) -> float:
    """Largest difference that FlexAttention makes to the attention by segments in such a call, relative to a norm.

    Of the output, without gradient and with, and of the gradients of its inputs, each relative to its own norm; on
    random tensors in the packed row _FLEX_SAMPLE. NaN if either has one.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int, dim: int) -> Tensor:
        # As layers make them: the heads of a token side by side in memory.
        values = torch.randn(1, call.tokens, heads, dim, generator=generator)
        return values.to(call.device, call.dtype).transpose(1, 2)

    tensors = [draw(call.heads, call.dim), draw(call.kv_heads, call.dim), draw(call.kv_heads, call.value_dim)]
    if call.sinks:
        tensors.append(torch.randn(call.heads, generator=generator).to(call.device, call.dtype))
    weights = draw(call.heads, call.value_dim).transpose(1, 2)

    def results(by_flex: bool) -> list[Tensor]:
        with shared_attention(nn.Module(), Layout(_FLEX_SAMPLE, by_flex=by_flex)):
            with torch.no_grad():
                alone = _attend(call, tensors)
            with torch.enable_grad():
                inputs = [tensor.clone().requires_grad_() for tensor in tensors]
                out = _attend(call, inputs)
                return [alone, out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]

    pairs = zip(results(True), results(False), strict=True)
    ratios = [(found - expected).float().norm() / expected.float().norm() for found, expected in pairs]
    return torch.stack(ratios).max().item()


def _attend(call: flex.Call, tensors: list[Tensor]) -> Tensor:
    query, key, value, *sinks = tensors
    settings = {"scaling": call.scaling, "sliding_window": call.window, "softcap": call.softcap}
    s_aux = sinks[0] if sinks else None
    out, _ = shared_prefix_attention(nn.Module(), query, key, value, None, s_aux=s_aux, **settings)
    return out


def _compare(found: Tensor, expected: Tensor, limits: tuple[float, float]) -> tuple[float, bool]:
    difference = (found.to(expected.dtype) - expected).abs()
    error, mean = difference.max().item(), difference.mean().item()
    return error, not (error <= limits[0] and mean <= limits[1])


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference of a log-probability between logits, in nats; infinite for what is not a number."""
    gap = float((found.log_softmax(-1) - expected.log_softmax(-1)).abs().max())
    return math.inf if math.isnan(gap) else gap


def tolerance_of(model: nn.Module) -> float:
    """Largest difference of a log-probability that rounding explains, in nats."""
    return _tolerances(model)[0]


def _tolerances(model: nn.Module) -> tuple[float, float]:
    return _TOLERANCES.get(_precision(model), _TOLERANCES[torch.bfloat16])


def _precision(model: nn.Module) -> torch.dtype:
    weight = embedding_weight(model)
    autocast = torch.is_autocast_enabled(weight.device.type)
    return torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype


def sample_groups(config: PretrainedConfig, vocabulary: int) -> list[Group]:
    """Two groups of random ids, special tokens left out: unequal prompts, a one-token response, four sequences."""
    special = {getattr(config, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    generator = torch.Generator().manual_seed(0)
    ids = [i for i in torch.randint(vocabulary, (256,), generator=generator).tolist() if i not in special]
    endless = cycle(ids or [0])

    def draw(count: int) -> list[int]:
        return list(islice(endless, count))

    return [Group(draw(11), [draw(5), draw(1), draw(3)]), Group(draw(4), [draw(8)])]


def _length_limit(config: PretrainedConfig) -> int | None:
    """Length up to which a sequence does not depend on the others of a call.

    Dynamic and long RoPE choose by the longest; sparse attention picks the best keys of a row, padding among them.
    """
    sparse = [value for name in SPARSE if isinstance(value := getattr(config, name, None), int)]
    if sparse:
        return min(sparse)
    return None if (switch := rope_switch(config)) is None else switch[1]


def rope_switch(config: PretrainedConfig) -> tuple[str, int] | None:
    """The kind of RoPE whose rotations depend on the length of the whole sequence, and the length where that begins."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    for rope in nested or [parameters]:
        if (kind := rope.get("rope_type")) in ("dynamic", "longrope"):
            original = rope.get("original_max_position_embeddings")
            original = original or getattr(config, "original_max_position_embeddings", None)
            return kind, original or config.max_position_embeddings
    return None


def _log(report: EngineReport) -> None:
    path = {"shared": "prompts are shared", "padded": "padded rows", "plain": "one sequence at a time"}[report.path]
    level = logging.INFO if report.path == "shared" else logging.WARNING
    logger.log(level, "%s: served by %s (%s)", report.model_type, path, report.reason)
