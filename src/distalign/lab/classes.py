"""Reward classes and policy classes of different sizes: what separates PMLE, PD and RKL (theorems 4, 6, 7, 14).

Where the reward class is the smaller one, what goes through a reward (RKL, PD with soft labels) needs fewer pairs than
PMLE; where it is the larger one, PMLE needs fewer. PD separates from RKL only where its labels are drawn instead of
expected ("hard"), which is what theorem 14 counts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, NamedTuple

from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor

from distalign.lab.exact import asymptotic_constant, divergence, independent, information_weights
from distalign.lab.experiment import Pairs, Row, Scale, TableExperiment, curve, level, mean_text, pick, powers, select
from distalign.lab.fit import Features, fit_pd, fit_pmle, fit_reward, fit_rkl
from distalign.lab.tables import Tables, draw, linear_tables
from distalign.progress import Advance
from distalign.report.shown import Claim, Panel, Shown, Table
from distalign.stats.intervals import mean_and_se, paired_difference

Policies = Float[Tensor, "worlds contexts responses"]
Rewards = Float[Tensor, "_ contexts responses reward_features"]


class Case(NamedTuple):
    """A world's classes: numbers of features (0: the full table) and how far μ leans away from the target."""

    responses: int
    policy: int
    reward: int
    skew: float
    about: str


CASES = {
    "table": Case(60, 0, 5, 0.0, "policy: the full table; reward: 5 features"),
    "linear": Case(60, 60, 5, 0.0, "policy: 60 features, one for each response; reward: the first 5 of them"),
    "skewed": Case(40, 40, 4, 2.0, "policy: 40 features; reward: the first 4; μ ∝ π*^−2"),
    "reversed": Case(40, 4, 40, 1.0, "policy: 4 features; reward: these and 36 more; μ ∝ π*^−1"),
}
_LABELS = {
    "pmle": "PMLE",
    "pd": "PD, soft labels, pairs from μ",
    "pd_policy": "PD, soft labels, pairs from π_t",
    "pd_hard": "PD, hard labels, pairs from π₀",
    "rkl": "RKL",
}
_ROUNDS = 4  # of PD on pairs of its own policy: the fourth moves nothing that is shown


class Classes(TableExperiment):
    """Features and target as in `lab.tables.linear_tables` with `scale`; n from `min_n` to `max_n` by factors of 4."""

    name: ClassVar[str] = "classes"

    scale: Scale = 1.0
    min_n: Pairs = 2**12
    max_n: Pairs = 2**18

    @model_validator(mode="after")
    def _consistent(self) -> Classes:
        if self.max_n < self.min_n:
            raise ValueError(f"max_n is {self.max_n}; give at least {self.min_n}")
        return self

    def run(self, advance: Advance) -> Row:
        """n·KL of every estimate in every case, beside its asymptotic constant."""
        sizes = powers(self.min_n, self.max_n, 4)
        numbers: Row = {"rows": [], "constants": []}
        for done, (name, case) in enumerate(CASES.items()):
            shape = self.seeds, self.contexts, case.responses, max(case.policy, case.reward)
            relevant = min(case.policy or case.reward, case.reward)
            tables, features = linear_tables(
                shape, relevant=relevant, scale=self.scale, gamma=self.gamma, seed=self.seed, skew=case.skew
            )
            policy = features[..., : case.policy] if case.policy else None
            reward = features[..., : case.reward]
            constants = self._constants(tables, policy, reward)
            for step, n in enumerate(sizes, done * len(sizes) + 1):
                estimates = self._estimates(tables, policy, reward, n)
                numbers["rows"] += [{"case": name, **row} for row in _rows(tables, estimates, constants, n)]
                advance(step, len(CASES) * len(sizes))
            numbers["constants"] += [
                {"case": name, "method": method, "constant": float(constant.mean())}
                for method, constant in constants.items()
            ]
        return numbers

    def _estimates(self, tables: Tables, policy: Features | None, reward: Rewards, n: int) -> dict[str, Policies]:
        """ln π of every estimate from n pairs."""
        counts = draw(tables, n, self.seed)
        rewards = fit_reward(tables, counts, reward, ridge=self.ridge)
        return {
            "pmle": fit_pmle(tables, counts, policy, ridge=self.ridge),
            "pd": fit_pd(tables, rewards, tables.pair_weights(tables.behavior), policy),
            "pd_policy": self._on_policy(tables, rewards, policy),
            "pd_hard": self._hard(tables, rewards, n, policy),
            "rkl": fit_rkl(tables, rewards, policy),
        }

    def _on_policy(self, tables: Tables, rewards: Policies, policy: Features | None) -> Policies:
        """PD in rounds, each on all pairs weighted by the policy of the round before, π₀ first."""
        logps = tables.reference
        for _ in range(_ROUNDS):
            logps = fit_pd(tables, rewards, tables.pair_weights(logps), policy)
        return logps

    def _hard(self, tables: Tables, rewards: Policies, n: int, policy: Features | None) -> Policies:
        """PD from n pairs of π₀ whose labels were drawn from σ(ΔR̂): of labels that are certain PD's loss is PMLE's."""
        teacher = replace(tables, target=(rewards / self.gamma).log_softmax(-1), behavior=tables.reference)
        return fit_pmle(tables, draw(teacher, n, self.seed, stream=1), policy, ridge=self.ridge)

    def _constants(self, tables: Tables, policy: Features | None, reward: Rewards) -> dict[str, Tensor]:
        """lim n·KL of every estimate but those with hard labels."""
        target, behavior, gamma = tables.target, tables.behavior, self.gamma
        if policy is None:
            # A full table reproduces every reward exactly: as if the policy class were the reward's own.
            through = asymptotic_constant(target, behavior, reward, reward, gamma=gamma)
            constants = {"pd": through, "pd_policy": through, "rkl": through}
            return {"pmle": tables.constant(), **constants}
        projections = {
            "pd": information_weights(behavior, target, gamma=gamma),
            "pd_policy": information_weights(target, target, gamma=gamma),
            "rkl": independent(target),
        }
        return {"pmle": asymptotic_constant(target, behavior, policy, gamma=gamma)} | {
            method: asymptotic_constant(target, behavior, policy, reward, projection, gamma=gamma)
            for method, projection in projections.items()
        }

    def show(self, numbers: Row) -> Shown:
        """A figure for each case, and one table."""
        sizes = powers(self.min_n, self.max_n, 4)
        return Shown(
            title="Classes: a reward simpler, or less simple, than the policy",
            about=(
                f"Log-linear worlds, {self.contexts} contexts, γ {self.gamma:g}; n·KL tends to a constant for every "
                f"estimate at rate 1/n. Means ± standard errors over {self.seeds} worlds, seed {self.seed}. "
                "Which class is the smaller one for real responses is not shown here."
            ),
            claims=_claims(numbers, sizes[-1]),
            panels=[_panel(numbers, name, case) for name, case in CASES.items()],
            tables=[_table(numbers, sizes)],
        )


def _rows(tables: Tables, estimates: dict[str, Policies], constants: dict[str, Tensor], n: int) -> list[Row]:
    n_kl = {method: n * divergence(tables.target, logps) for method, logps in estimates.items()}
    rows = []
    for method, values in n_kl.items():
        row: Row = {"method": method, "n": n, "n_kl": mean_and_se(values)._asdict()}
        row["over_pmle"] = paired_difference(values, n_kl["pmle"])._asdict()
        if method in constants:
            row["over_constant"] = mean_and_se(values / constants[method])._asdict()
        rows.append(row)
    return rows


def _claims(numbers: Row, n: int) -> list[Claim]:
    claims = []
    cases = {case: {row["method"]: row for row in select(numbers["rows"], case=case, n=n)} for case in CASES}
    for case in ("table", "linear"):
        for method in ("rkl", "pd", "pd_policy"):
            ratio = cases[case]["pmle"]["n_kl"]["mean"] / cases[case][method]["n_kl"]["mean"]
            promise = f"{case}: {_LABELS[method]}: n·KL at least 8 times below PMLE's"
            claims.append(Claim(promise, f"{ratio:.1f} times (n = {n})", ratio >= 8))
    for row in numbers["constants"]:
        case, method = row["case"], row["method"]
        mean, se, count = cases[case][method]["over_constant"].values()
        promise = f"{case}: {_LABELS[method]}: n·KL is within 25 % of its constant {row['constant']:.1f}"
        claims.append(Claim(promise, f"{mean:.3f} ± {se:.3f} times ({count} worlds)", abs(mean - 1) <= 0.25))
    for method in ("rkl", "pd_policy"):
        mean, low, high = cases["reversed"][method]["over_pmle"].values()
        text = f"n·KL larger by {mean:.1f} [{low:.1f}, {high:.1f}] (paired, 95 %)"
        claims.append(Claim(f"reversed: PMLE is better than {_LABELS[method]}", text, low > 0))
    means = [cases["skewed"][method]["n_kl"]["mean"] for method in ("rkl", "pd_hard", "pmle")]
    promise = "skewed: the order of theorems 7, 14, 4 (RKL; PD with hard labels on pairs from π₀; PMLE)"
    claims.append(Claim(promise, " < ".join(f"{mean:.0f}" for mean in means), means == sorted(means)))
    return claims


def _panel(numbers: Row, name: str, case: Case) -> Panel:
    curves = []
    for method, label in _LABELS.items():
        rows = select(numbers["rows"], case=name, method=method)
        n = [row["n"] for row in rows]
        curves.append(curve(label, rows, "n", "n_kl"))
        constants = select(numbers["constants"], case=name, method=method)
        curves += [level(f"{label} limit", n, row["constant"]) for row in constants]
    return Panel(
        title=f"n·KL, {name}",
        about=f"{case.about}. Dashed: the asymptotic constants, computed.",
        x="labelled pairs n",
        y="n · KL(π*‖π), nats",
        curves=curves,
    )


def _table(numbers: Row, sizes: list[int]) -> Table:
    constants = {(row["case"], row["method"]): row["constant"] for row in numbers["constants"]}
    rows = []
    for case in CASES:
        for method, label in _LABELS.items():
            n_kl = [mean_text(pick(numbers["rows"], case=case, method=method, n=n)["n_kl"]) for n in sizes]
            rows.append([case, label, *n_kl, constants.get((case, method))])
    return Table(
        title="n·KL",
        about="nats, mean ± standard error over worlds; the last column is the limit, computed from the worlds.",
        columns=["case", "estimate", *(f"n = {n}" for n in sizes), "limit"],
        rows=rows,
    )
