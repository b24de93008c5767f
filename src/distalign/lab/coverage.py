"""Coverage: what it costs when the labelled responses are not the ones that the target gives (theorems 4, 7, 14).

The behaviour μ ∝ π*^(−skew) leans away from the target as `skew` grows. The theorems bound n·KL by a coverage
coefficient times the size of the class over γ²; how n·KL really grows is an asymptotic constant, computed beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from distalign.lab.exact import asymptotic_constant, coverage, divergence
from distalign.lab.experiment import Advance, at_least, at_most
from distalign.lab.shown import Claim, Curve, Panel, Shown, Table, with_errors
from distalign.lab.tabular import fit_pmle, fit_reward, fit_rkl
from distalign.lab.world import Tables, draw, linear_tables
from distalign.stats.intervals import mean_and_se

_LABELS = {"pmle": "PMLE", "rkl": "RKL"}


@dataclass(frozen=True)
class Coverage:
    """Settings: log-linear worlds as in `lab.world.linear_tables`; the reward has the first `reward` of the features.

    Negative skews lean towards the target: −1 is μ = π*. One n, `max_n`, far above the largest constant.
    """

    contexts: int = 10
    responses: int = 40
    features: int = 40
    reward: int = 4
    scale: float = 1.0
    gamma: float = 0.5
    skews: tuple[float, ...] = (-1.0, 0.0, 0.5, 1.0, 1.5, 2.0)
    max_n: int = 2**18
    seeds: int = 40
    seed: int = 0
    ridge: float = 1e-3

    name: ClassVar[str] = "coverage"

    def __post_init__(self) -> None:
        at_most(self, max_n=10**12)
        at_least(self, contexts=1, responses=2, features=1, reward=1, max_n=1, seeds=2, seed=0)
        at_least(self, scale=1e-6, gamma=1e-6, ridge=1e-12)
        if self.features >= self.contexts * (self.responses - 1):
            raise ValueError(
                f"features is {self.features}; {self.contexts} contexts × {self.responses} responses tell fewer than "
                f"{self.contexts * (self.responses - 1)} of them apart"
            )
        if self.reward > self.features:
            raise ValueError(f"reward is {self.reward}, more than the {self.features} features there are")

    def run(self, advance: Advance) -> tuple[dict[str, Any], Shown]:
        """n·KL of PMLE and RKL for every skew, their constants, coverage coefficients and the bound that these give."""
        rows = []
        for number, skew in enumerate(self.skews):
            rows += self._skew(skew)
            advance(number + 1, len(self.skews))
        return {"rows": rows}, self._shown(rows)

    def _skew(self, skew: float) -> list[dict[str, Any]]:
        tables, features = linear_tables(
            worlds=self.seeds,
            contexts=self.contexts,
            responses=self.responses,
            features=self.features,
            relevant=self.reward,
            scale=self.scale,
            gamma=self.gamma,
            seed=self.seed,
            skew=skew,
        )
        reward = features[..., : self.reward]
        counts = draw(tables, self.max_n, self.seed)
        rewards = fit_reward(tables, counts, reward, ridge=self.ridge)
        policies = {
            "pmle": (features, fit_pmle(tables, counts, features, ridge=self.ridge)),
            "rkl": (reward, fit_rkl(tables, rewards, features)),
        }
        rows = []
        for method, (own, logps) in policies.items():
            constant = asymptotic_constant(tables.target, tables.behavior, own, gamma=self.gamma)
            coefficient = coverage(own, tables.target, tables.behavior)
            n_kl = self.max_n * divergence(tables.target, logps)
            bound = own.shape[-1] * coefficient / (4 * _least_information(tables) * self.gamma**2)
            rows.append(
                {
                    "skew": skew,
                    "method": method,
                    "n": self.max_n,
                    "n_kl": mean_and_se(n_kl)._asdict(),
                    "over_constant": mean_and_se(n_kl / constant)._asdict(),
                    "constant": float(constant.mean()),
                    "coverage": float(coefficient.mean()),
                    "coverage_reference": float(coverage(own, tables.target, tables.reference).mean()),
                    "bound": float(bound.mean()),
                    "within_bound": bool((constant <= bound).all()),
                }
            )
        return rows

    def _shown(self, rows: list[dict[str, Any]]) -> Shown:
        claims = []
        for method, label in _LABELS.items():
            own = [row for row in rows if row["method"] == method]
            worst = max(own, key=lambda row: abs(row["over_constant"]["mean"] - 1))["over_constant"]
            text = f"at worst {worst['mean']:.2f} ± {worst['se']:.2f} times, over {len(own)} skews"
            promise = f"{label}: n·KL is within 25 % of its asymptotic constant for every skew"
            claims.append(Claim(promise, text, abs(worst["mean"] - 1) <= 0.25))
            text = f"largest constant {max(row['constant'] for row in own):.0f}"
            promise = f"{label}: the constant is below d·C/(4 γ² least P(1−P)), an inequality that checks the code"
            claims.append(Claim(promise, text, all(row["within_bound"] for row in own)))
        factor = {m: _constant(rows, m, self.skews[-1]) / _constant(rows, m, self.skews[0]) for m in _LABELS}
        text = ", ".join(f"{label} {factor[method]:.1f} times" for method, label in _LABELS.items())
        promise = f"pairs far from the target cost more: skew {self.skews[-1]:g} against {self.skews[0]:g}"
        claims.append(Claim(promise, text, min(factor.values()) > 1))
        return Shown(
            title="Coverage: labelled responses that the target would not give",
            about=(
                f"Log-linear worlds, {self.contexts} contexts × {self.responses} responses, {self.features} features, "
                f"reward in the first {self.reward}, γ {self.gamma:g}, n = {self.max_n}; means ± standard errors over "
                f"{self.seeds} worlds, seed {self.seed}. The coefficients of the theorems are worst cases over the "
                "class: far from the target n·KL grows with them, and slower."
            ),
            claims=claims,
            panels=[self._panel(rows)],
            tables=[_table(rows)],
        )

    def _panel(self, rows: list[dict[str, Any]]) -> Panel:
        curves = []
        for method, label in _LABELS.items():
            own = sorted((row for row in rows if row["method"] == method), key=lambda row: row["coverage"])
            x = [row["coverage"] for row in own]
            curves.append(with_errors(label, x, [row["n_kl"] for row in own]))
            curves.append(Curve(f"{label} limit", x, [row["constant"] for row in own], kind="bound"))
        return Panel(
            title="n·KL against coverage",
            about="One point a skew, its class's own coefficient (C_Π for PMLE, C_R for RKL); dashed: the constants.",
            x="coverage coefficient",
            y="n · KL(π*‖π), nats",
            curves=curves,
        )


def _least_information(tables: Tables) -> Tensor:
    """The least P(1 − P) of any pair, world by world."""
    gap = tables.gamma * (tables.target.amax(-1) - tables.target.amin(-1)).amax(-1)
    return torch.sigmoid(gap) * torch.sigmoid(-gap)


def _constant(rows: list[dict[str, Any]], method: str, skew: float) -> float:
    return next(row["constant"] for row in rows if (row["method"], row["skew"]) == (method, skew))


def _table(rows: list[dict[str, Any]]) -> Table:
    return Table(
        title="Coverage and what it costs",
        about="C by μ is C_Π for PMLE and C_R for RKL; C by π₀ the same coefficient with π₀ in the place of μ.",
        columns=["skew", "estimate", "C by μ", "C by π₀", "n·KL", "limit", "bound"],
        rows=[
            [
                row["skew"],
                _LABELS[row["method"]],
                row["coverage"],
                row["coverage_reference"],
                "{mean:.3g} ± {se:.2g}".format(**row["n_kl"]),
                row["constant"],
                row["bound"],
            ]
            for row in rows
        ],
    )
