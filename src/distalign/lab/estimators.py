"""Estimators: bias and variance of every gradient estimator, exactly, beside the naive forms that people write.

The sampling distribution moves with the parameters. What forgets that is biased, and the least noisy of such mistakes
is the most dangerous one: training looks healthy. The forms called naive are written here, and are wrong.

Every draw of a group of responses is listed and weighted by its probability, so means and variances are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from distalign.lab.exact import divergence, entropy, optimum
from distalign.lab.experiment import Experiment, Row, Scale, curve, level, select, spread
from distalign.lab.tree import Tree
from distalign.methods.base import Samples
from distalign.methods.estimators import (
    entropy_full,
    entropy_plain,
    expected_reward,
    kl_full,
    kl_plain,
    leave_one_out,
    sequence_sum,
)
from distalign.methods.ppo import clipped_surrogate
from distalign.methods.rkl import rkl_loss, rkl_split_loss
from distalign.progress import Advance
from distalign.report.shown import Claim, Panel, Shown, Table
from distalign.settings import Count, NotNegative

_MOST_NUMBERS = 5_000_000  # in the gradients of all groups: 40 MB, of which a few copies are held
_EXACT = 1e-10  # relative to the gradient
_SIZES = (2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0, 64.0)

# What is estimated; the last is −E[R] − γ H(π) + β KL(π ‖ π₀), which RKL minimises (eq. 14).
QUANTITIES = KL, ENTROPY, REWARD, OBJECTIVE = "KL(π‖π₀)", "H(π)", "E[R]", "RKL objective"

Surrogate = Callable[[Samples], Tensor]
Logits = Float[Tensor, "nodes vocabulary"]
LogProbs = Float[Tensor, "responses"]


class Estimators(Experiment):
    """Tables over responses of at most `length` tokens, next-token logits and rewards N(0, scale²).

    Baselines are taken over groups of `group_size`. `stale` is the sd of the logits between the policy and the one that
    drew its stale responses, `reward_error` the sd of the reward's error near the optimum.
    """

    name: ClassVar[str] = "estimators"

    vocabulary: Annotated[int, Field(ge=2)] = 3
    length: Annotated[int, Field(ge=2)] = 3
    group_size: Annotated[int, Field(ge=2)] = 3
    gamma: NotNegative = 0.5
    beta: NotNegative = 0.05
    scale: Scale = 1.0
    stale: Scale = 0.5
    reward_error: Scale = 0.1
    clip: Scale = 0.2
    points: Annotated[int, Field(ge=2)] = 13
    seeds: Count = 10

    @model_validator(mode="after")
    def _consistent(self) -> Estimators:
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
        return self

    def run(self, advance: Advance) -> Row:
        """Every estimator in every world, and both forms of RKL's on the way from a random policy to the optimum."""
        numbers: Row = {"rows": [], "path": [], "group_sizes": []}
        objective = objective_forms(self.gamma, self.beta)
        terms = term_forms(self.clip) + naive_forms(self.group_size)
        for index in range(self.seeds):
            far, near, best = self._places(torch.Generator().manual_seed(1000 * self.seed + index))
            places = (far, "far", terms + objective), (near, "near", objective), (best, "optimum", objective)
            found = {
                "rows": [self._row(world, form, where) for world, where, forms in places for form in forms],
                "path": self._path(far, best.policy),
                "group_sizes": self._sizes(far),
            }
            for part, rows in found.items():
                numbers[part] += [{"world": index, **row} for row in rows]
            advance(index + 1, self.seeds)
        return numbers

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

    def _row(self, world: World, form: Form, where: str) -> Row:
        """Bias in nats, and relative to the exact gradient if that is not zero; variance of one response in nats².

        `many_variance` is the variance with a baseline from infinitely many responses.
        """
        exact = world.exact_gradient(form.quantity)
        mean, variance = world.gradient(form.surrogate, size=self.group_size if form.grouped else 1, stale=form.stale)
        bias = float((mean - exact).norm())
        baseline = form.grouped and not form.stale and not form.biased
        return {
            "quantity": form.quantity,
            "where": where,
            "estimator": form.name,
            "leave_one_out": form.grouped,
            "stale": form.stale,
            "biased_by_design": form.biased,
            "bias": bias,
            "relative_bias": None if where == "optimum" else bias / float(exact.norm()),
            "variance": variance,
            "many_variance": world.variance(form.surrogate, [math.inf])[0] if baseline else None,
        }

    def _sizes(self, world: World) -> list[Row]:
        """Variance of the full-vocabulary forms with a leave-one-out baseline by the size of its group."""
        forms = [form for form in term_forms(self.clip) if form.name == "full vocabulary" and form.grouped]
        return [
            {"quantity": form.quantity, "group_size": size, "variance": variance}
            for form in forms
            for size, variance in zip(_SIZES, world.variance(form.surrogate, _SIZES), strict=True)
        ]

    def _path(self, far: World, best: Logits) -> list[Row]:
        """Straight in the logits from the far policy to the optimum, evenly in the logarithm of what is left to go."""
        rows = []
        for left in torch.logspace(0, -3, self.points, dtype=torch.float64).tolist():
            world = replace(far, policy=best + left * (far.policy - best))
            distance = divergence(world.logps(world.policy)[None], world.logps(best)[None])
            row: Row = {"left": left, "kl": float(distance)}
            row["gradient"] = float(world.exact_gradient(OBJECTIVE).square().sum())
            for form in objective_forms(self.gamma, self.beta):
                if form.grouped:
                    _, row[form.name] = world.gradient(form.surrogate, size=self.group_size)
            rows.append(row)
        return rows

    def show(self, numbers: Row) -> Shown:
        """The noise of RKL's two forms on the way to the optimum, and what a baseline is worth."""
        rows = numbers["rows"]
        return Shown(
            title="Estimators: bias and variance of every gradient",
            about=(
                f"Responses of at most {self.length} tokens over {self.vocabulary}, all groups of {self.group_size} "
                f"enumerated in float64; γ {self.gamma:g}, β {self.beta:g}, next-token logits and rewards N(0, "
                f"{self.scale:g}²), {self.seeds} worlds, seed {self.seed}; medians over worlds with quartiles. "
                "Variance is E|ĝ − E ĝ|² of one response, in nats². What it means for training is not shown."
            ),
            claims=[*_bias_claims(rows, self.seeds), *_variance_claims(rows), *_objective_claims(rows)],
            panels=[_path_panel(numbers["path"]), _sizes_panel(numbers["group_sizes"], rows)],
            tables=[_table(rows)],
        )


def _bias_claims(rows: list[Row], seeds: int) -> list[Claim]:
    right, wrong = (select(rows, biased_by_design=biased) for biased in (False, True))
    worst = max(row["bias"] if row["relative_bias"] is None else row["relative_bias"] for row in right)
    estimators = len({tuple(_key(row).values()) for row in select(right, where="far")})
    least = min(wrong, key=lambda row: row["relative_bias"])
    return [
        Claim(
            f"the gradient of every estimator of the library is unbiased (below {_EXACT:g} of its length)",
            f"at most {worst:.0e}: {estimators} estimators, {seeds} worlds",
            worst < _EXACT,
        ),
        Claim(
            "only the naive forms are biased, and the clipped surrogate on stale responses, on purpose",
            f"least of them: {least['relative_bias']:.1%} ({least['quantity']}, {least['estimator']})",
            least["relative_bias"] > 1e-3 and worst < _EXACT,
        ),
    ]


def _variance_claims(rows: list[Row]) -> list[Claim]:
    """KL alone and entropy alone."""
    claims = []
    for quantity in (KL, ENTROPY):

        def values(estimator: str, key: str = "variance", grouped: bool = False, quantity: str = quantity) -> Tensor:
            wanted = select(rows, quantity=quantity, where="far", estimator=estimator, leave_one_out=grouped)
            return _column(wanted, key)

        alone, plain, grouped = values("full vocabulary"), values("plain"), values("full vocabulary", grouped=True)
        many, plain_many = (values(name, "many_variance", grouped=True) for name in ("full vocabulary", "plain"))
        naive = "naive: full vocabulary, no score term"
        bias = float(values(naive, "relative_bias").quantile(0.5))
        others = torch.minimum(alone, torch.minimum(plain, plain_many))
        claims += [
            _less(f"{quantity}: full vocabulary is less noisy than plain", alone / plain),
            _less(f"{quantity}: it is the least noisy with a baseline from many responses", many / others),
            _less(
                f"{quantity}: without the score term it is less noisy than any right form, and wrong",
                values(naive) / torch.minimum(others, torch.minimum(grouped, many)),
                f"; bias {bias:.0%}",
            ),
        ]
    return claims


def _objective_claims(rows: list[Row]) -> list[Claim]:
    """The two forms of RKL's objective, with leave-one-out."""
    joint, split = (
        {
            where: _column(select(rows, quantity=OBJECTIVE, estimator=name, leave_one_out=True, where=where))
            for where in ("far", "near", "optimum")
        }
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
    median, q25, q75 = spread(ratio).values()
    found = f"ratio {median:.2g} [{q25:.2g}, {q75:.2g}], below 1 in {int((ratio < 1).sum())} of {len(ratio)} worlds"
    return Claim(promised, found + more, median < 1)


def _path_panel(path: list[Row]) -> Panel:
    places = []
    for left in dict.fromkeys(row["left"] for row in path):
        rows = select(path, left=left)
        medians = {key: spread(_column(rows, key))["median"] for key in ("kl", "gradient")}
        places.append(medians | {form: spread(_column(rows, form)) for form in ("joint", "split")})
    return Panel(
        title="Noise of RKL's gradient on the way to the optimum",
        about=(
            "Leave-one-out, both forms; straight in the logits from a random policy. The noise of the joint form falls "
            "with the gradient, that of the split form does not. Not shown: that training goes this way."
        ),
        x="KL(π ‖ optimum), nats",
        y="variance of one response, nats²",
        curves=[
            curve("joint", places, "kl", "joint"),
            curve("split", places, "kl", "split"),
            curve("squared gradient", places, "kl", "gradient", "bound"),
        ],
    )


def _sizes_panel(sizes: list[Row], rows: list[Row]) -> Panel:
    curves = []
    for quantity in (KL, ENTROPY):
        full = select(rows, quantity=quantity, where="far", estimator="full vocabulary", leave_one_out=False)
        ratios = [
            {"size": size, "ratio": spread(_column(select(sizes, quantity=quantity, group_size=size)) / _column(full))}
            for size in _SIZES
        ]
        curves.append(curve(quantity, ratios, "size", "ratio"))
    return Panel(
        title="What a leave-one-out baseline is worth",
        about=(
            "Full-vocabulary forms. A baseline from few responses is noise itself: below the dashed line it helps. "
            "Exact for every number of responses, from all groups of two and of three."
        ),
        x="responses to a prompt",
        y="variance relative to no baseline",
        curves=[*curves, level("no baseline", _SIZES, 1.0)],
        y_scale="linear",
    )


def _table(rows: list[Row]) -> Table:
    def median(worlds: list[Row], key: str) -> float | None:
        return None if worlds[0][key] is None else spread(_column(worlds, key))["median"]

    lines = []
    for key in [_key(row) for row in rows if row["world"] == 0]:
        worlds = select(rows, **key)
        names = [key["quantity"], key["where"], key["estimator"], "others" if key["leave_one_out"] else "none"]
        variances = [*spread(_column(worlds)).values(), median(worlds, "many_variance")]
        lines.append([*names, median(worlds, "relative_bias"), *variances])
    return Table(
        title="Every estimator",
        about=(
            "Medians over worlds. Bias relative to the gradient (which is zero at the optimum: –), variance of one "
            "response in nats² with its quartiles, and with a baseline from infinitely many responses (K → ∞)."
        ),
        columns=["of", "where", "estimator", "baseline", "bias", "variance", "q25", "q75", "K → ∞"],
        rows=lines,
    )


def _key(row: Row) -> Row:
    """What says which estimator a row is of."""
    return {name: row[name] for name in ("quantity", "where", "estimator", "leave_one_out")}


def _column(rows: list[Row], key: str = "variance") -> Tensor:
    """One number, world by world."""
    return torch.tensor([row[key] for row in rows], dtype=torch.float64)


@dataclass(frozen=True)
class World:
    """One prompt: the policies as next-token logits, the rewards of all responses, the weights of RKL's objective.

    `policy` draws and is trained, `behavior` is an earlier policy whose responses may be reused.
    """

    tree: Tree
    policy: Logits
    reference: Logits
    behavior: Logits
    rewards: Float[Tensor, "responses"]
    gamma: float
    beta: float

    def logps(self, logits: Logits) -> LogProbs:
        """ln π of every response under next-token logits."""
        return self.tree.path_sums(logits.log_softmax(-1))

    def expectation(self, quantity: str, logps: LogProbs) -> Float[Tensor, ""]:
        """One of `QUANTITIES`, given ln π of all responses, in nats."""
        if quantity == KL:
            return divergence(logps[None], self.logps(self.reference)[None])
        if quantity == ENTROPY:
            return entropy(logps[None])
        if quantity == REWARD:
            return (logps.exp() * self.rewards).sum()
        reward, h, kl = (self.expectation(term, logps) for term in (REWARD, ENTROPY, KL))
        return -reward - self.gamma * h + self.beta * kl

    def optimum(self) -> Logits:
        """The policy that minimises the objective (appendix B), as next-token logits."""
        logps = optimum(self.rewards[None], self.logps(self.reference)[None], gamma=self.gamma, beta=self.beta)[0]
        mask = self.tree.mask
        mass = logps.exp()[:, None].expand(mask.shape)[mask]
        through = torch.zeros(self.policy.numel(), dtype=mass.dtype).index_add(0, self.tree.paths[mask], mass)
        return through.log().view_as(self.policy)

    def exact_gradient(self, quantity: str) -> Float[Tensor, "parameters"]:
        """Derivative of an expectation in the policy's logits."""
        logits = self.policy.clone().requires_grad_()
        return torch.autograd.grad(self.expectation(quantity, self.logps(logits)), logits)[0].flatten()

    def gradient(
        self, surrogate: Surrogate, *, size: int, stale: bool = False
    ) -> tuple[Float[Tensor, "parameters"], float]:
        """Mean and variance (nats²) of the gradient of a group's mean surrogate, over all groups of `size` responses.

        The variance is `size` times that of the mean, so that groups of different sizes compare. Groups of one have no
        baseline. `stale`: `behavior` drew the responses.
        """
        count = len(self.rewards)
        rows = torch.cartesian_prod(*[torch.arange(count)] * size).view(-1, size)
        copies = self.policy.expand(len(rows), *self.policy.shape).clone().requires_grad_()
        surrogates = surrogate(self._samples(copies, rows, stale=stale)).view(rows.shape).mean(1)
        gradients = torch.autograd.grad(surrogates.sum(), copies)[0].flatten(1)
        weights = self.logps(self.behavior if stale else self.policy)[rows].sum(1).exp()
        mean = weights @ gradients
        return mean, size * float(weights @ (gradients - mean).square().sum(1))

    def variance(self, surrogate: Surrogate, sizes: Sequence[float]) -> list[float]:
        """Variance of one response with a leave-one-out baseline, for groups of these sizes, ∞ among them if wanted.

            A + B / (K − 1)

        exactly, because the group's mean gradient is a U-statistic of degree two; A and B from all groups of two and
        of three. Holds for surrogates that are linear in their baseline, as all of `distalign.methods.estimators` are.
        """
        two, three = (self.gradient(surrogate, size=size)[1] for size in (2, 3))
        return [2 * three - two + 2 * (two - three) / (size - 1) for size in sizes]

    def _samples(
        self,
        copies: Float[Tensor, "groups nodes vocabulary"],
        rows: Int[Tensor, "groups size"],
        *,
        stale: bool,
    ) -> Samples:
        """The groups' responses as a method sees them, each under its group's own copy of the policy."""
        size = rows.shape[1]
        group = torch.arange(len(rows)).repeat_interleave(size)
        rows = rows.flatten()
        nodes, tokens = self.tree.nodes[rows], self.tree.tokens[rows]
        log_p, log_q = copies.log_softmax(-1), self.reference.log_softmax(-1)
        at = group[:, None], nodes
        token_logps = log_p[(*at, tokens)]
        return Samples(
            token_logps=token_logps,
            mask=self.tree.mask[rows],
            behavior_token_logps=self.behavior.log_softmax(-1)[nodes, tokens] if stale else token_logps.detach(),
            reference_token_logps=log_q[nodes, tokens],
            step_kl=(log_p.exp() * (log_p - log_q)).sum(-1)[at],
            step_entropy=-(log_p.exp() * log_p).sum(-1)[at],
            rewards=self.rewards[rows],
            group=group,
        )


class Form(NamedTuple):
    """An estimator as it is measured: what it estimates, its name, its surrogate of one response each.

    `grouped`: with a baseline from its group. `stale`: on an earlier policy's responses. `biased`: known to be wrong.
    """

    quantity: str
    name: str
    surrogate: Surrogate
    grouped: bool = False
    stale: bool = False
    biased: bool = False


def term_forms(clip: float) -> list[Form]:
    """Each term by each of the library's estimators: alone, with leave-one-out, and so on weighted stale responses."""
    forms = []
    for quantity, name, surrogate in (
        (KL, "plain", kl_plain),
        (KL, "full vocabulary", kl_full),
        (ENTROPY, "plain", entropy_plain),
        (ENTROPY, "full vocabulary", entropy_full),
        (REWARD, "plain", _reward),
    ):
        forms += [Form(quantity, name, surrogate), Form(quantity, name, surrogate, grouped=True)]
        forms.append(Form(quantity, f"{name}, stale, weighted", surrogate, grouped=True, stale=True))

    def clipped(samples: Samples) -> Tensor:
        advantages = samples.rewards - leave_one_out(samples.rewards, samples.group)
        advantages = advantages[:, None].expand(samples.mask.shape)
        behavior = samples.behavior_token_logps
        tokens = clipped_surrogate(samples.token_logps, behavior, advantages, samples.mask, clip=clip)
        return sequence_sum(tokens, samples.mask)

    forms.append(Form(REWARD, "clipped surrogate", clipped, grouped=True))
    forms.append(Form(REWARD, "clipped surrogate, stale", clipped, grouped=True, stale=True, biased=True))
    return forms


def objective_forms(gamma: float, beta: float) -> list[Form]:
    """RKL's whole objective by the loss of each form, with and without leave-one-out."""
    losses = {"joint": rkl_loss, "split": rkl_split_loss}
    forms = {name: partial(loss, gamma=gamma, beta=beta) for name, loss in losses.items()}
    return [Form(OBJECTIVE, name, form, grouped) for name, form in forms.items() for grouped in (False, True)]


def naive_forms(group_size: int) -> list[Form]:
    """No score term, a baseline that has the sample's own value in it, stale responses taken for fresh ones."""

    def own_value(samples: Samples) -> Tensor:
        rewards = samples.rewards
        baseline = rewards.view(-1, group_size).mean(1).repeat_interleave(group_size)
        return sequence_sum(samples.token_logps, samples.mask) * (rewards - baseline)

    def fresh(surrogate: Surrogate) -> Surrogate:
        return lambda samples: surrogate(samples.replace(behavior_token_logps=samples.token_logps.detach()))

    mean, no_score = "naive: derivative of the sample mean", "naive: full vocabulary, no score term"
    stale = "naive: stale taken for fresh"
    return [
        Form(KL, mean, _log_ratio, biased=True),
        Form(KL, no_score, lambda s: sequence_sum(s.step_kl, s.mask), biased=True),
        Form(KL, stale, fresh(kl_full), grouped=True, stale=True, biased=True),
        Form(ENTROPY, mean, lambda s: -sequence_sum(s.token_logps, s.mask), biased=True),
        Form(ENTROPY, no_score, lambda s: sequence_sum(s.step_entropy, s.mask), biased=True),
        Form(ENTROPY, stale, fresh(entropy_full), grouped=True, stale=True, biased=True),
        Form(REWARD, "naive: baseline with the own value", own_value, grouped=True, biased=True),
        Form(REWARD, stale, fresh(_reward), grouped=True, stale=True, biased=True),
    ]


def _reward(samples: Samples) -> Tensor:
    return expected_reward(samples, samples.rewards)


def _log_ratio(samples: Samples) -> Tensor:
    return sequence_sum(samples.token_logps - samples.reference_token_logps, samples.mask)
