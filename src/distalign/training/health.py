"""Is the policy still well? Numbers of its own responses, and one warning of each kind when they leave their start.

What was so at the start of a run (a base model that never ends, that repeats itself) is no reason to warn: change is.
A warning says what was seen, what it means and which setting to change. docs/rollouts.md has the thresholds.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from distalign.progress import one_line
from distalign.settings import Count, Positive, Section, Share
from distalign.stats.text import distinct_n, repeated_ngram_rate

logger = logging.getLogger("distalign.training.health")

# Responses with fewer tokens have too few n-grams to tell repetition from brevity.
SHORT = 8
# Fewer rewards than these correlate with anything.
FEW = 8
# A threshold is crossed when this many rounds in a row are beyond it.
ROUNDS = 2
# The start of the noisy numbers (shares and correlations) is their mean over the first rounds.
START_ROUNDS = 3
# Shares and correlations must also have moved by this many standard errors, and are taken to be of so many responses
# where their number is not known.
ERRORS, NUMBER = 3.0, 16.0
# Nats per token: below this the start is as good as deterministic, and a ratio to it says nothing.
LITTLE_ENTROPY = 0.02


def completion_metrics(
    responses: Sequence[list[int]], *, end_ids: Collection[int], rewards: Float[Tensor, "responses"] | None = None
) -> dict[str, float]:
    """What the responses of a round look like, without judging them.

    completions/number. completions/mean_length: tokens, the end included. completions/clipped_ratio: share without end.
    health/distinct_2, health/repeated_4grams: over responses of at least 8 tokens before their end; left out if those
    are fewer than half. health/reward_length_correlation: left out below 8 responses and where undefined.
    Raises ValueError for no responses.
    """
    if not responses:
        raise ValueError("completion_metrics: no responses; give at least one")
    ended = [bool(response) and response[-1] in end_ids for response in responses]
    lengths = torch.tensor([float(len(response)) for response in responses], dtype=torch.float64)
    metrics = {
        "completions/number": float(len(responses)),
        "completions/mean_length": float(lengths.mean()),
        "completions/clipped_ratio": 1 - sum(ended) / len(ended),
    }
    texts = [response[: len(response) - end] for response, end in zip(responses, ended, strict=True)]
    texts = [text for text in texts if len(text) >= SHORT]
    if 2 * len(texts) >= len(responses):
        metrics["health/distinct_2"] = distinct_n(texts, n=2)
        metrics["health/repeated_4grams"] = repeated_ngram_rate(texts, n=4).mean
    if rewards is not None and len(responses) >= FEW:
        with suppress(statistics.StatisticsError):  # one of them is constant
            metrics["health/reward_length_correlation"] = statistics.correlation(rewards.tolist(), lengths.tolist())
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


# Watching -------------------------------------------------------------------------------------------------------------

# Readings of one round, or of the start, by name.
Readings = dict[str, float]


class Finding(NamedTuple):
    """Whether a threshold is crossed, what to say if so, and numbers to log."""

    crossed: bool
    text: str
    metrics: dict[str, float]


class HealthSettings(Section):
    """When a run is called unhealthy. Thresholds against the start of the run, over the policy's own responses.

    A crossed one prints one warning; with `stop_on_collapse` the run saves and stops at the first of entropy,
    repetition and distinct.
    """

    stop_on_collapse: bool = False
    entropy: Share = 0.2
    kl: Positive = 50.0
    chosen_logps: Positive = 50.0
    distinct: Share = 0.3
    repetition: Annotated[float, Field(gt=0, le=1)] = 0.5
    missing_end: Annotated[float, Field(gt=0, le=1)] = 0.5
    length_correlation: Annotated[float, Field(gt=0, le=1)] = 0.8
    prompts: Count = 8


class Monitor:
    """Compares every round with the start of the run; `collapsed` is the reason once the policy is degenerate.

    `label` names the run in warnings.
    """

    def __init__(self, settings: HealthSettings, label: str) -> None:
        self.settings, self.label = settings, label
        self.collapsed: str | None = None
        self.start: Readings = {}
        self._seen: dict[str, int] = {}
        self._beyond: dict[str, int] = {}
        self._warned: set[str] = set()

    def update(self, metrics: dict[str, float], step: int) -> dict[str, float]:
        """Look at the means of one round, as many as are known; returns further numbers to log.

        Reads objective/entropy and objective/kl (nats per response), logps/chosen, and those of `completion_metrics`;
        numbers that are not finite are passed over. Warns once of each kind, and may set `collapsed`.
        """
        now = _readings(metrics)
        self._remember(now)
        logged: dict[str, float] = {}
        for kind, judge in _WATCHED.items():
            if kind not in now:
                continue
            finding = judge(now, self.start, self.settings)
            logged |= finding.metrics
            self._beyond[kind] = self._beyond.get(kind, 0) + 1 if finding.crossed else 0
            if self._beyond[kind] >= ROUNDS:
                self._report(kind, f"{finding.text} (health.{kind}: {getattr(self.settings, kind):g})", step)
        return logged

    def _remember(self, now: Readings) -> None:
        for name, value in now.items():
            seen = self._seen.get(name, 0)
            if seen < (START_ROUNDS if name in _NOISY else 1):
                self.start[name] = (self.start.get(name, 0.0) * seen + value) / (seen + 1)
                self._seen[name] = seen + 1

    def _report(self, kind: str, text: str, step: int) -> None:
        if kind in COLLAPSE and self.collapsed is None:
            self.collapsed = text
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning("%s, step %d: %s", self.label, step, text)

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on, as JSON can hold it."""
        warned = sorted(self._warned)
        return {"start": dict(self.start), "seen": dict(self._seen), "beyond": dict(self._beyond), "warned": warned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`. Whether the policy is still collapsed is for its next round to say."""
        self.start, self._seen, self._beyond = (dict(state[name]) for name in ("start", "seen", "beyond"))
        self._warned, self.collapsed = set(state["warned"]), None


_NAMES = {
    "kl": "objective/kl",
    "chosen_logps": "logps/chosen",
    "distinct": "health/distinct_2",
    "repetition": "health/repeated_4grams",
    "missing_end": "completions/clipped_ratio",
    "length_correlation": "health/reward_length_correlation",
    "length": "completions/mean_length",
    "number": "completions/number",
    "entropy": "objective/entropy",
}
_NOISY = ("repetition", "missing_end", "length_correlation")


def _readings(metrics: dict[str, float]) -> Readings:
    """The numbers that are watched. Entropy is taken per token, for responses that become shorter lose nats too."""
    now = {name: float(metrics[key]) for name, key in _NAMES.items() if math.isfinite(metrics.get(key, math.nan))}
    now.setdefault("number", NUMBER)
    if "entropy" in now and "length" in now:
        now["entropy"] /= max(now["length"], 1.0)
    if "distinct" in now:
        # Different bigrams per response: what more text has at least as many of, while their share falls.
        now["bigrams"] = now["distinct"] * max(now.get("length", 2.0) - 1, 1.0)
    return now


def _entropy(now: Readings, start: Readings, settings: HealthSettings) -> Finding:
    if start["entropy"] < LITTLE_ENTROPY:
        return Finding(False, "", {})
    ratio = now["entropy"] / start["entropy"]
    text = (
        f"entropy fell to {ratio:.0%} of its start: the policy is collapsing onto few responses; raise gamma "
        "(RKL's entropy weight) or beta, or lower training.learning_rate"
    )
    return Finding(ratio < settings.entropy, text, {"health/entropy_ratio": ratio})


def _repetition(now: Readings, start: Readings, settings: HealthSettings) -> Finding:
    text = (
        f"{now['repetition']:.0%} of the 4-grams of a response repeat earlier ones ({start['repetition']:.0%} at the "
        "start): the policy is caught in loops; raise beta, lower training.learning_rate, or see whether the reward "
        "likes repetition"
    )
    return Finding(_risen("repetition", now, start, settings.repetition), text, {})


def _distinct(now: Readings, start: Readings, settings: HealthSettings) -> Finding:
    # The share falls when there is more text, the count when there is less; only a collapse brings down both.
    ratio = max(now[name] / start[name] if start[name] > 0 else 1.0 for name in ("distinct", "bigrams"))
    text = (
        f"different bigrams fell to {ratio:.0%} of their start: responses to all prompts become the same; raise gamma "
        "(RKL's entropy weight) or beta, or lower training.learning_rate"
    )
    return Finding(ratio < settings.distinct, text, {"health/distinct_ratio": ratio})


def _kl(now: Readings, start: Readings, settings: HealthSettings) -> Finding:
    change = now["kl"] - start["kl"]
    text = (
        f"KL to the reference rose by {change:.0f} nats per response: the policy is far from where its reward is known "
        "to be right; raise beta, or lower training.learning_rate or training.max_steps"
    )
    return Finding(change > settings.kl, text, {"health/kl_change": change})


def _chosen_logps(now: Readings, start: Readings, settings: HealthSettings) -> Finding:
    change = now["chosen_logps"] - start["chosen_logps"]
    text = (
        f"the log-probability of the preferred responses fell by {-change:.0f} nats: what is learned moves probability "
        "to neither response (likelihood displacement); raise beta, lower training.learning_rate, or stop early"
    )
    return Finding(change < -settings.chosen_logps, text, {"health/chosen_logps_change": change})


def _missing_end(now: Readings, start: Readings, settings: HealthSettings) -> Finding:
    text = (
        f"{now['missing_end']:.0%} of the responses are cut before their end ({start['missing_end']:.0%} at the "
        "start): rewards are those of fragments; set rollout.missing_end, or raise rollout.max_completion_length"
    )
    return Finding(_risen("missing_end", now, start, settings.missing_end), text, {})


def _length_correlation(now: Readings, start: Readings, settings: HealthSettings) -> Finding:
    value, first = now["length_correlation"], start["length_correlation"]
    text = (
        f"rewards follow the length of the responses (correlation {value:.2f}, {first:.2f} at the start): the reward "
        "may be met by length alone; compare samples.jsonl, and correct the reward or raise beta"
    )
    # Fisher's transform of a correlation has standard error 1 / √(n − 3).
    moved = abs(_fisher(value) - _fisher(first)) * math.sqrt(max(now["number"] - 3, 1) / _TWO_SAMPLES)
    return Finding(abs(value) > settings.length_correlation and moved > ERRORS, text, {})


def _risen(name: str, now: Readings, start: Readings, threshold: float) -> bool:
    """Whether a share has come `threshold` of the way from its start to 1, and further than noise explains."""
    n, first = now["number"], start[name]
    share = (first * START_ROUNDS * n + 1) / (START_ROUNDS * n + 2)
    error = math.sqrt(share * (1 - share) / n * _TWO_SAMPLES)
    return now[name] - first > max(threshold * (1 - first), ERRORS * error)


def _fisher(value: float) -> float:
    return math.atanh(min(max(value, -0.999), 0.999))


# Variance of the difference between a round and the start, in units of a round's.
_TWO_SAMPLES = 1 + 1 / START_ROUNDS

# The name of a reading is that of its threshold in the health section.
_WATCHED: dict[str, Callable[[Readings, Readings, HealthSettings], Finding]] = {
    "entropy": _entropy,
    "repetition": _repetition,
    "distinct": _distinct,
    "kl": _kl,
    "chosen_logps": _chosen_logps,
    "missing_end": _missing_end,
    "length_correlation": _length_correlation,
}
COLLAPSE = ("entropy", "repetition", "distinct")


# Showing --------------------------------------------------------------------------------------------------------------


def write_completions(
    path: Path, step: int, texts: Sequence[tuple[str, Sequence[str], Sequence[float] | None]]
) -> None:
    """Append (prompt, responses, rewards or None) to samples.jsonl, one line per prompt, and log the first response.

    A reward that is not finite is written as null.
    """
    if not texts:
        return
    with path.open("a", encoding="utf-8") as file:
        for prompt, responses, rewards in texts:
            row: dict[str, Any] = {"step": step, "prompt": prompt, "responses": list(responses)}
            if rewards is not None:
                row["rewards"] = [value if math.isfinite(value) else None for value in map(float, rewards)]
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    prompt, responses, rewards = texts[0]
    worth = "" if rewards is None else f" (reward {rewards[0]:.3g})"
    logger.info("step %d%s: %s", step, worth, one_line(f"{prompt[-120:]} → {responses[0]}", 320))
