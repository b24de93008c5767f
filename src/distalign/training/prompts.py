"""What was collected for a prompt, and how one pass of the policy over it becomes what a loss reads.

Everything that is scored of a prompt is one group: the labelled pair if there is one, then the responses drawn in the
round, then fresh ones if the KL term wants them. The prompt is encoded once for all.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distalign.engine import Group, Scores
from distalign.methods import Method, Needs, Pairs, Samples
from distalign.methods.estimators import sequence_sum

logger = logging.getLogger("distalign.training.trainer")

# |implied reward gap| at which labels carry information, in nats: below it every pair is a fair coin, above it certain.
INFORMATIVE = (0.1, 5.0)
# Below this it is 0 but for rounding: a method whose reward is a log-ratio, before its first step.
AT_START = 1e-3


@dataclass(frozen=True)
class Collected:
    """One prompt of a step with all that stays constant while its loss is computed.

    `labelled`, `drawn` and `fresh` are numbers of responses of the group, in this order. `tensors` hold a row for each
    drawn response: rewards, behavior_token_logps, reference_token_logps, advantages, returns (nats).
    """

    group: Group
    labelled: int = 0
    drawn: int = 0
    fresh: int = 0
    probability: float | None = None
    reference_logps: Float[Tensor, "2"] | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)


def beside(pair: Collected, own: Collected) -> Collected:
    """A labelled pair and what was drawn for the same prompt, as one group."""
    group = Group(pair.group.prompt, [*pair.group.responses, *own.group.responses])
    return replace(own, group=group, labelled=2, probability=pair.probability, reference_logps=pair.reference_logps)


def labelled_pairs(logps: Float[Tensor, "pairs 2"], collected: Sequence[Collected]) -> Pairs:
    """The labelled pairs of these prompts, given their log-probabilities."""
    labels = [1.0 if one.probability is None else one.probability for one in collected]
    references = [one.reference_logps for one in collected if one.reference_logps is not None]
    reference = {"reference_logps": torch.stack(references).to(logps)} if references else {}
    return Pairs(logps=logps, probability=logps.new_tensor(labels), **reference)


def look(scores: Scores, collected: Sequence[Collected], needs: Needs, pairing: str) -> tuple[Pairs, Samples]:
    """What the loss is given of one pass over the groups of `collected`, all of the same make-up."""
    first, prompts = collected[0], len(collected)
    each = first.labelled + first.drawn + first.fresh
    rows = torch.arange(prompts * each, device=scores.mask.device).view(prompts, each)
    drawn = rows[:, first.labelled : first.labelled + first.drawn]
    pairs = Pairs()
    if needs.pairs == "labelled":
        pairs = labelled_pairs(scores.logps.view(prompts, each)[:, :2], collected)
    elif needs.pairs == "sampled":
        pairs = _sampled_pairs(scores, drawn, _stacked(collected, scores), pairing)
    if not needs.samples:
        return pairs, Samples()
    if first.fresh:
        return pairs, _samples(scores, rows[:, -first.fresh :], {})
    return pairs, _samples(scores, drawn, _stacked(collected, scores))


def _stacked(collected: Sequence[Collected], scores: Scores) -> dict[str, Tensor]:
    """The constants of all drawn responses, a row each; those with a column a token cut to the length of this pass."""
    steps = scores.mask.shape[1]
    found = {}
    for name in collected[0].tensors:
        rows = torch.cat([one.tensors[name] for one in collected]).to(scores.token_logps)
        found[name] = rows if rows.dim() == 1 else _fit(rows, steps)
    return found


def _fit(rows: Float[Tensor, "responses columns"], steps: int) -> Float[Tensor, "responses steps"]:
    # A pass may also hold labelled responses that are longer than anything that was drawn.
    short = steps - rows.shape[1]
    return torch.cat([rows, rows.new_zeros(len(rows), short)], 1) if short > 0 else rows[:, :steps]


def _sampled_pairs(scores: Scores, drawn: Int[Tensor, "prompts n"], tensors: dict[str, Tensor], pairing: str) -> Pairs:
    prompts, n = drawn.shape
    rewards = tensors.get("rewards")
    if pairing == "best_worst":
        assert rewards is not None
        grid = rewards.view(prompts, n)
        chosen = torch.stack([grid.argmax(1), grid.argmin(1)], 1)[:, None]
    else:
        chosen = torch.combinations(torch.arange(n, device=drawn.device), 2).expand(prompts, -1, 2)
    index = (chosen + n * torch.arange(prompts, device=drawn.device)[:, None, None]).reshape(-1, 2)
    logps, mask = scores.logps[drawn.reshape(-1)], scores.mask[drawn.reshape(-1)]

    def summed(name: str) -> Tensor | None:
        return sequence_sum(tensors[name].to(logps), mask) if name in tensors else None

    behavior, reference = summed("behavior_token_logps"), summed("reference_token_logps")
    if reference is None and scores.reference_logps is not None:
        reference = scores.reference_logps[drawn.reshape(-1)]
    rewards = None if rewards is None else rewards.to(logps)
    values = {"reference_logps": reference, "behavior_logps": behavior, "rewards": rewards}
    return Pairs(logps=logps[index], **{name: value[index] for name, value in values.items() if value is not None})


def _samples(scores: Scores, rows: Int[Tensor, "prompts n"], tensors: dict[str, Tensor]) -> Samples:
    flat = rows.reshape(-1)
    scored = {
        "reference_token_logps": scores.reference_token_logps,
        "step_kl": scores.step_kl,
        "step_entropy": scores.step_entropy,
        "values": scores.values,
    }
    return Samples(
        token_logps=scores.token_logps[flat],
        mask=scores.mask[flat],
        group=torch.arange(len(rows), device=flat.device).repeat_interleave(rows.shape[1]),
        **{**{name: value[flat] for name, value in scored.items() if value is not None}, **tensors},
    )


# Metrics --------------------------------------------------------------------------------------------------------------


class Notes:
    """Numbers for the next log line."""

    def __init__(self) -> None:
        self._noted: dict[str, list[tuple[float, int]]] = defaultdict(list)

    def add(self, metrics: dict[str, float], weight: int) -> None:
        """Take numbers for the mean of the next log line; with weight 0, counters of which the last is logged."""
        for name, value in metrics.items():
            self._noted[name] = [*(self._noted[name] if weight else []), (value, weight)]

    def take(self) -> dict[str, float]:
        """The means of what was noted since it was last taken."""
        found = {}
        for name, values in self._noted.items():
            total = sum(weight for _, weight in values)
            found[name] = sum(value * weight for value, weight in values) / total if total else values[-1][0]
        self._noted.clear()
        return found


def reference_of(pairs: Pairs) -> Float[Tensor, "pairs 2"] | None:
    """The reference's log-probabilities of pairs, if they were collected."""
    return pairs.reference_logps if hasattr(pairs, "reference_logps") else None


def pair_metrics(method: Method, pairs: Pairs) -> dict[str, float]:
    """Means over labelled pairs under TRL's names: the method's implied reward and log-probabilities, in nats."""
    with torch.no_grad():
        rewards = method.implicit_reward(pairs.logps, reference_of(pairs))
        margins = rewards[:, 0] - rewards[:, 1]
        first = (margins.sign() + 1) / 2
        label = pairs.probability
        means = {
            "rewards/chosen": rewards[:, 0],
            "rewards/rejected": rewards[:, 1],
            "rewards/margins": margins,
            "rewards/accuracies": label * first + (1 - label) * (1 - first),
            "logps/chosen": pairs.logps[:, 0],
            "logps/rejected": pairs.logps[:, 1],
        }
        return {name: float(values.detach().mean()) for name, values in means.items()}


def warn_about_sharpness(label: str, median: float) -> None:
    """Warn if the median |implied reward gap| of labelled pairs, in nats, says that labels carry no information."""
    low, high = INFORMATIVE
    if median > high:
        logger.warning(
            "%s: the median held-out pair has |logit| %.3g at the start: labels look certain and gradients vanish; "
            "lower gamma by about %.2g times",
            label,
            median,
            median,
        )
    elif AT_START < median < low:
        logger.warning(
            "%s: the median held-out pair has |logit| %.3g at the start: labels look like coins; raise gamma",
            label,
            median,
        )
