"""Reward classes and policy classes of different sizes: what separates PMLE, PD and RKL (theorems 4, 6, 7, 14).

Where the reward class is the smaller one, what goes through a reward (RKL, PD with soft labels) needs fewer pairs than
PMLE; where it is the larger one, PMLE needs fewer. PD separates from RKL only where its labels are drawn instead of
expected ("hard"), which is what theorem 14 counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from distalign.lab.exact import (
    asymptotic_constant,
    divergence,
    independent,
    information_weights,
    table_features,
)
from distalign.lab.experiment import Advance, at_least, at_most, powers
from distalign.lab.rates import spread
from distalign.lab.shown import Claim, Curve, Panel, Shown, Table, with_errors
from distalign.lab.tabular import fit_pd, fit_pd_hard, fit_pmle, fit_reward, fit_rkl
from distalign.lab.world import Tables, draw, linear_tables
from distalign.stats.intervals import mean_and_se, paired_difference


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
    "pd_hard": "PD, hard labels, pairs from μ",
    "pd_hard_reference": "PD, hard labels, pairs from π₀",
    "rkl": "RKL",
}
_ROUNDS = 4  # of PD on pairs of its own policy: the fourth moves nothing that is shown


@dataclass(frozen=True)
class Classes:
    """Settings: `contexts` in every world, features and target as in `lab.world.linear_tables` with `scale`.

    `ridge`: see `lab.tabular`. n goes from `min_n` to `max_n` by factors of four.
    """

    contexts: int = 10
    scale: float = 1.0
    gamma: float = 0.5
    min_n: int = 2**12
    max_n: int = 2**18
    seeds: int = 40
    seed: int = 0
    ridge: float = 1e-3

    name: ClassVar[str] = "classes"

    def __post_init__(self) -> None:
        at_most(self, max_n=10**12)
        at_least(self, contexts=1, min_n=1, max_n=self.min_n, seeds=2, seed=0, scale=1e-6, gamma=1e-6, ridge=1e-12)

    def run(self, advance: Advance) -> tuple[dict[str, Any], Shown]:
        """n·KL of every estimate in every case, beside its asymptotic constant."""
        sizes = powers(self.min_n, self.max_n, 4)
        rows, constants, total = [], [], len(CASES) * len(sizes)
        for number, (name, case) in enumerate(CASES.items()):
            start = number * len(sizes)
            found = self._case(name, case, sizes, lambda i, start=start: advance(start + i, total))
            rows += found[0]
            constants += found[1]
        numbers = {"rows": rows, "constants": constants}
        return numbers, self._shown(numbers, sizes)

    def _case(
        self, name: str, case: Case, sizes: list[int], step: Callable[[int], None]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        tables, features = linear_tables(
            worlds=self.seeds,
            contexts=self.contexts,
            responses=case.responses,
            features=max(case.policy, case.reward),
            relevant=min(case.policy or case.reward, case.reward),
            scale=self.scale,
            gamma=self.gamma,
            seed=self.seed,
            skew=case.skew,
        )
        policy = features[..., : case.policy] if case.policy else None
        reward = features[..., : case.reward]
        limits = self._constants(tables, policy, reward)
        rows = []
        for i, n in enumerate(sizes):
            kl = {
                m: divergence(tables.target, logps) for m, logps in self._estimates(tables, policy, reward, n).items()
            }
            for method, values in kl.items():
                row = {"case": name, "method": method, "n": n, "forward_kl": spread(values)._asdict()}
                row["n_kl"] = mean_and_se(n * values)._asdict()
                row["over_pmle"] = paired_difference(n * values, n * kl["pmle"])._asdict()
                if method in limits:
                    row["over_constant"] = mean_and_se(n * values / limits[method])._asdict()
                rows.append(row)
            step(i + 1)
        return rows, [{"case": name, "method": method, "constant": float(c.mean())} for method, c in limits.items()]

    def _estimates(self, tables: Tables, policy: Tensor | None, reward: Tensor, n: int) -> dict[str, Tensor]:
        counts = draw(tables, n, self.seed)
        rewards = fit_reward(tables, counts, reward, ridge=self.ridge)
        return {
            "pmle": fit_pmle(tables, counts, policy, ridge=self.ridge),
            "pd": fit_pd(tables, rewards, tables.pair_weights(tables.behavior), policy),
            "pd_policy": self._on_policy(tables, rewards, policy),
            "pd_hard": self._hard(tables, rewards, tables.behavior, n, policy),
            "pd_hard_reference": self._hard(tables, rewards, tables.reference, n, policy),
            "rkl": fit_rkl(tables, rewards, policy),
        }

    def _on_policy(self, tables: Tables, rewards: Tensor, policy: Tensor | None) -> Tensor:
        """PD in rounds, each on all pairs weighted by the policy of the round before, π₀ first."""
        logps = tables.reference
        for _ in range(_ROUNDS):
            logps = fit_pd(tables, rewards, tables.pair_weights(logps), policy)
        return logps

    def _hard(self, tables: Tables, rewards: Tensor, source: Tensor, n: int, policy: Tensor | None) -> Tensor:
        """PD from n pairs of `source` whose labels were drawn from σ(ΔR̂)."""
        teacher = replace(tables, target=(rewards / self.gamma).log_softmax(-1), behavior=source)
        return fit_pd_hard(tables, draw(teacher, n, self.seed, stream=1), policy, ridge=self.ridge)

    def _constants(self, tables: Tables, policy: Tensor | None, reward: Tensor) -> dict[str, Tensor]:
        """lim n·KL of every estimate but those with hard labels."""
        target, behavior, gamma = tables.target, tables.behavior, self.gamma
        if policy is None:
            policy = table_features(self.contexts, target.shape[-1])
            # A full table reproduces every reward exactly: as if the policy class were the reward's own.
            through = asymptotic_constant(target, behavior, reward, reward, gamma=gamma)
            return {"pmle": asymptotic_constant(target, behavior, policy, gamma=gamma), "pd": through} | dict.fromkeys(
                ("pd_policy", "rkl"), through
            )
        seen, own = (information_weights(source, target, gamma=gamma) for source in (behavior, target))
        return {
            "pmle": asymptotic_constant(target, behavior, policy, gamma=gamma),
            "pd": asymptotic_constant(target, behavior, policy, reward, seen, gamma=gamma),
            "pd_policy": asymptotic_constant(target, behavior, policy, reward, own, gamma=gamma),
            "rkl": asymptotic_constant(target, behavior, policy, reward, independent(target), gamma=gamma),
        }

    def _shown(self, numbers: dict[str, Any], sizes: list[int]) -> Shown:
        return Shown(
            title="Classes: a reward simpler, or less simple, than the policy",
            about=(
                f"Log-linear worlds, {self.contexts} contexts, γ {self.gamma:g}; n·KL tends to a constant for every "
                f"estimate at rate 1/n. Means ± standard errors over {self.seeds} worlds, seed {self.seed}. "
                "The worlds are made so that one class is the smaller; which one is smaller for real responses is not "
                "shown here."
            ),
            claims=_claims(numbers, sizes),
            panels=[_panel(numbers, name, case) for name, case in CASES.items()],
            tables=[_table(numbers, sizes)],
        )


def _rows(numbers: dict[str, Any], case: str, n: int) -> dict[str, dict[str, Any]]:
    """The rows of a case at one n, by method."""
    return {row["method"]: row for row in numbers["rows"] if (row["case"], row["n"]) == (case, n)}


def _claims(numbers: dict[str, Any], sizes: list[int]) -> list[Claim]:
    claims, n = [], sizes[-1]
    for case in ("table", "linear"):
        found = _rows(numbers, case, n)
        for method in ("rkl", "pd", "pd_policy"):
            ratio = found["pmle"]["n_kl"]["mean"] / found[method]["n_kl"]["mean"]
            promise = f"{case}: {_LABELS[method]}: n·KL at least 8 times below PMLE's"
            claims.append(Claim(promise, f"{ratio:.1f} times (n = {n})", ratio >= 8))
    for row in numbers["constants"]:
        mean, se, count = _rows(numbers, row["case"], n)[row["method"]]["over_constant"].values()
        promise = f"{row['case']}: {_LABELS[row['method']]}: n·KL is within 25 % of its constant {row['constant']:.1f}"
        claims.append(Claim(promise, f"{mean:.3f} ± {se:.3f} times ({count} worlds)", abs(mean - 1) <= 0.25))
    found = _rows(numbers, "reversed", n)
    for method in ("rkl", "pd_policy"):
        mean, low, high = found[method]["over_pmle"].values()
        text = f"n·KL larger by {mean:.1f} [{low:.1f}, {high:.1f}] (paired, 95 %)"
        claims.append(Claim(f"reversed: PMLE is better than {_LABELS[method]}", text, low > 0))
    found = _rows(numbers, "skewed", n)
    means = [found[method]["n_kl"]["mean"] for method in ("rkl", "pd_hard_reference", "pmle")]
    promise = "skewed: the order of theorems 7, 14, 4 (RKL; PD with hard labels on pairs from π₀; PMLE)"
    claims.append(Claim(promise, " < ".join(f"{mean:.0f}" for mean in means), means == sorted(means)))
    return claims


def _panel(numbers: dict[str, Any], name: str, case: Case) -> Panel:
    curves = []
    for method, label in _LABELS.items():
        rows = [row for row in numbers["rows"] if (row["case"], row["method"]) == (name, method)]
        x = [row["n"] for row in rows]
        curves.append(with_errors(label, x, [row["n_kl"] for row in rows]))
        bounds = [row for row in numbers["constants"] if (row["case"], row["method"]) == (name, method)]
        curves += [Curve(f"{label} limit", [x[0], x[-1]], [row["constant"]] * 2, kind="bound") for row in bounds]
    return Panel(
        title=f"n·KL, {name}",
        about=f"{case.about}. Dashed: the asymptotic constants, computed.",
        x="labelled pairs n",
        y="n · KL(π*‖π), nats",
        curves=curves,
    )


def _table(numbers: dict[str, Any], sizes: list[int]) -> Table:
    constants = {(row["case"], row["method"]): row["constant"] for row in numbers["constants"]}
    rows = [
        [case, label, *(_text(_rows(numbers, case, n)[method]["n_kl"]) for n in sizes), constants.get((case, method))]
        for case in CASES
        for method, label in _LABELS.items()
    ]
    return Table(
        title="n·KL",
        about="nats, mean ± standard error over worlds; the last column is the limit, computed from the worlds.",
        columns=["case", "estimate", *(f"n = {n}" for n in sizes), "limit"],
        rows=rows,
    )


def _text(estimate: dict[str, float]) -> str:
    return f"{estimate['mean']:.3g} ± {estimate['se']:.2g}"
