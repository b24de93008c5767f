"""Tiles of a head: their shape, and what passes between them: sums with a running maximum, tiles kept for later."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Bytes of a head's tiles that may wait for the backward pass.
KEPT = 2**27


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
    found = z.gather(1, (targets - start).clamp(0, stop - start - 1)[:, None]).squeeze(1)
    return torch.where(inside, found, into)


class Kept:
    """exp(z − top) of the first tiles, with those maxima: for one backward pass, which uses them up."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.tiles: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def add(self, block: slice, start: int, weights: Float[Tensor, "block tile"], top: Float[Tensor, "block"]) -> None:
        """Keep a tile if there is room for it."""
        self.room -= weights.nbytes
        if self.room >= 0:
            self.tiles[block.start, start] = weights, top

    def take(self, block: slice, start: int) -> tuple[Tensor, Tensor] | None:
        """A tile, free to be overwritten, and its maxima [block, 1]; None if it is not (or no longer) here."""
        found = self.tiles.pop((block.start, start), None)
        return None if found is None else (found[0], found[1][:, None])
