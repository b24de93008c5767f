"""Worlds of short sequences in which the target is known exactly: their networks, and labelled pairs drawn from them.

"markov": the target is a Markov chain over tokens, so a reward of (V + 1) · V numbers can be right; the reference is a
network fitted to target × random network. "tilted": the reference is a random network, the target a network fitted to
reference × bigram weights, so that both are in the policy's class and ln of the target is no small table. In both the
target is a wanted number of nats away, and the responses that are labelled come from the reference.

A network is a tiny causal transformer evaluated on a tree of prefixes, many models at once. A position attends to its
own prefixes and nothing else, so one forward pass over the tree gives every conditional of every prompt, exactly. All
weights carry a leading axis, the models: a hundred models train in the time of a few.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from distalign.lab.exact import divergence
from distalign.lab.experiment import generator
from distalign.lab.tree import Positions, Tree
from distalign.methods.preference import preference_logit

Weights = dict[str, Tensor]  # by name, [models, ...]
Key = tuple[int, int, str]  # seed, number of the repetition, "markov" or "tilted"

PROMPTS = 2
WIDTH = 16
RARE = -1.0  # added to the score of end-of-sequence: where every token is as likely, short responses hold the mass


def random_network(vocabulary: int, places: int, source: torch.Generator) -> Weights:
    """Random weights of one model (its axis has size 1), normal and scaled by fan-in; about 7,000.

    Two layers of one attention head and a hidden layer four times as wide; `places` is how many tokens it reads.
    """
    sizes = {}
    for layer in range(2):
        sizes[f"{layer}.attend"] = (WIDTH, 3 * WIDTH)
        sizes[f"{layer}.attended"] = (WIDTH, WIDTH)
        sizes[f"{layer}.up"] = (WIDTH, 4 * WIDTH)
        sizes[f"{layer}.down"] = (4 * WIDTH, WIDTH)
    sizes["head"] = (WIDTH, vocabulary)
    weights = {name: torch.randn((1, *size), generator=source) / math.sqrt(size[0]) for name, size in sizes.items()}
    weights |= {f"{name}.bias": torch.zeros(1, 1, columns) for name, (_, columns) in sizes.items()}
    for name, rows in (("word", vocabulary), ("place", places), ("prompt", PROMPTS)):
        weights[name] = torch.randn((1, rows, WIDTH), generator=source)
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
    prompts = prompt.shape[1]
    tokens = word[:, positions.tokens] + place[:, positions.depths]
    x = (tokens[:, None] + prompt[:, :, None]).flatten(1, 2)  # [models, prompts · positions, width]

    def linear(name: str, inputs: Tensor) -> Tensor:
        return torch.baddbmm(weights[f"{name}.bias"], inputs, weights[name])

    def normal(inputs: Tensor) -> Tensor:
        return functional.layer_norm(inputs, (WIDTH,))

    for layer in range(2):
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
    weight = (query[..., None, :] * key) @ query.new_full((WIDTH, 1), 1 / math.sqrt(WIDTH))
    later = torch.arange(depth) > positions.depths[:, None]
    return (weight.masked_fill(later[..., None], -math.inf).softmax(-2) * value).sum(-2)


@dataclass(frozen=True)
class World:
    """A target and a reference network, in float64 but for the weights of the network.

    `target` is ln π* of every response, `reference` ln π₀ of every next token; `distance` is KL(π* ‖ π₀) as it turned
    out, in nats.
    """

    kind: str
    key: Key
    target: Float[Tensor, "prompts responses"]
    reference: Float[Tensor, "prompts nodes vocabulary"]
    weights: Weights
    distance: float


@dataclass(frozen=True)
class Data:
    """Labelled pairs of a world, as `draw_pairs` numbers them. The first `held_out` are never trained on: they choose
    the checkpoint. They are a tenth, and at least 200: fewer choose badly.
    """

    world: World
    pairs: Int[Tensor, "pairs 2"]

    @property
    def held_out(self) -> int:
        """How many pairs are held out."""
        return max(200, len(self.pairs) // 10)


def logps(weights: Weights, tree: Tree) -> Float[Tensor, "models prompts nodes vocabulary"]:
    """Next-token log-probabilities at every node, in nats."""
    return scores(weights, tree.inner).log_softmax(-1)


def bigram(
    first: Float[Tensor, "*models prompts vocabulary"],
    after: Float[Tensor, "*models vocabulary vocabulary"],
    tree: Tree,
) -> Float[Tensor, "*models prompts nodes vocabulary"]:
    """Scores of the next token that depend on the one before it alone, and on the prompt for the first."""
    rest = after[..., tree.inner.tokens[1:], :]
    prompts = first.shape[-2]
    rest = rest[..., None, :, :].expand(*rest.shape[:-2], prompts, *rest.shape[-2:])
    return torch.cat([first[..., None, :], rest], -2)


def bigram_features(tree: Tree) -> Float[Tensor, "prompts responses features"]:
    """The tables of `bigram` as a linear class, less what changes no preference: first tokens count against end-of-
    sequence, and nothing follows that.
    """
    size = tree.vocabulary
    tables = torch.eye((PROMPTS + size) * size, dtype=torch.float64).view(-1, PROMPTS + size, size)
    counted = torch.ones(PROMPTS + size, size, dtype=torch.bool)
    counted[:PROMPTS, 0] = counted[PROMPTS] = False
    tables = tables[counted.flatten()]
    return tree.path_sums(bigram(tables[:, :PROMPTS], tables[:, PROMPTS:], tree)).movedim(0, -1)


def make_worlds(keys: Sequence[Key], tree: Tree, *, distance: float, steps: int) -> list[World]:
    """A world for each key, the networks fitted together, all within 3 % of the wanted distance.

    Raises ValueError if a network cannot be fitted to that.
    """
    drafts = [_draft(key, tree) for key in keys]
    weights, wanted, worlds = stack([draft.start for draft in drafts]), [distance] * len(drafts), []
    for attempt in range(6):
        goals = torch.stack([draft.goal(want) for draft, want in zip(drafts, wanted, strict=True)])
        length, lr = (steps, 1e-2) if attempt == 0 else (steps // 2, 3e-3)
        weights = fit(weights, goals, tree, steps=length, lr=lr)
        worlds = [draft.world(take(weights, [i])) for i, draft in enumerate(drafts)]
        if all(abs(world.distance / distance - 1) <= 0.03 for world in worlds):
            return worlds
        wanted = [want * distance / world.distance for want, world in zip(wanted, worlds, strict=True)]
    reached = [round(world.distance, 3) for world in worlds]
    raise ValueError(f"the networks end {reached} nats away instead of {distance}; give more steps")


def fit(
    weights: Weights, goals: Float[Tensor, "models prompts responses"], tree: Tree, *, steps: int, lr: float
) -> Weights:
    """The networks that minimise KL(goal ‖ network) from these weights on: exact gradients, Adam, a cosine schedule."""
    leaves = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
    optimizer = torch.optim.Adam(leaves.values(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    goals = goals.float()
    for _ in range(steps):
        optimizer.zero_grad()
        divergence(goals, tree.path_sums(logps(leaves, tree))).sum().backward()
        optimizer.step()
        schedule.step()
    return {name: leaf.detach() for name, leaf in leaves.items()}


def draw_pairs(world: World, n: int, tree: Tree, *, gamma: float) -> Data:
    """n labelled pairs: a prompt, two responses of the reference, a label drawn from the target's preference (eq. 3).

    Responses are numbered through the prompts, as in a flattened [prompts, responses]; column 0 is the preferred one.
    """
    source = generator(*world.key, n)
    probabilities = tree.path_sums(world.reference).exp()
    prompts = torch.randint(len(probabilities), (n,), generator=source)
    both = torch.multinomial(probabilities, 2 * n, replacement=True, generator=source).view(len(probabilities), n, 2)
    responses = both[prompts, torch.arange(n)] + (prompts * probabilities.shape[1])[:, None]
    logit = preference_logit(world.target.flatten()[responses], gamma=gamma)
    swap = torch.rand(n, generator=source, dtype=logit.dtype) >= logit.sigmoid()
    return Data(world, torch.where(swap[:, None], responses.flip(1), responses))


def bend_to(bent: Callable[[float], float], distance: float) -> float:
    """The gain, to rounding, at which a distance that grows with it from zero reaches the wanted one, in nats.

    Raises ValueError if none up to a million does.
    """
    low, high = 0.0, 1.0
    while bent(high) < distance:
        low, high = high, 2 * high
        if high > 1e6:
            raise ValueError(f"no tilt brings the target {distance} nats away; give a smaller distance")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if bent(middle) < distance else (low, middle)
    return high


@dataclass(frozen=True)
class _Draft:
    """A world before its network is fitted: one side exact, next-token log-probabilities, and what bends it.

    `markov`: the exact side is the target, bent at every node by the scores of a random network. Otherwise it is the
    reference, a network itself, bent as a whole: bigram scores of the response.
    """

    key: Key
    tree: Tree
    start: Weights
    exact: Float[Tensor, "prompts nodes vocabulary"]
    bend: Float[Tensor, "prompts nodes vocabulary"]

    @property
    def markov(self) -> bool:
        return self.key[-1] == "markov"

    def goal(self, distance: float) -> Float[Tensor, "prompts responses"]:
        """ln of what the network is fitted to, at the distance from the exact side, KL(target ‖ reference)."""
        base = self.tree.path_sums(self.exact)

        def bent(gain: float) -> tuple[float, Tensor]:
            if self.markov:
                reference = self.tree.path_sums((self.exact + gain * self.bend).log_softmax(-1))
                return float(divergence(base, reference)), reference
            target = (base + gain * self.tree.path_sums(self.bend)).log_softmax(-1)
            return float(divergence(target, base)), target

        return bent(bend_to(lambda gain: bent(gain)[0], distance))[1]

    def world(self, weights: Weights) -> World:
        """The world whose network has been fitted."""
        fitted = logps(double(weights), self.tree)[0]
        target, reference = (self.exact, fitted) if self.markov else (fitted, self.exact)
        target = self.tree.path_sums(target)
        distance = float(divergence(target, self.tree.path_sums(reference)))
        return World(self.key[-1], self.key, target, reference, weights if self.markov else self.start, distance)


def _draft(key: Key, tree: Tree) -> _Draft:
    source = generator(*key)
    net = random_network(tree.vocabulary, tree.length, source)
    first = torch.randn(PROMPTS, tree.vocabulary, generator=source, dtype=torch.float64)
    after = torch.randn(tree.vocabulary, tree.vocabulary, generator=source, dtype=torch.float64)
    chain = bigram(first, after, tree)
    if key[-1] == "markov":
        return _Draft(key, tree, net, chain.log_softmax(-1), scores(double(net), tree.inner)[0])
    net["head.bias"][..., 0] = RARE
    return _Draft(key, tree, net, logps(double(net), tree)[0], chain)
