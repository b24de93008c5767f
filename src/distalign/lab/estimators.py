"""Estimators: bias and variance of every gradient estimator, exactly, beside the naive forms that people write.

The sampling distribution moves with the parameters. What forgets that is biased, and the least noisy of such mistakes
is the most dangerous one: training looks healthy. The forms called naive are written here, and are wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from distalign.lab.exact import divergence
from distalign.lab.experiment import Advance, at_least
from distalign.lab.forms import (
    ENTROPY,
    EXPECTATIONS,
    KL,
    OBJECTIVE,
    Form,
    naive_forms,
    objective_forms,
    term_forms,
)
from distalign.lab.gradients import World
from distalign.lab.rates import spread
from distalign.lab.shown import Claim, Curve, Panel, Shown, Table, with_quartiles
from distalign.lab.tree import Tree

_MOST_NUMBERS = 5_000_000  # in the gradients of all groups: 40 MB, of which a few copies are held
_EXACT = 1e-10  # relative to the gradient
_SIZES = (2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0, 64.0)


@dataclass(frozen=True)
class Estimators:
    """Settings: tables over responses of at most `length` tokens, next-token logits and rewards N(0, scale²).

    Baselines are taken over groups of `group_size`. `stale` is the sd of the logits between the policy and the one that
    drew its stale responses, `reward_error` the sd of the reward's error near the optimum.
    """

    vocabulary: int = 3
    length: int = 3
    group_size: int = 3
    gamma: float = 0.5
    beta: float = 0.05
    scale: float = 1.0
    stale: float = 0.5
    reward_error: float = 0.1
    clip: float = 0.2
    points: int = 13
    seeds: int = 10
    seed: int = 0

    name: ClassVar[str] = "estimators"

    def __post_init__(self) -> None:
        at_least(self, vocabulary=2, length=2, group_size=2, points=2, seeds=1, seed=0, gamma=0, beta=0)
        at_least(self, scale=1e-6, stale=1e-6, reward_error=1e-6, clip=1e-6)
        if self.gamma + self.beta == 0:
            raise ValueError("gamma and beta are both 0; RKL has an optimum if one of them is positive")
        nodes = sum((self.vocabulary - 1) ** t for t in range(self.length))
        responses = nodes + (self.vocabulary - 1) ** self.length
        numbers = responses**self.group_size * nodes * self.vocabulary
        if numbers > _MOST_NUMBERS:
            raise ValueError(
                f"vocabulary {self.vocabulary}, length {self.length} and group_size {self.group_size} make "
                f"{responses}^{self.group_size} groups and {numbers:,} numbers in their gradients; give smaller ones, "
                f"for at most {_MOST_NUMBERS:,}"
            )

    def run(self, advance: Advance) -> tuple[dict[str, Any], Shown]:
        """Every estimator in every world, and both forms of RKL's on the way from a random policy to the optimum."""
        rows: list[dict[str, Any]] = []
        path: list[dict[str, Any]] = []
        sizes: list[dict[str, Any]] = []
        for index in range(self.seeds):
            far, near, best = self._places(torch.Generator().manual_seed(1000 * self.seed + index))
            objective = objective_forms(self.gamma, self.beta)
            terms = term_forms(self.clip) + naive_forms(self.group_size, self.gamma, self.beta)
            rows += [{"world": index, **self._row(far, form, "far")} for form in terms + objective]
            rows += [{"world": index, **self._row(near, form, "near")} for form in objective]
            rows += [{"world": index, **self._row(best, form, "optimum")} for form in objective]
            path += [{"world": index, **row} for row in self._path(far, best.policy)]
            sizes += [{"world": index, **row} for row in self._sizes(far)]
            advance(index + 1, self.seeds)
        numbers = {"rows": rows, "path": path, "group_sizes": sizes}
        return numbers, self._shown(numbers)

    def _places(self, random: torch.Generator) -> tuple[World, World, World]:
        """A world with a random policy, with its optimal policy but a reward a little off, and at its optimum."""
        tree = Tree(self.vocabulary, self.length)

        def table(scale: float) -> Tensor:
            shape = (len(tree.prefixes), self.vocabulary)
            return scale * torch.randn(shape, generator=random, dtype=torch.float64)

        def rewards(scale: float) -> Tensor:
            return scale * torch.randn(len(tree.responses), generator=random, dtype=torch.float64)

        policy, reference = table(self.scale), table(self.scale)
        behavior = policy + table(self.stale)
        far = World(tree, policy, reference, behavior, rewards(self.scale), self.gamma, self.beta)
        best = replace(far, policy=far.optimum())
        return far, replace(best, rewards=far.rewards + rewards(self.reward_error)), best

    def _row(self, world: World, form: Form, where: str) -> dict[str, Any]:
        """Bias in nats, variance of one response in nats², and both relative to the exact gradient, if it is not zero.

        `many_variance` is that with a baseline from infinitely many responses.
        """
        exact = world.exact_gradient(partial(EXPECTATIONS[form.quantity], world))
        gradient = world.gradient(form.surrogate, size=self.group_size if form.grouped else 1, stale=form.stale)
        bias, length = float((gradient.mean - exact).norm()), float(exact.norm())
        at_optimum = where == "optimum"
        return {
            "quantity": form.quantity,
            "where": where,
            "estimator": form.name,
            "leave_one_out": form.grouped,
            "stale": form.stale,
            "biased_by_design": form.biased,
            "bias": bias,
            "relative_bias": None if at_optimum else bias / length,
            "variance": gradient.variance,
            "relative_variance": None if at_optimum else gradient.variance / length**2,
            "many_variance": world.variance(form.surrogate, [math.inf])[0] if _is_library_baseline(form) else None,
        }

    def _sizes(self, world: World) -> list[dict[str, Any]]:
        """Variance of the full-vocabulary forms with a leave-one-out baseline by the size of its group."""
        forms = [form for form in term_forms(self.clip) if form.name == "full vocabulary" and form.grouped]
        return [
            {"quantity": form.quantity, "group_size": size, "variance": variance}
            for form in forms
            for size, variance in zip(_SIZES, world.variance(form.surrogate, list(_SIZES)), strict=True)
        ]

    def _path(self, far: World, best: Tensor) -> list[dict[str, Any]]:
        """Straight in the logits from the far policy to the optimum, evenly in the logarithm of what is left to go."""
        rows = []
        for left in torch.logspace(0, -3, self.points, dtype=torch.float64).tolist():
            world = replace(far, policy=best + left * (far.policy - best))
            distance = divergence(world.logps(world.policy)[None], world.logps(best)[None])
            row = {"left": left, "kl": float(distance)}
            row["gradient"] = float(world.exact_gradient(world.objective).square().sum())
            for form in objective_forms(self.gamma, self.beta):
                if form.grouped:
                    row[form.name] = world.gradient(form.surrogate, size=self.group_size).variance
            rows.append(row)
        return rows

    def _shown(self, numbers: dict[str, Any]) -> Shown:
        rows = numbers["rows"]
        return Shown(
            title="Estimators: bias and variance of every gradient",
            about=(
                f"Responses of at most {self.length} tokens over {self.vocabulary}, all groups of {self.group_size} "
                f"enumerated in float64; γ {self.gamma:g}, β {self.beta:g}, next-token logits and rewards N(0, "
                f"{self.scale:g}²), {self.seeds} worlds, seed {self.seed}; medians over worlds with quartiles. "
                "Variance is E|ĝ − E ĝ|² of one response, in nats². How much it matters for training is not shown."
            ),
            claims=[*self._bias_claims(rows), *_variance_claims(rows), *_objective_claims(rows)],
            panels=[_path_panel(numbers["path"]), _sizes_panel(numbers["group_sizes"], rows)],
            tables=[_table(rows)],
        )

    def _bias_claims(self, rows: list[dict[str, Any]]) -> list[Claim]:
        right = [row for row in rows if not row["biased_by_design"]]
        worst = max(row["bias"] if row["relative_bias"] is None else row["relative_bias"] for row in right)
        estimators = len({_key(row) for row in right if row["where"] == "far"})
        wrong = [row for row in rows if row["biased_by_design"]]
        least = min(wrong, key=lambda row: row["relative_bias"])
        own = max(abs(row["relative_bias"] - 1 / self.group_size) for row in wrong if "own value" in row["estimator"])
        return [
            Claim(
                f"the gradient of every estimator of the library is unbiased (below {_EXACT:g} of its length)",
                f"at most {worst:.0e}: {estimators} estimators, {self.seeds} worlds",
                worst < _EXACT,
            ),
            Claim(
                "only the naive forms are biased, and the clipped surrogate on stale responses, on purpose",
                f"least of them: {least['relative_bias']:.1%} ({least['quantity']}, {least['estimator']})",
                least["relative_bias"] > 1e-3 and worst < _EXACT,
            ),
            Claim(
                f"a baseline with the own value leaves (K − 1)/K of the gradient: {1 / self.group_size:.1%} missing",
                f"to within {own:.0e}",
                own < _EXACT,
            ),
        ]


def _variance_claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """KL alone and entropy alone."""
    claims = []
    for quantity in (KL, ENTROPY):
        alone, plain = _values(rows, quantity, "full vocabulary"), _values(rows, quantity, "plain")
        grouped = _values(rows, quantity, "full vocabulary", grouped=True)
        many = _values(rows, quantity, "full vocabulary", "many_variance", grouped=True)
        plain_many = _values(rows, quantity, "plain", "many_variance", grouped=True)
        naive = "naive: full vocabulary, no score term"
        bias, without = _values(rows, quantity, naive, "relative_bias"), _values(rows, quantity, naive)
        others = torch.minimum(alone, torch.minimum(plain, plain_many))
        claims += [
            _less(f"{quantity}: full vocabulary is less noisy than plain", alone / plain),
            _less(f"{quantity}: it is the least noisy with a baseline from many responses", many / others),
            _less(
                f"{quantity}: without the score term it is less noisy than any right form, and wrong",
                without / torch.minimum(others, torch.minimum(grouped, many)),
                f"; bias {float(bias.quantile(0.5)):.0%}",
            ),
        ]
    return claims


def _objective_claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """The two forms of RKL's objective, with leave-one-out."""
    joint, split = (
        {where: _values(rows, OBJECTIVE, name, grouped=True, where=where) for where in ("far", "near", "optimum")}
        for name in ("joint", "split")
    )
    zero, rest = float(joint["optimum"].max()), float(split["optimum"].quantile(0.5))
    return [
        _less("RKL far from its optimum: split is less noisy than joint", split["far"] / joint["far"]),
        _less("RKL near its optimum: joint is less noisy than split", joint["near"] / split["near"]),
        Claim(
            "RKL at its optimum: joint has no noise at all (below 1e-12)",
            f"at most {zero:.0e} in {len(joint['optimum'])} worlds; split {rest:.2g}",
            zero < 1e-12 < rest,
        ),
    ]


def _less(promised: str, ratio: Tensor, more: str = "") -> Claim:
    """That a ratio of variances is below one: its median is, and how many worlds agree."""
    median, q25, q75 = spread(ratio)
    found = f"ratio {median:.2g} [{q25:.2g}, {q75:.2g}], below 1 in {int((ratio < 1).sum())} of {len(ratio)} worlds"
    return Claim(promised, found + more, median < 1)


def _path_panel(path: list[dict[str, Any]]) -> Panel:
    def curve(label: str, key: str) -> Curve:
        steps = list(dict.fromkeys(row["left"] for row in path))
        at = {left: [row for row in path if row["left"] == left] for left in steps}
        x = [spread(_tensor(rows, "kl")).median for rows in at.values()]
        return _curve(label, x, [_tensor(rows, key) for rows in at.values()])

    gradient = curve("squared gradient", "gradient")
    return Panel(
        title="Noise of RKL's gradient on the way to the optimum",
        about=(
            "Leave-one-out, both forms; straight in the logits from a random policy. The noise of the joint form falls "
            "with the gradient, that of the split form does not. Not shown: that training goes this way."
        ),
        x="KL(π ‖ optimum), nats",
        y="variance of one response, nats²",
        curves=[
            curve("joint", "joint"),
            curve("split", "split"),
            Curve(gradient.label, gradient.x, gradient.y, kind="bound"),
        ],
    )


def _sizes_panel(sizes: list[dict[str, Any]], rows: list[dict[str, Any]]) -> Panel:
    curves = []
    for quantity in dict.fromkeys(row["quantity"] for row in sizes):
        mine = [row for row in sizes if row["quantity"] == quantity]
        values = [_tensor([row for row in mine if row["group_size"] == size], "variance") for size in _SIZES]
        alone = _values(rows, quantity, "full vocabulary")
        curves.append(_curve(quantity, list(_SIZES), [value / alone for value in values]))
    return Panel(
        title="What a leave-one-out baseline is worth",
        about=(
            "Full-vocabulary forms. A baseline from few responses is noise itself: below the dashed line it helps. "
            "Exact for every number of responses, from all groups of two and of three."
        ),
        x="responses to a prompt",
        y="variance relative to no baseline",
        curves=[*curves, Curve("no baseline", [_SIZES[0], _SIZES[-1]], [1.0, 1.0], kind="bound")],
        y_scale="linear",
    )


def _table(rows: list[dict[str, Any]]) -> Table:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(_key(row), []).append(row)

    def median(group: list[dict[str, Any]], key: str) -> float | None:
        return None if group[0][key] is None else spread(_tensor(group, key)).median

    return Table(
        title="Every estimator",
        about=(
            "Medians over worlds. Bias relative to the gradient (which is zero at the optimum: –), variance of one "
            "response in nats² with its quartiles, and with a baseline from infinitely many responses (K → ∞)."
        ),
        columns=["of", "where", "estimator", "baseline", "bias", "variance", "q25", "q75", "K → ∞"],
        rows=[
            [
                *(group[0][key] for key in ("quantity", "where", "estimator")),
                "others" if group[0]["leave_one_out"] else "none",
                median(group, "relative_bias"),
                *spread(_tensor(group, "variance")),
                median(group, "many_variance"),
            ]
            for group in groups.values()
        ],
    )


def _values(
    rows: list[dict[str, Any]],
    quantity: str,
    estimator: str,
    key: str = "variance",
    *,
    grouped: bool = False,
    where: str = "far",
) -> Tensor:
    """One number of one estimator, world by world."""
    wanted = (quantity, where, estimator, grouped)
    return _tensor([row for row in rows if _key(row) == wanted], key)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["quantity"], row["where"], row["estimator"], row["leave_one_out"]


def _tensor(rows: list[dict[str, Any]], key: str) -> Tensor:
    return torch.tensor([row[key] for row in rows], dtype=torch.float64)


def _curve(label: str, x: list[float], values: list[Tensor]) -> Curve:
    return with_quartiles(label, x, [spread(one)._asdict() for one in values])


def _is_library_baseline(form: Form) -> bool:
    return form.grouped and not form.stale and not form.biased
