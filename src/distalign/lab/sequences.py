"""Experiment "sequences": policies that are networks and responses that are sequences, with KL known exactly.

Tiny transformers over every response of at most four tokens, trained by the methods' own losses with real sampling.
What methods do as n grows, and what decides it: in the world "markov" the reward model is of the right form; in the
world "tilted" it is an ordinary network, and how it starts matters more than the method.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Annotated, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field

from distalign.lab.exact import asymptotic_constant, divergence, dpo_limit, optimum, rlhf_limit
from distalign.lab.experiment import Experiment, Row, curve, level, powers, select, spread
from distalign.lab.sequence_training import Job, Schedule, fit_bigram, fit_rewards, train
from distalign.lab.sequence_worlds import (
    Data,
    Weights,
    World,
    bigram_features,
    double,
    draw_pairs,
    logps,
    make_worlds,
)
from distalign.lab.tree import Tree
from distalign.methods import DPO, PD, PMLE, REBEL, RKL, RLHF
from distalign.progress import Advance
from distalign.report.shown import Claim, Curve, Panel, Shown, Table
from distalign.settings import Count, Positive

TREE = Tree(vocabulary=8, length=4)
WEIGHTS = torch.logspace(-1.5, 2.5, 81, dtype=torch.float64).tolist()  # an oracle's KL weights, times γ
Policy = Float[torch.Tensor, "prompts responses"]
Policies = Float[torch.Tensor, "models prompts responses"]


class Best(NamedTuple):
    """An optimum by enumeration, and the KL weight that it belongs to."""

    logps: Policy
    beta: float


class Cell(NamedTuple):
    """Labelled pairs of a world and the rewards that were fitted to them, by the kind of the reward model."""

    data: Data
    rewards: dict[str, Policy]


class Sequences(Experiment):
    """Forward KL of each method against the number of labelled pairs n = 512 · 4^k, in two worlds.

    `distance` is KL(π* ‖ π₀) in nats; `betas` are KL weights of PMLE without early stopping. Steps and learning rates:
    `steps`, `lr` of PMLE, `dpo_lr` of DPO; `policy_steps`, `policy_lr` of the methods that sample; `reward_steps` of
    networks as reward models, `scalar_lr` of the scalar head, `init_lr` of γ ln π₀ + a correction, `brief_steps`,
    `brief_lr` of a scalar head that is fitted less. `ridge` is the bigram reward's, against the summed loss. At most
    `counter_n` pairs are drawn in the world "tilted", and methods that sample are trained at the largest number alone
    there.
    """

    name: ClassVar[str] = "sequences"

    seeds: Count = 3
    max_n: Annotated[int, Field(ge=512)] = 32768
    gamma: Positive = 1.0
    distance: Positive = 1.0
    betas: Annotated[tuple[Positive, ...], Field(min_length=1)] = (0.03, 0.3)
    steps: Count = 400
    lr: Positive = 3e-3
    dpo_lr: Positive = 2e-2
    policy_steps: Count = 300
    policy_lr: Positive = 1e-2
    reward_steps: Count = 160
    scalar_lr: Positive = 1e-2
    init_lr: Positive = 5e-3
    brief_steps: Count = 40
    brief_lr: Positive = 3e-3
    ridge: Positive = 0.1
    counter_n: Annotated[int, Field(ge=512)] = 8192

    def run(self, advance: Advance) -> Row:
        """Train everything, and measure it by enumeration."""
        keys = [(self.seed, repetition, kind) for kind in ("markov", "tilted") for repetition in range(self.seeds)]
        worlds = make_worlds(keys, TREE, distance=self.distance, steps=300)
        cells = self._cells(worlds, partial(_stage, advance, 5, 30, "rewards"))
        rows = [row for cell in cells for row in self._enumerated(cell)]
        rows += self._labelled([cell.data for cell in cells], advance)
        rows += self._sampled(cells, partial(_stage, advance, 75, 100, "sampling"))
        limits = [row for world in worlds for row in self._limits(world)]
        constants = [self._constant(world) for world in worlds if world.kind == "markov"]
        return {"rows": rows, "limits": limits, "constants": constants}

    def _cells(self, worlds: list[World], advance: Advance) -> list[Cell]:
        """Every world at every number of pairs, the rewards of its repetitions fitted together."""
        cells = []
        for kind, most in (("markov", self.max_n), ("tilted", min(self.max_n, self.counter_n))):
            for n in powers(512, most, 4):
                same = [draw_pairs(world, n, TREE, gamma=self.gamma) for world in worlds if world.kind == kind]
                fitted = self._rewards(same)
                cells += [Cell(data, {end: all_[i] for end, all_ in fitted.items()}) for i, data in enumerate(same)]
                advance(len(cells), len(worlds) * 4)
        return cells

    def _rewards(self, data: list[Data]) -> dict[str, Policies]:
        """By the ending of a method's name: the rewards of these data sets, all of one kind of world."""
        if data[0].world.kind == "markov":
            return {"": fit_bigram(data, TREE, ridge=self.ridge)}
        models = {
            "_policy": ("policy", Schedule(self.reward_steps, lr=self.init_lr)),
            "_scalar": ("scalar", Schedule(self.reward_steps, lr=self.scalar_lr)),
            "_brief": ("scalar", Schedule(self.brief_steps, lr=self.brief_lr)),
        }
        return {end: fit_rewards(kind, data, TREE, how, gamma=self.gamma) for end, (kind, how) in models.items()}

    def _optima(self, world: World, rewards: Policy) -> dict[str, Best]:
        """What the methods that use a reward tend to, by enumeration (appendix B), by method."""
        reference = TREE.path_sums(world.reference)

        def best(gamma: float, beta: float) -> Best:
            return Best(optimum(rewards, reference, gamma=gamma, beta=beta), beta)

        rkl, rebel = best(self.gamma, 0.0), best(0.0, self.gamma)
        tuned = [best(0.0, self.gamma * weight) for weight in WEIGHTS]
        rlhf = min(tuned, key=lambda each: float(divergence(world.target, each.logps)))
        return {"rkl": rkl, "pd": rkl, "rlhf": rlhf, "rebel": rebel}

    def _enumerated(self, cell: Cell) -> list[Row]:
        """Rows of the reference and of what the fitted rewards lead to, nothing trained."""
        rows = [_row(cell.data, "reference", TREE.path_sums(cell.data.world.reference))]
        for ending, rewards in cell.rewards.items():
            optima = self._optima(cell.data.world, rewards)
            for name in ("rkl", "rlhf", "rebel"):
                best = optima[name]
                rows.append(_row(cell.data, f"{name}{ending}_optimum", best.logps, beta=best.beta))
        return rows

    def _limits(self, world: World) -> list[Row]:
        """Forward KL as n → ∞, the reward then being γ ln π*, in nats; PMLE, PD and RKL tend to 0."""
        reference = TREE.path_sums(world.reference)
        rlhf, dpo = rlhf_limit(world.target, reference, gamma=self.gamma), dpo_limit(world.target, reference)
        values = {"reference": world.distance, "rlhf": float(rlhf), "dpo": float(dpo), "rebel": float(dpo)}
        return [
            {"world": world.kind, "seed": world.key[1], "method": name, "forward_kl": value}
            for name, value in values.items()
        ]

    def _constant(self, world: World) -> Row:
        """C = lim n · KL(π* ‖ π̂), in nats, n the pairs that are fitted, where reward and policy are bigram tables: how
        well π₀ covers the target. One for PMLE, PD and RKL, as the classes are one.
        """
        features, reference = bigram_features(TREE), TREE.path_sums(world.reference)
        constant = asymptotic_constant(world.target[None], reference[None], features[None], gamma=self.gamma)
        return {"world": world.kind, "seed": world.key[1], "constant": float(constant)}

    def _labelled(self, data: list[Data], advance: Advance) -> list[Row]:
        """PMLE stopped early and at its last step, with β instead, and DPO stopped early."""
        markov = [each for each in data if each.world.kind == "markov"]
        plain = [Job("pmle", PMLE(gamma=self.gamma, beta=0.0), each) for each in data]
        held = [Job(f"pmle_beta_{b:g}", PMLE(gamma=self.gamma, beta=b), each) for b in self.betas for each in markov]
        dpo = [Job("dpo", DPO(gamma=self.gamma), each) for each in markov]
        schedule = Schedule(self.steps, lr=self.lr, batch=512)
        pmle = train([*plain, *held], TREE, schedule, partial(_stage, advance, 30, 65, "pmle"))
        best, last = _policies(pmle.best)[: len(plain)], _policies(pmle.last)
        rows = _rows(plain, best) + _rows(held, last[len(plain) :])
        rows += [_row(job.data, "pmle_last", policy) for job, policy in zip(plain, last, strict=False)]
        schedule = Schedule(self.steps, lr=self.dpo_lr, batch=1024)
        return rows + _rows(dpo, _policies(train(dpo, TREE, schedule, partial(_stage, advance, 65, 75, "dpo")).best))

    def _sampled(self, cells: list[Cell], advance: Advance) -> list[Row]:
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

    def show(self, numbers: Row) -> Shown:
        """Both worlds against n, PMLE with and without early stopping, and what the pairs allow."""
        results = _Results(numbers)
        about = (
            f"Tiny transformers over 8 tokens, responses of at most four, two prompts; γ {self.gamma:g}, KL(π* ‖ π₀) "
            f"{self.distance:g} nats within 3 %, the labelled responses drawn from π₀; {self.seeds} seeds, each "
            "with a world and data of its own. KL, entropy and limits are exact: all 2,801 responses are enumerated. "
            "The policies are trained by the methods' own losses on pairs or on responses sampled token by token. "
            "Settings were chosen on seed 0; other seeds do not meet every bar (docs/lab.md)."
        )
        brief = f"{self.brief_steps} steps, lr {self.brief_lr:g}"
        return Shown(
            "Short sequences with a known target",
            about,
            claims=[*_markov_claims(results), *_claims_over_n(results), *_tilted_claims(results, brief)],
            panels=[_against_n(results), _stopping(results, self.betas), _counter(results)],
            tables=[_medians(results, "markov"), _coverage_table(results), _medians(results, "tilted")],
        )


def _stage(advance: Advance, start: int, end: int, name: str, done: int, total: int) -> None:
    """Report a stage's progress as a part of the whole, in per cent."""
    advance(start + (end - start) * done // total, 100, name)


def _policies(weights: Weights) -> Policies:
    """ln π of every response, in float64."""
    return TREE.path_sums(logps(double(weights), TREE))


def _rows(jobs: Sequence[Job], policies: Policies) -> list[Row]:
    return [_row(job.data, job.name, policy) for job, policy in zip(jobs, policies, strict=True)]


def _row(data: Data, name: str, policy: Policy, **more: float) -> Row:
    """One measurement, in nats: a policy in a world, at a number of pairs; `seed` numbers the repetition."""
    world = data.world
    return {
        "world": world.kind,
        "method": name,
        "n": len(data.pairs),
        "fitted": len(data.pairs) - data.held_out,
        "seed": world.key[1],
        "forward_kl": float(divergence(world.target, policy)),
        **more,
    }


NAMES = {"pmle": "PMLE", "pd": "PD", "rkl": "RKL", "rlhf": "RLHF, oracle β", "dpo": "DPO", "rebel": "REBEL"}
REWARDS = {"_policy": "γ ln π₀ + correction", "_scalar": "scalar head", "_brief": "scalar head, fitted briefly"}


class _Results:
    """Rows by world, method and n; the n at which the claims are judged is the largest up to 8,192."""

    def __init__(self, numbers: Row) -> None:
        self.rows, self.limits = numbers["rows"], numbers["limits"]
        self.constants = [row["constant"] for row in numbers["constants"]]
        self.sizes = {
            world: sorted({row["n"] for row in select(self.rows, world=world)}) for world in ("markov", "tilted")
        }
        ns = self.sizes["markov"]
        self.judged = max(n for n in ns if n <= max(8192, ns[0]))

    def values(self, method: str, n: int, world: str = "markov", key: str = "forward_kl") -> list[float]:
        """A value of every seed, in order."""
        return [float(row[key]) for row in select(self.rows, world=world, method=method, n=n)]

    def limit(self, method: str, world: str = "markov") -> list[float]:
        """The limit of every seed, in order."""
        return [row["forward_kl"] for row in select(self.limits, world=world, method=method)]

    def asymptotic(self, n: int) -> list[float]:
        """C / m of every seed, in nats, with m the pairs that are fitted."""
        return [c / fitted for c, fitted in zip(self.constants, self.values("rkl", n, key="fitted"), strict=True)]

    def over_n(self, method: str, world: str = "markov") -> list[Row]:
        """Median and quartiles of forward KL for every n at which there is one."""
        values = {n: self.values(method, n, world) for n in self.sizes[world]}
        return [{"n": n, "forward_kl": spread(each)} for n, each in values.items() if each]

    def medians(self, method: str) -> list[float]:
        """Medians of forward KL in the world "markov", over n."""
        return [row["forward_kl"]["median"] for row in self.over_n(method)]

    def curve(self, method: str, label: str, world: str = "markov") -> Curve:
        """Median and quartiles of forward KL over n."""
        return curve(label, self.over_n(method, world), "n", "forward_kl")

    def bound(self, method: str, label: str, world: str = "markov") -> Curve:
        """The median limit, drawn across the world's range of n."""
        return level(label, self.sizes[world], spread(self.limit(method, world))["median"])


def _markov_claims(results: _Results) -> list[Claim]:
    n = results.judged
    pmle, pd, rkl, rlhf = (results.values(method, n) for method in ("pmle", "pd", "rkl", "rlhf"))
    ratios = [a / b for a, b in zip(rlhf, rkl, strict=True)]
    gaps = [gap for method in ("rkl", "pd") for gap in results.values(method, n, key="from_optimum")]
    bound = results.asymptotic(n)
    above = [a / b for a, b in zip(results.values("rkl_optimum", n), bound, strict=True)]
    at = f"n = {n:,}, each seed"
    claims = [
        Claim(f"PMLE, stopped early: forward KL ≤ 0.15 ({at})", _list(pmle), max(pmle) <= 0.15),
        Claim(f"RKL with the bigram reward ≤ 0.12 ({at})", f"{_list(rkl)} (C/m {_list(bound)})", max(rkl) <= 0.12),
        Claim(f"PD with the bigram reward ≤ 0.12 ({at})", f"{_list(pd)} (C/m {_list(bound)})", max(pd) <= 0.12),
        Claim(
            f"RKL's enumerated optimum between half and twice C/m, the pairs' own limit ({at})",
            f"{_list(above, 2)} times {_list(bound)}",
            all(0.5 <= times <= 2 for times in above),
        ),
        Claim(
            f"RKL and PD, trained by sampling, within 0.02 nats of their enumerated optimum ({at}: RKL, then PD)",
            f"KL(optimum ‖ policy) {_list(gaps, 4)}",
            max(gaps) <= 0.02,
        ),
        Claim(f"RLHF at least 8 times RKL ({at})", f"{_list(rlhf)}: {_list(ratios, 1)} times", min(ratios) >= 8),
    ]
    trained = f"; KL(optimum ‖ policy) {_list(results.values('rebel', n, key='from_optimum'))}"
    for method, promise, more in (("dpo", "DPO", ""), ("rebel", "REBEL with η = 1/γ, β = γ", trained)):
        values, limit = results.values(method, n), results.limit(method)
        off = [100 * (a / b - 1) for a, b in zip(values, limit, strict=True)]
        text = f"{_list(off, 1)} % from {_list(limit)}{more}"
        promise = f"{promise} within 15 % of its enumerated limit, one for both ({at})"
        claims.append(Claim(promise, text, max(map(abs, off)) <= 15))
    return claims


def _claims_over_n(results: _Results) -> list[Claim]:
    first, *more = results.sizes["markov"]
    if not more:
        return []
    claims = []
    for method in ("pmle", "pd", "rkl"):
        medians = results.medians(method)
        falls = all(after < before for before, after in pairwise(medians))
        claims.append(Claim(f"{NAMES[method]} falls with every step of n (medians)", _list(medians), falls))
    for method in ("rlhf", "dpo"):
        medians, limit = results.medians(method), spread(results.limit(method))["median"]
        flat = abs(medians[-1] / medians[-2] - 1) <= 0.15 and abs(medians[-1] / limit - 1) <= 0.15
        promise = f"is flat over the last step of n and at its limit {limit:.3f}, both to 15 % (medians)"
        claims.append(Claim(f"{NAMES[method]} {promise}", _list(medians), flat))
    last, stopped = results.values("pmle_last", first), results.values("pmle", first)
    reference = results.limit("reference")
    return [
        *claims,
        Claim(
            f"With n = {first} PMLE's last step is worse than the reference and early stopping is better, each seed",
            f"last step {_list(last)}, stopped early {_list(stopped)}, reference {_list(reference)}",
            all(a > b > c for a, b, c in zip(last, reference, stopped, strict=True)),
        ),
    ]


def _tilted_claims(results: _Results, brief: str) -> list[Claim]:
    def claim(promised: str, ending: str, n: int, *, loses: bool) -> Claim:
        rkl, rlhf = (results.values(method + ending, n, "tilted") for method in ("rkl", "rlhf"))
        holds = all((a > b) == loses for a, b in zip(rkl, rlhf, strict=True))
        promised = f"Tilted target, {promised}: RKL at β = 0 {'loses to' if loses else 'beats'} RLHF with oracle β"
        return Claim(f"{promised} (n = {n:,}, each seed)", f"RKL {_list(rkl)}, RLHF {_list(rlhf)}", holds)

    few, most = results.sizes["tilted"][0], results.sizes["tilted"][-1]
    return [
        claim("scalar head, few pairs, optima", "_scalar_optimum", few, loses=True),
        claim(f"scalar head, fitted briefly ({brief})", "_brief", most, loses=True),
        claim("scalar head, fitted to the end (an earlier prototype lost here)", "_scalar", most, loses=False),
        claim("γ ln π₀ + a learned correction", "_policy", most, loses=False),
    ]


def _against_n(results: _Results) -> Panel:
    bounds = [("rlhf", "limit of RLHF"), ("dpo", "limit of DPO and REBEL"), ("reference", "π₀")]
    return Panel(
        title="Markov target: forward KL against the number of labelled pairs",
        about=(
            "Medians over seeds with quartiles; dashed the limits for n → ∞, enumerated. The reward has the form of "
            "ln π* here: with few pairs PD and RKL are behind PMLE, with many ahead, by that reward alone."
        ),
        x="labelled pairs",
        y="KL(π* ‖ π), nats",
        curves=[
            *(results.curve(method, name) for method, name in NAMES.items()),
            *(results.bound(method, label) for method, label in bounds),
        ],
    )


def _stopping(results: _Results, betas: Sequence[float]) -> Panel:
    labels = {"pmle": "stopped early, β = 0", "pmle_last": "last step, β = 0"}
    labels |= {f"pmle_beta_{beta:g}": f"last step, β = {beta:g}" for beta in betas}
    return Panel(
        title="Markov target: PMLE with early stopping, with β, with neither",
        about=(
            "Overfitting is the failure of small n: held-out pairs repair it. A KL weight repairs it too, but it is a "
            "bias that stays as n grows."
        ),
        x="labelled pairs",
        y="KL(π* ‖ π), nats",
        curves=[
            *(results.curve(method, label) for method, label in labels.items()),
            results.bound("reference", "π₀"),
        ],
    )


def _counter(results: _Results) -> Panel:
    curves = [
        results.curve(f"{method}{ending}_optimum", f"{name}, {label}", "tilted")
        for ending, label in REWARDS.items()
        for method, name in (("rkl", "RKL"), ("rlhf", "RLHF"))
    ]
    return Panel(
        title="Tilted target: the reward model decides",
        about=(
            "Enumerated optima of the fitted rewards, RKL at β = 0, RLHF with oracle β; PMLE, which has no reward, "
            "trained. Where the reward is bad RKL follows it and RLHF, held at π₀ by a β that only an oracle knows, "
            "does not; started at γ ln π₀ the reward is good."
        ),
        x="labelled pairs",
        y="KL(π* ‖ π), nats",
        curves=[*curves, results.curve("pmle", "PMLE", "tilted"), results.bound("rlhf", "limit of RLHF", "tilted")],
    )


def _medians(results: _Results, world: str) -> Table:
    sizes = results.sizes[world]
    rows = []
    for method in dict.fromkeys(row["method"] for row in select(results.rows, world=world)):
        medians = {row["n"]: row["forward_kl"]["median"] for row in results.over_n(method, world)}
        rows.append([method, *(medians.get(n) for n in sizes)])
    about = "Nats, over seeds. Rows that end in _optimum are enumerated from the fitted reward, nothing trained."
    return Table(f"{world.title()} target: median KL(π* ‖ π)", about, ["method", *(f"n = {n:,}" for n in sizes)], rows)


def _coverage_table(results: _Results) -> Table:
    rows = []
    for n in results.sizes["markov"]:
        optima, trained = results.values("rkl_optimum", n), results.values("pmle", n)
        seeds = zip(results.constants, results.asymptotic(n), optima, trained, strict=True)
        rows += [[seed, n, c, bound, rkl, rkl / bound, pmle] for seed, (c, bound, rkl, pmle) in enumerate(seeds)]
    about = (
        "C = lim m · KL(π* ‖ π̂) for a bigram table, computed from the world; m the pairs that are fitted. It says how "
        "badly π₀ covers the target: where C/m is above a bar, a bigram reward meets it by luck alone. PMLE's class is "
        "a network, of which C says little."
    )
    columns = ["world", "n", "C", "C/m", "RKL, enumerated", "of C/m", "PMLE"]
    return Table("Markov target: what the pairs allow", about, columns, rows)


def _list(values: Sequence[float], digits: int = 3) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)
