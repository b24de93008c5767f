"""The paper's figure 1: how far each estimate is from the target as the number of labelled pairs grows.

In a full table PMLE, PD with soft labels and RKL at β = 0 are ONE estimator, softmax(R̂/γ), found here by three losses.
The paper's scale (0.1) has a reference so near the target that the estimate without regularisation is worse than it
below some 2¹⁵ pairs; scale 1 shows the separation plainly.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from distalign.lab.exact import divergence, dpo_limit, optimum, rlhf_limit
from distalign.lab.experiment import Pairs, Row, Scale, TableExperiment, curve, level, pick, powers, select, spread
from distalign.lab.fit import fit_dpo, fit_pd, fit_pmle, fit_rebel, fit_reward, fit_rkl
from distalign.lab.tables import Counts, Tables, draw, random_tables
from distalign.methods.preference import preference_logit, preference_nll
from distalign.progress import Advance
from distalign.report.shown import Claim, Curve, Panel, Shown, Table
from distalign.stats.intervals import Interval

_WINDOW = (2**11, 2**16)  # where the paper's figure has its slope
_JUDGED = 2**11  # pairs; below it the ridge decides, and no promise is judged
_ONE_ESTIMATOR = ("pmle", "pd", "rkl")
_CURVES = {
    "reference": "π₀",
    "pmle": "PMLE = PD = RKL",
    "rkl_tuned": "RKL, best β",
    "rlhf": "RLHF, best β",
    "dpo": "DPO, REBEL",
}

Policies = Float[Tensor, "worlds contexts responses"]
Distances = Float[Tensor, "sizes seeds"]


class Figure1(TableExperiment):
    """The paper's toy (appendix D.1) and the same with other scales of the logits: `seeds` worlds at each scale.

    β of `rkl_tuned` and `rlhf` is the best of `betas` values by the oracle; `*_held_out` choose it by a share
    `held_out` of the pairs. The ridge decides below 2¹¹ pairs.
    """

    name: ClassVar[str] = "figure1"

    scales: Annotated[tuple[Scale, ...], Field(min_length=1)] = (0.1, 1.0)
    responses: Annotated[int, Field(ge=2)] = 10
    min_n: Pairs = 2**5
    max_n: Pairs = 2**20
    betas: Annotated[int, Field(ge=2)] = 57
    held_out: Annotated[float, Field(ge=0.01, lt=1)] = 0.2

    @model_validator(mode="after")
    def _consistent(self) -> Figure1:
        if self.max_n < 2 * self.min_n:
            raise ValueError(f"max_n is {self.max_n}; give at least {2 * self.min_n}")
        if len(set(self.scales)) < len(self.scales):
            raise ValueError(f"scales is {list(self.scales)}; give each scale once")
        return self

    def run(self, advance: Advance) -> Row:
        """Forward KL of every estimate for every n; slopes, constants and floors."""
        sizes = powers(self.min_n, self.max_n)
        numbers: Row = {part: [] for part in ("rows", "slopes", "floors", "one_estimator", "constant_ratios")}
        numbers["constant"] = {}
        for index, scale in enumerate(self.scales):
            tables = random_tables(
                self.seeds, self.contexts, self.responses, scale=scale, gamma=self.gamma, seed=self.seed
            )
            distances: dict[str, list[Tensor]] = {}
            for done, n in enumerate(sizes, index * len(sizes) + 1):
                policies = self._estimates(tables, n)
                for name, logps in policies.items():
                    distances.setdefault(name, []).append(divergence(tables.target, logps))
                difference = max(float((policies["pmle"] - policies[name]).abs().max()) for name in ("pd", "rkl"))
                numbers["one_estimator"].append({"scale": str(scale), "n": n, "largest_difference": difference})
                advance(done, len(self.scales) * len(sizes))
            kl = {name: torch.stack(at) for name, at in distances.items()}
            for part, found in self._analyse(tables, sizes, kl).items():
                numbers[part] += [{"scale": str(scale), **row} for row in found]
            numbers["constant"][str(scale)] = float(tables.constant().median())
        return numbers

    def _estimates(self, tables: Tables, n: int) -> dict[str, Policies]:
        """ln π of every estimate from n pairs."""
        counts = draw(tables, n, self.seed)
        rewards = fit_reward(tables, counts, ridge=self.ridge)
        rest, held_out = counts.split(self.held_out, self.seed)
        refit = fit_reward(tables, rest, ridge=self.ridge)
        betas = torch.logspace(-3, 4, self.betas, dtype=torch.float64)
        return {
            "reference": tables.reference,
            "pmle": fit_pmle(tables, counts, ridge=self.ridge),
            "pd": fit_pd(tables, rewards, tables.pair_weights(tables.behavior)),
            "rkl": fit_rkl(tables, rewards),
            "rkl_tuned": tune(tables, rewards, betas, gamma=self.gamma),
            "rkl_held_out": tune(tables, rewards, betas, gamma=self.gamma, held_out=held_out, refit=refit),
            "rlhf": tune(tables, rewards, betas, gamma=0.0),
            "rlhf_held_out": tune(tables, rewards, betas, gamma=0.0, held_out=held_out, refit=refit),
            "dpo": fit_dpo(tables, counts, ridge=self.ridge),
            "rebel": fit_rebel(tables, rewards, eta=1 / self.gamma, beta=self.gamma, rounds=2),
        }

    def _analyse(self, tables: Tables, sizes: list[int], kl: dict[str, Distances]) -> dict[str, list[Row]]:
        """What is computed of the distances at one scale."""
        constant = tables.constant()
        dpo = dpo_limit(tables.target, tables.reference)
        limits = {"rlhf": rlhf_limit(tables.target, tables.reference, gamma=self.gamma), "dpo": dpo, "rebel": dpo}
        # The paper's window; all sizes if fewer than two are in it.
        inside = [i for i, n in enumerate(sizes) if _WINDOW[0] <= n <= _WINDOW[1]]
        window = inside if len(inside) > 1 else list(range(len(sizes)))
        ends = {"from": sizes[window[0]], "to": sizes[window[-1]]}
        slopes = []
        for name, distances in kl.items():
            if name != "reference":
                slope, low, high = fit_slope([sizes[i] for i in window], distances[window], seed=self.seed)
                slopes.append({"method": name, **ends, "slope": slope, "low": low, "high": high})
        return {
            "rows": [
                {"method": name, "n": n, "forward_kl": spread(distances)}
                for name in kl
                for n, distances in zip(sizes, kl[name], strict=True)
            ],
            "slopes": slopes,
            "floors": [{"method": name, "forward_kl": float(limit.median())} for name, limit in limits.items()],
            "constant_ratios": [
                {"method": name, "n": n, "ratio": float((n * distances / constant).median())}
                for name in _ONE_ESTIMATOR
                for n, distances in zip(sizes, kl[name], strict=True)
            ],
        }

    def show(self, numbers: Row) -> Shown:
        """One figure and one table for each scale."""
        scales = [str(scale) for scale in self.scales]
        return Shown(
            title="Figure 1: forward KL against the number of labelled pairs",
            about=(
                f"{self.contexts} contexts × {self.responses} responses, γ {self.gamma:g}, full tables; medians and "
                f"quartiles over {self.seeds} worlds, seed {self.seed}. PMLE, PD (soft labels) and RKL (β = 0) are one "
                "estimator here. β is chosen by the oracle, the true forward KL, which nobody has; the table shows "
                "beside it what held-out pairs choose. The scales share their random draws."
            ),
            claims=[claim for scale in scales for claim in self._claims(numbers, scale)],
            panels=[_panel(numbers, scale) for scale in scales],
            tables=[_table(select(numbers["rows"], scale=scale), scale) for scale in scales],
        )

    def _claims(self, numbers: Row, scale: str) -> list[Claim]:
        at = {part: select(rows, scale=scale) for part, rows in numbers.items() if part != "constant"}
        claims = []
        for row in at["slopes"]:
            if row["method"] in _ONE_ESTIMATOR:
                promise = (
                    f"scale {scale}: {row['method'].upper()} falls like 1/n for n from {row['from']} to {row['to']}"
                )
                holds = row["low"] >= -1.10 and row["high"] <= -0.95
                judged = row["from"] >= _JUDGED and row["to"] >= 8 * row["from"]
                text = f"slope {row['slope']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
                claims.append(Claim(promise, text, holds if judged else None))
        large = [row["ratio"] for row in at["constant_ratios"] if row["n"] >= 2**13]
        if large:
            text = f"between {min(large):.3f} and {max(large):.3f}, C = {numbers['constant'][scale]:.0f}"
            holds = min(large) >= 0.9 and max(large) <= 1.1
            claims.append(Claim(f"scale {scale}: n·KL/C is 1 from 2¹³ pairs on", text, holds))
        same = [row["largest_difference"] for row in at["one_estimator"] if row["n"] >= _JUDGED]
        if same:
            promise = f"scale {scale}: PMLE, PD and RKL are one estimator"
            claims.append(Claim(promise, f"ln π differs by at most {max(same):.1e}", max(same) < 1e-6))
        for floor in at["floors"]:
            last = select(at["rows"], method=floor["method"])[-1]
            kl, n, limit = last["forward_kl"]["median"], last["n"], floor["forward_kl"]
            promise = f"scale {scale}: {floor['method'].upper()} levels off, at its computed floor {limit:.3g} to 10 %"
            holds = abs(kl / limit - 1) <= 0.1 if n >= 2**20 else None
            claims.append(Claim(promise, f"{kl:.3g} at n = {n}", holds))
        return claims


def tune(
    tables: Tables,
    rewards: Policies,
    betas: Float[Tensor, "betas"],
    *,
    gamma: float,
    held_out: Counts | None = None,
    refit: Policies | None = None,
) -> Policies:
    """The optimum of appendix B at the best of `betas`, world by world; γ = 0 is RLHF.

    By the oracle: the least forward KL to the target, which nobody has. With `held_out` pairs: the least negative
    log-likelihood of their labels under the policy's own preference model (eq. 3), from the rewards `refit` without
    them; the policy that is returned has all the pairs' rewards.
    """
    trial = rewards if refit is None else refit

    def score(beta: float) -> Tensor:
        logps = optimum(trial, tables.reference, gamma=gamma, beta=beta)
        if held_out is None:
            return divergence(tables.target, logps)
        logit = preference_logit(tables.pair_logps(logps), gamma=tables.gamma)
        return (held_out.total * preference_nll(logit, held_out.frequency)).sum((-2, -1))

    scores = torch.stack([score(beta) for beta in betas.tolist()])
    best = betas[scores.argmin(0)]
    return optimum(rewards, tables.reference, gamma=gamma, beta=best[:, None, None])


def fit_slope(n: list[int], values: Distances, *, seed: int, resamples: int = 2000) -> Interval:
    """Least squares of ln(median over seeds) on ln n, with a 95 % bootstrap interval over seeds (each with all its n).

    Raises ValueError for fewer than two sizes, and for values that are not above zero, which have no logarithm.
    """
    if len(n) < 2 or not bool((values > 0).all()):
        raise ValueError(f"sizes {n}, least value {float(values.min())}: a slope takes two sizes and values above zero")
    random = np.random.default_rng(seed)
    x = np.log(np.array(n, dtype=float))
    x = x - x.mean()
    rows = values.numpy()
    index = random.integers(rows.shape[1], size=(resamples, rows.shape[1]))
    medians = np.log(np.median(rows[:, index], axis=-1))
    slopes = (x @ medians) / (x @ x)
    low, high = np.quantile(slopes, [0.025, 0.975])
    return Interval(float(x @ np.log(np.median(rows, axis=1)) / (x @ x)), float(low), float(high))


def _panel(numbers: Row, scale: str) -> Panel:
    curves, constant = [], numbers["constant"][scale]
    for method, label in _CURVES.items():
        rows = select(numbers["rows"], scale=scale, method=method)
        n = [row["n"] for row in rows]
        curves.append(curve(label, rows, "n", "forward_kl"))
        floors = select(numbers["floors"], scale=scale, method=method)
        curves += [level(f"{label} limit", n, row["forward_kl"]) for row in floors]
    line = [size for size in n if size >= 2**10]
    curves.append(Curve("C/n", line, [constant / size for size in line], kind="bound"))
    return Panel(
        title=f"Forward KL, logit scale {scale}",
        about="Medians, bands from quartile to quartile; dashed: computed limits, not fits.",
        x="labelled pairs n",
        y="KL(π*‖π), nats",
        curves=curves,
    )


def _table(rows: list[Row], scale: str) -> Table:
    sizes = sorted({row["n"] for row in rows})
    columns = sizes[::2] if len(sizes) > 10 else sizes
    methods = dict.fromkeys(row["method"] for row in rows)
    return Table(
        title=f"Median forward KL, logit scale {scale}",
        about="nats; *_tuned and rlhf choose β by the oracle, *_held_out by held-out pairs.",
        columns=["method", *(str(n) for n in columns)],
        rows=[
            [method, *(pick(rows, method=method, n=n)["forward_kl"]["median"] for n in columns)] for method in methods
        ],
    )
