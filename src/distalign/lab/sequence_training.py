"""Trains policies and reward models on a tree, many at once: methods, sizes, seeds and worlds in one stack.

As in the trainer, a method gets what its `needs` declares and nothing asks which method it is. Labelled pairs come from
the data; samples and sampled pairs are drawn token by token from the policy as it is. Models never mix: each has its
own random numbers, gradient norm and best checkpoint, and ends the same whatever it is stacked with.

Reward models: "bigram", a score per token given the one before, the form of ln π* in the world "markov". "scalar", what
a reward model usually is: the policy's network with one number read at the last token. "policy", γ ln π₀ plus a learned
correction, a score of every token by a copy of the policy's network, trained whole, its head from zero. (The recipe's
`init: policy` begins at γ ln π₀ too, but its network is frozen, and its correction a bounded linear score.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distalign.lab.experiment import generator
from distalign.lab.sequence_worlds import PROMPTS, Data, Weights, World, bigram, double, logps, scores, stack
from distalign.lab.tree import Tree
from distalign.methods import Method, Pairs, Samples
from distalign.methods.estimators import sequence_sum
from distalign.methods.preference import bradley_terry_nll, induced_reward

_GRADIENT = 1e-4  # nats: the largest entry of the gradient of the summed loss where the search for a minimum ends


@dataclass(frozen=True)
class Job:
    """One policy to train from its world's reference: its name, the method, the labelled pairs, and the reward of every
    response, in nats. Random numbers come from the world's key, the number of pairs and the name.
    """

    name: str
    method: Method
    data: Data
    rewards: Float[Tensor, "prompts responses"] | None = None


@dataclass(frozen=True)
class Schedule:
    """How long and how: AdamW without decay, `warmup` a share of the steps, then cosine, gradient norms clipped to 1.

    A step sees `batch` labelled pairs, or `samples` responses of each prompt, drawn anew every `reuse` steps; `every`
    is how often held-out pairs are looked at.
    """

    steps: int
    lr: float = 3e-3
    batch: int = 256
    samples: int = 128
    reuse: int = 1
    warmup: float = 0.1
    every: int = 10

    def rate(self, step: int) -> float:
        """Share of `lr` at a step, counted from 0."""
        rising = self.warmup * self.steps
        if step < rising:
            return (step + 1) / (rising + 1)
        return (1 + math.cos(math.pi * (step - rising) / (self.steps - rising))) / 2


class Trained(NamedTuple):
    """The policies after the last step, and where held-out labels were likeliest."""

    last: Weights
    best: Weights


class Adam:
    """AdamW on a stack of models, each clipped by its own gradient norm, with a copy of the best of each."""

    def __init__(self, weights: Weights, schedule: Schedule) -> None:
        self.weights = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
        self.best = {name: weight.detach().clone() for name, weight in weights.items()}
        self._value = torch.full((len(next(iter(weights.values()))),), math.inf, dtype=torch.float64)
        self._optimizer = torch.optim.AdamW(self.weights.values(), lr=schedule.lr, weight_decay=0.0)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, schedule.rate)

    def step(self, loss: Float[Tensor, ""]) -> None:
        """One step on the sum of the models' losses."""
        self._optimizer.zero_grad()
        loss.backward()
        gradients = [g for weight in self.weights.values() if (g := weight.grad) is not None]
        norm = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
        for g in gradients:
            g *= (1 / norm.clamp(min=1.0)).view(-1, *[1] * (g.dim() - 1))
        self._optimizer.step()
        self._schedule.step()

    def keep(self, value: Float[Tensor, "models"]) -> None:
        """Remember the models whose value is lower than ever."""
        better = value < self._value
        self._value = torch.where(better, value, self._value)
        for name, weight in self.weights.items():
            chosen = better.view(-1, *[1] * (weight.dim() - 1))
            self.best[name] = torch.where(chosen, weight.detach(), self.best[name])


def train(
    jobs: Sequence[Job], tree: Tree, schedule: Schedule, advance: Callable[[int, int], None] = lambda done, total: None
) -> Trained:
    """Train every job, in stacks in the order of the jobs."""
    adam = Adam(stack([job.data.world.weights for job in jobs]), schedule)
    members: dict[Method, list[int]] = {}
    for index, job in enumerate(jobs):
        members.setdefault(job.method, []).append(index)
    groups = [_Group(method, models, [jobs[i] for i in models], tree, schedule) for method, models in members.items()]
    for step in range(schedule.steps):
        policy = logps(adam.weights, tree)
        adam.step(torch.stack([group.loss(policy, step) for group in groups]).sum())
        if (step + 1) % schedule.every == 0 or step + 1 == schedule.steps:
            with torch.no_grad():
                both = zip(jobs, logps(adam.weights, tree), strict=True)
                adam.keep(torch.tensor([_held_out(job, policy, tree) for job, policy in both], dtype=torch.float64))
        advance(step + 1, schedule.steps)
    return Trained({name: weight.detach() for name, weight in adam.weights.items()}, adam.best)


def _held_out(job: Job, policy: Float[Tensor, "prompts nodes vocabulary"], tree: Tree) -> float:
    """Negative log-likelihood of the held-out labels under the reward that the policy stands for."""
    pairs = job.data.pairs[: job.data.held_out]
    both = [tree.path_sums(table.double()).flatten() for table in (policy, job.data.world.reference)]
    return float(bradley_terry_nll(job.method.implicit_reward(both[0][pairs], both[1][pairs])).mean())


class _Group:
    """The jobs of one method, seen as one batch: their losses are one call of the method's loss."""

    def __init__(self, method: Method, models: list[int], jobs: list[Job], tree: Tree, schedule: Schedule) -> None:
        self.method, self.models, self.tree, self.schedule = method, models, tree, schedule
        self.jobs = jobs
        self.sources = [generator(*job.data.world.key, len(job.data.pairs), job.name) for job in jobs]
        needs = method.needs
        self.labelled, self.sampled = needs.pairs == "labelled", needs.samples or needs.pairs == "sampled"
        rewards = [job.rewards for job in jobs if job.rewards is not None]
        self.rewards = torch.stack(rewards).float() if needs.reward else None
        self.reference = torch.stack([job.data.world.reference for job in jobs]).float()
        self.drawn = torch.empty(0, dtype=torch.long)
        self.behavior = torch.empty(0)

    def loss(self, policy: Float[Tensor, "models prompts nodes vocabulary"], step: int) -> Float[Tensor, ""]:
        """Sum over these models of the method's loss, on new labelled pairs and, when a round begins, new samples."""
        policy = policy[self.models]
        pairs = self._labelled(policy) if self.labelled else Pairs()
        samples = Samples()
        if self.sampled:
            fresh = step % self.schedule.reuse == 0
            if fresh:
                self._draw(policy)
            samples = self._samples(policy, fresh)
            if self.method.needs.pairs == "sampled":
                pairs = self._in_pairs(samples)
        return len(self.models) * self.method.loss(pairs, samples)

    def _labelled(self, policy: Float[Tensor, "models prompts nodes vocabulary"]) -> Pairs:
        chosen = []
        for job, source in zip(self.jobs, self.sources, strict=True):
            pairs, size = job.data.pairs, (self.schedule.batch,)
            chosen.append(pairs[torch.randint(job.data.held_out, len(pairs), size, generator=source)])
        index = torch.stack(chosen)

        def logps_of(table: Tensor) -> Tensor:
            return self.tree.path_sums(table).flatten(1).gather(1, index.flatten(1)).view(-1, 2)

        reference = {"reference_logps": logps_of(self.reference)} if self.method.needs.reference else {}
        return Pairs(logps_of(policy), **reference)

    def _draw(self, policy: Float[Tensor, "models prompts nodes vocabulary"]) -> None:
        shape = (policy.shape[1], self.schedule.samples, self.tree.length)
        uniform = torch.stack([torch.rand(shape, generator=source) for source in self.sources])
        self.drawn = self.tree.draw(policy, uniform)
        self.behavior = self._along(policy.detach())

    def _along(self, table: Float[Tensor, "models prompts nodes *vocabulary"]) -> Float[Tensor, "samples length"]:
        """Values of a table of next tokens (or of nodes) along the paths of the drawn responses, a row for each."""
        where = (self.tree.paths if table.dim() == 4 else self.tree.nodes)[self.drawn]
        return table.flatten(2).gather(2, where.flatten(2)).view(-1, self.tree.length)

    def _samples(self, policy: Float[Tensor, "models prompts nodes vocabulary"], fresh: bool) -> Samples:
        needs, groups = self.method.needs, math.prod(self.drawn.shape[:2])
        collected = {} if fresh else {"behavior_token_logps": self.behavior}
        if needs.reference:
            collected["reference_token_logps"] = self._along(self.reference)
        if needs.kl:
            collected["step_kl"] = self._along((policy.exp() * (policy - self.reference)).sum(-1))
        if self.rewards is not None:
            collected["rewards"] = self.rewards.gather(2, self.drawn).flatten()
        return Samples(
            token_logps=self._along(policy),
            mask=self.tree.mask[self.drawn].flatten(0, 2),
            group=torch.arange(groups).repeat_interleave(self.schedule.samples),
            **collected,
        )

    def _in_pairs(self, samples: Samples) -> Pairs:
        """Samples two by two, as they were drawn; neighbours answer the same prompt."""

        def two(token_logps: Tensor) -> Tensor:
            return sequence_sum(token_logps, samples.mask).view(-1, 2)

        collected = {}
        if hasattr(samples, "reference_token_logps"):
            collected["reference_logps"] = two(samples.reference_token_logps)
        if hasattr(samples, "rewards"):
            collected["rewards"] = samples.rewards.view(-1, 2)
        return Pairs(two(samples.token_logps), behavior_logps=two(self.behavior), **collected)


def fit_bigram(data: Sequence[Data], tree: Tree, *, ridge: float) -> Float[Tensor, "models prompts responses"]:
    """Rewards of every response by a bigram table, in nats, a model a data set: the minimum, by L-BFGS in float64.

        Σ −ln σ(R(chosen) − R(rejected)) + ridge/2 · |weights|²

    The ridge is a normal prior of standard deviation 1/√ridge nats: a transition that is hardly seen has no maximum of
    the likelihood otherwise. Raises RuntimeError if the search does not end.
    """
    return torch.stack([_minimum(each.pairs[each.held_out :], tree, ridge) for each in data])


def _minimum(pairs: Int[Tensor, "pairs 2"], tree: Tree, ridge: float) -> Float[Tensor, "prompts responses"]:
    weights = torch.zeros(PROMPTS + tree.vocabulary, tree.vocabulary, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS(
        [weights],
        max_iter=1000,
        tolerance_grad=_GRADIENT,
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
    if weights.grad is None or float(weights.grad.abs().max()) > _GRADIENT:
        raise RuntimeError("fit_bigram: no minimum after 1,000 steps; give a larger ridge")
    return rewards().detach()


def fit_rewards(
    kind: str, data: Sequence[Data], tree: Tree, schedule: Schedule, *, gamma: float
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


def _scalar(worlds: Sequence[World], tree: Tree, gamma: float) -> tuple[Weights, Callable[[Weights], Tensor]]:
    """The reference's network with one more place, for the last token, and a head of one column that starts at zero."""
    weights = stack([world.weights for world in worlds])
    models, _, width = weights["place"].shape
    weights["place"] = torch.cat([weights["place"], weights["place"][:, -1:]], 1)
    weights["head"], weights["head.bias"] = torch.zeros(models, width, 1), torch.zeros(models, 1, 1)
    nodes = len(tree.prefixes)
    return weights, lambda w: scores(w, tree.whole)[..., nodes:, 0]


def _policy(worlds: Sequence[World], tree: Tree, gamma: float) -> tuple[Weights, Callable[[Weights], Tensor]]:
    weights = stack([world.weights for world in worlds])
    weights |= {name: torch.zeros_like(weights[name]) for name in ("head", "head.bias")}
    start = induced_reward(torch.stack([tree.path_sums(world.reference) for world in worlds]), gamma=gamma)
    return weights, lambda w: start.to(w["head"].dtype) + tree.path_sums(scores(w, tree.inner))


# Weights of a stack to begin with, and what makes rewards [models, prompts, responses] of them.
MODELS = {"scalar": _scalar, "policy": _policy}
