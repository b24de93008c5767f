"""Rounds of a method that learns from its own responses: which prompts, what was drawn, what it is worth.

    for each round of prompts:      sample, reward, score          `Rollout.draw`, `Rollout.judge`
        for each inner epoch:       minibatches of the round       `RoundBatches`

What is drawn depends on the weights, the run's seed and the number of the round alone, so a run can stop anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.data import BatchSampler
from transformers import TrainingArguments

from distalign.errors import InputError
from distalign.methods import Method
from distalign.rewards import Request, Reward
from distalign.rollout.backends import Backend, make_backend
from distalign.settings import Count, Positive, Section
from distalign.training.buffer import Buffer
from distalign.training.missing_end import apply_missing_end


class TrainingError(InputError):
    """Training cannot start: says what was found and what to do."""


class MissingEnd(Section):
    """What becomes of the reward of a response that was cut before its end: nothing, `value` added, or `value`."""

    rule: Literal["none", "penalty", "replace"] = "none"
    value: Annotated[float, Field(allow_inf_nan=False)] = -1.0


class RolloutSettings(Section):
    """How a method that learns from its own responses samples them, and how often each is used.

    A round samples for `minibatches` optimizer steps and goes through them `inner_epochs` times. `stale` says what
    becomes of the KL term once the policy has moved: importance weights, or fresh responses. `pairing` makes pairs of
    more than two samples. `max_new_tokens` is the evaluation's unless it is given. `show` completions a round are
    written to samples.jsonl, one of them to the terminal.
    """

    backend: Literal["transformers", "continuous", "vllm"] = "transformers"
    url: str | None = None
    samples: Count = 2
    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: Count = 20
    min_new_tokens: Annotated[int, Field(ge=0)] = 0
    rows: Count = 64
    missing_end: MissingEnd = MissingEnd()
    minibatches: Count = 1
    inner_epochs: Count = 1
    pairing: Literal["all", "best_worst"] = "all"
    stale: Literal["weights", "resample"] = "weights"
    show: Annotated[int, Field(ge=0)] = 2

    @model_validator(mode="after")
    def _lengths(self) -> RolloutSettings:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"rollout.min_new_tokens is {self.min_new_tokens} and max_new_tokens {self.max_new_tokens}; lower the "
                "first or raise the second"
            )
        return self


def acts(method: Method) -> bool:
    """Whether a method learns from responses that the policy itself draws."""
    return method.needs.samples or method.needs.pairs == "sampled"


def check_rollout(label: str, method: Method, settings: Any) -> None:
    """Raise TrainingError for `rollout` settings that do not go with the method; `settings` has the recipe's fields."""
    needs = method.needs
    if settings.samples == 1 and not needs.values:
        raise TrainingError(
            f"{label}: rollout.samples is 1, but pairs and leave-one-out baselines are made of several responses to "
            "one prompt; set it to 2 or more"
        )
    if settings.stale == "resample" and needs.samples and needs.reward and needs.pairs != "sampled":
        raise TrainingError(
            f"{label}: rollout.stale is resample, which draws fresh responses for a KL term, but this method scores "
            "the samples that it learns from; leave it at weights"
        )
    if settings.pairing == "best_worst" and needs.pairs == "sampled" and not needs.reward:
        raise TrainingError(f"{label}: rollout.pairing is best_worst, but the method has no reward; take all")


def check_arguments(label: str, args: TrainingArguments) -> None:
    """Raise TrainingError for arguments of transformers that cannot be followed here."""
    if args.world_size > 1 or args.n_gpu > 1:
        raise TrainingError(
            f"{max(args.world_size, args.n_gpu)} devices found; this version trains on one: start one process and "
            "show it one device (CUDA_VISIBLE_DEVICES=0)"
        )
    if args.torch_compile:
        raise TrainingError(
            f"{label}: torch_compile would compile the model's own forward, which the engine does not call; "
            "leave it out of training"
        )


def without_autocast(model: Any) -> None:
    """Take off the autocast that accelerate put around a model's forward: used by itself the model is what it was.

    accelerate's own `unwrap_model` takes off the model's decorators besides.
    """
    original = vars(model).pop("_original_forward", None)
    if original is None:
        return
    if getattr(original, "__func__", None) is type(model).forward:
        vars(model).pop("forward", None)
    else:
        model.forward = original


def check_needs(label: str, method: Method, *, reference: bool, rollout: Rollout | None) -> None:
    """Raise TrainingError if what the method needs is not there."""
    needs = method.needs
    if (needs.reference or needs.kl) and not reference:
        raise TrainingError(f"{label} needs the reference, but the policy was made without; pass reference=True")
    if not acts(method):
        return
    if rollout is None:
        raise TrainingError(f"{label} learns from responses of the policy; pass rollout, which says how to draw them")
    if needs.reward and rollout.reward is None:
        raise TrainingError(f"{label} needs a reward for the responses; give one: reward in the recipe")
    check_rollout(label, method, rollout.settings)


class RoundBatches(BatchSampler):
    """Batches of row numbers, round by round: a round's prompts come `inner_epochs` times, in a new order each time.

    A round has `batches` batches of `batch_size` prompts; what is left at the end of an epoch is a smaller round. The
    order depends on the seed and the epoch alone.
    """

    def __init__(self, total: int, *, batch_size: int, batches: int, inner_epochs: int, seed: int) -> None:
        self.total, self.batch_size, self.seed = total, batch_size, seed
        self.size, self.inner_epochs = batch_size * batches, inner_epochs
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Decide the rounds of an epoch."""
        self.epoch = epoch
        order = self._permutation(self.total, epoch, 0).tolist()
        self.rounds = [order[start : start + self.size] for start in range(0, self.total, self.size)]
        self._round_of = {index: number for number, rows in enumerate(self.rounds) for index in rows}

    def round_of(self, index: int) -> tuple[int, list[int]]:
        """Number (over all epochs) and rows of the round in which this row comes up."""
        number = self._round_of[index]
        return self.epoch * len(self.rounds) + number, self.rounds[number]

    def batches_of(self, rows: Sequence[int]) -> int:
        """Number of batches of a round, all its inner epochs together."""
        return self.inner_epochs * -(-len(rows) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for number, rows in enumerate(self.rounds):
            for inner in range(self.inner_epochs):
                order = self._permutation(len(rows), self.epoch, 1 + number * self.inner_epochs + inner)
                shuffled = [rows[i] for i in order.tolist()]
                for start in range(0, len(shuffled), self.batch_size):
                    yield shuffled[start : start + self.batch_size]

    def __len__(self) -> int:
        return sum(self.batches_of(rows) for rows in self.rounds)

    def _permutation(self, n: int, epoch: int, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(mix(self.seed, epoch, number))
        return torch.randperm(n, generator=generator)


def mix(*numbers: int) -> int:
    """One seed of several numbers: different for different numbers, the same on every machine."""
    found = 0
    for number in numbers:
        found = (found * 1_000_003 + number + 1) % (1 << 62)
    return found


@dataclass
class Rollout:
    """How responses are drawn and rewarded: the recipe's `rollout` section, the token that ends a response, a reward.

    `reward` is None for methods that read none.
    """

    settings: Any
    end_id: int
    reward: Reward | None = None
    backend: Backend = field(init=False)

    def __post_init__(self) -> None:
        self.backend = make_backend(self.settings)

    def sample(
        self, model: nn.Module, prompts: Sequence[list[int]], *, seed: int, number: int, n: int | None = None
    ) -> list[list[list[int]]]:
        """Responses of the policy as it is, `n` a prompt (`settings.samples` if not given)."""
        own = self.settings
        return self.backend.generate(
            model,
            prompts,
            n=n or own.samples,
            max_new_tokens=own.max_new_tokens,
            min_new_tokens=own.min_new_tokens,
            temperature=own.temperature,
            top_p=own.top_p,
            end_id=self.end_id,
            seed=mix(seed, number),
        )

    def draw(self, model: nn.Module, rows: Sequence[Any], indices: list[int], *, seed: int, number: int) -> Buffer:
        """The buffer of a round: responses to its prompts, nothing else yet."""
        prompts = [row.prompt for row in rows]
        return Buffer(number, 0, indices, prompts, self.sample(model, prompts, seed=seed, number=number))

    def judge(self, buffer: Buffer, rows: Sequence[Any]) -> Float[Tensor, "responses"]:
        """Rewards of a round's responses, the missing-end rule applied. Raises RewardError."""
        assert self.reward is not None
        requests = [
            Request(row.prompt, responses, row.row) for row, responses in zip(rows, buffer.responses, strict=True)
        ]
        ended = torch.tensor([own[-1] == self.end_id for responses in buffer.responses for own in responses])
        rule = self.settings.missing_end
        return apply_missing_end(self.reward(requests), ended, rule.rule, rule.value)
