"""Responses sampled from a policy: each prompt is encoded once for all responses to it.

Rows that have ended leave the batch; prompts are batched by length. The distribution sampled from is the model's own
(temperature, top-p and length limits as given here; the sampling defaults that a checkpoint may carry are not applied).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from distalign.engine.drawn import Drawn
from distalign.engine.forward import evaluating
from distalign.engine.lm_head import LogitRows, head_of, score_rows
from distalign.engine.packing import ReadPrompt
from distalign.engine.selfcheck import require_plain_head
from distalign.rollout.decode import Encoded, Forked, Shared, encode_prompts, shares_prompts
from distalign.rollout.prefix import close_gaps


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn. Raises ValueError for settings out of range."""

    max_new_tokens: int
    min_new_tokens: int
    temperature: float
    top_p: float
    end_id: int

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"sample: max_new_tokens is {self.max_new_tokens} and min_new_tokens {self.min_new_tokens}; the first "
                "must be at least 1 and the second between 0 and the first"
            )
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1:
            raise ValueError(
                f"sample: temperature is {self.temperature} and top_p {self.top_p}; take ≥ 0 and above 0 up to 1"
            )


def sample(
    model: Any,
    prompts: Sequence[list[int]],
    *,
    n: int = 1,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    end_id: int,
    seed: int,
    rows: int = 64,
    progress: Callable[[int, int], Any] | None = None,
) -> list[list[list[int]]]:
    """`n` responses to every prompt, as token ids: result[prompt][response].

    A response ends with `end_id`, or has `max_new_tokens` tokens and no end. At least `min_new_tokens` come before the
    end: until then it is not drawn, and the other tokens keep their proportion. Temperature 0 takes the most likely
    token. With `top_p` < 1 only the most likely tokens that together reach it are sampled, renormalised.
    `rows` bounds the responses decoded at once; where `n` exceeds it they are decoded in parts, from one encoding of
    the prompt. The same arguments and seed give the same responses on one machine; the global random state is left
    alone. Raises ValueError for an empty prompt or settings out of range.
    """
    drawing = Drawing(max_new_tokens, min_new_tokens, temperature, top_p, end_id)
    return [[one.ids for one in own] for own in _sample(model, prompts, n, drawing, seed, rows, progress)]


def sample_in_batches(
    model: Any,
    prompts: Sequence[list[int]],
    each: Callable[[Sequence[int], Drawn], Any],
    *,
    n: int = 1,
    max_new_tokens: int,
    temperature: float = 1.0,
    end_id: int,
    seed: int,
    rows: int = 64,
    keep: int = 0,
    behind: bool = False,
    progress: Callable[[int, int], Any] | None = None,
) -> list[list[list[int]]]:
    """As `sample`; `each(numbers, drawn)` is given every batch of prompts, by their numbers, with what answered them.

    Up to `keep` bytes of logits are in `drawn`, those of the steps that found room, while `each` runs. With `behind` it
    runs in a thread of its own, one batch at a time, while the next batch is drawn: it must use nothing that shares
    modules or configurations with the model, the caller's autocast and inference mode are not its own, and what it
    raises is raised here, unless drawing has raised before. Of the bytes a batch then has half.

    Raises CannotTile, before the first batch is answered, if the model's head is not plain or its first logits are not
    those of their states, and ValueError as `sample` does.
    """
    drawing = Drawing(max_new_tokens, 0, temperature, 1.0, end_id)
    head = head_of(model)
    kept = _KeptLogits(keep, max(rows, n) * max_new_tokens, 2 if behind else 1)
    running: list[Future[Any]] = []
    checked = False

    def visit(_: Sequence[int], encoded: Encoded) -> None:
        nonlocal checked
        if not checked:
            require_plain_head(model, encoded.states[:8], encoded.logits[:8])
            checked = True

    def note(states: Tensor, logits: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        return states, kept.places(logits)

    def wait() -> None:
        while running:
            running.pop().result()

    def hand_on(numbers: Sequence[int], flat: list[_Response]) -> None:
        responses = [one.ids for one in flat]
        states, places = (torch.cat(parts) for parts in zip(*(one.noted for one in flat), strict=True))
        by_prompt = [responses[first : first + n] for first in range(0, len(responses), n)]
        drawn = Drawn(by_prompt, states, head, kept.logits, places)
        if behind:
            wait()
            running.append(thread.submit(each, numbers, drawn))
        else:
            each(numbers, drawn)
        kept.turn()
        for one in flat:
            one.noted = ()

    settings: dict[str, Any] = {"note": note, "watch": True, "visit": visit, "answered": hand_on}
    with ThreadPoolExecutor(1) as thread:
        answers = _sample(model, prompts, n, drawing, seed, rows, progress, **settings)
        wait()
    return [[one.ids for one in own] for own in answers]


class _KeptLogits:
    """Logits of the steps of a batch that find room, for `tokens` at most: `keep` bytes, in buffers used by turns."""

    def __init__(self, keep: int, tokens: int, buffers: int) -> None:
        self.keep, self.tokens, self.used = keep // buffers, tokens, 0
        self.buffers = [torch.zeros(0, 0)] * buffers

    @property
    def logits(self) -> Float[Tensor, "kept vocab"]:
        """Those of the batch that is drawn now."""
        return self.buffers[0]

    def turn(self) -> None:
        """Begin the next batch, in the buffer that has waited longest."""
        self.buffers.append(self.buffers.pop(0))
        self.used = 0

    def places(self, logits: Tensor) -> Tensor:
        """The place at which the logits of every row are kept: −1 if there is no room."""
        count, size = logits.shape
        if self.logits.shape[1] != size:
            self.buffers[0] = logits.new_empty(min(self.keep // logits[0].nbytes, self.tokens), size)
        if self.used + count > len(self.logits):
            return torch.full((count,), -1, device=logits.device)
        places = torch.arange(self.used, self.used + count, device=logits.device)
        self.logits[self.used : self.used + count] = logits
        self.used += count
        return places


@dataclass(frozen=True)
class Spoken:
    """Responses of a model, responses[prompt][response], and what their sampling has computed besides.

    Sums over the tokens of each response, in nats, in float64: ln π and the entropy at every step. `read` has the
    prompts as the model has read them, or None.
    """

    responses: list[list[list[int]]]
    logps: Float[Tensor, "responses"]
    entropy: Float[Tensor, "responses"]
    read: list[ReadPrompt | None]


def sample_with_scores(
    model: Any,
    prompts: Sequence[list[int]],
    *,
    n: int = 1,
    max_new_tokens: int,
    temperature: float = 1.0,
    end_id: int,
    seed: int,
    rows: int = 64,
    keep: int = 0,
    progress: Callable[[int, int], Any] | None = None,
) -> Spoken:
    """As `sample`, with log-probabilities and entropies of softmax(logits / temperature), which scoring need not find.

    Prompts as read are kept in up to `keep` bytes, of a model whose responses share them. Raises ValueError as
    `sample` does, and for a temperature of 0.
    """
    if temperature == 0:
        raise ValueError("sample_with_scores: temperature is 0, which has no probabilities; take one above 0")
    drawing = Drawing(max_new_tokens, 0, temperature, 1.0, end_id)
    read: list[ReadPrompt | None] = [None] * len(prompts)
    room = keep

    def note(_: Tensor, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        found = score_rows(LogitRows(logits, temperature), tokens, entropy=True)
        assert found.entropy is not None
        return found.logps, found.entropy

    def visit(indices: Sequence[int], encoded: Encoded) -> None:
        nonlocal room
        room -= encoded.bytes
        if room >= 0 and shares_prompts(model):
            for index, one in zip(indices, encoded.read() or (), strict=False):
                read[index] = one

    seen: dict[str, Any] = {"watch": True, "visit": visit} if keep else {}
    drawn = _sample(model, prompts, n, drawing, seed, rows, progress, note=note, **seen)
    noted = zip(*(one.noted for own in drawn for one in own), strict=True)
    logps, entropy = (torch.stack([one.double().sum() for one in column]).cpu() for column in noted)
    return Spoken([[one.ids for one in own] for own in drawn], logps, entropy, read)


# What to remember of each row, from the states [rows, hidden], the logits made of them and the tokens drawn from these.
_Note = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


@dataclass
class _Response:
    """The tokens of a response, and what was noted of each of them."""

    ids: list[int] = field(default_factory=list)
    noted: tuple[Tensor, ...] = ()


@torch.no_grad()
def _sample(
    model: Any,
    prompts: Sequence[list[int]],
    n: int,
    drawing: Drawing,
    seed: int,
    rows: int,
    progress: Callable[[int, int], Any] | None,
    *,
    note: _Note | None = None,
    watch: bool = False,
    visit: Callable[[Sequence[int], Encoded], None] | None = None,
    answered: Callable[[Sequence[int], list[_Response]], None] | None = None,
) -> list[list[_Response]]:
    """As `sample`, with what is noted of every token; the note is given states only if they are watched.

    `visit` sees every batch of prompts, by their numbers, when it has been read, and `answered` when it has been
    answered: its responses, prompt by prompt.
    """
    _check(prompts, n, rows)
    device = model.get_input_embeddings().weight.device
    generator = torch.Generator(device).manual_seed(seed)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    size = max(1, rows // n)
    results: list[list[_Response]] = [[] for _ in prompts]
    with evaluating(model):
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            encoded = encode_prompts(model, [prompts[i] for i in batch], drawing.end_id, watch=watch)
            if visit is not None:
                visit(batch, encoded)
            flat = _respond(model, encoded, n, rows, drawing, generator, note)
            if answered is not None:
                answered(batch, flat)
            for position, index in enumerate(batch):
                results[index] = flat[position * n : (position + 1) * n]
            if progress is not None:
                progress(min(start + size, len(order)), len(order))
    return results


def _check(prompts: Sequence[list[int]], n: int, rows: int) -> None:
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"sample: prompts[{index}] is empty; start it with any token")
    if n < 1 or rows < 1:
        raise ValueError(f"sample: n is {n} and rows {rows}; both must be at least 1")


def _respond(
    model: Any,
    encoded: Encoded,
    n: int,
    rows: int,
    drawing: Drawing,
    generator: torch.Generator,
    note: _Note | None,
) -> list[_Response]:
    """`n` responses to each prompt, in order, at most `rows` at once."""
    kind = Shared if shares_prompts(model) else Forked
    parts = torch.arange(len(encoded.mask), device=generator.device).repeat_interleave(n).split(rows)
    responses: list[_Response] = []
    for index, parents in enumerate(parts):
        own = kind(encoded, parents, drawing.max_new_tokens, again=index < len(parts) - 1)
        states = encoded.states[parents] if encoded.call.watch else encoded.states
        responses += _decode(own, encoded.logits[parents], states, drawing, generator, note)
    return responses


def _decode(
    own: Forked | Shared,
    logits: Float[Tensor, "rows vocabulary"],
    states: Tensor,
    drawing: Drawing,
    generator: torch.Generator,
    note: _Note | None,
) -> list[_Response]:
    """One token a step for the responses not ended, from the logits of the first token and the states behind them."""
    responses = [_Response() for _ in range(len(logits))]
    alive = torch.arange(len(responses), device=logits.device)
    noted: list[tuple[Tensor, ...]] = []
    for step in range(drawing.max_new_tokens):
        if step < drawing.min_new_tokens:
            logits[:, drawing.end_id] = -math.inf
        tokens = choose(logits, drawing.temperature, drawing.top_p, generator)
        for row, token in zip(alive.tolist(), tokens.tolist(), strict=True):
            responses[row].ids.append(token)
        if note is not None:
            noted.append((alive, *note(states, logits, tokens)))
        going = close_gaps(tokens != drawing.end_id)
        if not len(going) or step == drawing.max_new_tokens - 1:
            break
        if len(going) < len(alive):
            own.keep(going)
            tokens, alive = tokens[going], alive[going]
        logits = own.step(tokens)
        states = own.call.states
    if noted:
        owners, *values = (torch.cat(parts) for parts in zip(*noted, strict=True))
        order, lengths = owners.argsort(stable=True), [len(response.ids) for response in responses]
        for response, *parts in zip(responses, *(one[order].split(lengths) for one in values), strict=True):
            response.noted = tuple(parts)
    return responses


def choose(
    logits: Float[Tensor, "rows vocabulary"], temperature: float, top_p: float, generator: torch.Generator
) -> Int[Tensor, "rows"]:
    """A token a row from softmax(logits / temperature), cut to the most likely ones that reach `top_p` together."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits / temperature).softmax(-1)
    if top_p < 1:
        ordered, index = probabilities.sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p
        probabilities = torch.zeros_like(probabilities).scatter(-1, index, ordered.masked_fill(beyond, 0))
    return _draw(probabilities, generator)


def _draw(weights: Float[Tensor, "rows vocabulary"], generator: torch.Generator) -> Int[Tensor, "rows"]:
    """A token a row, in proportion to its weight.

    `torch.multinomial` makes a random number for every token of the vocabulary, which on a CPU costs a fifth of a
    decoding step. There two a row do: for the block of 64 tokens, and for the place in the block.
    """
    if weights.device.type != "cpu":
        return torch.multinomial(weights, 1, generator=generator).squeeze(1)
    spare = -weights.shape[1] % 64
    blocks = (F.pad(weights, (0, spare)) if spare else weights).unflatten(1, (-1, 64))
    block = _invert(blocks.sum(-1), generator)
    return 64 * block + _invert(blocks[torch.arange(len(blocks)), block], generator)


def _invert(weights: Float[Tensor, "rows choices"], generator: torch.Generator) -> Int[Tensor, "rows"]:
    """A choice a row, by the inverse of the cumulative distribution."""
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    uniform = torch.rand(len(weights), 1, dtype=torch.float64, generator=generator)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).squeeze(1)
