"""Sharpness: what a wrong γ does, what preferences say about γ (nothing), what samples of the target say, what γ costs.

Only γ ln π enters the preference model, so training with γ′ tends to π*^(γ/γ′) and predicts preferences just as well.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from distalign.lab.exact import asymptotic_constant, divergence, table_features
from distalign.lab.experiment import Advance, at_least, at_most
from distalign.lab.rates import spread
from distalign.lab.shown import Claim, Curve, Panel, Shown, Table, with_errors, with_quartiles
from distalign.lab.tabular import fit_pmle, fit_reward
from distalign.lab.world import Tables, draw, generator, random_tables
from distalign.methods.preference import induced_logps, preference_logit, preference_nll
from distalign.stats.intervals import mean_and_se


@dataclass(frozen=True)
class Gamma:
    """Settings: full tables with logits N(0, scale²) whose labels have sharpness `gamma`, n = `max_n` pairs.

    `trained` are the γ′ that training assumes, `samples` how many direct samples of π* γ is estimated from, `sharpness`
    the true γ of worlds in which its cost is measured.
    """

    contexts: int = 10
    responses: int = 10
    scale: float = 1.0
    gamma: float = 0.5
    trained: tuple[float, ...] = (0.125, 0.25, 0.35, 0.5, 0.7, 1.0, 2.0)
    samples: tuple[int, ...] = (10, 30, 100, 300, 1000)
    sharpness: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0)
    max_n: int = 2**18
    seeds: int = 40
    seed: int = 0
    ridge: float = 1e-3

    name: ClassVar[str] = "gamma"

    def __post_init__(self) -> None:
        at_most(self, max_n=10**12)
        at_least(self, contexts=1, responses=2, scale=1e-6, gamma=1e-6, trained=1e-6, samples=1, sharpness=1e-6)
        at_least(self, max_n=1, seeds=2, seed=0, ridge=1e-12)

    def run(self, advance: Advance) -> tuple[dict[str, Any], Shown]:
        """The four parts: misspecified γ, identification from preferences, from samples, and the cost."""
        tables = self._tables(self.gamma)
        total = len(self.trained) + len(self.samples) + len(self.sharpness)
        rewards = fit_reward(tables, draw(tables, self.max_n, self.seed), ridge=self.ridge)
        numbers: dict[str, Any] = {"misspecified": [], "identified": [], "cost": []}
        done = 0
        for part, values, measure in (
            ("misspecified", self.trained, lambda gamma: self._misspecified(tables, gamma)),
            ("identified", self.samples, lambda count: self._identified(tables, rewards, int(count))),
            ("cost", self.sharpness, self._cost),
        ):
            for value in values:
                numbers[part].append(measure(value))
                done += 1
                advance(done, total)
        return numbers, self._shown(numbers)

    def _tables(self, gamma: float) -> Tables:
        shape = {"worlds": self.seeds, "contexts": self.contexts, "responses": self.responses}
        return random_tables(**shape, scale=self.scale, gamma=gamma, seed=self.seed)

    def _misspecified(self, tables: Tables, gamma: float) -> dict[str, Any]:
        """PMLE with another γ: forward KL, its limit KL(π* ‖ π*^(γ/γ′)), and the NLL of fresh labels."""
        assumed = replace(tables, gamma=gamma)
        logps = fit_pmle(assumed, draw(tables, self.max_n, self.seed), ridge=self.ridge)
        fresh = draw(tables, self.max_n, self.seed, stream=1)
        loss = preference_nll(preference_logit(tables.pair_logps(logps), gamma=gamma), fresh.frequency)
        nll = (fresh.total * loss).sum((-2, -1)) / fresh.total.sum((-2, -1))
        limit = induced_logps(tables.gamma * tables.target, gamma=gamma)
        return {
            "trained_gamma": gamma,
            "n": self.max_n,
            "forward_kl": spread(divergence(tables.target, logps))._asdict(),
            "limit": float(divergence(tables.target, limit).clamp(min=0).median()),
            "fresh_nll": float(nll.mean()),
        }

    def _identified(self, tables: Tables, rewards: Tensor, count: int) -> dict[str, Any]:
        """γ by maximum likelihood of `count` samples of π* under softmax(R̂/γ), and its predicted spread.

        ln softmax(R̂/γ) has in 1/γ a variance of Var R̂ under the model; at the truth the relative standard error of γ is
        1/√(count · Var ln π*).
        """
        random = generator(self.seed, f"{count} samples")
        flat = (tables.target.exp() / self.contexts).flatten(1)
        index = torch.multinomial(flat, count, replacement=True, generator=random)
        seen = torch.zeros_like(flat).scatter_add_(1, index, torch.ones(index.shape, dtype=flat.dtype))
        found = best_sharpness(rewards, seen.view_as(tables.target))
        mean = (tables.target.exp() * tables.target).sum(-1, keepdim=True)
        variance = (tables.target.exp() * (tables.target - mean).square()).sum(-1).mean(-1)
        predicted = self.gamma / (count * variance.median()).sqrt()
        return {"samples": count, "gamma": spread(found)._asdict(), "predicted_se": float(predicted)}

    def _cost(self, gamma: float) -> dict[str, Any]:
        """n·KL of PMLE in worlds whose labels have this sharpness, beside its constant."""
        tables = self._tables(gamma)
        constant = asymptotic_constant(
            tables.target, tables.behavior, table_features(self.contexts, self.responses), gamma=gamma
        )
        logps = fit_pmle(tables, draw(tables, self.max_n, self.seed), ridge=self.ridge)
        n_kl = self.max_n * divergence(tables.target, logps)
        return {
            "gamma": gamma,
            "n": self.max_n,
            "n_kl": mean_and_se(n_kl)._asdict(),
            "over_constant": mean_and_se(n_kl / constant)._asdict(),
            "constant": float(constant.mean()),
        }

    def _shown(self, numbers: dict[str, Any]) -> Shown:
        return Shown(
            title="Gamma: the sharpness of preferences",
            about=(
                f"Full tables, {self.contexts} contexts × {self.responses} responses, logit scale {self.scale:g}, true "
                f"γ {self.gamma:g}, n = {self.max_n}, {self.seeds} worlds, seed {self.seed}. In an unrestricted class "
                "preferences say nothing about γ; in a restricted one they may, which is not shown here."
            ),
            claims=self._claims(numbers),
            panels=self._panels(numbers),
            tables=_tables(numbers),
        )

    def _claims(self, numbers: dict[str, Any]) -> list[Claim]:
        rows, claims = numbers["misspecified"], []
        off = max(abs(row["forward_kl"]["median"] - row["limit"]) for row in rows)
        promise = "training with γ′ tends to π*^(γ/γ′)"
        claims.append(Claim(promise, f"forward KL within {off:.2g} nats of that limit for every γ′", off < 0.05))
        nll = [row["fresh_nll"] for row in rows]
        text = f"NLL of fresh labels between {min(nll):.6f} and {max(nll):.6f} over all γ′"
        claims.append(Claim("preferences do not identify γ in a full table", text, max(nll) - min(nll) < 1e-5))
        limits = {row["trained_gamma"] / self.gamma: row["limit"] for row in rows}
        for factor in (2.0, 4.0):
            if factor in limits and 1 / factor in limits:
                text = f"{limits[1 / factor]:.3g} against {limits[factor]:.3g} nats"
                promise = f"a γ′ {factor:g} times too small hurts more than one as much too large"
                claims.append(Claim(promise, text, limits[1 / factor] > limits[factor]))
        row = numbers["identified"][-1]
        low, high = row["gamma"]["q25"], row["gamma"]["q75"]
        text = f"{row['gamma']['median']:.3f}, quartiles {low:.3f} and {high:.3f}"
        promise = f"{row['samples']} direct samples of π* give γ to 10 %"
        claims.append(Claim(promise, text, 0.9 * self.gamma <= low <= high <= 1.1 * self.gamma))
        cost = numbers["cost"]
        products = [row["n_kl"]["mean"] * row["gamma"] ** 2 for row in cost]
        text = ", ".join(f"{p:.0f} at γ {row['gamma']:g}" for p, row in zip(products, cost, strict=True))
        promise = "pairs cost 1/γ²: n·KL · γ² stays within a factor of 2"
        claims.append(Claim(promise, text, max(products) < 2 * min(products)))
        return claims

    def _panels(self, numbers: dict[str, Any]) -> list[Panel]:
        rows = numbers["misspecified"]
        x = [row["trained_gamma"] for row in rows]
        wrong = Panel(
            title="Forward KL by the γ that training assumes",
            about=f"The labels have γ = {self.gamma:g}. Dashed: the limit as n → ∞.",
            x="γ′ in training",
            y="KL(π*‖π), nats",
            curves=[
                with_quartiles("PMLE", x, [row["forward_kl"] for row in rows]),
                Curve("PMLE limit", x, [row["limit"] for row in rows], kind="bound"),
            ],
        )
        rows = numbers["identified"]
        x = [row["samples"] for row in rows]
        found = Panel(
            title="γ from direct samples of the target",
            about="Maximum likelihood under softmax(R̂/γ); medians and quartiles over worlds. Dashed: the truth.",
            x="samples of π*",
            y="estimated γ",
            curves=[
                with_quartiles("estimate", x, [row["gamma"] for row in rows]),
                Curve("truth", [x[0], x[-1]], [self.gamma] * 2, kind="bound"),
            ],
            y_scale="linear",
        )
        rows = numbers["cost"]
        x = [row["gamma"] for row in rows]
        cost = Panel(
            title="What sharpness costs",
            about="n·KL of PMLE by the γ of the labels. Dashed: the asymptotic constant, which grows like 1/γ².",
            x="γ of the labels",
            y="n · KL(π*‖π), nats",
            curves=[
                with_errors("PMLE", x, [row["n_kl"] for row in rows]),
                Curve("PMLE limit", x, [row["constant"] for row in rows], kind="bound"),
            ],
        )
        return [wrong, found, cost]


def best_sharpness(
    rewards: Float[Tensor, "worlds contexts responses"], seen: Float[Tensor, "worlds contexts responses"]
) -> Float[Tensor, "worlds"]:
    """γ that maximises the likelihood of `seen` counts under softmax(R/γ), between 1e-3 and 1e3.

    The log-likelihood is concave in 1/γ: bisection on its slope, in ln γ.
    """
    low = torch.full((len(rewards), 1, 1), 1e-3, dtype=torch.float64)
    high = torch.full_like(low, 1e3)
    for _ in range(60):
        inverse = (low * high).sqrt()
        mean = ((inverse * rewards).softmax(-1) * rewards).sum(-1, keepdim=True)
        slope = (seen * (rewards - mean)).sum((1, 2), keepdim=True)
        low, high = torch.where(slope > 0, inverse, low), torch.where(slope > 0, high, inverse)
    return 1 / inverse[:, 0, 0]


def _tables(numbers: dict[str, Any]) -> list[Table]:
    wrong = [
        [row["trained_gamma"], row["forward_kl"]["median"], row["limit"], f"{row['fresh_nll']:.6f}"]
        for row in numbers["misspecified"]
    ]
    found = [
        [row["samples"], *(row["gamma"][key] for key in ("median", "q25", "q75")), row["predicted_se"]]
        for row in numbers["identified"]
    ]
    return [
        Table(
            "Trained with another γ",
            "nats; the last column is the mean NLL of fresh labels under the trained policy's preference model.",
            ["γ′", "forward KL", "limit", "NLL of fresh labels"],
            wrong,
        ),
        Table(
            "γ from direct samples of π*",
            "Medians and quartiles over worlds; the last column is the standard error that theory gives.",
            ["samples", "γ", "25 %", "75 %", "predicted error"],
            found,
        ),
    ]
