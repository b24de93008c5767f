"""Calibration: what was predicted against what was observed, and the γ of a policy that makes the two agree.

The γ of a policy says how sharply its log-probabilities speak about preferences that it has not been trained on.
P(a ≻ b) = σ(γ [ln π(a) − ln π(b)]) (arXiv 2506.01523v2, eq. 3) with γ free is a logistic regression with one feature
and no constant. Its maximum over held-out pairs calibrates the policy's preferences, as a temperature does a
classifier's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from distalign.methods.preference import preference_nll
from distalign.stats.intervals import Estimate, Interval, float64, mean_and_se
from distalign.stats.logistic import fit_logistic

COIN = math.log(2)  # nats per pair at γ = 0
FEWEST = 2  # pairs of which there is a standard error
# Pairs whose responses differ, from which on the profile likelihood's interval holds γ about as often as it says.
ENOUGH = 10
_FALL = 1.920729410347062  # half the 95 % quantile of χ²(1): what the log-likelihood may fall within the interval
_WEAK, _STRONG = 0.1, 5.0  # nats of |γ Δ ln π|: below it a pair is a coin, above it certain


def calibrate(logps: Float[Tensor, "pairs 2"], probability: Float[Tensor, "pairs"] | None = None) -> Calibration:
    """The γ that makes held-out labels most probable under a policy, and how good its preferences are there.

        maximise over γ:  mean over pairs of  p ln σ(γ Δ) + (1 − p) ln σ(−γ Δ),   Δ = ln π(a) − ln π(b)

    `logps` are sums over response tokens in nats, column 0 the preferred response; `probability` p says with which
    probability that is so, 1 where it is None. Pairs count as independent. The interval of fewer than `ENOUGH` pairs
    with Δ ≠ 0 is unknown, from −inf to inf.

    Raises ValueError for fewer than `FEWEST` pairs, and where a number is not finite, a probability outside [0, 1], or
    every Δ is 0.

    Source: arXiv 2506.01523v2, eq. 3, 4.
    """
    check_count(len(logps))
    logps = logps.detach().to("cpu", torch.float64)
    label = torch.ones(len(logps), dtype=torch.float64) if probability is None else probability.detach().cpu().double()
    if not bool(logps.isfinite().all()) or not bool(((label >= 0) & (label <= 1)).all()):
        raise ValueError("a log-probability is not finite, or a label's probability outside [0, 1]; drop that pair")
    gap = logps[:, 0] - logps[:, 1]
    if not bool(gap.any()):
        raise ValueError(
            f"both responses of all {len(gap)} pairs have the same log-probability; γ has no effect on them"
        )
    # Turned so that the likelier label comes first.
    gap, label = torch.where(label < 0.5, -gap, gap), torch.where(label < 0.5, 1 - label, label)

    def nll(gamma: float) -> Tensor:
        logit = torch.where(gap == 0, 0.0, gamma * gap)
        return torch.where(label == 1, preference_nll(logit), preference_nll(logit, label))

    gamma = _best_gamma(gap, label)
    logit = torch.where(gap == 0, 0.0, gamma * gap)
    correct = torch.where(logit > 0, label, torch.where(logit < 0, 1 - label, 0.5))
    confidence = logit.abs().sigmoid()
    reliability = reliability_table(confidence, correct)
    interval = Interval(gamma, -math.inf, math.inf)
    if int((gap != 0).sum()) >= ENOUGH:
        interval = _profile(gamma, lambda g: float(nll(g).sum()), 1 / float(gap.abs().max()))
    return Calibration(
        gamma=interval,
        nll=mean_and_se(nll(gamma)),
        accuracy=mean_and_se(torch.where(gap > 0, label, torch.where(gap < 0, 1 - label, 0.5))),
        ece=expected_calibration_error(confidence, correct),
        ece_floor=sum(math.sqrt(2 / math.pi * b.n * b.predicted * (1 - b.predicted)) for b in reliability) / len(gap),
        median_logit=float(logit.abs().median()),
        reliability=reliability,
        pairs=len(gap),
    )


def check_count(pairs: int) -> None:
    """Raise ValueError for fewer than `FEWEST` pairs."""
    if pairs < FEWEST:
        raise ValueError(
            f"γ from {pairs} labelled pair{'' if pairs == 1 else 's'} has no error; give {ENOUGH} or more, of which "
            "there is an interval"
        )


class Bin(NamedTuple):
    """One row of a reliability table: mean predicted probability, observed frequency, number of values."""

    predicted: float
    observed: float
    n: int


def reliability_table(probability: Float[Tensor, "n"], outcome: Float[Tensor, "n"], *, bins: int = 10) -> list[Bin]:
    """What was predicted against what was observed, in equally wide bins of predicted probability.

    Empty bins are left out. `outcome` is 1 where the event happened, 0 where it did not, or the frequency with which
    it did. Raises ValueError if a probability lies outside [0, 1].
    """
    probability, outcome = float64(probability), float64(outcome)
    if bool(((probability < 0) | (probability > 1)).any()):
        raise ValueError("a predicted probability lies outside [0, 1]; pass probabilities, not log-odds")
    index = (probability * bins).long().clamp(max=bins - 1)
    chosen = [index == b for b in range(bins)]
    return [Bin(float(probability[c].mean()), float(outcome[c].mean()), int(c.sum())) for c in chosen if c.any()]


def expected_calibration_error(
    probability: Float[Tensor, "n"], outcome: Float[Tensor, "n"], *, bins: int = 10
) -> float:
    """Gap between predicted probability and observed frequency, averaged over the values; 0 is perfect, 1 the worst.

        Σ_bins (n_bin / n) |predicted_bin − observed_bin|

    Biased upwards by sampling noise, about √(bins / n) / 2 even for a perfect predictor: compare at equal n and bins
    only.

    Source: arXiv 1706.04599, eq. 3.
    """
    table = reliability_table(probability, outcome, bins=bins)
    return sum(row.n * abs(row.predicted - row.observed) for row in table) / sum(row.n for row in table)


@dataclass(frozen=True)
class Calibration:
    """What held-out pairs say of a policy's γ, with its 95 % profile-likelihood interval; ±inf if separable.

    Both ends of the interval are infinite where the pairs are too few (`ENOUGH`) to know it.

    `nll` is in nats per pair, to be held against `COIN`, that of γ = 0; γ was fitted on these very pairs, which
    flatters it by about 1/(2 · pairs). `accuracy` is how often the label is what the policy prefers at any γ > 0. `ece`
    is the calibration error at γ, `ece_floor` what `pairs` coins would leave to a perfect policy, `reliability` the
    table of confidence against correctness behind it. `median_logit` is the median of |γ Δ ln π|, in nats.
    """

    gamma: Interval
    nll: Estimate
    accuracy: Estimate
    ece: float
    ece_floor: float
    median_logit: float
    reliability: list[Bin]
    pairs: int

    @property
    def meaning(self) -> list[str]:
        """What to think of it, in sentences."""
        gamma, low, high = self.gamma
        if math.isinf(low) and math.isinf(high):
            return [
                f"Fewer than {ENOUGH} of these {self.pairs} pairs have responses of different log-probability, too few "
                "for an interval: how far γ may be from this is unknown. Give more held-out pairs."
            ]
        if math.isinf(gamma):
            verb, bound = ("agrees with", f"> {low:.3g}") if gamma > 0 else ("contradicts", f"< {high:.3g}")
            return [
                f"The policy {verb} every label, so the likelihood grows without end in γ: all that can be said is "
                f"γ {bound}. Were these pairs trained on? Give held-out pairs, or more of them."
            ]
        if low <= 0 <= high:
            return [
                f"The interval of γ holds 0: on these {self.pairs} pairs the policy's log-probabilities say nothing "
                "about preferences. More pairs narrow it."
            ]
        words = []
        if gamma < 0:
            words.append(
                "γ is negative: the policy's log-probabilities point the wrong way. Check that the chosen response "
                "comes first; if it does, something else, such as length, outweighs preference."
            )
        if self.median_logit < _WEAK:
            words.append(
                f"The median |γ Δ ln π| is {self.median_logit:.2g} nats, below {_WEAK:g}: a typical pair is a coin for "
                "the policy, whose log-probabilities differ mostly for other reasons than preference."
            )
        elif self.median_logit > _STRONG:
            words.append(
                f"The median |γ Δ ln π| is {self.median_logit:.2g} nats, above {_STRONG:g}: a typical label is certain "
                "for the policy and teaches it little. Harder pairs would."
            )
        if not words:
            words.append(
                f"Log-probabilities that differ by {1 / gamma:.3g} nats mean odds of e to one. This γ calibrates this "
                "policy; the target's is another, unless the policy is close to the target."
            )
        if self.ece > 2 * self.ece_floor:
            words.append(
                f"The calibration error {self.ece:.3f} is more than twice what chance would leave "
                f"({self.ece_floor:.3f}): no single γ makes these preferences right."
            )
        return words

    def to_json(self) -> dict[str, object]:
        """Plain data for a file: numbers, texts, lists and dictionaries; what is not finite as a text, "inf"."""

        def plain(value: object) -> object:
            if isinstance(value, (Interval, Estimate, Bin)):
                return {name: plain(part) for name, part in value._asdict().items()}
            if isinstance(value, list):
                return [plain(part) for part in value]
            return str(value) if isinstance(value, float) and not math.isfinite(value) else value

        return {**{name: plain(value) for name, value in vars(self).items()}, "coin": COIN, "meaning": self.meaning}


def _best_gamma(gap: Float[Tensor, "pairs"], label: Float[Tensor, "pairs"]) -> float:
    """The maximum of the likelihood; ±inf where every pair that says something is certain, and all say the same."""
    telling, certain = gap[gap != 0], bool((label[gap != 0] == 1).all())
    if certain and bool((telling > 0).all()):
        return math.inf
    if certain and bool((telling < 0).all()):
        return -math.inf
    return float(fit_logistic(gap[:, None], label).coefficients[0])


def _profile(gamma: float, nll: Callable[[float], float], unit: float) -> Interval:
    """γ with the ends of what the likelihood, within `_FALL` of its maximum, allows; `unit` is a small step in γ."""
    least = nll(gamma)

    def end(inside: float, side: int) -> float:
        step = unit
        while nll(inside + side * step) - least < _FALL:
            step *= 2
        near, far = 0.0, step
        for _ in range(40):
            middle = (near + far) / 2
            near, far = (middle, far) if nll(inside + side * middle) - least < _FALL else (near, middle)
        return inside + side * far

    if math.isfinite(gamma):
        return Interval(gamma, end(gamma, -1), end(gamma, 1))
    side, inside = (1, unit) if gamma > 0 else (-1, -unit)
    while nll(inside) - least >= _FALL:
        inside *= 2
    bound = end(inside, -side)
    return Interval(gamma, bound, gamma) if side > 0 else Interval(gamma, gamma, bound)
