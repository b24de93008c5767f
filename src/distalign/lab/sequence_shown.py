"""What the experiment "sequences" shows of its rows: medians over seeds, claims seed by seed, figures and tables."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from distalign.lab.shown import Claim, Curve, Panel, Shown, Table

Row = dict[str, Any]

OTHER_SEEDS = (
    "Settings were chosen on seed 0. Of the nine worlds of seeds 1 to 3 (defaults, n = 8,192) six meet the bars "
    "of PMLE, PD, RKL and of RLHF against RKL; three meet none of them, those in which π₀ covers the target worst (C/m "
    "0.15 to 0.20), and in one PD ends 0.03 nats from its optimum."
)

NAMES = {
    "pmle": "PMLE",
    "pmle_last": "PMLE, last step",
    "pd": "PD",
    "rkl": "RKL",
    "rlhf": "RLHF, oracle β",
    "dpo": "DPO",
    "rebel": "REBEL",
}


def summarise(rows: Sequence[Row]) -> list[Row]:
    """Median and quartiles over seeds, in nats, a row for each world, method and n, in the order of the rows."""
    cells: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        cells.setdefault((row["world"], row["method"], row["n"]), []).append(row)
    return [
        {"world": world, "method": method, "n": n, "seeds": len(cell)}
        | {key: _quartiles([row[key] for row in cell]) for key in ("forward_kl", "reverse_kl", "entropy")}
        for (world, method, n), cell in cells.items()
    ]


def show(numbers: dict[str, Any], *, gamma: float, distance: float, betas: Sequence[float], brief: str) -> Shown:
    """Claims, figures and tables; settings as those of the experiment, `brief` says how the brief reward is fitted."""
    seen = _Seen(numbers)
    about = (
        f"Tiny transformers over 8 tokens, responses of at most four, two prompts; γ {gamma:g}, KL(π* ‖ π₀) "
        f"{distance:g} nats within 3 %, the labelled responses drawn from π₀; {len(seen.limit('dpo'))} seeds, each "
        "with a world and data of its own. KL, entropy and limits are exact: all 2,801 responses are enumerated. The "
        "policies are trained by the methods' own losses on pairs or on responses sampled token by token. "
        + OTHER_SEEDS
    )
    claims = [*_markov_claims(seen), *_tilted_claims(seen, brief)]
    panels = [_against_n(seen), _stopping(seen, betas), _counter(seen)]
    tables = [_markov_table(seen), _coverage_table(seen), _optimum_table(seen), _counter_table(seen)]
    return Shown("Short sequences with a known target", about, claims, panels, tables)


class _Seen:
    """Rows by world, method and n; the n at which the claims are judged is the largest up to 8,192."""

    def __init__(self, numbers: dict[str, Any]) -> None:
        self.rows, self.limits, self.summary = numbers["rows"], numbers["limits"], numbers["summary"]
        self.constants = [row["constant"] for row in sorted(numbers["constants"], key=lambda row: row["seed"])]
        self.ns = sorted({row["n"] for row in self.rows})
        self.judged = max(n for n in self.ns if n <= max(8192, self.ns[0]))
        self.counter = max(row["n"] for row in self.rows if row["world"] == "tilted")

    def values(self, method: str, n: int, world: str = "markov", key: str = "forward_kl") -> list[float]:
        """A value of every seed, in order."""
        found = [row for row in self.rows if (row["world"], row["method"], row["n"]) == (world, method, n)]
        return [float(row[key]) for row in sorted(found, key=lambda row: row["seed"])]

    def limit(self, method: str, world: str = "markov") -> list[float]:
        """The limit of every seed, in order."""
        found = [row for row in self.limits if (row["world"], row["method"]) == (world, method)]
        return [row["forward_kl"] for row in sorted(found, key=lambda row: row["seed"])]

    def asymptotic(self, n: int) -> list[float]:
        """C / m of every seed, in nats, with m the pairs that are fitted."""
        return [one / fitted for one, fitted in zip(self.constants, self.values("rkl", n, key="fitted"), strict=True)]

    def medians(self, method: str) -> list[float]:
        """Medians of forward KL in the world "markov", over n."""
        return [_quartiles(self.values(method, n))["median"] for n in self.ns]

    def curve(self, method: str, label: str, world: str = "markov") -> Curve:
        """Median and quartiles of forward KL over n."""
        found = [row for row in self.summary if (row["world"], row["method"]) == (world, method)]
        values = [row["forward_kl"] for row in sorted(found, key=lambda row: row["n"])]
        median, low, high = ([value[key] for value in values] for key in ("median", "q25", "q75"))
        return Curve(label, sorted(row["n"] for row in found), median, low, high)

    def bound(self, method: str, label: str, world: str = "markov") -> Curve:
        """The median limit, drawn across the world's range of n."""
        ns = [row["n"] for row in self.rows if row["world"] == world]
        return Curve(label, [min(ns), max(ns)], [_quartiles(self.limit(method, world))["median"]] * 2, kind="bound")


def _markov_claims(seen: _Seen) -> list[Claim]:
    n = seen.judged
    pmle, pd, rkl, rlhf, dpo = (seen.values(method, n) for method in ("pmle", "pd", "rkl", "rlhf", "dpo"))
    ratios = [a / b for a, b in zip(rlhf, rkl, strict=True)]
    off = [a / b - 1 for a, b in zip(dpo, seen.limit("dpo"), strict=True)]
    gaps = [gap for method in ("rkl", "pd") for gap in seen.values(method, n, key="from_optimum")]
    rebel = [a / b - 1 for a, b in zip(seen.values("rebel", n), seen.limit("rebel"), strict=True)]
    bound = seen.asymptotic(n)
    above = [a / b for a, b in zip(seen.values("rkl_optimum", n), bound, strict=True)]
    at = f"n = {n:,}, each seed"
    claims = [
        Claim(f"PMLE, stopped early: forward KL ≤ 0.15 ({at})", _list(pmle), max(pmle) <= 0.15),
        Claim(f"RKL with the bigram reward ≤ 0.12 ({at})", f"{_list(rkl)} (C/m {_list(bound)})", max(rkl) <= 0.12),
        Claim(f"PD with the bigram reward ≤ 0.12 ({at})", f"{_list(pd)} (C/m {_list(bound)})", max(pd) <= 0.12),
        Claim(
            f"RKL's enumerated optimum between half and twice C/m, the pairs' own limit ({at})",
            f"{_list(above, 2)} times {_list(bound)}",
            all(0.5 <= one <= 2 for one in above),
        ),
        Claim(
            f"RKL and PD, trained by sampling, within 0.02 nats of their enumerated optimum ({at}: RKL, then PD)",
            f"KL(optimum ‖ policy) {_list(gaps, 4)}",
            max(gaps) <= 0.02,
        ),
        Claim(f"RLHF with oracle β ≥ 0.80 ({at})", _list(rlhf), min(rlhf) >= 0.8),
        Claim(f"RLHF at least 8 times RKL ({at})", _list(ratios, 1), min(ratios) >= 8),
        Claim(f"DPO ≥ 0.8 ({at})", _list(dpo), min(dpo) >= 0.8),
        Claim(
            f"DPO within 15 % of its enumerated limit ({at})",
            f"{_list([100 * one for one in off], 1)} % from {_list(seen.limit('dpo'))}",
            max(map(abs, off)) <= 0.15,
        ),
        Claim(
            f"REBEL with η = 1/γ, β = γ within 15 % of its limit, which is DPO's ({at})",
            f"{_list([100 * one for one in rebel], 1)} % from {_list(seen.limit('rebel'))}; "
            f"KL(optimum ‖ policy) {_list(seen.values('rebel', n, key='from_optimum'))}",
            max(map(abs, rebel)) <= 0.15,
        ),
    ]
    return claims + _claims_over_n(seen)


def _claims_over_n(seen: _Seen) -> list[Claim]:
    if len(seen.ns) < 2:
        return []
    claims = []
    for method in ("pmle", "pd", "rkl"):
        medians = seen.medians(method)
        falls = all(after < before for before, after in pairwise(medians))
        claims.append(Claim(f"{NAMES[method]} falls with every step of n (medians)", _list(medians), falls))
    for method in ("rlhf", "dpo"):
        medians, limit = seen.medians(method), _quartiles(seen.limit(method))["median"]
        flat = abs(medians[-1] / medians[-2] - 1) <= 0.15 and abs(medians[-1] / limit - 1) <= 0.15
        promised = (
            f"{NAMES[method]} is flat over the last step of n and at its limit {limit:.3f}, both to 15 % (medians)"
        )
        claims.append(Claim(promised, _list(medians), flat))
    first = seen.ns[0]
    last, stopped = seen.values("pmle_last", first), seen.values("pmle", first)
    return [
        *claims,
        Claim(
            f"With n = {first} PMLE's last step is worse than the reference and early stopping is better, each seed",
            f"last step {_list(last)}, stopped early {_list(stopped)}, reference {_list(seen.limit('reference'))}",
            all(a > b > c for a, b, c in zip(last, seen.limit("reference"), stopped, strict=True)),
        ),
    ]


def _tilted_claims(seen: _Seen, brief: str) -> list[Claim]:
    def claim(promised: str, ending: str, n: int, *, loses: bool) -> Claim:
        rkl, rlhf = (seen.values(method + ending, n, "tilted") for method in ("rkl", "rlhf"))
        holds = all((a > b) == loses for a, b in zip(rkl, rlhf, strict=True))
        promised = f"{promised}: RKL at β = 0 {'loses to' if loses else 'beats'} RLHF with oracle β"
        return Claim(f"{promised} (n = {n:,}, each seed)", f"RKL {_list(rkl)}, RLHF {_list(rlhf)}", holds)

    first, n = seen.ns[0], seen.counter
    scalar = "Tilted target, ordinary scalar head"
    return [
        claim(f"{scalar}, few pairs, optima", "_scalar_optimum", first, loses=True),
        claim(f"{scalar}, fitted briefly ({brief})", "_brief", n, loses=True),
        claim(f"{scalar}, fitted to the end (an earlier prototype lost here)", "_scalar", n, loses=False),
        claim("Tilted target, γ ln π₀ + a learned correction", "_policy", n, loses=False),
    ]


def _against_n(seen: _Seen) -> Panel:
    curves = [seen.curve(method, NAMES[method]) for method in ("pmle", "pd", "rkl", "rlhf", "dpo", "rebel")]
    bounds = [("rlhf", "limit of RLHF"), ("dpo", "limit of DPO and REBEL"), ("reference", "π₀")]
    return Panel(
        title="Markov target: forward KL against the number of labelled pairs",
        about=(
            "Medians over seeds with quartiles; dashed the limits for n → ∞, enumerated. The reward has the form of "
            "ln π* here. PD and RKL do not separate from each other, and what separates them from PMLE is the reward "
            "alone: with few pairs it overfits and they are behind PMLE, with many its form favours them. REBEL "
            "overshoots its limit in forward KL though KL(optimum ‖ policy) is far less."
        ),
        x="labelled pairs",
        y="KL(π* ‖ π), nats",
        curves=[*curves, *(seen.bound(method, label) for method, label in bounds)],
    )


def _stopping(seen: _Seen, betas: Sequence[float]) -> Panel:
    kept = [seen.curve(f"pmle_beta_{beta:g}", f"last step, β = {beta:g}") for beta in betas]
    curves = [seen.curve("pmle", "stopped early, β = 0"), seen.curve("pmle_last", "last step, β = 0"), *kept]
    return Panel(
        title="Markov target: PMLE with early stopping, with β, with neither",
        about=(
            "Overfitting is the failure of small n: held-out pairs repair it. A KL weight repairs it too, but it is a "
            "bias that stays as n grows, and would have to shrink with n. One recipe of optimisation for all."
        ),
        x="labelled pairs",
        y="KL(π* ‖ π), nats",
        curves=[*curves, seen.bound("reference", "π₀")],
    )


REWARDS = {"_policy": "γ ln π₀ + correction", "_scalar": "scalar head", "_brief": "scalar head, fitted briefly"}


def _counter(seen: _Seen) -> Panel:
    curves = [
        seen.curve(f"{method}{ending}_optimum", f"{name}, {label}", "tilted")
        for ending, label in REWARDS.items()
        for method, name in (("rkl", "RKL"), ("rlhf", "RLHF"))
    ]
    return Panel(
        title="Tilted target: the reward model decides",
        about=(
            "Enumerated optima of the fitted rewards, RKL at β = 0, RLHF with oracle β; PMLE, which has no reward, "
            "trained. Where the reward is bad RKL follows it and RLHF, held at π₀ by a β that only an oracle knows, "
            "does not; started at γ ln π₀ the reward is good. The brief fit has fewer steps, and smaller ones."
        ),
        x="labelled pairs",
        y="KL(π* ‖ π), nats",
        curves=[*curves, seen.curve("pmle", "PMLE", "tilted"), seen.bound("rlhf", "limit of RLHF", "tilted")],
    )


def _markov_table(seen: _Seen) -> Table:
    found = [row for row in seen.summary if row["world"] == "markov" and row["n"] == seen.judged]
    rows = [
        [row["method"], *row["forward_kl"].values(), row["reverse_kl"]["median"], row["entropy"]["median"]]
        for row in found
    ]
    columns = ["method", "KL(π* ‖ π)", "lower quartile", "upper quartile", "KL(π ‖ π*)", "entropy"]
    about = (
        "Medians over seeds, nats. Rows that end in _optimum are enumerated from the fitted reward, nothing trained."
    )
    return Table(f"Markov target at n = {seen.judged:,}", about, columns, rows)


def _coverage_table(seen: _Seen) -> Table:
    rows = [
        [seed, n, constant, bound, rkl, rkl / bound, pmle]
        for n in seen.ns
        for seed, (constant, bound, rkl, pmle) in enumerate(
            zip(seen.constants, seen.asymptotic(n), seen.values("rkl_optimum", n), seen.values("pmle", n), strict=True)
        )
    ]
    columns = ["world", "n", "C", "C/m", "RKL, enumerated", "of C/m", "PMLE"]
    about = (
        "C = lim m · KL(π* ‖ π̂) for a bigram table, computed from the world; m the pairs that are fitted. It says how "
        "badly π₀ covers the target: where C/m is above a bar, a bigram reward meets it by luck alone. PMLE's class is "
        "a network, of which C says little."
    )
    return Table("Markov target: what the pairs allow", about, columns, rows)


def _optimum_table(seen: _Seen) -> Table:
    rows = [
        [row["world"], row["method"], row["n"], row["seed"], row["beta"], row["forward_kl"], row["from_optimum"]]
        for row in seen.rows
        if "from_optimum" in row and row["n"] == (seen.judged if row["world"] == "markov" else seen.counter)
    ]
    columns = ["world", "method", "n", "seed", "β", "KL(π* ‖ π)", "KL(optimum ‖ π)"]
    about = (
        "Trained on sampled responses against the enumerated optimum of the same reward. A scalar head's optimum need "
        "not be in the class of the policy, which then smooths it."
    )
    return Table("How near sampling comes to the optimum", about, columns, rows)


def _counter_table(seen: _Seen) -> Table:
    n = seen.counter
    rows = []
    for ending, label in REWARDS.items():
        for method in ("rkl", "rlhf", "rkl_tuned"):
            trained = seen.values(method + ending, n, "tilted")
            best = _quartiles(seen.values(f"{method}{ending}_optimum", n, "tilted"))["median"]
            rows.append([label, method, _quartiles(trained)["median"] if trained else None, best])
    pmle = _quartiles(seen.values("pmle", n, "tilted"))["median"]
    rows.append(["none", "pmle", pmle, None])
    about = "Median KL(π* ‖ π), nats. rkl_tuned has an oracle β, as RLHF has; it is enumerated only."
    return Table(f"Tilted target at n = {n:,}", about, ["reward", "method", "trained", "enumerated optimum"], rows)


def _quartiles(values: Sequence[float]) -> dict[str, float]:
    shares = torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64)
    quantiles = torch.quantile(torch.tensor(values, dtype=torch.float64), shares)
    return dict(zip(("median", "q25", "q75"), quantiles.tolist(), strict=True))


def _list(values: Sequence[float], digits: int = 3) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)
