"""Policies against each other: Bradley-Terry ratings, and the win rate at equal lengths.

Wins are counted softly: a tie is half a win for both, a judge's probability is that fraction of a win. Comparisons on
one prompt depend on each other (an easy prompt is easy for all), so errors are over prompts where prompts are given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from distalign.stats.intervals import Interval, student_quantile
from distalign.stats.logistic import Separable, fit_logistic


@dataclass(frozen=True)
class Ratings:
    """Ratings r in nats of log-odds, P(i beats j) = σ(r_i − r_j); the anchor's is 0 and has no error of its own.

    `quantile` turns standard errors into 95 % intervals: Student's for the number of prompts.
    """

    values: Float[Tensor, "policies"]
    covariance: Float[Tensor, "policies policies"]
    quantile: float

    def difference(self, first: int, second: int) -> Interval:
        """r_first − r_second with its 95 % interval, in nats of log-odds; second = anchor gives a rating's own."""
        mean = float(self.values[first] - self.values[second])
        c = self.covariance
        se = math.sqrt(max(0.0, float(c[first, first] + c[second, second] - 2 * c[first, second])))
        return Interval(mean, mean - self.quantile * se, mean + self.quantile * se)


def bradley_terry_over_prompts(wins: Float[Tensor, "prompts policies policies"], *, anchor: int = 0) -> Ratings:
    """Maximum-likelihood ratings, wins[p, i, j] being how often i beat j on prompt p; ties are half a win for both.

    In nats of log-odds. The covariance is the sandwich over prompts, the intervals Student's with prompts − 1 degrees
    of freedom: they hold whatever is dependent within a prompt, and for soft wins, but need some 30 prompts. Raises
    ValueError for a single prompt, and where the maximum is infinite, with the policies that never met, or never lost.

    Source: Bradley and Terry 1952; a finite maximum exists under the condition of Ford 1957.
    """
    wins = wins.detach().to("cpu", torch.float64)
    policies = wins.shape[-1]
    _check_finite(wins.sum(0))
    first, second = torch.triu_indices(policies, policies, 1)
    won, lost = wins[:, first, second], wins[:, second, first]
    # A row for each pair that met on a prompt, a feature for each policy but the anchor.
    prompt, pair = (won + lost > 0).nonzero(as_tuple=True)
    rest = torch.tensor([i for i in range(policies) if i != anchor])
    design = torch.eye(policies, dtype=torch.float64)[:, rest]
    total = (won + lost)[prompt, pair]
    fit = fit_logistic((design[first] - design[second])[pair], won[prompt, pair] / total, total)
    values = torch.zeros(policies, dtype=torch.float64)
    covariance = torch.zeros(policies, policies, dtype=torch.float64)
    values[rest] = fit.coefficients
    covariance[rest[:, None], rest] = fit.clustered_covariance(prompt)
    return Ratings(values, covariance, student_quantile(len(prompt.unique()) - 1))


@dataclass(frozen=True)
class LengthControlled:
    """The win rate at equal lengths with its 95 % interval, and what was taken out.

    `length_effect` is φ, the log-odds (nats) that a much longer response gains by its
    length alone: positive where the judge likes length.
    """

    win_rate: Interval
    length_effect: Interval


def length_controlled_win_rate(
    wins: Float[Tensor, "prompts"], lengths: Float[Tensor, "prompts"], baseline_lengths: Float[Tensor, "prompts"]
) -> LengthControlled:
    """Win rate over a baseline, a fraction, had all responses been as long as the baseline's: AlpacaEval 2's model.

        P(win) = σ( θ + φ tanh( Δ / sd Δ ) ),   Δ = length − baseline length
        win rate at equal lengths = σ(θ)

    wins[p] is 1 for a win, 0.5 for a tie, or the judge's probability; lengths in any one unit (AlpacaEval: characters).
    Fitted by maximum likelihood, the interval on the log-odds, with the sandwich covariance over prompts. What
    AlpacaEval adds and this leaves out: a term for the difficulty of each prompt, an L1 penalty set by
    cross-validation, and a fifth of a weight of made-up comparisons with verbose and terse baselines, which guards
    against gaming.

    Raises ValueError for fewer than three prompts, where all Δ are the same, or a length and the outcomes cannot be
    told apart.

    Source: arXiv 2404.04475, section 3.
    """
    wins, gap = wins.to(torch.float64), (lengths - baseline_lengths).to(torch.float64)
    if len(gap) < 3:
        raise ValueError(f"{len(gap)} prompts, and a win rate and the effect of length want three: compare on more")
    spread = float(gap.std())
    if not spread > 0:
        raise ValueError(
            f"the {len(gap)} differences in length do not vary; nothing can be said about length: report the win rate"
        )
    features = torch.stack([torch.ones_like(gap), torch.tanh(gap / spread)], -1)
    try:
        fit = fit_logistic(features, wins)
    except Separable as error:
        raise ValueError(
            f"{len(wins)} comparisons, {float(wins.mean()):.3f} of them won: length predicts every "
            "outcome, so no win rate at equal lengths exists; compare on more prompts, or report the raw win rate"
        ) from error
    # Two numbers are fitted.
    freedom = len(wins) - 2
    covariance = fit.clustered_covariance(torch.arange(len(wins))) * (len(wins) - 1) / freedom
    quantile = student_quantile(freedom)

    def interval(index: int) -> Interval:
        value, half_width = float(fit.coefficients[index]), quantile * math.sqrt(float(covariance[index, index]))
        return Interval(value, value - half_width, value + half_width)

    win_rate = Interval(*torch.tensor(interval(0), dtype=torch.float64).sigmoid().tolist())
    return LengthControlled(win_rate, interval(1))


def _check_finite(wins: Float[Tensor, "policies policies"]) -> None:
    """Ford's condition: from every policy a chain of wins leads to every other one."""
    met, beaten = _chains(wins + wins.T), _chains(wins)
    for name, chains in (("met", met), ("beaten", beaten)):
        for row in chains:
            inside, outside = row.nonzero()[:, 0].tolist(), (~row).nonzero()[:, 0].tolist()
            if not outside:
                continue
            if name == "met":
                raise ValueError(
                    f"policies {inside} were never compared with {outside}; compare a pair across, or rate each group"
                )
            raise ValueError(
                f"policies {outside} never lost to {inside}, not even a tie, so their ratings are infinite; compare on "
                "more prompts, leave them out, or report win rates"
            )


def _chains(wins: Float[Tensor, "policies policies"]) -> Tensor:
    """True where a chain of wins leads from the row to the column, the row itself included."""
    reached = (wins > 0) | torch.eye(len(wins), dtype=torch.bool)
    for _ in range(len(wins)):
        reached = (reached.double() @ reached.double()) > 0
    return reached
