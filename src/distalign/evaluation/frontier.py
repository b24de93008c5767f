"""The frontier of one reference and reward: all its points, what to take within a KL budget, and how it is shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from distalign.evaluation.frontier_estimates import Band, BestOfN, Point, best_of_n, default_grid, mean_band, predict

if TYPE_CHECKING:
    from rich.table import Table

ABOUT = (
    "Reward against KL of the optimum at each β (a point) and γ (a curve), predicted from samples of the reference "
    "alone; bands of 90 % for these prompts. It is the reward model's reward, not the quality that it stands for."
)


@dataclass(frozen=True)
class Recommendation:
    """What to train within a KL budget: points that are trusted and whose band of KL ends within it.

    `highest_reward`: the most reward. For a given KL no policy has more than RLHF's, so γ = 0 is often it.
    `keeps_entropy`: the most reward among those that keep the wanted share of the reference's entropy, or None.
    `by_gamma`: the most reward for each γ, for those who know γ (from `calibrate`) and look for β.
    """

    kl_budget: float
    entropy_floor: float
    highest_reward: Point
    keeps_entropy: Point | None
    by_gamma: tuple[Point, ...]

    def __str__(self) -> str:
        lines = [
            f"KL of at most {self.kl_budget:g} nats: β {self.highest_reward.beta:g}, γ {self.highest_reward.gamma:g} "
            f"has the highest reward, {_cell(self.highest_reward.reward)}, with entropy "
            f"{_cell(self.highest_reward.entropy)}."
        ]
        floor = f"an entropy of at least {self.entropy_floor:.3g} nats"
        if self.keeps_entropy is None:
            lines.append(f"None has {floor}; take a larger γ or β.")
        elif self.keeps_entropy is not self.highest_reward:
            point = self.keeps_entropy
            lines.append(f"With {floor}: β {point.beta:g}, γ {point.gamma:g}, reward {_cell(point.reward)}.")
        return "\n".join(lines)


@dataclass(frozen=True)
class Frontier:
    """Points, best-of-n and what the reference itself has, all on the same prompts and samples."""

    points: tuple[Point, ...]
    best_of: tuple[BestOfN, ...]
    reference_reward: Band
    reference_entropy: Band
    prompts: int
    samples: int

    @property
    def warnings(self) -> list[str]:
        """One line for every point that is not to be trusted."""
        return [point.warning for point in self.points if point.warning]

    def recommend(self, kl_budget: float, *, keep_entropy: float = 0.9) -> Recommendation:
        """What to train so that KL(π ‖ π₀) per response stays within `kl_budget` nats on prompts like these.

        `keep_entropy` is a fraction of the reference's entropy. Raises ValueError if no trusted point is that near.
        """
        within = [point for point in self.points if point.trusted and point.kl.high <= kl_budget]
        if not within:
            nearest = min((p for p in self.points if p.trusted), key=lambda p: p.kl.high, default=None)
            found = (
                "no point is trusted" if nearest is None else f"the nearest trusted one has {_cell(nearest.kl)} nats"
            )
            raise ValueError(
                f"no point with a KL within {kl_budget:g} nats: {found}; try larger β, or more samples per prompt"
            )
        floor = keep_entropy * self.reference_entropy.value
        broad = [point for point in within if point.entropy.value >= floor]
        best = {gamma: [p for p in within if p.gamma == gamma] for gamma in sorted({p.gamma for p in within})}
        return Recommendation(
            kl_budget,
            floor,
            max(within, key=_reward),
            max(broad, key=_reward, default=None),
            tuple(max(points, key=_reward) for points in best.values()),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data for a file: numbers, texts, lists and dictionaries; NaN as None."""
        return {
            "prompts": self.prompts,
            "samples": self.samples,
            "reference": {"reward": _plain(self.reference_reward), "entropy": _plain(self.reference_entropy)},
            "points": [
                {
                    "beta": p.beta,
                    "gamma": p.gamma,
                    **{key: _plain(getattr(p, key)) for key in ("reward", "kl", "entropy")},
                    "ess": p.ess,
                    "ess_per_prompt": p.ess_per_prompt,
                    "trusted": p.trusted,
                    "warning": p.warning,
                }
                for p in self.points
            ],
            "best_of": [{"n": b.n, "reward": _plain(b.reward), "kl_bound": b.kl_bound} for b in self.best_of],
        }

    def table(self) -> Table:
        """The points and best-of-n for a terminal; those not to be trusted are dim."""
        from rich.table import Table

        table = Table(title=f"Predicted from {self.samples} samples of the reference on each of {self.prompts} prompts")
        for column in ("β", "γ", "reward", "KL(π‖π₀), nats", "entropy, nats", "ESS", "per prompt"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_row("reference", "", _cell(self.reference_reward), "0", _cell(self.reference_entropy), "", "")
        for point in self.points:
            cells = [_cell(band) for band in (point.reward, point.kl, point.entropy)]
            sizes = [f"{point.ess:.0f}", f"{point.ess_per_prompt:.1f}"]
            style = None if point.trusted else "dim"
            table.add_row(
                f"{point.beta:g}", f"{point.gamma:g}" if point.gamma else "0 (RLHF)", *cells, *sizes, style=style
            )
        for best in self.best_of:
            table.add_row(f"best of {best.n}", "", _cell(best.reward), f"≤ {best.kl_bound:.3g}", "", "", "")
        if self.warnings:
            table.caption = f"dim: {len(self.warnings)} points with too few effective samples (ESS) to trust"
        return table

    def panel(self) -> dict[str, Any]:
        """The reward-KL plane as plain data, as a figure takes it: title, axes, curves of x, y, low, high."""
        curves = []
        for gamma in sorted({point.gamma for point in self.points}):
            label = f"γ = {gamma:g}" if gamma else "RLHF (γ = 0)"
            for trusted in (True, False):
                chosen = [p for p in self.points if p.gamma == gamma and p.trusted is trusted]
                chosen.sort(key=lambda point: point.kl.value)
                if chosen:
                    kind, note = ("line", "") if trusted else ("points", ", too few samples")
                    bands = [point.reward for point in chosen]
                    curves.append(_curve(label + note, [point.kl.value for point in chosen], bands, kind))
        if self.best_of:
            bounds = [best.kl_bound for best in self.best_of]
            curves.append(_curve("best of n, KL at most", bounds, [best.reward for best in self.best_of], "points"))
        axes = {"x": "KL(π ‖ π₀), nats", "y": "expected reward", "x_scale": "linear", "y_scale": "linear"}
        return {"title": "Predicted frontier", "about": ABOUT, "curves": curves, **axes}


def predict_frontier(
    rewards: Float[Tensor, "prompts samples"],
    logps: Float[Tensor, "prompts samples"],
    *,
    betas: Sequence[float] | None = None,
    gammas: Sequence[float] | None = None,
) -> Frontier:
    """The whole frontier from samples of π₀ with rewards and ln π₀ (nats), as `predict` takes them.

    None takes the grid of `default_grid`. Best-of-n stands beside it for n = 2, 4, 8 … up to a quarter of the samples.
    """
    if betas is None or gammas is None:
        default = default_grid(rewards, logps)
        betas, gammas = default[0] if betas is None else betas, default[1] if gammas is None else gammas
    prompts, samples = rewards.shape
    points = predict(rewards, logps, betas=betas, gammas=gammas)
    ns = [2**k for k in range(1, samples.bit_length()) if 4 * 2**k <= samples]
    reward, entropy = (mean_band(values.double()) for values in (rewards, -logps))
    return Frontier(tuple(points), tuple(best_of_n(rewards, ns)), reward, entropy, prompts, samples)


def _reward(point: Point) -> float:
    return point.reward.value


def _cell(band: Band) -> str:
    return f"{band.value:.3g} [{band.low:.3g}, {band.high:.3g}]"


def _plain(band: Band) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in band._asdict().items()}


def _curve(label: str, x: list[float], bands: Sequence[Band], kind: str) -> dict[str, Any]:
    y, low, high, _ = (list(column) for column in zip(*bands, strict=True))
    return {"label": label, "x": x, "y": y, "low": low, "high": high, "kind": kind}
