"""Model + prompt groups → ln π of every response token, in nats; with entropy and KL to a reference at every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from distalign.engine.forward import (
    decoder_of,
    device_of,
    encode,
    evaluating,
    require_causal_lm,
)
from distalign.engine.lm_head import KEPT, HiddenRows, LogitRows, Rows, head_of, score_rows
from distalign.engine.memory import recomputes
from distalign.engine.packing import Frame, Group, frame, micro_batches, validate
from distalign.engine.selfcheck import EngineReport, Path, check

# A reference model, or a function whose context gives one (for instance the policy with its adapter off).
Reference = nn.Module | Callable[[], AbstractContextManager[nn.Module]]

# Tokens of one call without gradient from which on compiling FlexAttention (half a minute) pays off.
_WORTH_COMPILING = 2**21


@dataclass(frozen=True)
class Scores:
    """Values of every response token, one row for each response, in the order of the groups; 0 at padding. All in nats.

    token_logps: ln π(y_t | s_t). mask: True on response tokens. group: index of the group that a row belongs to.
    step_entropy: entropy of π(· | s_t). step_kl: KL(π(· | s_t) ‖ π₀(· | s_t)) over the full vocabulary.
    reference_token_logps: ln π₀(y_t | s_t), a constant. values: what the value head says of s_t. The last four are None
    unless asked for.
    """

    token_logps: Float[Tensor, "responses steps"]
    mask: Bool[Tensor, "responses steps"]
    group: Int[Tensor, "responses"]
    step_entropy: Float[Tensor, "responses steps"] | None = None
    step_kl: Float[Tensor, "responses steps"] | None = None
    reference_token_logps: Float[Tensor, "responses steps"] | None = None
    values: Float[Tensor, "responses steps"] | None = None

    def to(self, device: torch.device | str) -> Scores:
        """The same on another device."""
        values = {name: value.to(device) for name, value in vars(self).items() if value is not None}
        return Scores(**values)

    @property
    def logps(self) -> Float[Tensor, "responses"]:
        """ln π(response | prompt): sums over tokens, in float64 where the device has it (float32: 5e-4 off)."""
        return total(self.token_logps)

    @property
    def reference_logps(self) -> Float[Tensor, "responses"] | None:
        """ln π₀(response | prompt), summed like `logps`."""
        return None if self.reference_token_logps is None else total(self.reference_token_logps)


def total(values: Float[Tensor, "responses steps"]) -> Float[Tensor, "responses"]:
    """Sum over steps, in float64 where the device has it."""
    return values.sum(-1, dtype=torch.float32 if values.device.type == "mps" else torch.float64)


def score(
    model: nn.Module,
    groups: Sequence[Group],
    *,
    reference: Reference | None = None,
    entropy: bool = False,
    temperature: float = 1.0,
    value_head: nn.Module | None = None,
) -> Scores:
    """Log-probabilities of all responses in one pass, differentiable when gradients are enabled.

    `model` runs in the mode it is in (dropout in training mode), the reference without dropout and without gradient.
    With a temperature, everything is that of softmax(logits / temperature), for the model and the reference alike.
    `value_head` maps hidden states [rows, hidden] to one number for each row: values before each token.

    At its first use a model is checked (`check`), and served by a slower path if its prompts cannot be shared. Raises
    ValueError for groups that cannot be scored, a temperature that is not positive, a reference with another
    vocabulary, or values of a model whose hidden states cannot be told from its logits.
    """
    _validate(model, groups, temperature)
    return _score(model, groups, reference, entropy, temperature, value_head, kernels=torch.is_grad_enabled())


def _score(
    model: nn.Module,
    groups: Sequence[Group],
    reference: Reference | None,
    entropy: bool,
    temperature: float,
    value_head: nn.Module | None,
    *,
    kernels: bool,
) -> Scores:
    places = frame(groups, device_of(model))
    rows, reference_rows = _both_rows(model, reference, groups, temperature, kernels=kernels)
    keep = KEPT if torch.is_grad_enabled() and not recomputes(model) else 0
    values = score_rows(rows, places.targets, entropy=entropy, reference=reference_rows, keep=keep)
    return Scores(
        token_logps=_lay_out(values.logps, places),
        mask=places.mask,
        group=places.group,
        step_entropy=None if values.entropy is None else _lay_out(values.entropy, places),
        step_kl=None if values.kl is None else _lay_out(values.kl, places),
        reference_token_logps=None if values.reference_logps is None else _lay_out(values.reference_logps, places),
        values=None if value_head is None else _lay_out(_values(rows, value_head), places),
    )


def _values(rows: Rows, value_head: nn.Module) -> Float[Tensor, "rows"]:
    if not isinstance(rows, HiddenRows):
        raise ValueError("score: this model's hidden states cannot be told from its logits, so it has no value head.")
    parameter = next(value_head.parameters())
    with torch.autocast(rows.hidden.device.type, enabled=False):
        return value_head(rows.hidden.to(parameter.dtype)).view(-1)


def score_in_batches(
    model: nn.Module,
    groups: Sequence[Group],
    *,
    token_budget: int,
    reference: Reference | None = None,
    entropy: bool = False,
    temperature: float = 1.0,
    value_head: nn.Module | None = None,
    progress: Callable[[int, int], Any] | None = None,
) -> Scores:
    """`score` without gradient and dropout, in micro-batches of at most `token_budget` tokens, longest groups first.

    Results are in the order of `groups`. `progress(done, total)` is called after each micro-batch with numbers of
    groups. Raises ValueError as `score` and `micro_batches` do, before anything is computed.
    """
    _validate(model, groups, temperature)
    parts: list[tuple[list[int], Scores]] = []
    kernels, done = worth_compiling(groups), 0
    with evaluating(model):
        for batch in micro_batches(groups, token_budget):
            chosen = [groups[index] for index in batch]
            part = _score(model, chosen, reference, entropy, temperature, value_head, kernels=kernels)
            parts.append((batch, part))
            done += len(batch)
            if progress is not None:
                progress(done, len(groups))
    return join(groups, parts)


def join(groups: Sequence[Group], parts: Sequence[tuple[Sequence[int], Scores]]) -> Scores:
    """What was scored in parts as one: each part has the scores of the groups at some places, all parts have all.

    The parts are on one device.
    """
    device = parts[0][1].mask.device
    places = frame(groups, device)
    starts = _starts(groups)
    result: dict[str, Tensor] = {}
    for indices, part in parts:
        rows = torch.tensor([row for index in indices for row in range(starts[index], starts[index + 1])])
        for name in _VALUES:
            values = getattr(part, name)
            if values is not None:
                whole = result.setdefault(name, values.new_zeros(places.mask.shape))
                whole[rows.to(device), : values.shape[1]] = values
    return Scores(mask=places.mask, group=places.group, **result)


_VALUES = [field.name for field in fields(Scores) if field.name not in ("mask", "group")]


def _starts(groups: Sequence[Group]) -> list[int]:
    starts = [0]
    for group in groups:
        starts.append(starts[-1] + len(group.responses))
    return starts


def worth_compiling(groups: Sequence[Group]) -> bool:
    """Whether scoring all of these without gradient takes longer than compiling kernels for it."""
    return sum(group.tokens for group in groups) >= _WORTH_COMPILING


def _rows(model: nn.Module, groups: Sequence[Group], temperature: float, *, kernels: bool) -> Rows:
    """Rows of the model, by the path that serves it; with `kernels`, FlexAttention is tried if it has not been."""
    report = check(model, kernels=kernels)
    return encode(model, groups, path_for(report, groups), temperature, by_flex=report.by_flex)


def path_for(report: EngineReport, groups: Sequence[Group]) -> Path:
    """The path that serves these groups: the model's, unless they are too long for it."""
    longest = max(len(group.prompt) + len(response) - 1 for group in groups for response in group.responses)
    return "plain" if report.length_limit is not None and longest > report.length_limit else report.path


def _both_rows(
    model: nn.Module, reference: Reference | None, groups: Sequence[Group], temperature: float, *, kernels: bool
) -> tuple[Rows, Rows | None]:
    """Rows of the model and of its reference; a decoder that both share is run once."""
    if reference is not None and not isinstance(reference, nn.Module):
        # Checked as it is trained: such a reference may be the same model with its adapter off.
        check(model, kernels=kernels)
    if isinstance(reference, nn.Module) and _same_decoder(model, reference):
        rows = _rows(model, groups, temperature, kernels=kernels)
        if isinstance(rows, HiddenRows):
            return rows, HiddenRows(rows.hidden.detach(), head_of(reference), temperature)
        return rows, _reference_rows(reference, groups, temperature, kernels=kernels)
    # The reference first: its activations are gone before the model's are kept for the backward pass.
    reference_rows = None if reference is None else _reference_rows(reference, groups, temperature, kernels=kernels)
    return _rows(model, groups, temperature, kernels=kernels), reference_rows


def _same_decoder(model: nn.Module, reference: nn.Module) -> bool:
    """Whether both models have the very same decoder weights and no dropout, so that only their heads differ."""
    if model.training or reference.training or check(reference, kernels=False).path == "plain":
        return False
    ours, theirs = (
        [(name, id(tensor)) for name, tensor in decoder_of(either).named_parameters()] for either in (model, reference)
    )
    return ours == theirs and len(ours) > 0


def _reference_rows(reference: Reference, groups: Sequence[Group], temperature: float, *, kernels: bool) -> Rows:
    context = nullcontext(reference) if isinstance(reference, nn.Module) else reference()
    with context as model:
        if not isinstance(model, nn.Module):
            raise TypeError(f"reference: its context gives a {type(model).__name__}; it must give the reference model.")
        _validate(model, groups, source="reference: groups")
        with evaluating(model):
            return _rows(model, groups, temperature, kernels=kernels)


def _lay_out(values: Float[Tensor, "rows"], places: Frame) -> Float[Tensor, "responses steps"]:
    return values.new_zeros(places.mask.shape).masked_scatter(places.mask, values)


def _validate(model: Any, groups: Sequence[Group], temperature: float = 1.0, source: str = "groups") -> None:
    if not temperature > 0:
        raise ValueError(f"score: temperature is {temperature}; it must be above 0.")
    require_causal_lm(model)
    config = model.config.get_text_config()
    stretches = (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "dynamic"
    positions = None if stretches else getattr(config, "max_position_embeddings", None)
    positions = None if positions is None or positions < 0 else positions  # XLNet says −1
    validate(groups, vocabulary=len(model.get_input_embeddings().weight), max_positions=positions, source=source)


# Hidden states after every token, for rewards -------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """Every response token of some groups, response after response.

    hidden: last hidden states AFTER reading the token. ids: the tokens. owner: the response that a token belongs to,
    counted over all groups. lengths: tokens of each response. logps: ln π(response | prompt) in nats, if asked for.
    """

    hidden: Float[Tensor, "tokens hidden"]
    ids: Int[Tensor, "tokens"]
    owner: Int[Tensor, "tokens"]
    lengths: Int[Tensor, "responses"]
    logps: Float[Tensor, "responses"] | None = None

    @property
    def last(self) -> Float[Tensor, "responses hidden"]:
        """Hidden states after the whole response."""
        return self.hidden[self.lengths.cumsum(0) - 1]

    def counts(self, vocabulary: int) -> Float[Tensor, "responses vocabulary"]:
        """How often each token stands in each response."""
        counts = torch.zeros(len(self.lengths), vocabulary, device=self.ids.device)
        return counts.index_put_((self.owner, self.ids), counts.new_ones(()), accumulate=True)

    def mean(self, values: Float[Tensor, "tokens width"]) -> Float[Tensor, "responses width"]:
        """Mean over the tokens of each response."""
        total = values.new_zeros(len(self.lengths), values.shape[1]).index_add(0, self.owner, values)
        return total / self.lengths[:, None]


def read(model: nn.Module, groups: Sequence[Group], *, logps: bool = False) -> Reading:
    """Hidden states after every response token in one pass, prompts shared where the model allows; differentiable.

    The whole response is read, its last token too, so a sequence needs one position more than `score` does. Raises
    ValueError for groups that cannot be read.
    """
    # Nothing is predicted from the last token of a sequence, so the engine leaves it out: one more, and it is read.
    longer = [Group(group.prompt, [[*response, response[-1]] for response in group.responses]) for group in groups]
    _validate(model, longer)
    device = device_of(model)
    responses = [response for group in groups for response in group.responses]
    lengths = torch.tensor([len(response) for response in responses], device=device)
    ids = torch.tensor([token for response in responses for token in response], device=device)
    owner = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
    hidden, rows = _encode(model, longer)
    # Of T + 1 states the first T predict the tokens, and the last T have read them.
    starts = torch.zeros(len(hidden), dtype=torch.bool, device=device)
    starts[(lengths + 1).cumsum(0) - lengths - 1] = True
    total = None
    if logps:
        values = score_rows(rows.chosen(~starts.roll(-1)), ids).logps
        wide = values.to(torch.float32 if device.type == "mps" else torch.float64)
        total = wide.new_zeros(len(lengths)).index_add(0, owner, wide)
    return Reading(hidden[~starts], ids, owner, lengths, total)


@torch.no_grad()
def expected_counts(model: nn.Module, groups: Sequence[Group]) -> Float[Tensor, "responses vocabulary"]:
    """Σ_t π(· | s_t): how often each token is expected in the places of a response, given what stands before them.

    What the response holds less this is the derivative of ln π(response) in a bias on the logits.
    """
    _validate(model, groups)
    lengths = torch.tensor([len(response) for group in groups for response in group.responses])
    owner = torch.arange(len(lengths)).repeat_interleave(lengths).to(device_of(model))
    _, rows = _encode(model, groups)
    total = torch.zeros(len(lengths), rows.vocabulary, device=owner.device)
    step = max(1, 2**24 // rows.vocabulary)
    for start in range(0, rows.rows, step):
        block = slice(start, min(start + step, rows.rows))
        total.index_add_(0, owner[block], rows.tile(block, 0, rows.vocabulary).softmax(-1).float())
    return total


def _encode(model: nn.Module, groups: Sequence[Group]) -> tuple[Float[Tensor, "rows hidden"], Rows]:
    """Hidden states that predict the tokens of `groups`, and what gives their log-probabilities."""
    report = check(model, kernels=torch.is_grad_enabled())
    path = path_for(report, groups)
    if path != "plain":
        rows = encode(model, groups, path, 1.0, by_flex=report.by_flex)
        assert isinstance(rows, HiddenRows)
        return rows.hidden, rows
    hidden, logits = [], []
    for group in groups:
        for response in group.responses:
            ids = torch.tensor([[*group.prompt, *response[:-1]]], device=device_of(model))
            out = model(input_ids=ids, use_cache=False, output_hidden_states=True)
            hidden.append(out.hidden_states[-1][0, -len(response) :])
            logits.append(out.logits[0, -len(response) :])
    return torch.cat(hidden), LogitRows(torch.cat(logits))
