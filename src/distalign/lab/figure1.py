"""The paper's figure 1: how far each estimate is from the target as the number of labelled pairs grows.

In a full table PMLE, PD with soft labels and RKL at β = 0 are ONE estimator, softmax(R̂/γ), found here by three losses.
The paper's scale (0.1) has a reference so near the target that the estimate without regularisation is worse than it
below some 2¹⁵ pairs; scale 1 shows the separation plainly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from distalign.lab.exact import asymptotic_constant, divergence, dpo_limit, rlhf_limit, table_features
from distalign.lab.experiment import Advance, at_least, at_most, powers
from distalign.lab.rates import Slope, falls_like_one_over_n, fit_slope, spread, tune
from distalign.lab.shown import Claim, Curve, Panel, Shown, Table, with_quartiles
from distalign.lab.tabular import fit_dpo, fit_pd, fit_pmle, fit_rebel, fit_reward, fit_rkl
from distalign.lab.world import Tables, draw, random_tables
from distalign.methods import METHODS

_WINDOW = (2**11, 2**16)  # where the paper's figure has its slope

# What has a floor, and whose it is.
_FLOORS = {"rlhf": "rlhf", "rlhf_held_out": "rlhf", "dpo": "dpo", "rebel": "dpo"}
_ONE_ESTIMATOR = ("pmle", "pd", "rkl")

# RLHF's forward KL over RKL's at 2¹⁶ pairs, each with its best β: what earlier measurements lead one to expect.
_RATIOS = {"0.1": (1.7, 2.4), "1.0": (40.0, math.inf)}

_JUDGED = 2**11  # pairs; below it the ridge decides, and no promise is judged

Measured = dict[str, Float[Tensor, "sizes seeds"]]


@dataclass(frozen=True)
class Figure1:
    """Settings of the paper's toy (appendix D.1) and of the same with other scales of the logits.

    `seeds` worlds are drawn at each scale. β of `rkl_tuned` and `rlhf` is the best of `betas` values by the oracle;
    `*_held_out` choose it by a share `held_out` of the pairs. `ridge`: see `lab.tabular`; it decides below 2¹¹ pairs.
    """

    scales: tuple[float, ...] = (0.1, 1.0)
    contexts: int = 10
    responses: int = 10
    gamma: float = 0.5
    min_n: int = 2**5
    max_n: int = 2**20
    seeds: int = 40
    seed: int = 0
    ridge: float = 1e-3
    betas: int = 57
    held_out: float = 0.2

    name: ClassVar[str] = "figure1"

    def __post_init__(self) -> None:
        at_most(self, max_n=10**12)
        at_least(self, contexts=1, responses=2, min_n=1, max_n=2 * self.min_n, seeds=2, betas=2, seed=0, scales=1e-6)
        at_least(self, gamma=1e-6, ridge=1e-12, held_out=0.01)
        if self.held_out >= 1 or len(set(self.scales)) < len(self.scales):
            raise ValueError("held_out must be below 1 and no scale may stand twice")

    def run(self, advance: Advance) -> tuple[dict[str, Any], Shown]:
        """Forward KL of every estimate for every n; slopes, constants, floors and verdicts."""
        sizes = powers(self.min_n, self.max_n)
        results, total = [], len(self.scales) * len(sizes)
        for number, scale in enumerate(self.scales):
            start = number * len(sizes)
            results.append(self._scale(scale, sizes, lambda i, start=start: advance(start + i, total)))
        numbers: dict[str, Any] = {
            key: [row for result in results for row in result[key]]
            for key in ("rows", "slopes", "floors", "verdicts", "one_estimator", "constant_ratios", "ratios")
        }
        numbers["constant"] = {str(result["scale"]): result["constant"] for result in results}
        return numbers, self._shown(numbers)

    def _scale(self, scale: float, sizes: list[int], step: Callable[[int], None]) -> dict[str, Any]:
        tables = random_tables(
            worlds=self.seeds,
            contexts=self.contexts,
            responses=self.responses,
            scale=scale,
            gamma=self.gamma,
            seed=self.seed,
        )
        features = table_features(self.contexts, self.responses)
        constant = asymptotic_constant(tables.target, tables.behavior, features, gamma=self.gamma)
        measured, apart = [], []
        for i, n in enumerate(sizes):
            policies = self._estimates(tables, n)
            measured.append({name: divergence(tables.target, logps) for name, logps in policies.items()})
            apart.append(max(_distance(policies["pmle"], policies[name]) for name in _ONE_ESTIMATOR[1:]))
            step(i + 1)
        kl = {name: torch.stack([one[name] for one in measured]) for name in measured[0]}
        key = str(scale)
        slopes = [
            {"scale": key, "method": name, "from": a, "to": b, **slope._asdict()}
            for name in kl
            if name != "reference"
            for a, b in _windows(sizes)
            for slope in [_slope(sizes, kl[name], a, b, self.seed)]
        ]
        n = torch.tensor(sizes, dtype=torch.float64)[:, None]
        ratio = {name: (n * kl[name] / constant).median(1).values for name in kl}
        limits = {"rlhf": rlhf_limit(tables.target, tables.reference, gamma=self.gamma)[1]}
        limits["dpo"] = dpo_limit(tables.target, tables.reference)
        floors = {name: float(limits[owner].median()) for name, owner in _FLOORS.items()}
        return {
            "scale": key,
            "constant": float(constant.median()),
            "rows": [
                {"scale": key, "method": name, "n": size, "forward_kl": spread(kl[name][i])._asdict()}
                for name in kl
                for i, size in enumerate(sizes)
            ],
            "slopes": slopes,
            "floors": [{"scale": key, "method": name, "forward_kl": floor} for name, floor in floors.items()],
            "one_estimator": [
                {"scale": key, "n": size, "largest_difference": d} for size, d in zip(sizes, apart, strict=True)
            ],
            "constant_ratios": [
                {"scale": key, "method": name, "n": size, "ratio": float(ratio[name][i])}
                for name in _ONE_ESTIMATOR
                for i, size in enumerate(sizes)
            ],
            "ratios": [
                {"scale": key, "n": size, "rlhf_over_rkl": float(kl["rlhf"][i].median() / kl["rkl_tuned"][i].median())}
                for i, size in enumerate(sizes)
            ],
            "verdicts": [
                self._verdict(key, name, sizes, kl[name], ratio[name], floors.get(name))
                for name in kl
                if name in METHODS
            ],
        }

    def _estimates(self, tables: Tables, n: int) -> dict[str, Float[Tensor, "worlds contexts responses"]]:
        """ln π of every estimate from n pairs."""
        counts = draw(tables, n, self.seed)
        rewards = fit_reward(tables, counts, ridge=self.ridge)
        rest, held_out = counts.split(self.held_out, self.seed)
        refit = fit_reward(tables, rest, ridge=self.ridge)
        betas = torch.logspace(-3, 4, self.betas, dtype=torch.float64)
        by_pairs = {"held_out": held_out, "refit": refit}
        return {
            "reference": tables.reference,
            "pmle": fit_pmle(tables, counts, ridge=self.ridge),
            "pd": fit_pd(tables, rewards, tables.pair_weights(tables.behavior)),
            "rkl": fit_rkl(tables, rewards),
            "rkl_tuned": tune(tables, rewards, betas, gamma=self.gamma).logps,
            "rkl_held_out": tune(tables, rewards, betas, gamma=self.gamma, **by_pairs).logps,
            "rlhf": tune(tables, rewards, betas, gamma=0.0).logps,
            "rlhf_held_out": tune(tables, rewards, betas, gamma=0.0, **by_pairs).logps,
            "dpo": fit_dpo(tables, counts, ridge=self.ridge),
            "rebel": fit_rebel(tables, rewards, eta=1 / self.gamma, beta=self.gamma, rounds=2),
        }

    def _verdict(
        self,
        scale: str,
        name: str,
        sizes: list[int],
        kl: Float[Tensor, "sizes seeds"],
        ratio: Float[Tensor, "sizes"],
        floor: float | None,
    ) -> dict[str, Any]:
        """Whether a method does what its declared rate says: 1/n with the computed constant, or its floor in the end.

        None where there are too few pairs to judge by.
        """
        a, b = _windows(sizes)[0]
        # Every fit here is at β = 0.
        theorem = METHODS[name].theorem
        rate = f"1/n ({theorem})" if theorem else None
        inside = [float(r) for n, r in zip(sizes, ratio, strict=True) if n >= 4 * _JUDGED and a <= n <= b]
        last = float(kl[-1].median())
        agrees: bool | None = None
        if floor is not None and sizes[-1] >= 2**20:
            agrees = abs(last / floor - 1) <= 0.1
        elif rate is not None and inside:
            agrees = falls_like_one_over_n(_slope(sizes, kl, a, b, self.seed), (min(inside), max(inside)))
        least, largest = (min(inside), max(inside)) if inside else (None, None)
        found = {"least_ratio": least, "largest_ratio": largest, "last": last, "floor": floor}
        return {"scale": scale, "method": name, "rate": rate, "agrees": agrees, **found}

    def _papers(self) -> bool:
        """Whether the worlds are the paper's, but for the scale."""
        return (self.contexts, self.responses, self.gamma) == (10, 10, 0.5)

    def _shown(self, numbers: dict[str, Any]) -> Shown:
        scales = [str(scale) for scale in self.scales]
        return Shown(
            title="Figure 1: forward KL against the number of labelled pairs",
            about=(
                f"{self.contexts} contexts × {self.responses} responses, γ {self.gamma:g}, full tables; medians and "
                f"quartiles over {self.seeds} worlds, seed {self.seed}. PMLE, PD (soft labels) and RKL (β = 0) are one "
                "estimator here and lie on one line. β is chosen by the oracle, the true forward KL, which nobody has; "
                "the table shows beside it what held-out pairs choose. "
                "The scales share their random draws."
            ),
            claims=[claim for scale in scales for claim in _claims(numbers, scale, paper=self._papers())],
            panels=[_panel(numbers, scale) for scale in scales],
            tables=[_table(numbers, scale) for scale in scales],
        )


def _distance(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max())


def _windows(sizes: list[int]) -> list[tuple[int, int]]:
    """The paper's window and what is above it, cut to the sizes at hand."""
    inside = [n for n in sizes if _WINDOW[0] <= n <= _WINDOW[1]]
    above = [n for n in sizes if n >= _WINDOW[1]]
    windows = [(part[0], part[-1]) for part in (inside, above) if len(part) > 1]
    return windows or [(sizes[0], sizes[-1])]


def _slope(sizes: list[int], kl: Tensor, a: int, b: int, seed: int) -> Slope:
    inside = [i for i, n in enumerate(sizes) if a <= n <= b]
    return fit_slope([sizes[i] for i in inside], kl[inside], seed=seed)


def _median(numbers: dict[str, Any], scale: str, method: str, n: int) -> float:
    return next(
        row["forward_kl"]["median"]
        for row in numbers["rows"]
        if (row["scale"], row["method"], row["n"]) == (scale, method, n)
    )


def _claims(numbers: dict[str, Any], scale: str, *, paper: bool) -> list[Claim]:
    def own(key: str) -> list[dict[str, Any]]:
        return [row for row in numbers[key] if row["scale"] == scale]

    claims = []
    first = own("slopes")[0]
    for row in own("slopes"):
        if row["method"] in _ONE_ESTIMATOR and row["from"] == first["from"]:
            text = f"slope {row['slope']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
            promise = f"scale {scale}: {_name(row)} falls like 1/n for n from {row['from']} to {row['to']}"
            holds = row["low"] >= -1.10 and row["high"] <= -0.95
            claims.append(
                Claim(promise, text, holds if row["from"] >= _JUDGED and row["to"] >= 8 * row["from"] else None)
            )
    large = [row["ratio"] for row in own("constant_ratios") if row["n"] >= 2**13]
    if large:
        text = f"between {min(large):.3f} and {max(large):.3f}, C = {numbers['constant'][scale]:.0f}"
        holds = min(large) >= 0.9 and max(large) <= 1.1
        claims.append(Claim(f"scale {scale}: n·KL/C is 1 from 2¹³ pairs on", text, holds))
    same = [row["largest_difference"] for row in own("one_estimator") if row["n"] >= _JUDGED]
    if same:
        promise = f"scale {scale}: PMLE, PD and RKL are one estimator"
        claims.append(Claim(promise, f"ln π differs by at most {max(same):.1e}", max(same) < 1e-6))
    for row in own("ratios"):
        if row["n"] == 2**16 and scale in _RATIOS and paper:
            (low, high), ratio = _RATIOS[scale], row["rlhf_over_rkl"]
            times = f"{low:g} to {high:g} times" if math.isfinite(high) else f"at least {low:g} times"
            promise = f"scale {scale}: at 2¹⁶ pairs RLHF is {times} as far as RKL, both with their best β"
            claims.append(Claim(promise, f"{ratio:.2f} times", low <= ratio <= high))
    for row in own("verdicts"):
        if row["floor"] is not None:
            promise = f"scale {scale}: {_name(row)} levels off, at its computed floor {row['floor']:.3g} to 10 %"
            text = f"{row['last']:.3g} at n = {own('rows')[-1]['n']}"
        else:
            promise = f"scale {scale}: {_name(row)} does what its declared rate says, {row['rate']}"
            ratios = [row["least_ratio"], row["largest_ratio"]]
            text = "n·KL/C between {:.2f} and {:.2f}".format(*ratios) if None not in ratios else "too few pairs"
        claims.append(Claim(promise, text, row["agrees"]))
    return claims


def _name(row: dict[str, Any]) -> str:
    return row["method"].upper()


def _panel(numbers: dict[str, Any], scale: str) -> Panel:
    names = {"reference": "π₀", "pmle": "PMLE = PD = RKL", "rkl_tuned": "RKL, best β", "rlhf": "RLHF, best β"}
    names |= {"dpo": "DPO, REBEL"}
    curves = []
    for name, label in names.items():
        rows = [row for row in numbers["rows"] if (row["scale"], row["method"]) == (scale, name)]
        x = [row["n"] for row in rows]
        curves.append(with_quartiles(label, x, [row["forward_kl"] for row in rows]))
        floors = [row for row in numbers["floors"] if (row["scale"], row["method"]) == (scale, name)]
        curves += [Curve(f"{label} limit", [x[0], x[-1]], [row["forward_kl"]] * 2, kind="bound") for row in floors]
    constant = numbers["constant"][scale]
    line = [n for n in x if n >= 2**10]
    curves.append(Curve("C/n", line, [constant / n for n in line], kind="bound"))
    return Panel(
        title=f"Forward KL, logit scale {scale}",
        about="Medians, bands from quartile to quartile; dashed: computed limits, not fits.",
        x="labelled pairs n",
        y="KL(π*‖π), nats",
        curves=curves,
    )


def _table(numbers: dict[str, Any], scale: str) -> Table:
    rows = [row for row in numbers["rows"] if row["scale"] == scale]
    sizes = sorted({row["n"] for row in rows})
    shown = sizes[::2] if len(sizes) > 10 else sizes
    methods = list(dict.fromkeys(row["method"] for row in rows))
    return Table(
        title=f"Median forward KL, logit scale {scale}",
        about="nats; *_tuned and rlhf choose β by the oracle, *_held_out by held-out pairs.",
        columns=["method", *(str(n) for n in shown)],
        rows=[[method, *(_median(numbers, scale, method, n) for n in shown)] for method in methods],
    )
