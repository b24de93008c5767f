"""Experiment "sequences": policies that are networks and responses that are sequences, with KL known exactly.

Tiny transformers over every response of at most four tokens, trained by the methods' own losses with real sampling.
What methods do as n grows, and what decides it: in the world "markov" the reward model is of the right form; in the
world "tilted" it is an ordinary network, and how it starts matters more than the method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from distalign.lab.exact import asymptotic_constant, divergence, entropy, optimum
from distalign.lab.experiment import Advance, at_least, powers
from distalign.lab.net import Weights, double
from distalign.lab.sequence_rewards import fit_bigram, fit_rewards
from distalign.lab.sequence_shown import show, summarise
from distalign.lab.sequence_training import Job, Schedule, train
from distalign.lab.sequence_worlds import Data, World, bigram_features, draw_pairs, logps, make_worlds
from distalign.lab.shown import Shown
from distalign.lab.tree import Tree
from distalign.methods import DPO, PD, PMLE, REBEL, RKL, RLHF
from distalign.methods.preference import induced_reward

TREE = Tree(vocabulary=8, length=4)
WEIGHTS = torch.logspace(-1.5, 2.5, 81, dtype=torch.float64).tolist()  # an oracle's KL weights, times γ
POSITIVE = ["gamma", "distance", "betas", "ridge", "lr", "dpo_lr", "policy_lr", "scalar_lr", "init_lr", "brief_lr"]
STAGES = {"worlds": 5, "rewards": 25, "pmle": 35, "dpo": 10, "sampling": 25}  # shares of the time, in per cent


class Best(NamedTuple):
    """An optimum by enumeration, and the KL weight that it belongs to."""

    logps: Float[Tensor, "prompts responses"]
    beta: float


class Cell(NamedTuple):
    """Labelled pairs of a world and the rewards that were fitted to them, by the kind of the reward model."""

    data: Data
    rewards: dict[str, Float[Tensor, "prompts responses"]]


@dataclass(frozen=True)
class Sequences:
    """Forward KL of each method against the number of labelled pairs n = 512 · 4^k, in two worlds.

    `distance` is KL(π* ‖ π₀) in nats; `betas` are KL weights of PMLE without early stopping. Steps and learning rates:
    `steps`, `lr` of PMLE, `dpo_lr` of DPO; `policy_steps`, `policy_lr` of the methods that sample; `reward_steps` of
    networks as reward models, `scalar_lr` of the scalar head, `init_lr` of γ ln π₀ + a correction, `brief_steps`,
    `brief_lr` of a scalar head that is fitted less. `ridge` is the bigram reward's, against the summed loss. At most
    `counter_n` pairs are drawn in the world "tilted", and methods that sample are trained at the largest number alone
    there.
    """

    seed: int = 0
    seeds: int = 3
    max_n: int = 32768
    gamma: float = 1.0
    distance: float = 1.0
    betas: tuple[float, ...] = (0.03, 0.3)
    steps: int = 400
    lr: float = 3e-3
    dpo_lr: float = 2e-2
    policy_steps: int = 300
    policy_lr: float = 1e-2
    reward_steps: int = 160
    scalar_lr: float = 1e-2
    init_lr: float = 5e-3
    brief_steps: int = 40
    brief_lr: float = 3e-3
    ridge: float = 0.1
    counter_n: int = 8192

    name: ClassVar[str] = "sequences"

    def __post_init__(self) -> None:
        at_least(self, seed=0, seeds=1, max_n=512, counter_n=512)
        at_least(self, steps=1, policy_steps=1, reward_steps=1, brief_steps=1)
        for name in POSITIVE:
            value = getattr(self, name)
            if min(value if isinstance(value, tuple) else (value,)) <= 0:
                raise ValueError(f"{name} is {value}; give more than 0")

    def run(self, advance: Advance) -> tuple[dict[str, Any], Shown]:
        """Train everything, and measure it by enumeration."""
        stage = _stages(advance)
        keys = [(self.seed, repetition, kind) for kind in ("markov", "tilted") for repetition in range(self.seeds)]
        worlds = make_worlds(keys, TREE, distance=self.distance, steps=300)
        stage("worlds")(1, 1)
        cells = self._cells(worlds, stage("rewards"))
        rows = [row for cell in cells for row in self._enumerated(cell)]
        rows += self._labelled([cell.data for cell in cells], stage)
        rows += self._sampled(cells, stage("sampling"))
        limits = [row for world in worlds for row in self._limits(world)]
        constants = [self._constant(world) for world in worlds if world.kind == "markov"]
        numbers = {"rows": rows, "summary": summarise(rows), "limits": limits, "constants": constants}
        brief = f"{self.brief_steps} steps, lr {self.brief_lr:g}"
        return numbers, show(numbers, gamma=self.gamma, distance=self.distance, betas=self.betas, brief=brief)

    def _cells(self, worlds: list[World], advance: Callable[[int, int], None]) -> list[Cell]:
        """Every world at every number of pairs, the rewards of its repetitions fitted together."""
        cells = []
        for kind, most in (("markov", self.max_n), ("tilted", min(self.max_n, self.counter_n))):
            for n in powers(512, most, 4):
                same = [draw_pairs(world, n, TREE, gamma=self.gamma) for world in worlds if world.kind == kind]
                fitted = self._rewards(same)
                cells += [Cell(data, {name: one[i] for name, one in fitted.items()}) for i, data in enumerate(same)]
                advance(len(cells), len(worlds) * 4)
        return cells

    def _rewards(self, data: list[Data]) -> dict[str, Float[Tensor, "models prompts responses"]]:
        """By the ending of a method's name: the rewards of these data sets, all of one kind of world."""
        if data[0].world.kind == "markov":
            return {"": fit_bigram(data, TREE, ridge=self.ridge)}
        models = {
            "_policy": ("policy", Schedule(self.reward_steps, lr=self.init_lr)),
            "_scalar": ("scalar", Schedule(self.reward_steps, lr=self.scalar_lr)),
            "_brief": ("scalar", Schedule(self.brief_steps, lr=self.brief_lr)),
        }
        return {end: fit_rewards(kind, data, TREE, how, gamma=self.gamma) for end, (kind, how) in models.items()}

    def _optima(self, world: World, rewards: Float[Tensor, "prompts responses"]) -> dict[str, Best]:
        """What the methods that use a reward tend to, by enumeration (appendix B), by method."""
        reference = TREE.path_sums(world.reference)

        def best(gamma: float, betas: Sequence[float]) -> Best:
            optima = [Best(optimum(rewards, reference, gamma=gamma, beta=beta), beta) for beta in betas]
            return min(optima, key=lambda one: float(divergence(world.target, one.logps)))

        weights = [self.gamma * weight for weight in WEIGHTS]
        rkl, rebel = best(self.gamma, [0.0]), best(0.0, [self.gamma])
        tuned = best(self.gamma, [0.0, *weights])
        return {"rkl": rkl, "pd": rkl, "rlhf": best(0.0, weights), "rebel": rebel, "rkl_tuned": tuned}

    def _enumerated(self, cell: Cell) -> list[dict[str, Any]]:
        """Rows of the reference and of what the fitted rewards lead to, nothing trained."""
        rows = [_row(cell.data, "reference", TREE.path_sums(cell.data.world.reference))]
        for ending, rewards in cell.rewards.items():
            optima = self._optima(cell.data.world, rewards)
            for name in ("rkl", "rkl_tuned", "rlhf", "rebel"):
                best = optima[name]
                rows.append(_row(cell.data, f"{name}{ending}_optimum", best.logps, beta=best.beta))
        return rows

    def _limits(self, world: World) -> list[dict[str, Any]]:
        """Forward KL as n → ∞, the reward then being γ ln π*, in nats; PMLE, PD and RKL tend to 0."""
        optima = self._optima(world, induced_reward(world.target, gamma=self.gamma))
        # DPO tends to π₀π*/Z whatever its γ, and so does REBEL with a KL weight of γ.
        limits = {"rlhf": optima["rlhf"], "dpo": optima["rebel"], "rebel": optima["rebel"]}
        values = {name: float(divergence(world.target, best.logps)) for name, best in limits.items()}
        return [
            {"world": world.kind, "seed": world.key[1], "method": name, "forward_kl": value}
            for name, value in {"reference": world.distance, **values}.items()
        ]

    def _constant(self, world: World) -> dict[str, Any]:
        """C = lim n · KL(π* ‖ π̂), in nats, n the pairs that are fitted, where reward and policy are bigram tables: how
        well π₀ covers the target. One for PMLE, PD and RKL, as the classes are one.
        """
        features, reference = bigram_features(TREE), TREE.path_sums(world.reference)
        constant = asymptotic_constant(world.target[None], reference[None], features[None], gamma=self.gamma)
        return {"world": world.kind, "seed": world.key[1], "constant": float(constant)}

    def _labelled(self, data: list[Data], stage: Callable[[str], Callable[[int, int], None]]) -> list[dict[str, Any]]:
        """PMLE stopped early and at its last step, with β instead, and DPO stopped early."""
        markov = [one for one in data if one.world.kind == "markov"]
        plain = [Job("pmle", PMLE(gamma=self.gamma, beta=0.0), one) for one in data]
        held = [Job(f"pmle_beta_{b:g}", PMLE(gamma=self.gamma, beta=b), one) for b in self.betas for one in markov]
        dpo = [Job("dpo", DPO(gamma=self.gamma), one) for one in markov]
        pmle = train([*plain, *held], TREE, Schedule(self.steps, lr=self.lr, batch=512), stage("pmle"))
        best, last = _policies(pmle.best)[: len(plain)], _policies(pmle.last)
        rows = _rows(plain, best) + _rows(held, last[len(plain) :])
        rows += [_row(job.data, "pmle_last", policy) for job, policy in zip(plain, last, strict=False)]
        schedule = Schedule(self.steps, lr=self.dpo_lr, batch=1024)
        return rows + _rows(dpo, _policies(train(dpo, TREE, schedule, stage("dpo")).best))

    def _sampled(self, cells: list[Cell], advance: Callable[[int, int], None]) -> list[dict[str, Any]]:
        """The methods that draw from the policy, each beside the optimum that its reward has by enumeration."""
        jobs, optima = [], []
        most = max(len(cell.data.pairs) for cell in cells if cell.data.world.kind == "tilted")
        for cell in cells:
            world = cell.data.world
            if world.kind == "tilted" and len(cell.data.pairs) < most:
                continue
            for ending, rewards in cell.rewards.items():
                best = self._optima(world, rewards)
                methods = {"rkl": RKL(gamma=self.gamma, beta=0.0), "rlhf": RLHF(beta=best["rlhf"].beta)}
                if world.kind == "markov":
                    methods |= {"pd": PD(gamma=self.gamma, beta=0.0), "rebel": REBEL(1 / self.gamma, self.gamma)}
                jobs += [Job(name + ending, method, cell.data, rewards) for name, method in methods.items()]
                optima += [best[name] for name in methods]
        schedule = Schedule(self.policy_steps, lr=self.policy_lr, reuse=4)
        trained = _policies(train(jobs, TREE, schedule, advance).last)
        return [
            _row(job.data, job.name, policy, beta=best.beta, from_optimum=float(divergence(best.logps, policy)))
            for job, policy, best in zip(jobs, trained, optima, strict=True)
        ]


def _stages(advance: Advance) -> Callable[[str], Callable[[int, int], None]]:
    """For a stage by name: what reports how much of it is done, as a part of the whole."""

    def begin(name: str) -> Callable[[int, int], None]:
        names = list(STAGES)
        before = sum(STAGES[one] for one in names[: names.index(name)])
        return lambda done, total: advance(before + STAGES[name] * done // total, 100, name)

    return begin


def _policies(weights: Weights) -> Float[Tensor, "models prompts responses"]:
    """ln π of every response, in float64."""
    return TREE.path_sums(logps(double(weights), TREE))


def _rows(jobs: Sequence[Job], policies: Float[Tensor, "models prompts responses"]) -> list[dict[str, Any]]:
    return [_row(job.data, job.name, policy) for job, policy in zip(jobs, policies, strict=True)]


def _row(data: Data, name: str, policy: Float[Tensor, "prompts responses"], **more: float) -> dict[str, Any]:
    """One measurement, in nats: a policy in a world, at a number of pairs; `seed` numbers the repetition."""
    world = data.world
    return {
        "world": world.kind,
        "method": name,
        "n": len(data.pairs),
        "fitted": len(data.pairs) - data.held_out,
        "seed": world.key[1],
        "forward_kl": float(divergence(world.target, policy)),
        "reverse_kl": float(divergence(policy, world.target)),
        "entropy": float(entropy(policy)),
        **more,
    }
