"""Degeneracy: what collapses, and what only a finite number of pairs makes collapse.

As β → 0 RLHF gives one response for certain whatever the reward, RKL tends to the target. On separable pairs (each seen
once, labels that contradict nothing) DPO trained long enough gives one response too, and so does PMLE at β = 0: that is
the likelihood of finite data, not the reference. Early stopping or β > 0 is the remedy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from distalign.lab.exact import divergence, entropy, optimum
from distalign.lab.experiment import Advance, at_least
from distalign.lab.rates import spread
from distalign.lab.shown import Claim, Curve, Panel, Shown, Table, with_quartiles
from distalign.lab.tabular import fit_reward
from distalign.lab.world import Counts, Tables, draw, generator, random_tables
from distalign.methods.base import Samples
from distalign.methods.dpo import dpo_loss
from distalign.methods.estimators import kl_full
from distalign.methods.pmle import pmle_loss

_LABELS = {"pmle": "PMLE, β = 0", "pmle_kl": "PMLE, β > 0", "dpo": "DPO"}
_RL = {"rlhf": "RLHF", "rkl": "RKL"}

Objective = Callable[[Float[Tensor, "worlds contexts responses"]], Tensor]


@dataclass(frozen=True)
class Degeneracy:
    """Settings: full tables with logits N(0, scale²).

    The first part has rewards from `n` pairs and β from `most_beta` down to `least_beta`; the second trains by gradient
    descent for `steps` steps of size `learning_rate` on every pair once, with PMLE also at β = `kl_weight`.
    """

    contexts: int = 10
    responses: int = 10
    scale: float = 1.0
    gamma: float = 0.5
    n: int = 2**14
    least_beta: float = 1e-3
    most_beta: float = 10.0
    betas: int = 33
    steps: int = 10_000
    learning_rate: float = 10.0
    kl_weight: float = 0.05
    seeds: int = 10
    seed: int = 0
    ridge: float = 1e-3

    name: ClassVar[str] = "degeneracy"

    def __post_init__(self) -> None:
        at_least(self, contexts=1, responses=3, n=1, betas=2, steps=1, seeds=2, seed=0, least_beta=1e-9)
        at_least(self, most_beta=self.least_beta, scale=1e-6, gamma=1e-6, ridge=1e-12, learning_rate=0, kl_weight=0)

    def run(self, advance: Advance) -> tuple[dict[str, Any], Shown]:
        """Entropy and forward KL of RLHF and RKL by β, and of DPO and PMLE by the number of steps."""
        tables = random_tables(
            worlds=self.seeds,
            contexts=self.contexts,
            responses=self.responses,
            scale=self.scale,
            gamma=self.gamma,
            seed=self.seed,
        )
        total = 1 + 2 * len(_LABELS)
        numbers: dict[str, Any] = {
            "target_entropy": float(entropy(tables.target).median()),
            "reference_kl": float(divergence(tables.target, tables.reference).median()),
            "by_beta": self._by_beta(tables),
            "by_steps": [],
        }
        advance(1, total)
        labels = {"transitive": _transitive(tables), "sampled": _once(tables, self.seed)}
        done = 1
        for kind, counts in labels.items():
            for method, objective in self._objectives(tables, counts).items():
                rows = self._descend(tables, objective)
                numbers["by_steps"] += [{"labels": kind, "method": method} | row for row in rows]
                done += 1
                advance(done, total)
        return numbers, self._shown(numbers)

    def _by_beta(self, tables: Tables) -> list[dict[str, Any]]:
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
                    row = {"reward": reward, "method": method, "beta": beta}
                    row["entropy"] = float(entropy(logps).median())
                    row["forward_kl"] = float(divergence(tables.target, logps).median())
                    row["expected_reward"] = float(expected.sum(-1).mean(-1).median())
                    rows.append(row)
        return rows

    def _objectives(self, tables: Tables, counts: Counts) -> dict[str, Objective]:
        """The mean loss over the pairs of a context, summed over contexts: each is a problem of its own."""
        frequency = counts.frequency.flatten()
        reference = tables.pair_logps(tables.reference).reshape(-1, 2)

        def mean(each: Tensor) -> Tensor:
            return each.view_as(counts.total).mean(-1).sum()

        def pmle(logps: Tensor) -> Tensor:
            return mean(pmle_loss(tables.pair_logps(logps).reshape(-1, 2), frequency, gamma=self.gamma))

        def kl(logps: Tensor) -> Tensor:
            # One step a response: KL_t is the same for every response, and nothing comes after it.
            step_kl = (logps.exp() * (logps - tables.reference)).sum(-1).reshape(-1, 1)
            mask = torch.ones_like(step_kl, dtype=torch.bool)
            return kl_full(Samples(token_logps=logps[..., 0].reshape(-1, 1), mask=mask, step_kl=step_kl)).sum()

        def dpo(logps: Tensor) -> Tensor:
            return mean(dpo_loss(tables.pair_logps(logps).reshape(-1, 2), reference, frequency, gamma=self.gamma))

        return {"pmle": pmle, "pmle_kl": lambda logps: pmle(logps) + self.kl_weight * kl(logps), "dpo": dpo}

    def _descend(self, tables: Tables, objective: Objective) -> list[dict[str, Any]]:
        """Gradient descent from π₀."""
        logits = tables.reference.clone().requires_grad_()
        stops = {round(10 ** (k / 8)) for k in range(200)} & set(range(1, self.steps + 1)) | {0, self.steps}
        rows = []
        for step in range(self.steps + 1):
            if step in stops:
                logps = logits.detach().log_softmax(-1)
                spreads = {"entropy": entropy(logps), "forward_kl": divergence(tables.target, logps)}
                rows.append({"step": step} | {key: spread(values)._asdict() for key, values in spreads.items()})
            (gradient,) = torch.autograd.grad(objective(logits.log_softmax(-1)), logits)
            logits = (logits.detach() - self.learning_rate * gradient).requires_grad_()
        return rows

    def _shown(self, numbers: dict[str, Any]) -> Shown:
        return Shown(
            title="Degeneracy: what collapses",
            about=(
                f"Full tables, {self.contexts} contexts × {self.responses} responses, logit scale {self.scale:g}, γ "
                f"{self.gamma:g}, {self.seeds} worlds, seed {self.seed}, medians. Fitted rewards are from {self.n} "
                "pairs. Expected reward is largest where the policy has collapsed, so it does not measure "
                "quality here; how long real training takes to get there is not shown."
            ),
            claims=self._claims(numbers),
            panels=self._panels(numbers),
            tables=[_table(numbers)],
        )

    def _claims(self, numbers: dict[str, Any]) -> list[Claim]:
        goal = numbers["target_entropy"]
        least = {m: min(_by(numbers, "fitted", m), key=lambda row: row["beta"]) for m in _RL}
        last = {(row["labels"], row["method"]): row for row in numbers["by_steps"] if row["step"] == self.steps}
        claims = []
        row = least["rlhf"]
        text = f"entropy {row['entropy']:.3f} of the target's {goal:.2f}, forward KL {row['forward_kl']:.3g}"
        promise = f"RLHF collapses as β → 0 (β = {self.least_beta:g})"
        claims.append(Claim(promise, text, row["entropy"] < 0.1 * goal))
        row = least["rkl"]
        text = f"entropy {row['entropy']:.3f} of the target's {goal:.2f}, forward KL {row['forward_kl']:.3g}"
        promise = "RKL does not: it tends to the target"
        claims.append(Claim(promise, text, abs(row["entropy"] - goal) < 0.1 * goal and row["forward_kl"] < 0.1))
        best = max(_by(numbers, "true", "rlhf") + _by(numbers, "true", "rkl"), key=lambda row: row["expected_reward"])
        text = f"entropy {best['entropy']:.3f} where E[R*] is largest"
        claims.append(Claim("expected reward is largest at the collapse", text, best["entropy"] < 0.1 * goal))
        for method in ("dpo", "pmle"):
            value = last["transitive", method]["entropy"]["median"]
            text = f"entropy {value:.3f} after {self.steps} steps"
            promise = f"{_LABELS[method]} gives one response in the end on separable pairs"
            claims.append(Claim(promise, text, value < 0.1 * goal))
        value = last["transitive", "pmle_kl"]["entropy"]["median"]
        text = f"entropy {value:.3f} after {self.steps} steps"
        claims.append(Claim(f"{_LABELS['pmle_kl']} ({self.kl_weight:g}) does not", text, value > 0.3 * goal))
        return claims

    def _panels(self, numbers: dict[str, Any]) -> list[Panel]:
        betas = [self.least_beta, self.most_beta]
        target = Curve("target", betas, [numbers["target_entropy"]] * 2, kind="bound")
        panels = []
        for key, name, unit in (("entropy", "Entropy", "H(π), nats"), ("forward_kl", "Forward KL", "KL(π*‖π), nats")):
            curves = []
            for method, label in _RL.items():
                rows = _by(numbers, "fitted", method)
                curves.append(Curve(label, [row["beta"] for row in rows], [row[key] for row in rows]))
            curves += [target] if key == "entropy" else []
            about = "Optima of appendix B for one fitted reward."
            scale = "linear" if key == "entropy" else "log"
            panels.append(Panel(f"{name} as β → 0", about, "β", unit, curves, y_scale=scale))
        steps = [1, self.steps]
        for key, name, unit in (("entropy", "Entropy", "H(π), nats"), ("forward_kl", "Forward KL", "KL(π*‖π), nats")):
            curves = []
            for method, label in _LABELS.items():
                rows = [r for r in numbers["by_steps"] if (r["labels"], r["method"]) == ("transitive", method)]
                rows = [row for row in rows if row["step"] > 0]
                curves.append(with_quartiles(label, [row["step"] for row in rows], [row[key] for row in rows]))
            if key == "entropy":
                curves.append(Curve("target", steps, [numbers["target_entropy"]] * 2, kind="bound"))
            about = "Every pair once, labels in the target's order: nothing contradicts. Gradient descent from π₀."
            scale = "linear" if key == "entropy" else "log"
            panels.append(Panel(f"{name} on separable pairs", about, "steps", unit, curves, y_scale=scale))
        return panels


def _by(numbers: dict[str, Any], reward: str, method: str) -> list[dict[str, Any]]:
    return [row for row in numbers["by_beta"] if (row["reward"], row["method"]) == (reward, method)]


def _transitive(tables: Tables) -> Counts:
    """Every pair once, the response that the target gives more often preferred."""
    both = tables.pair_logps(tables.target)
    return Counts(torch.ones_like(both[..., 0]), (both[..., 0] > both[..., 1]).to(torch.float64))


def _once(tables: Tables, seed: int) -> Counts:
    """Every pair once, the label drawn from P_{π*}."""
    random = generator(seed, "labels")
    both = tables.pair_logps(tables.target)
    probability = (tables.gamma * (both[..., 0] - both[..., 1])).sigmoid()
    return Counts(torch.ones_like(probability), torch.bernoulli(probability, generator=random))


def _table(numbers: dict[str, Any]) -> Table:
    steps = sorted({row["step"] for row in numbers["by_steps"]})
    shown = [step for step in steps if step in (0, 10, 100, 1000, steps[-1])]
    found = {(row["labels"], row["method"], row["step"]): row for row in numbers["by_steps"]}
    rows = [
        [kind, label, *(_cell(found[kind, method, step]) for step in shown)]
        for kind in ("transitive", "sampled")
        for method, label in _LABELS.items()
    ]
    return Table(
        title="Entropy / forward KL by gradient steps, every pair seen once",
        about="nats, medians; transitive: labels in the target's order; sampled: labels drawn from P_{π*}.",
        columns=["labels", "method", *(f"{step} steps" for step in shown)],
        rows=rows,
    )


def _cell(row: dict[str, Any]) -> str:
    return f"{row['entropy']['median']:.3g} / {row['forward_kl']['median']:.3g}"
