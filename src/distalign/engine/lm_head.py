"""Log-probabilities, entropy and KL from hidden states, tile by tile over the vocabulary.

With z the logits of a row, p = softmax(z) and y its token, all in nats:

    ln p(y) = z_y − ln Σ_j exp z_j
    H(p)    = ln Σ_j exp z_j − Σ_j p_j z_j
    KL(p‖q) = Σ_j p_j (z_j − w_j) − ln Σ_j exp z_j + ln Σ_j exp w_j        (w: logits of the reference q)

The sums run over tiles with a running maximum, so no [rows, vocabulary] tensor is made. The backward pass computes the
tiles again but for the first ones, which may be kept. Where the head is frozen and only log-probabilities are asked
for, nothing is: d ln p(y) / d hidden is found on the way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Bytes of a head's tiles that may wait for the backward pass.
KEPT = 2**27


class CannotTile(Exception):
    """The head is not a plain linear map with known logit scaling. The message says why."""


@dataclass(frozen=True)
class Head:
    """Hidden state → logits: cap · tanh(scale · (W h + b) / cap), without the cap if it is None."""

    weight: Float[Tensor, "vocab hidden"]
    bias: Float[Tensor, "vocab"] | None = None
    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class RowScores:
    """One value per row, in nats. `entropy`, `kl` and `reference_logps` are None where they were not asked for."""

    logps: Float[Tensor, "rows"]
    entropy: Float[Tensor, "rows"] | None
    kl: Float[Tensor, "rows"] | None
    reference_logps: Float[Tensor, "rows"] | None


def output_layer(model: nn.Module) -> nn.Module:
    """The layer that makes the logits."""
    return model.get_output_embeddings()  # pyright: ignore[reportCallIssue]


def head_of(model: nn.Module) -> Head:
    """The language-model head of a transformers (or PEFT) model.

    Raises CannotTile if it is not a plain `torch.nn.Linear`, for instance because it carries an adapter or is
    quantised.
    """
    layer = output_layer(model)
    if type(layer) is not nn.Linear:
        raise CannotTile(f"its head is a {type(layer).__module__}.{type(layer).__name__}, not a plain torch.nn.Linear")
    if layer._forward_hooks or layer._forward_pre_hooks:
        raise CannotTile("its head has forward hooks")
    config = model.config.get_text_config()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    scale = 1.0 if getattr(config, "logit_scale", None) is None else float(config.logit_scale)
    scale /= getattr(config, "logits_scaling", None) or 1.0
    return Head(layer.weight, layer.bias, scale, getattr(config, "final_logit_softcapping", None))


class HiddenRows:
    """Rows of hidden states with the head that turns them into logits, one tile at a time.

    Half precision is accumulated in float32: on a CPU the products too are taken in float32 (they are faster there).
    """

    def __init__(self, hidden: Float[Tensor, "rows hidden"], head: Head, temperature: float = 1.0) -> None:
        self.hidden, self.head, self.device = hidden, head, hidden.device
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        product = torch.get_autocast_dtype(device) if autocast else torch.promote_types(hidden.dtype, head.weight.dtype)
        self.dtype = torch.promote_types(product, torch.float32)
        self.product = self.dtype if device == "cpu" else product
        self.vocabulary, self.rows = head.weight.shape[0], hidden.shape[0]
        self.temperature = temperature

    def chosen(self, index: Tensor) -> HiddenRows:
        """Some of the rows, by number or by mask."""
        return HiddenRows(self.hidden[index], self.head, self.temperature)

    def weight(self, start: int, stop: int) -> Float[Tensor, "tile hidden"]:
        """Rows of the head's weight, in the dtype of the products."""
        return self.head.weight[start:stop].to(self.product)

    def tile(self, rows: slice, start: int, stop: int) -> Float[Tensor, "block tile"]:
        """Logits over the temperature; a new tensor, free to be overwritten."""
        hidden, weight = self.hidden[rows].to(self.product), self.weight(start, stop).T
        if self.head.bias is None:
            z = (hidden @ weight).to(self.dtype)
        else:
            z = torch.addmm(self.head.bias[start:stop].to(self.product), hidden, weight).to(self.dtype)
        if self.head.softcap is not None:
            return z.mul_(self.head.scale / self.head.softcap).tanh_().mul_(self.head.softcap / self.temperature)
        factor = self.head.scale / self.temperature
        return z if factor == 1.0 else z.mul_(factor)

    def slope(self, z: Float[Tensor, "block tile"]) -> Float[Tensor, "block tile"] | float:
        """Derivative of `tile` with respect to W h + b, at its value."""
        factor = self.head.scale / self.temperature
        if self.head.softcap is None:
            return factor
        return (1 - (z * (self.temperature / self.head.softcap)).square_()).mul_(factor)


def precision(model: nn.Module) -> str:
    """In what the weights are, and in what the head's products and their sums are taken, autocast included."""
    try:
        head = head_of(model)
    except CannotTile as reason:
        return f"log-probabilities of the model's own logits ({reason})"
    rows = HiddenRows(head.weight[:0], head)
    weights, products, sums = (
        str(kind).removeprefix("torch.") for kind in (head.weight.dtype, rows.product, rows.dtype)
    )
    return f"weights in {weights}, the head's products in {products}, their sums in {sums}"


class LogitRows:
    """Rows of logits that the model computed itself."""

    def __init__(self, logits: Float[Tensor, "rows vocab"], temperature: float = 1.0) -> None:
        self.logits, self.temperature, self.device = logits, temperature, logits.device
        self.rows, self.vocabulary = logits.shape
        self.dtype = torch.promote_types(logits.dtype, torch.float32)

    def chosen(self, index: Tensor) -> LogitRows:
        """Some of the rows, by number or by mask."""
        return LogitRows(self.logits[index], self.temperature)

    def tile(self, rows: slice, start: int, stop: int) -> Float[Tensor, "block tile"]:
        """Logits over the temperature; a new tensor, free to be overwritten."""
        return self.logits[rows, start:stop].to(self.dtype) / self.temperature


Rows = HiddenRows | LogitRows


def score_rows(
    rows: Rows,
    targets: Int[Tensor, "rows"],
    *,
    entropy: bool = False,
    reference: Rows | None = None,
    keep: int = 0,
) -> RowScores:
    """Log-probability of each row's target, with its entropy and its KL to a reference if asked for.

    Differentiable in the hidden states, the weight and the bias (or the logits), not in the reference. Where
    log-probabilities alone are asked for, up to `keep` bytes of exp(logits) wait for the backward pass, which then need
    not compute these products again.

    Raises ValueError if the reference has another vocabulary.
    """
    if reference is not None and reference.vocabulary != rows.vocabulary:
        raise ValueError(
            f"reference: its vocabulary has {reference.vocabulary} tokens, the policy's {rows.vocabulary}; "
            "take a reference with the same head."
        )
    ask = _Ask(rows, targets, entropy, reference, torch.is_grad_enabled(), keep)
    if isinstance(rows, HiddenRows):
        outputs: tuple[Tensor, ...] = _TiledHead.apply(rows.hidden, rows.head.weight, rows.head.bias, ask)
        logps, h, kl, reference_logps = outputs
    elif ask.gradient:
        return _score_logits(rows, targets, entropy, reference)
    else:
        logps, reference_logps, _, _, h, kl = _scan_all(ask, Kept(0))
    with_reference = reference is not None
    return RowScores(
        logps, h if entropy else None, kl if with_reference else None, reference_logps if with_reference else None
    )


def _score_logits(rows: LogitRows, targets: Tensor, entropy: bool, reference: Rows | None) -> RowScores:
    log_p = rows.tile(slice(None), 0, rows.vocabulary).log_softmax(-1)
    p = log_p.exp() if entropy or reference is not None else log_p
    h = -_weighted(p, log_p) if entropy else None
    kl = reference_logps = None
    if reference is not None:
        with torch.no_grad():
            whole = reference.tile(slice(None), 0, reference.vocabulary)
            log_q = whole.log_softmax(-1).to(log_p.dtype)
        kl = _weighted(p, log_p - log_q)
        reference_logps = _pick(log_q, targets)
    return RowScores(_pick(log_p, targets), h, kl, reference_logps)


def _weighted(p: Tensor, values: Tensor) -> Tensor:
    return (p * values.clamp(-1e30, 1e30)).sum(-1)


def _pick(values: Tensor, targets: Tensor) -> Tensor:
    return values.gather(-1, targets[:, None]).squeeze(-1)


@dataclass(frozen=True)
class _Ask:
    rows: Any  # Rows; those of logits have no backward pass here
    targets: Tensor
    entropy: bool
    reference: Rows | None
    gradient: bool
    keep: int

    @property
    def only_logps(self) -> bool:
        return not self.entropy and self.reference is None

    def blocks(self) -> Iterator[slice]:
        block, _ = tile_shape(self.rows.rows, self.rows.vocabulary, self.rows.device)
        return (slice(a, min(a + block, self.rows.rows)) for a in range(0, self.rows.rows, block))

    def tiles(self) -> Iterator[tuple[int, int]]:
        _, width = tile_shape(self.rows.rows, self.rows.vocabulary, self.rows.device)
        return ((a, min(a + width, self.rows.vocabulary)) for a in range(0, self.rows.vocabulary, width))


def _scan_all(ask: _Ask, kept: Kept) -> tuple[Tensor, ...]:
    """Log-probs, reference log-probs, both log-normalisers, entropy and KL; what was not asked for is meaningless."""
    with torch.autocast(ask.rows.device.type, enabled=False):
        parts = zip(*(_scan(ask, block, kept) for block in ask.blocks()), strict=True)
        return tuple(torch.cat(part) for part in parts)


def _scan(ask: _Ask, block: slice, kept: Kept) -> tuple[Tensor, ...]:
    """What `_scan_all` finds, of one block of rows."""
    rows, targets, reference = ask.rows, ask.targets[block], ask.reference
    shape = {"dtype": rows.dtype, "device": rows.device}
    sums, reference_sums = (Sums(len(targets), **shape) for _ in range(2))
    hit, reference_hit, mean_z, mean_w = (torch.zeros(len(targets), **shape) for _ in range(4))
    for start, stop in ask.tiles():
        z = rows.tile(block, start, stop)
        hit = gather(z, targets, start, stop, hit)
        weights, fade = sums.add(z, keep=not ask.only_logps)
        if ask.only_logps:
            kept.add(block, start, weights, sums.top)
        else:
            mean_z = mean_z * fade + torch.linalg.vecdot(weights, z.clamp_(min=-1e30))
        if reference is not None:
            w = reference.tile(block, start, stop).to(rows.dtype)
            reference_hit = gather(w, targets, start, stop, reference_hit)
            mean_w = mean_w * fade + torch.linalg.vecdot(weights, w.clamp_(min=-1e30))
            reference_sums.add(w, keep=False)
    log_z, log_w = sums.log, reference_sums.log if reference is not None else sums.log
    entropy = log_z - mean_z / sums.total
    kl = (mean_z - mean_w) / sums.total - log_z + log_w
    return hit - log_z, reference_hit - log_w, log_z, log_w, entropy, kl


def _scan_with_gradient(ask: _Ask, block: slice) -> tuple[Tensor, Tensor]:
    """Log-probs of one block of rows and their derivative with respect to the hidden states."""
    rows, targets = ask.rows, ask.targets[block]
    hidden = rows.hidden[block]
    sums = Sums(len(targets), rows.dtype, hidden.device)
    hit = torch.zeros(len(targets), dtype=rows.dtype, device=hidden.device)
    mean = torch.zeros(hidden.shape, dtype=rows.dtype, device=hidden.device)
    for start, stop in ask.tiles():
        z = rows.tile(block, start, stop)
        hit = gather(z, targets, start, stop, hit)
        weights, fade = sums.add(z, keep=False)
        mean.mul_(fade[:, None])
        _add_product(mean, weights.to(rows.product), rows.weight(start, stop))
    target_rows = rows.head.weight[targets].to(rows.dtype)
    gradient = (target_rows - mean.div_(sums.total[:, None])).mul_(rows.head.scale / rows.temperature)
    return hit - sums.log, gradient.to(hidden.dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, where the factors may have a narrower dtype than the total."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _set_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total = left @ right, where the factors may have a narrower dtype than the total."""
    if total.dtype == left.dtype:
        torch.mm(left, right, out=total)
    else:
        total.copy_(left @ right)


class _TiledHead(torch.autograd.Function):
    """(hidden, weight, bias) → log-probs, entropy, KL, reference log-probs, one per row."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ask: _Ask) -> tuple[Tensor, ...]:
        device = hidden.device.type
        ctx.ask = ask
        only_hidden = ctx.needs_input_grad[0] and not any(ctx.needs_input_grad[1:3])
        # With a cap the gradient needs z itself.
        ctx.direct = ask.gradient and ask.only_logps and only_hidden and ask.rows.head.softcap is None
        with torch.autocast(device, enabled=False):
            if ctx.direct:
                parts = zip(*(_scan_with_gradient(ask, block) for block in ask.blocks()), strict=True)
                logps, gradient = (torch.cat(part) for part in parts)
                ctx.save_for_backward(gradient)
                empty = logps.new_zeros(0)
                return logps, empty, empty.clone(), empty.clone()
            # With a cap the gradient needs z itself.
            ctx.kept = Kept(
                ask.keep if ask.gradient and any(ctx.needs_input_grad[:3]) and ask.rows.head.softcap is None else 0
            )
            logps, reference_logps, *saved = _scan_all(ask, ctx.kept)
        ctx.save_for_backward(hidden, weight, bias, *saved)
        _, _, entropy, kl = saved
        ctx.mark_non_differentiable(reference_logps)
        return logps, entropy, kl, reference_logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logps: Tensor, d_entropy: Tensor, d_kl: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        if ctx.direct:
            (gradient,) = ctx.saved_tensors
            return (gradient * d_logps[:, None]).to(gradient.dtype), None, None, None
        hidden, weight, bias, *sums = ctx.saved_tensors
        upstream = (d_logps, d_entropy, d_kl)
        return *_backward(ctx.ask, ctx.kept, hidden, weight, bias, sums, upstream, ctx.needs_input_grad), None


def _backward(
    ask: _Ask,
    kept: Kept,
    hidden: Float[Tensor, "rows hidden"],
    weight: Float[Tensor, "vocab hidden"],
    bias: Float[Tensor, "vocab"] | None,
    sums: list[Tensor],
    upstream: tuple[Tensor, ...],
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias, from tiles kept or computed again.

    d ln p_y/dz_j = 1[j = y] − p_j;   dH/dz_j = −p_j (ln p_j + H);   dKL/dz_j = p_j (ln p_j − ln q_j − KL).
    """
    dtype = ask.rows.dtype
    d_hidden = torch.zeros_like(hidden, dtype=dtype) if needs[0] else None
    d_weight = torch.empty_like(weight, dtype=dtype) if needs[1] else None
    d_bias = torch.zeros_like(weight[:, 0], dtype=dtype) if needs[2] and bias is not None else None
    for block in ask.blocks():
        for start, stop in ask.tiles():
            d_z = _logit_gradient(ask, kept, block, start, stop, sums, upstream).to(ask.rows.product)
            if d_hidden is not None:
                _add_product(d_hidden[block], d_z, ask.rows.weight(start, stop))
            if d_weight is not None:
                # The first block writes every row of the tile: memory as large as the head is touched once, not twice.
                add = _add_product if block.start else _set_product
                add(d_weight[start:stop], d_z.T, hidden[block].to(ask.rows.product))
            if d_bias is not None:
                d_bias[start:stop] += d_z.sum(0)
    return (
        None if d_hidden is None else d_hidden.to(hidden.dtype),
        None if d_weight is None else d_weight.to(weight.dtype),
        None if d_bias is None or bias is None else d_bias.to(bias.dtype),
    )


def _logit_gradient(
    ask: _Ask, kept: Kept, block: slice, start: int, stop: int, sums: list[Tensor], upstream: tuple[Tensor, ...]
) -> Float[Tensor, "block tile"]:
    """Gradient with respect to W h + b on one tile."""
    log_z, log_w, entropy, kl = (part[block, None] for part in sums)
    d_logps, d_entropy, d_kl = (part[block, None] for part in upstream)
    tile = kept.take(block, start)
    z = ask.rows.tile(block, start, stop) if tile is None else tile[0]
    slope = ask.rows.slope(z)
    if tile is not None:
        d_z = z.mul_((tile[1] - log_z).exp_().mul_(-d_logps))
    elif ask.only_logps:
        d_z = z.sub_(log_z).exp_().mul_(-d_logps)
    else:
        log_p = z.sub_(log_z)
        d_z = log_p.exp()
        factor = log_p.clamp_(min=-1e30).mul_(d_kl - d_entropy).sub_(d_logps + d_entropy * entropy + d_kl * kl)
        if ask.reference is not None:
            log_q = ask.reference.tile(block, start, stop).to(z).sub_(log_w).clamp_(min=-1e30)
            factor.sub_(log_q.mul_(d_kl))
        d_z.mul_(factor)
    column = ask.targets[block, None] - start
    inside = (column >= 0) & (column < stop - start)
    d_z.scatter_add_(1, column.clamp(0, stop - start - 1), torch.where(inside, d_logps, 0).to(d_z.dtype))
    return d_z if isinstance(slope, float) and slope == 1.0 else d_z.mul_(slope)


# Tiles ----------------------------------------------------------------------------------------------------------------


def tile_shape(rows: int, vocabulary: int, device: torch.device) -> tuple[int, int]:
    """Rows and vocabulary entries of one tile: half a million logits (2 MB) on a CPU, 64 million on an accelerator.

    The more rows there are, the narrower the tile, down to a width at which a matrix product is still efficient.
    """
    elements, narrow, most_rows = (2**19, 1024, 1024) if device.type == "cpu" else (2**26, 4096, 16384)
    blocks = math.ceil(max(rows, 1) / most_rows)
    block = math.ceil(max(rows, 1) / blocks)
    width = max(narrow, elements // block)
    return block, math.ceil(vocabulary / math.ceil(vocabulary / width))


class Sums:
    """Running sums over tiles of exp(z), and of exp(z) times other values, all relative to a running maximum."""

    def __init__(self, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.top = torch.full((rows,), torch.finfo(dtype).min, dtype=dtype, device=device)
        self.total = torch.zeros(rows, dtype=dtype, device=device)

    def add(self, z: Float[Tensor, "block tile"], *, keep: bool) -> tuple[Tensor, Tensor]:
        """Take a tile in; return exp(z − top) (in place of z unless `keep`) and the factor for sums made so far."""
        top = torch.maximum(self.top, z.amax(-1))
        fade = (self.top - top).exp_()
        weights = torch.sub(z, top[:, None]).exp_() if keep else z.sub_(top[:, None]).exp_()
        self.total = self.total * fade + weights.sum(-1)
        self.top = top
        return weights, fade

    @property
    def log(self) -> Float[Tensor, "block"]:
        """ln Σ exp z."""
        return self.top + self.total.log()


def gather(
    z: Float[Tensor, "block tile"], targets: Int[Tensor, "block"], start: int, stop: int, into: Float[Tensor, "block"]
) -> Float[Tensor, "block"]:
    """`into`, with the values of the rows whose target lies on the tile."""
    inside = (targets >= start) & (targets < stop)
    values = z.gather(1, (targets - start).clamp(0, stop - start - 1)[:, None]).squeeze(1)
    return torch.where(inside, values, into)


class Kept:
    """exp(z − top) of the first tiles, with those maxima: for one backward pass, which uses them up."""

    def __init__(self, space: int) -> None:
        self.space = space
        self.tiles: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def add(self, block: slice, start: int, weights: Float[Tensor, "block tile"], top: Float[Tensor, "block"]) -> None:
        """Keep a tile if there is space for it."""
        self.space -= weights.nbytes
        if self.space >= 0:
            self.tiles[block.start, start] = weights, top

    def take(self, block: slice, start: int) -> tuple[Tensor, Tensor] | None:
        """A tile, free to be overwritten, and its maxima [block, 1]; None if it is not (or no longer) here."""
        tile = self.tiles.pop((block.start, start), None)
        return None if tile is None else (tile[0], tile[1][:, None])
