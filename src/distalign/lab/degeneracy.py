"""Degeneracy: what collapses, and what only a finite number of pairs makes collapse.

As β → 0 RLHF gives one response for certain whatever the reward, RKL tends to the target. On separable pairs (each seen
once, labels that contradict nothing) DPO trained long enough gives one response too, and so does PMLE at β = 0: that is
the likelihood of finite data, not the reference. Early stopping or β > 0 is the remedy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from distalign.lab.exact import divergence, entropy, optimum
from distalign.lab.experiment import Pairs, Row, Scale, TableExperiment, curve, level, pick, select, spread
from distalign.lab.fit import fit_reward
from distalign.lab.tables import Tables, draw, random_tables
from distalign.methods.dpo import dpo_loss
from distalign.methods.pmle import pmle_loss
from distalign.progress import Advance
from distalign.report.shown import Claim, Panel, Shown
from distalign.settings import Count, NotNegative

_LABELS = {"pmle": "PMLE, β = 0", "pmle_kl": "PMLE, β > 0", "dpo": "DPO"}
_RL = {"rlhf": "RLHF", "rkl": "RKL"}
_MEASURES: dict[str, tuple[str, str, Literal["linear", "log"]]] = {
    "entropy": ("Entropy", "H(π), nats", "linear"),
    "forward_kl": ("Forward KL", "KL(π*‖π), nats", "log"),
}

Objective = Callable[[Float[Tensor, "worlds contexts responses"]], Tensor]


class Degeneracy(TableExperiment):
    """Full tables with logits N(0, scale²).

    The first part has rewards from `n` pairs and β from `most_beta` down to `least_beta`; the second trains by gradient
    descent for `steps` steps of size `learning_rate` on every pair once, with PMLE also at β = `kl_weight`.
    """

    name: ClassVar[str] = "degeneracy"

    responses: Annotated[int, Field(ge=3)] = 10
    scale: Scale = 1.0
    n: Pairs = 2**14
    least_beta: Annotated[float, Field(ge=1e-9, allow_inf_nan=False)] = 1e-3
    most_beta: NotNegative = 10.0
    betas: Annotated[int, Field(ge=2)] = 33
    steps: Count = 10_000
    learning_rate: NotNegative = 10.0
    kl_weight: NotNegative = 0.05
    seeds: Annotated[int, Field(ge=2)] = 10

    @model_validator(mode="after")
    def _consistent(self) -> Degeneracy:
        if self.most_beta < self.least_beta:
            raise ValueError(f"most_beta is {self.most_beta}; give at least {self.least_beta:g}")
        return self

    def run(self, advance: Advance) -> Row:
        """Entropy and forward KL of RLHF and RKL by β, and of DPO and PMLE by the number of steps."""
        tables = random_tables(
            self.seeds, self.contexts, self.responses, scale=self.scale, gamma=self.gamma, seed=self.seed
        )
        total = 1 + len(_LABELS)
        numbers: Row = {
            "target_entropy": float(entropy(tables.target).median()),
            "by_beta": self._by_beta(tables),
            "by_steps": [],
        }
        advance(1, total)
        for done, (method, objective) in enumerate(self._objectives(tables).items(), 2):
            numbers["by_steps"] += [{"method": method, **row} for row in self._descend(tables, objective)]
            advance(done, total)
        return numbers

    def _by_beta(self, tables: Tables) -> list[Row]:
        """The optima of appendix B for the true reward γ ln π* and for one fitted to pairs."""
        rewards = {"true": self.gamma * tables.target}
        rewards["fitted"] = fit_reward(tables, draw(tables, self.n, self.seed), ridge=self.ridge)
        low, high = math.log10(self.least_beta), math.log10(self.most_beta)
        rows = []
        for reward, values in rewards.items():
            for method, gamma in {"rlhf": 0.0, "rkl": self.gamma}.items():
                for beta in torch.logspace(low, high, self.betas, dtype=torch.float64).tolist():
                    logps = optimum(values, tables.reference, gamma=gamma, beta=beta)
                    expected = self.gamma * (logps.exp() * (tables.target - tables.target.amax(-1, keepdim=True)))
                    row: Row = {"reward": reward, "method": method, "beta": beta}
                    row["entropy"] = float(entropy(logps).median())
                    row["forward_kl"] = float(divergence(tables.target, logps).median())
                    row["expected_reward"] = float(expected.sum(-1).mean(-1).median())
                    rows.append(row)
        return rows

    def _objectives(self, tables: Tables) -> dict[str, Objective]:
        """The mean loss over the pairs of a context, summed over contexts: each is a problem of its own.

        Every pair is seen once, and the response that the target gives more often is the preferred one.
        """
        both = tables.pair_logps(tables.target)
        label = (both[..., 0] > both[..., 1]).to(torch.float64)
        reference = tables.pair_logps(tables.reference).reshape(-1, 2)

        def mean(each: Tensor) -> Tensor:
            return each.view_as(label).mean(-1).sum()

        def pmle(logps: Tensor) -> Tensor:
            return mean(pmle_loss(tables.pair_logps(logps).reshape(-1, 2), label.flatten(), gamma=self.gamma))

        def kl(logps: Tensor) -> Tensor:
            return self.contexts * divergence(logps, tables.reference).sum()

        def dpo(logps: Tensor) -> Tensor:
            return mean(dpo_loss(tables.pair_logps(logps).reshape(-1, 2), reference, label.flatten(), gamma=self.gamma))

        return {"pmle": pmle, "pmle_kl": lambda logps: pmle(logps) + self.kl_weight * kl(logps), "dpo": dpo}

    def _descend(self, tables: Tables, objective: Objective) -> list[Row]:
        """Gradient descent from π₀."""
        logits = tables.reference.clone().requires_grad_()
        stops = {round(10 ** (k / 8)) for k in range(200)} & set(range(1, self.steps + 1)) | {0, self.steps}
        rows = []
        for step in range(self.steps + 1):
            if step in stops:
                logps = logits.detach().log_softmax(-1)
                kl = divergence(tables.target, logps)
                rows.append({"step": step, "entropy": spread(entropy(logps)), "forward_kl": spread(kl)})
            (gradient,) = torch.autograd.grad(objective(logits.log_softmax(-1)), logits)
            logits = (logits.detach() - self.learning_rate * gradient).requires_grad_()
        return rows

    def show(self, numbers: Row) -> Shown:
        """Entropy and forward KL by β, and by steps."""
        return Shown(
            title="Degeneracy: what collapses",
            about=(
                f"Full tables, {self.contexts} contexts × {self.responses} responses, logit scale {self.scale:g}, γ "
                f"{self.gamma:g}, {self.seeds} worlds, seed {self.seed}, medians. Fitted rewards are from {self.n} "
                "pairs. How long real training takes to get there is not shown."
            ),
            claims=self._claims(numbers),
            panels=self._panels(numbers),
        )

    def _claims(self, numbers: Row) -> list[Claim]:
        goal = numbers["target_entropy"]
        fitted = {method: select(numbers["by_beta"], reward="fitted", method=method) for method in _RL}
        rlhf, rkl = (min(rows, key=lambda row: row["beta"]) for rows in fitted.values())
        best = max(select(numbers["by_beta"], reward="true"), key=lambda row: row["expected_reward"])
        last = {method: pick(numbers["by_steps"], method=method, step=self.steps) for method in _LABELS}

        def text(row: Row) -> str:
            numbers = (row["entropy"], row["forward_kl"])
            entropy, kl = (number["median"] if isinstance(number, dict) else number for number in numbers)
            return f"entropy {entropy:.3f} of the target's {goal:.2f}, forward KL {kl:.3g}"

        collapse = "one response in the end on separable pairs"
        near = abs(rkl["entropy"] - goal) < 0.1 * goal and rkl["forward_kl"] < 0.1
        after = {method: row["entropy"]["median"] for method, row in last.items()}
        return [
            Claim(f"RLHF collapses as β → 0 (β = {self.least_beta:g})", text(rlhf), rlhf["entropy"] < 0.1 * goal),
            Claim("RKL does not: it tends to the target", text(rkl), near),
            Claim("expected reward is largest at the collapse", text(best), best["entropy"] < 0.1 * goal),
            Claim(f"DPO gives {collapse}", text(last["dpo"]), after["dpo"] < 0.1 * goal),
            Claim(f"PMLE, β = 0, gives {collapse}", text(last["pmle"]), after["pmle"] < 0.1 * goal),
            Claim(f"PMLE, β = {self.kl_weight:g}, does not", text(last["pmle_kl"]), after["pmle_kl"] > 0.3 * goal),
        ]

    def _panels(self, numbers: Row) -> list[Panel]:
        optima = "Optima of appendix B for one fitted reward."
        descent = "Every pair once, labels in the target's order: nothing contradicts. Gradient descent from π₀."
        by_beta = select(numbers["by_beta"], reward="fitted")
        by_steps = [row for row in numbers["by_steps"] if row["step"] > 0]
        panels = []
        for where, about, x, axis, rows, labels in (
            ("as β → 0", optima, "beta", "β", by_beta, _RL),
            ("on separable pairs", descent, "step", "steps", by_steps, _LABELS),
        ):
            for measure, (name, unit, scale) in _MEASURES.items():
                curves = [curve(label, select(rows, method=method), x, measure) for method, label in labels.items()]
                if measure == "entropy":
                    ends = sorted({row[x] for row in rows})
                    curves.append(level("target", ends, numbers["target_entropy"]))
                panels.append(Panel(f"{name} {where}", about, axis, unit, curves, y_scale=scale))
        return panels
