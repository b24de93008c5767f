"""A tiny causal transformer evaluated on a tree of prefixes, many models at once.

A position attends to its own prefixes and nothing else, so one forward pass over the tree gives what as many causal
passes as there are responses would: every conditional of every prompt, exactly. All weights carry a leading axis, the
models: at this size an operation costs more to start than to do, and a hundred models train in the time of a few.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from distalign.lab.tree import Positions

Weights = dict[str, Tensor]  # by name, [models, ...]


@dataclass(frozen=True)
class Shape:
    """The size of a network: `layers` of one attention head and a hidden layer of 4 · `width`; about 7,000 weights."""

    vocabulary: int
    prompts: int
    depth: int
    width: int = 16
    layers: int = 2

    def fresh(self, generator: torch.Generator, *, gain: float = 1.0) -> Weights:
        """Random weights of one model (its axis has size 1): normal, scaled by fan-in, the head by `gain`."""
        wide, sizes = 4 * self.width, {}
        for layer in range(self.layers):
            sizes[f"{layer}.attend"] = (self.width, 3 * self.width)
            sizes[f"{layer}.attended"] = (self.width, self.width)
            sizes[f"{layer}.up"] = (self.width, wide)
            sizes[f"{layer}.down"] = (wide, self.width)
        sizes["head"] = (self.width, self.vocabulary)
        weights = {
            name: torch.randn((1, rows, columns), generator=generator) / math.sqrt(rows)
            for name, (rows, columns) in sizes.items()
        }
        weights["head"] *= gain
        weights |= {f"{name}.bias": torch.zeros(1, 1, columns) for name, (_, columns) in sizes.items()}
        for name, rows in (("word", self.vocabulary), ("place", self.depth), ("prompt", self.prompts)):
            weights[name] = torch.randn((1, rows, self.width), generator=generator)
        return weights


def stack(models: Sequence[Weights]) -> Weights:
    """Several models as one, in order."""
    return {name: torch.cat([model[name] for model in models]) for name in models[0]}


def take(weights: Weights, models: Sequence[int]) -> Weights:
    """Some of the models, in the order asked for; one may be asked for twice."""
    return {name: weight[list(models)] for name, weight in weights.items()}


def double(weights: Weights) -> Weights:
    """The same weights in float64, cut from any graph: what is evaluated."""
    return {name: weight.detach().double() for name, weight in weights.items()}


def states(weights: Weights, positions: Positions) -> Float[Tensor, "models prompts positions width"]:
    """Final hidden state at every position, after every prompt."""
    word, place, prompt = (weights[name] for name in ("word", "place", "prompt"))
    prompts, width = prompt.shape[1:]
    tokens = word[:, positions.tokens] + place[:, positions.depths]
    x = (tokens[:, None] + prompt[:, :, None]).flatten(1, 2)  # [models, prompts · positions, width]

    def linear(name: str, inputs: Tensor) -> Tensor:
        return torch.baddbmm(weights[f"{name}.bias"], inputs, weights[name])

    def normal(inputs: Tensor) -> Tensor:
        return functional.layer_norm(inputs, (width,))

    for layer in range(sum(name.endswith(".up") for name in weights)):
        mixed = linear(f"{layer}.attend", normal(x)).unflatten(1, (prompts, -1))
        x = x + linear(f"{layer}.attended", _attend(mixed, positions).flatten(1, 2))
        x = x + linear(f"{layer}.down", functional.gelu(linear(f"{layer}.up", normal(x))))
    return normal(x).unflatten(1, (prompts, -1))


def scores(weights: Weights, positions: Positions) -> Float[Tensor, "models prompts positions vocabulary"]:
    """The head's scores at every position: a policy's next-token logits. A head of one column is a scalar head."""
    final = states(weights, positions)
    return torch.baddbmm(weights["head.bias"], final.flatten(1, 2), weights["head"]).unflatten(1, final.shape[1:3])


def _attend(
    mixed: Float[Tensor, "models prompts positions three_widths"], positions: Positions
) -> Float[Tensor, "models prompts positions width"]:
    """Attention of every position to its ancestors and itself. The product with ones sums faster than `sum` does."""
    query, key, value = mixed.chunk(3, -1)
    ancestors, depth = positions.ancestors.flatten(), positions.ancestors.shape[1]
    key, value = (z.index_select(2, ancestors).unflatten(2, (-1, depth)) for z in (key, value))
    width = query.shape[-1]
    weight = (query[..., None, :] * key) @ query.new_full((width, 1), 1 / math.sqrt(width))
    later = torch.arange(depth) > positions.depths[:, None]
    return (weight.masked_fill(later[..., None], -math.inf).softmax(-2) * value).sum(-2)
