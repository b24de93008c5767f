"""Coverage: what it costs when the labelled responses are not the ones that the target gives (theorems 4, 7, 14).

The behaviour μ ∝ π*^(−skew) leans away from the target as `skew` grows. The theorems bound n·KL by a coverage
coefficient times the size of the class over γ²; how n·KL really grows is an asymptotic constant, computed beside it.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, FiniteFloat, model_validator

from distalign.lab.exact import asymptotic_constant, coverage, divergence
from distalign.lab.experiment import Pairs, Row, Scale, TableExperiment, curve, mean_text, pick, select
from distalign.lab.fit import fit_pmle, fit_reward, fit_rkl
from distalign.lab.tables import draw, linear_tables
from distalign.progress import Advance
from distalign.report.shown import Claim, Panel, Shown, Table
from distalign.settings import Count
from distalign.stats.intervals import mean_and_se

_LABELS = {"pmle": "PMLE", "rkl": "RKL"}


class Coverage(TableExperiment):
    """Log-linear worlds as in `lab.tables.linear_tables`; the reward has the first `reward` of the features.

    Negative skews lean towards the target: −1 is μ = π*. One n, `max_n`, far above the largest constant.
    """

    name: ClassVar[str] = "coverage"

    responses: Annotated[int, Field(ge=2)] = 40
    features: Count = 40
    reward: Count = 4
    scale: Scale = 1.0
    skews: Annotated[tuple[FiniteFloat, ...], Field(min_length=1)] = (-1.0, 0.0, 0.5, 1.0, 1.5, 2.0)
    max_n: Pairs = 2**18

    @model_validator(mode="after")
    def _consistent(self) -> Coverage:
        apart = self.contexts * (self.responses - 1)
        if self.features >= apart:
            raise ValueError(
                f"features is {self.features}; {self.contexts} contexts × {self.responses} responses tell fewer than "
                f"{apart} of them apart"
            )
        if self.reward > self.features:
            raise ValueError(f"reward is {self.reward}, more than the {self.features} features there are")
        return self

    def run(self, advance: Advance) -> Row:
        """n·KL of PMLE and RKL for every skew, their constants, coverage coefficients and the bound that these give."""
        rows = []
        for done, skew in enumerate(self.skews, 1):
            rows += self._skew(skew)
            advance(done, len(self.skews))
        return {"rows": rows}

    def _skew(self, skew: float) -> list[Row]:
        shape = self.seeds, self.contexts, self.responses, self.features
        tables, features = linear_tables(
            shape, relevant=self.reward, scale=self.scale, gamma=self.gamma, seed=self.seed, skew=skew
        )
        reward = features[..., : self.reward]
        counts = draw(tables, self.max_n, self.seed)
        rewards = fit_reward(tables, counts, reward, ridge=self.ridge)
        estimates = {
            "pmle": (features, fit_pmle(tables, counts, features, ridge=self.ridge)),
            "rkl": (reward, fit_rkl(tables, rewards, features)),
        }
        # The least P(1 − P) of any pair, world by world.
        gap = self.gamma * (tables.target.amax(-1) - tables.target.amin(-1)).amax(-1)
        information = gap.sigmoid() * (-gap).sigmoid()
        rows = []
        for method, (own_class, logps) in estimates.items():
            constant = asymptotic_constant(tables.target, tables.behavior, own_class, gamma=self.gamma)
            coefficient = coverage(own_class, tables.target, tables.behavior)
            n_kl = self.max_n * divergence(tables.target, logps)
            bound = own_class.shape[-1] * coefficient / (4 * information * self.gamma**2)
            rows.append(
                {
                    "skew": skew,
                    "method": method,
                    "n": self.max_n,
                    "n_kl": mean_and_se(n_kl)._asdict(),
                    "over_constant": mean_and_se(n_kl / constant)._asdict(),
                    "constant": float(constant.mean()),
                    "coverage": float(coefficient.mean()),
                    "bound": float(bound.mean()),
                }
            )
        return rows

    def show(self, numbers: Row) -> Shown:
        """n·KL against coverage."""
        rows, first, last = numbers["rows"], self.skews[0], self.skews[-1]
        claims, growth = [], {}
        for method, label in _LABELS.items():
            ratios = [row["over_constant"] for row in select(rows, method=method)]
            worst = max(ratios, key=lambda ratio: abs(ratio["mean"] - 1))
            text = f"at worst {worst['mean']:.2f} ± {worst['se']:.2f} times, over {len(ratios)} skews"
            promise = f"{label}: n·KL is within 25 % of its asymptotic constant for every skew"
            claims.append(Claim(promise, text, abs(worst["mean"] - 1) <= 0.25))
            near, far = (pick(rows, method=method, skew=skew)["constant"] for skew in (first, last))
            growth[label] = far / near
        promise = f"pairs far from the target cost more: skew {last:g} against {first:g}"
        text = ", ".join(f"{label} {factor:.1f} times" for label, factor in growth.items())
        claims.append(Claim(promise, text, min(growth.values()) > 1))
        return Shown(
            title="Coverage: labelled responses that the target would not give",
            about=(
                f"Log-linear worlds, {self.contexts} contexts × {self.responses} responses, {self.features} features, "
                f"reward in the first {self.reward}, γ {self.gamma:g}, n = {self.max_n}; means ± standard errors over "
                f"{self.seeds} worlds, seed {self.seed}. The coefficients of the theorems are worst cases over the "
                "class."
            ),
            claims=claims,
            panels=[_panel(rows)],
            tables=[_table(rows)],
        )


def _panel(rows: list[Row]) -> Panel:
    curves = []
    for method, label in _LABELS.items():
        points = sorted(select(rows, method=method), key=lambda row: row["coverage"])
        curves.append(curve(label, points, "coverage", "n_kl"))
        curves.append(curve(f"{label} limit", points, "coverage", "constant", "bound"))
    return Panel(
        title="n·KL against coverage",
        about="One point a skew, its class's own coefficient (C_Π for PMLE, C_R for RKL); dashed: the constants.",
        x="coverage coefficient",
        y="n · KL(π*‖π), nats",
        curves=curves,
    )


def _table(rows: list[Row]) -> Table:
    keys = ("coverage", "n_kl", "constant", "bound")
    shown = [row | {"n_kl": mean_text(row["n_kl"])} for row in rows]
    return Table(
        title="Coverage and what it costs",
        about=(
            "C is C_Π for PMLE and C_R for RKL. The bound is d·C/(4 γ² least P(1 − P)), with d the size of the class: "
            "above the limit by algebra."
        ),
        columns=["skew", "estimate", "C", "n·KL", "limit", "bound"],
        rows=[[row["skew"], _LABELS[row["method"]], *(row[key] for key in keys)] for row in shown],
    )
