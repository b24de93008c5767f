"""Sharpness: what a wrong γ does, what preferences say about γ (nothing), what samples of the target say, what γ costs.

Only γ ln π enters the preference model, so training with γ′ tends to π*^(γ/γ′) and predicts preferences just as well.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from distalign.lab.exact import divergence
from distalign.lab.experiment import Pairs, Row, Scale, TableExperiment, curve, generator, level, spread
from distalign.lab.fit import fit_pmle, fit_reward
from distalign.lab.tables import Tables, draw, random_tables
from distalign.methods.preference import induced_logps, preference_logit, preference_nll
from distalign.progress import Advance
from distalign.report.shown import Claim, Panel, Shown, Table
from distalign.settings import Count
from distalign.stats.intervals import mean_and_se

Scales = Annotated[tuple[Scale, ...], Field(min_length=1)]


class Gamma(TableExperiment):
    """Full tables with logits N(0, scale²) whose labels have sharpness `gamma`, n = `max_n` pairs.

    `trained` are the γ′ that training assumes, `samples` how many direct samples of π* γ is estimated from, `sharpness`
    the true γ of worlds in which its cost is measured.
    """

    name: ClassVar[str] = "gamma"

    responses: Annotated[int, Field(ge=2)] = 10
    scale: Scale = 1.0
    trained: Scales = (0.125, 0.25, 0.35, 0.5, 0.7, 1.0, 2.0)
    samples: Annotated[tuple[Count, ...], Field(min_length=1)] = (10, 30, 100, 300, 1000)
    sharpness: Scales = (0.125, 0.25, 0.5, 1.0)
    max_n: Pairs = 2**18

    def run(self, advance: Advance) -> Row:
        """The four parts: misspecified γ, identification from preferences, from samples, and the cost."""
        tables = self._tables(self.gamma)
        rewards = fit_reward(tables, draw(tables, self.max_n, self.seed), ridge=self.ridge)
        numbers = {"misspecified": [self._misspecified(tables, gamma) for gamma in self.trained]}
        numbers["identified"] = [self._identified(tables, rewards, count) for count in self.samples]
        numbers["cost"] = [self._cost(gamma) for gamma in self.sharpness]
        advance(1, 1)
        return numbers

    def _tables(self, gamma: float) -> Tables:
        return random_tables(self.seeds, self.contexts, self.responses, scale=self.scale, gamma=gamma, seed=self.seed)

    def _misspecified(self, tables: Tables, gamma: float) -> Row:
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
            "forward_kl": spread(divergence(tables.target, logps)),
            "limit": float(divergence(tables.target, limit).clamp(min=0).median()),
            "fresh_nll": float(nll.mean()),
        }

    def _identified(self, tables: Tables, rewards: Tensor, count: int) -> Row:
        """γ by maximum likelihood of `count` samples of π* under softmax(R̂/γ), and its predicted spread.

        ln softmax(R̂/γ) has in 1/γ a variance of Var R̂ under the model; at the truth the relative standard error of γ is
        1/√(count · Var ln π*).
        """
        random = generator(self.seed, *f"{count} samples".encode())
        flat = (tables.target.exp() / self.contexts).flatten(1)
        index = torch.multinomial(flat, count, replacement=True, generator=random)
        seen = torch.zeros_like(flat).scatter_add_(1, index, torch.ones(index.shape, dtype=flat.dtype))
        estimate = best_sharpness(rewards, seen.view_as(tables.target))
        mean = (tables.target.exp() * tables.target).sum(-1, keepdim=True)
        variance = (tables.target.exp() * (tables.target - mean).square()).sum(-1).mean(-1)
        predicted = self.gamma / (count * variance.median()).sqrt()
        return {"samples": count, "gamma": spread(estimate), "predicted_se": float(predicted)}

    def _cost(self, gamma: float) -> Row:
        """n·KL of PMLE in worlds whose labels have this sharpness, beside its constant."""
        tables = self._tables(gamma)
        logps = fit_pmle(tables, draw(tables, self.max_n, self.seed), ridge=self.ridge)
        n_kl = self.max_n * divergence(tables.target, logps)
        return {
            "gamma": gamma,
            "n": self.max_n,
            "n_kl": mean_and_se(n_kl)._asdict(),
            "constant": float(tables.constant().mean()),
        }

    def show(self, numbers: Row) -> Shown:
        """A figure for each part."""
        return Shown(
            title="Gamma: the sharpness of preferences",
            about=(
                f"Full tables, {self.contexts} contexts × {self.responses} responses, logit scale {self.scale:g}, true "
                f"γ {self.gamma:g}, n = {self.max_n}, {self.seeds} worlds, seed {self.seed}. In an unrestricted class "
                "preferences say nothing about γ; in a restricted one they may, which is not shown here."
            ),
            claims=self._claims(**numbers),
            panels=self._panels(**numbers),
            tables=[_table(numbers["identified"])],
        )

    def _claims(self, misspecified: list[Row], identified: list[Row], cost: list[Row]) -> list[Claim]:
        off = max(abs(row["forward_kl"]["median"] - row["limit"]) for row in misspecified)
        nll = [row["fresh_nll"] for row in misspecified]
        claims = [
            Claim(
                "training with γ′ tends to π*^(γ/γ′)",
                f"forward KL within {off:.2g} nats of that limit for every γ′",
                off < 0.05,
            ),
            Claim(
                "preferences do not identify γ in a full table",
                f"NLL of fresh labels between {min(nll):.6f} and {max(nll):.6f} over all γ′",
                max(nll) - min(nll) < 1e-5,
            ),
        ]
        samples, (median, low, high) = identified[-1]["samples"], identified[-1]["gamma"].values()
        text = f"{median:.3f}, quartiles {low:.3f} and {high:.3f}"
        holds = 0.9 * self.gamma <= low <= high <= 1.1 * self.gamma
        claims.append(Claim(f"{samples} direct samples of π* give γ to 10 %", text, holds))
        products = {row["gamma"]: row["n_kl"]["mean"] * row["gamma"] ** 2 for row in cost}
        text = ", ".join(f"{product:.0f} at γ {gamma:g}" for gamma, product in products.items())
        promise = "pairs cost 1/γ²: n·KL · γ² stays within a factor of 2"
        holds = max(products.values()) < 2 * min(products.values())
        return [*claims, Claim(promise, text, holds)]

    def _panels(self, misspecified: list[Row], identified: list[Row], cost: list[Row]) -> list[Panel]:
        wrong = Panel(
            title="Forward KL by the γ that training assumes",
            about=f"The labels have γ = {self.gamma:g}. Dashed: the limit as n → ∞.",
            x="γ′ in training",
            y="KL(π*‖π), nats",
            curves=[
                curve("PMLE", misspecified, "trained_gamma", "forward_kl"),
                curve("PMLE limit", misspecified, "trained_gamma", "limit", "bound"),
            ],
        )
        sampled = Panel(
            title="γ from direct samples of the target",
            about="Maximum likelihood under softmax(R̂/γ); medians and quartiles over worlds. Dashed: the truth.",
            x="samples of π*",
            y="estimated γ",
            curves=[
                curve("estimate", identified, "samples", "gamma"),
                level("truth", self.samples, self.gamma),
            ],
            y_scale="linear",
        )
        sharp = Panel(
            title="What sharpness costs",
            about="n·KL of PMLE by the γ of the labels. Dashed: the asymptotic constant, which grows like 1/γ².",
            x="γ of the labels",
            y="n · KL(π*‖π), nats",
            curves=[
                curve("PMLE", cost, "gamma", "n_kl"),
                curve("PMLE limit", cost, "gamma", "constant", "bound"),
            ],
        )
        return [wrong, sampled, sharp]


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


def _table(identified: list[Row]) -> Table:
    return Table(
        "γ from direct samples of π*",
        "Medians and quartiles over worlds; the last column is the standard error that theory gives.",
        ["samples", "γ", "25 %", "75 %", "predicted error"],
        [[row["samples"], *row["gamma"].values(), row["predicted_se"]] for row in identified],
    )
