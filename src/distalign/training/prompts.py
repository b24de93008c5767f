"""The prompts of a step with all that is scored of them, and how one pass of the policy becomes what a loss reads.

Everything that is scored of a prompt is one group: the labelled pair if there is one, then the reference's responses,
then those drawn in the round. The prompt is encoded once for all.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distalign.engine import Group, Scores, micro_batches
from distalign.errors import InputError
from distalign.methods import Method, Needs, Pairs, Samples
from distalign.methods.estimators import sequence_sum
from distalign.training.processes import ALONE, Processes

logger = logging.getLogger("distalign.training.trainer")

# |implicit reward gap| at which labels carry information, in nats: below it a pair is a fair coin, above it certain.
INFORMATIVE = (0.1, 8.0)
# Below this it is 0 but for rounding: a method whose reward is a log-ratio, before its first step.
AT_START = 1e-3
# Above it nearly every label is certain in single precision, and most pairs have no gradient at all.
SATURATED = 100.0


@dataclass(frozen=True)
class PromptGroup:
    """One prompt of a step with all that stays constant while its loss is computed.

    `labelled`, `reference` and `drawn` are numbers of responses of the group, in this order. `probability`,
    `reference_logps` and `rewards` are of the labelled pair. `constants` have a row for each drawn response: rewards,
    behavior_token_logps, reference_token_logps, advantages, returns (nats); so have `reference_constants` for each of
    the reference's.
    """

    group: Group
    labelled: int = 0
    reference: int = 0
    drawn: int = 0
    probability: float = 1.0
    reference_logps: Float[Tensor, "2"] | None = None
    rewards: Float[Tensor, "2"] | None = None
    reference_constants: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)

    @property
    def before_drawn(self) -> int:
        """The number of responses that were there before the round."""
        return self.labelled + self.reference


def merge(first: PromptGroup, second: PromptGroup) -> PromptGroup:
    """What two sources have of one prompt, as one group; `second` comes later in the order of sources."""
    return replace(
        first,
        group=Group(first.group.prompt, [*first.group.responses, *second.group.responses]),
        reference=first.reference + second.reference,
        reference_constants=first.reference_constants | second.reference_constants,
        drawn=second.drawn,
        constants=second.constants,
    )


@dataclass(frozen=True)
class MicroBatch:
    """Prompts that go through the policy together.

    `weight` is their share of the prompts of the optimizer step, `indices` their places in the batch.
    """

    prompts: list[PromptGroup]
    weight: float
    indices: Sequence[int] = ()

    @property
    def tokens(self) -> int:
        """Tokens of the groups, each prompt once."""
        return sum(prompt.group.tokens for prompt in self.prompts)

    def inputs(self, scores: Scores, needs: Needs, pairing: Literal["all", "best_worst"]) -> tuple[Pairs, Samples]:
        """What the loss reads of the scores. All prompts have the same numbers of responses."""
        first, rows = self.prompts[0], self._rows(scores)
        drawn = rows[:, first.before_drawn : first.before_drawn + first.drawn]
        if not needs.reference:
            # It is also computed for the log, and beside a full KL.
            scores = replace(scores, reference_token_logps=None)
        constants = self._constants([prompt.constants for prompt in self.prompts], scores, needs)
        parts = []
        if "labelled" in needs.pairs:
            parts.append(self.labelled(scores))
        if "reference" in needs.pairs:
            of_reference = self._constants([prompt.reference_constants for prompt in self.prompts], scores, needs)
            parts.append(_drawn_pairs(scores, rows[:, first.labelled : first.before_drawn], of_reference, pairing))
        if "sampled" in needs.pairs:
            parts.append(_drawn_pairs(scores, drawn, constants, pairing))
        samples = _samples(scores, drawn, constants) if needs.samples else Samples()
        return concatenate(parts), samples

    def labelled(self, scores: Scores) -> Pairs:
        """The labelled pairs, one of each prompt."""
        return labelled_pairs(scores.logps[self._rows(scores)[:, :2]], self.prompts)

    def _rows(self, scores: Scores) -> Int[Tensor, "prompts each"]:
        """Rows of the scores, prompt by prompt."""
        return torch.arange(len(scores.mask), device=scores.mask.device).view(len(self.prompts), -1)

    def _constants(self, given: Sequence[dict[str, Tensor]], scores: Scores, needs: Needs) -> dict[str, Tensor]:
        """The declared constants of all prompts, as long as the responses of this pass."""
        steps, constants = scores.mask.shape[1], {}
        for name in given[0]:
            if name != "reference_token_logps" or needs.reference:
                rows = torch.cat([each[name] for each in given]).to(scores.token_logps)
                constants[name] = rows if rows.dim() == 1 else _fit(rows, steps)
        return constants


@dataclass(frozen=True)
class Batch:
    """The prompts of one batch, and how many the optimizer step has: the loss is a mean over those."""

    prompts: list[PromptGroup]
    step_prompts: int

    @property
    def tokens(self) -> int:
        """Tokens of the batch, each prompt once."""
        return sum(prompt.group.tokens for prompt in self.prompts)

    def micro_batches(self, token_budget: int, processes: Processes = ALONE) -> list[MicroBatch]:
        """This process's share of the prompts, in parts of at most `token_budget` tokens.

        Every process gets the same number of parts, as passes of a sharded model need it: where one has less to do, its
        smallest prompt comes again, with weight 0.
        """
        sizes = [prompt.group.tokens for prompt in self.prompts]
        shares = [
            [
                [share[place] for place in part]
                for part in micro_batches([self.prompts[i].group for i in share], token_budget)
            ]
            for share in processes.deal(sizes)
        ]
        mine = shares[processes.rank]
        parts = [MicroBatch([self.prompts[i] for i in part], len(part) / self.step_prompts, part) for part in mine]
        spare = sizes.index(min(sizes))
        filler = MicroBatch([self.prompts[spare]], 0.0, [spare])
        return parts + [filler] * (max(map(len, shares)) - len(parts))


def labelled_pairs(logps: Float[Tensor, "pairs 2"], prompts: Sequence[PromptGroup]) -> Pairs:
    """The labelled pairs of these prompts, given their log-probabilities."""
    probability = logps.new_tensor([prompt.probability for prompt in prompts])
    constants = {}
    for name in ("reference_logps", "rewards"):
        rows = [row for prompt in prompts if (row := getattr(prompt, name)) is not None]
        if rows:
            constants[name] = torch.stack(rows).to(logps)
    return Pairs(logps, probability=probability, **constants)


def concatenate(parts: Sequence[Pairs]) -> Pairs:
    """The pairs of all parts as one record, with the fields that each of them has."""
    if len(parts) < 2:
        return parts[0] if parts else Pairs()
    names = [each.name for each in fields(Pairs) if all(hasattr(part, each.name) for part in parts)]
    return Pairs(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def _fit(rows: Float[Tensor, "responses columns"], steps: int) -> Float[Tensor, "responses steps"]:
    # A pass may also hold labelled responses that are longer than anything that was drawn.
    short = steps - rows.shape[1]
    return torch.cat([rows, rows.new_zeros(len(rows), short)], 1) if short > 0 else rows[:, :steps]


def _drawn_pairs(
    scores: Scores,
    drawn: Int[Tensor, "prompts n"],
    constants: dict[str, Tensor],
    pairing: Literal["all", "best_worst"],
) -> Pairs:
    prompts, n = drawn.shape
    if pairing == "best_worst":
        rewards = constants["rewards"].view(prompts, n)
        chosen = torch.stack([rewards.argmax(1), rewards.argmin(1)], 1)[:, None]
    else:
        chosen = torch.combinations(torch.arange(n, device=drawn.device), 2).expand(prompts, -1, 2)
    index = (chosen + n * torch.arange(prompts, device=drawn.device)[:, None, None]).reshape(-1, 2)
    logps, mask = scores.logps[drawn.reshape(-1)], scores.mask[drawn.reshape(-1)]
    values = {}
    for kind in ("behavior", "reference"):
        if f"{kind}_token_logps" in constants:
            values[f"{kind}_logps"] = sequence_sum(constants[f"{kind}_token_logps"].to(logps), mask)
    if "reference_logps" not in values and scores.reference_logps is not None:
        values["reference_logps"] = scores.reference_logps[drawn.reshape(-1)]
    if "rewards" in constants:
        values["rewards"] = constants["rewards"].to(logps)
    return Pairs(logps[index], **{name: value[index] for name, value in values.items()})


def _samples(scores: Scores, rows: Int[Tensor, "prompts n"], constants: dict[str, Tensor]) -> Samples:
    flat = rows.reshape(-1)
    names = ("reference_token_logps", "step_kl", "step_entropy", "values")
    scored = {name: value[flat] for name in names if (value := getattr(scores, name)) is not None}
    return Samples(
        token_logps=scores.token_logps[flat],
        mask=scores.mask[flat],
        group=torch.arange(len(rows), device=flat.device).repeat_interleave(rows.shape[1]),
        **{**scored, **constants},
    )


# Metrics --------------------------------------------------------------------------------------------------------------


# The sum of a number times its weight, and of the weights, by name.
Sums = Mapping[str, Sequence[float]]


class MetricAverager:
    """Numbers for the next log line, of all processes."""

    def __init__(self, processes: Processes = ALONE) -> None:
        self.processes = processes
        self._noted: dict[str, tuple[float, float]] = {}

    def add(self, metrics: dict[str, float], weight: float | None = None) -> None:
        """Take numbers for the mean of the next log line; without a weight, one in all processes together.

        With weight 0 they are counters, of which the last is logged: those of the processes add up.
        """
        weight = 1 / self.processes.count if weight is None else weight
        for name, value in metrics.items():
            total, weights = self._noted.get(name, (0.0, 0.0)) if weight else (value, 0.0)
            self._noted[name] = (total + value * weight, weights + weight)

    def take(self) -> dict[str, float]:
        """The means of what was added since it was last taken."""
        noted = merge_sums(self.processes.gather(self._noted))
        self._noted = {}
        return {name: total / weights if weights else total for name, (total, weights) in noted.items()}

    def state_dict(self) -> dict[str, tuple[float, float]]:
        """What this process added and nobody took yet, as JSON can hold it."""
        return dict(self._noted)

    def load_state_dict(self, state: Sums) -> None:
        """Go on from what all processes had, merged by `merge_sums`."""
        self._noted = merge_sums([state]) if self.processes.first else {}


def merge_sums(noted: Sequence[Sums]) -> dict[str, tuple[float, float]]:
    """Those of several processes added up."""
    merged: dict[str, tuple[float, float]] = {}
    for part in noted:
        for name, (total, weight) in part.items():
            before = merged.get(name, (0.0, 0.0))
            merged[name] = (before[0] + total, before[1] + weight)
    return merged


def implicit_rewards(method: Method, pairs: Pairs) -> Float[Tensor, "pairs 2"]:
    """The method's implicit reward of labelled pairs, in nats; with the reference where it was scored."""
    return method.implicit_reward(pairs.logps, pairs.reference_logps if hasattr(pairs, "reference_logps") else None)


def pair_metrics(method: Method, pairs: Pairs) -> dict[str, float]:
    """Means over labelled pairs under TRL's names: the method's implicit reward and log-probabilities, in nats."""
    with torch.no_grad():
        rewards = implicit_rewards(method, pairs)
        margins = rewards[:, 0] - rewards[:, 1]
        first = (margins.sign() + 1) / 2
        means = {
            "rewards/chosen": rewards[:, 0],
            "rewards/rejected": rewards[:, 1],
            "rewards/margins": margins,
            "rewards/accuracies": pairs.probability * first + (1 - pairs.probability) * (1 - first),
            "logps/chosen": pairs.logps[:, 0],
            "logps/rejected": pairs.logps[:, 1],
        }
        return {name: float(values.detach().mean()) for name, values in means.items()}


def effective_share(weights: Float[Tensor, "responses"]) -> float:
    """(Σ w)² / (n Σ w²): the share of the responses that still counts under these importance weights."""
    return float(weights.sum() ** 2 / (len(weights) * weights.square().sum()))


def check_sharpness(label: str, median: float) -> None:
    """Warn if the median |implicit reward gap| of labelled pairs, in nats, says that labels carry no information.

    Raises InputError above `SATURATED`.
    """
    low, high = INFORMATIVE
    found = f"{label}: the median pair has |logit| {median:.3g} at the start"
    less = f"divide what scales the implicit reward by about {median:.2g}"
    if median > SATURATED:
        raise InputError(f"{found}, so that most pairs have no gradient; lower gamma ({less}), or set gamma: auto")
    if median > high:
        logger.warning("%s: labels look certain and gradients vanish; lower gamma (%s)", found, less)
    elif AT_START < median < low:
        logger.warning("%s: labels look like coins; raise gamma", found)
