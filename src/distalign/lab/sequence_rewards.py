"""Reward models of short sequences, fitted to labelled pairs: a table of the right form, and two that are not.

"bigram": a score per token given the one before, the form of ln π* in the world "markov". "scalar": what a reward model
usually is, the policy's network with one number read at the last token. "policy": γ ln π₀ plus a learned correction, a
score of every token by the policy's network, with a head that starts at zero; the recipe's `init: policy` is that.
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
from distalign.preference import bradley_terry_nll, induced_reward


class _Model(NamedTuple):
    """Weights of a stack to begin with, what makes rewards [models, prompts, responses] of them, and the weight of
    ridge/2 · |weights|² beside the summed loss.
    """

    start: Weights
    rewards: Callable[[Weights], Tensor]
    ridge: float


def fit_rewards(
    kind: str,
    data: Sequence[Data],
    tree: Tree,
    schedule: Schedule,
    *,
    gamma: float,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Float[Tensor, "models prompts responses"]:
    """Rewards of every response, in nats, a model a data set: maximum likelihood, stopped early by the held-out pairs.

    Every step sees all other pairs, so nothing is drawn. The bigram table has a ridge besides (a normal prior of
    standard deviation 3.2 nats): a transition that is hardly seen has no maximum otherwise.
    """
    start, rewards_of, ridge = MODELS[kind]([one.world for one in data], tree, gamma)
    adam = Adam(start, schedule)
    trained = [one.pairs[one.held_out :] for one in data]
    held_out = [one.pairs[: one.held_out] for one in data]
    pull = ridge / 2 / torch.tensor([len(pairs) for pairs in trained])

    def losses(rewards: Tensor, chosen: list[Tensor]) -> Tensor:
        each = zip(rewards, chosen, strict=True)
        return torch.stack([bradley_terry_nll(table.flatten()[pairs]).mean() for table, pairs in each])

    for step in range(schedule.steps):
        loss = losses(rewards_of(adam.weights), trained)
        if ridge:
            loss = loss + pull * torch.stack([w.square().flatten(1).sum(1) for w in adam.weights.values()]).sum(0)
        adam.step(loss.sum())
        if (step + 1) % schedule.every == 0 or step + 1 == schedule.steps:
            with torch.no_grad():
                adam.keep(losses(rewards_of(adam.weights), held_out).double())
        advance(step + 1, schedule.steps)
    with torch.no_grad():
        return rewards_of(double(adam.best))


def _bigram(worlds: Sequence[World], tree: Tree, gamma: float) -> _Model:
    size = tree.vocabulary
    weights = {"first": torch.zeros(len(worlds), PROMPTS, size), "after": torch.zeros(len(worlds), size, size)}
    return _Model(weights, lambda w: tree.path_sums(bigram(w["first"], w["after"], tree)), ridge=0.1)


def _scalar(worlds: Sequence[World], tree: Tree, gamma: float) -> _Model:
    """The reference's network with one more place, for the last token, and a head of one column that starts at zero."""
    weights = stack([world.weights for world in worlds])
    models, _, width = weights["place"].shape
    weights["place"] = torch.cat([weights["place"], weights["place"][:, -1:]], 1)
    weights["head"], weights["head.bias"] = torch.zeros(models, width, 1), torch.zeros(models, 1, 1)
    nodes = len(tree.prefixes)
    return _Model(weights, lambda w: scores(w, tree.whole)[..., nodes:, 0], ridge=0.0)


def _policy(worlds: Sequence[World], tree: Tree, gamma: float) -> _Model:
    weights = stack([world.weights for world in worlds])
    weights |= {name: torch.zeros_like(weights[name]) for name in ("head", "head.bias")}
    start = induced_reward(torch.stack([tree.path_sums(world.reference) for world in worlds]), gamma=gamma)
    return _Model(weights, lambda w: start.to(w["head"].dtype) + tree.path_sums(scores(w, tree.inner)), ridge=0.0)


MODELS = {"bigram": _bigram, "scalar": _scalar, "policy": _policy}
