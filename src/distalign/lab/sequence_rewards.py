"""Reward models of short sequences, fitted to labelled pairs: a table of the right form, and two that are not.

"bigram": a score per token given the one before, the form of ln π* in the world "markov". "scalar": what a reward model
usually is, the policy's network with one number read at the last token. "policy": γ ln π₀ plus a learned correction, a
score of every token by a copy of the policy's network, trained whole, its head from zero. The recipe's `init: policy`
begins at γ ln π₀ too, but its network is frozen, and its correction a bounded linear score of hidden states and
embeddings over √T.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from distalign.lab.net import Weights, double, scores, stack
from distalign.lab.sequence_training import Adam, Schedule
from distalign.lab.sequence_worlds import PROMPTS, Data, World, bigram
from distalign.lab.tree import Tree
from distalign.methods.preference import bradley_terry_nll, induced_reward

GRADIENT = 1e-4  # nats: the largest entry of the gradient of the summed loss where the search ends


class _Model(NamedTuple):
    """Weights of a stack to begin with, and what makes rewards [models, prompts, responses] of them."""

    start: Weights
    rewards: Callable[[Weights], Tensor]


def fit_bigram(data: Sequence[Data], tree: Tree, *, ridge: float) -> Float[Tensor, "models prompts responses"]:
    """Rewards of every response by a bigram table, in nats, a model a data set: the minimum, by L-BFGS in float64.

        Σ −ln σ(R(chosen) − R(rejected)) + ridge/2 · |weights|²

    The ridge is a normal prior of standard deviation 1/√ridge nats: a transition that is hardly seen has no maximum of
    the likelihood otherwise. Raises RuntimeError if the search does not end.
    """
    return torch.stack([_minimum(one, tree, ridge) for one in data])


def _minimum(data: Data, tree: Tree, ridge: float) -> Float[Tensor, "prompts responses"]:
    size, pairs = tree.vocabulary, data.pairs[data.held_out :]
    weights = torch.zeros(PROMPTS + size, size, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS(
        [weights],
        max_iter=1000,
        tolerance_grad=GRADIENT,
        tolerance_change=1e-12,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def rewards() -> Tensor:
        return tree.path_sums(bigram(weights[:PROMPTS], weights[PROMPTS:], tree))

    def loss() -> Tensor:
        search.zero_grad()
        total = bradley_terry_nll(rewards().flatten()[pairs]).sum() + ridge / 2 * weights.square().sum()
        total.backward()
        return total

    search.step(loss)
    loss()
    if weights.grad is None or float(weights.grad.abs().max()) > GRADIENT:
        raise RuntimeError("fit_bigram: no minimum after 1,000 steps; give a larger ridge")
    return rewards().detach()


def fit_rewards(
    kind: str,
    data: Sequence[Data],
    tree: Tree,
    schedule: Schedule,
    *,
    gamma: float,
) -> Float[Tensor, "models prompts responses"]:
    """Rewards of every response by networks, in nats, a model a data set: stopped early by the held-out pairs.

    Every step sees all other pairs, so nothing is drawn.
    """
    start, rewards_of = MODELS[kind]([one.world for one in data], tree, gamma)
    adam = Adam(start, schedule)
    trained = [one.pairs[one.held_out :] for one in data]
    held_out = [one.pairs[: one.held_out] for one in data]

    def losses(rewards: Tensor, chosen: list[Tensor]) -> Tensor:
        each = zip(rewards, chosen, strict=True)
        return torch.stack([bradley_terry_nll(table.flatten()[pairs]).mean() for table, pairs in each])

    for step in range(schedule.steps):
        adam.step(losses(rewards_of(adam.weights), trained).sum())
        if (step + 1) % schedule.every == 0 or step + 1 == schedule.steps:
            with torch.no_grad():
                adam.keep(losses(rewards_of(adam.weights), held_out).double())
    with torch.no_grad():
        return rewards_of(double(adam.best))


def _scalar(worlds: Sequence[World], tree: Tree, gamma: float) -> _Model:
    """The reference's network with one more place, for the last token, and a head of one column that starts at zero."""
    weights = stack([world.weights for world in worlds])
    models, _, width = weights["place"].shape
    weights["place"] = torch.cat([weights["place"], weights["place"][:, -1:]], 1)
    weights["head"], weights["head.bias"] = torch.zeros(models, width, 1), torch.zeros(models, 1, 1)
    nodes = len(tree.prefixes)
    return _Model(weights, lambda w: scores(w, tree.whole)[..., nodes:, 0])


def _policy(worlds: Sequence[World], tree: Tree, gamma: float) -> _Model:
    weights = stack([world.weights for world in worlds])
    weights |= {name: torch.zeros_like(weights[name]) for name in ("head", "head.bias")}
    start = induced_reward(torch.stack([tree.path_sums(world.reference) for world in worlds]), gamma=gamma)
    return _Model(weights, lambda w: start.to(w["head"].dtype) + tree.path_sums(scores(w, tree.inner)))


MODELS = {"scalar": _scalar, "policy": _policy}
