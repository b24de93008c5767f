"""Rounds of a method that learns from its own responses: which prompts, what was drawn, what it is worth.

    for each round of prompts:      sample, reward, score          `RolloutWorker.draw_round`
        for each inner epoch:       minibatches of the round       `RoundBatches`, `RolloutWorker.collect`

What is drawn depends on the weights, the run's seed and the number of the round alone, so a run can stop anywhere.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.data import BatchSampler
from transformers import TrainingArguments

from distalign.data import EncodedPair, EncodedPrompt, plain_text
from distalign.engine import Group, Reference, Scores, join, score_in_batches
from distalign.methods import Method, Needs, Samples
from distalign.models.load import positions
from distalign.models.policy import Policy
from distalign.rewards import Request, Reward
from distalign.rewards.base import checked
from distalign.rollout.sample import sample
from distalign.rollout.vllm import ServerError, VLLMServer, check_mismatch, rescored
from distalign.training.health import Monitor, completion_metrics, write_completions
from distalign.training.processes import ALONE, Processes
from distalign.training.prompts import MetricAverager, PromptGroup
from distalign.training.rollout_settings import MissingEnd, RolloutSettings

logger = logging.getLogger("distalign.training.trainer")
T = TypeVar("T")

Row = EncodedPair | EncodedPrompt
# Runs a pass of the policy without gradient, inside the forward of whatever wraps it, and gives what it returns.
RunPass = Callable[[Callable[[], Any]], Any]
# Name of the constant of a round that holds the log-probabilities of a server that drew it.
SERVER = "server_token_logps"


class RoundBatches(BatchSampler):
    """Batches of row numbers, round by round: a round's prompts come `num_iterations` times, in a new order each time.

    A round has `batches` batches of `batch_size` prompts; what is left at the end of an epoch is a smaller round. The
    order depends on the seed and the epoch alone.
    """

    def __init__(self, total: int, *, batch_size: int, batches: int, num_iterations: int, seed: int) -> None:
        self.total, self.batch_size, self.seed = total, batch_size, seed
        self.size, self.num_iterations = batch_size * batches, num_iterations
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
        return self.num_iterations * -(-len(rows) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for number, rows in enumerate(self.rounds):
            for inner in range(self.num_iterations):
                order = self._permutation(len(rows), self.epoch, 1 + number * self.num_iterations + inner)
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
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (1 << 62)
    return seed


@dataclass
class Round:
    """The prompts of one round, their sampled responses, and numbers for every response: state that is saved.

    number: of the round, which with the run's seed decides what is sampled. position: optimizer steps already done in
    it. indices: row of every prompt in its data set. tensors: one row for each response, prompt by prompt: rewards,
    behavior_token_logps, reference_token_logps, advantages, returns (nats).
    """

    number: int
    position: int
    indices: list[int]
    prompts: list[list[int]]
    responses: list[list[list[int]]]
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)

    @cached_property
    def starts(self) -> list[int]:
        """Row of the first response to every prompt, and the number of all responses."""
        return [0, *accumulate(len(group) for group in self.responses)]

    def rows(self, i: int) -> slice:
        """Rows of `tensors` that belong to prompt number `i` of the round."""
        starts = self.starts
        return slice(starts[i], starts[i + 1])


def apply_missing_end(
    rewards: Float[Tensor, "responses"], ended: Bool[Tensor, "responses"], missing_end: MissingEnd
) -> Float[Tensor, "responses"]:
    """Rewards with the missing-end rule: `value` is added (penalty) or taken instead (replace) where `ended` is False.

    In the unit of the rewards; what is given stays as it is. REBEL's own experiments replace by −1.
    """
    if missing_end.rule == "none":
        return rewards
    other = rewards + missing_end.value if missing_end.rule == "penalty" else rewards.new_tensor(missing_end.value)
    return rewards.where(ended, other)


@dataclass
class Rollout:
    """How responses are drawn and rewarded: the recipe's `rollout` section, the token that ends a response, a reward.

    `reward` is None for methods that read none. `end_ids` are all tokens that end a response (`rollout.end_ids`).
    The work is dealt to `processes`, by whole prompts; all of them get the whole result. A `server` is asked by the
    first of them.
    """

    settings: RolloutSettings
    end_id: int
    reward: Reward | None
    end_ids: Collection[int]
    processes: Processes = ALONE
    server: VLLMServer | None = None

    def sample(
        self,
        model: nn.Module,
        prompts: Sequence[list[int]],
        *,
        seed: int,
        number: int,
        n: int | None = None,
        version: int | None,
    ) -> tuple[list[list[list[int]]], dict[str, Tensor]]:
        """Responses of the policy as it is, `n` for each prompt (`settings.num_generations` if not given).

        `version` is the number of steps that made its weights, None for the reference's. With them come constants of
        the responses: of a server's, `SERVER`, the log-probabilities that it drew them with.
        """
        settings = self.settings
        how = {
            "n": n or settings.num_generations,
            "max_new_tokens": settings.max_completion_length,
            "min_new_tokens": settings.min_new_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "end_id": self.end_id,
            "seed": mix(seed, number),
        }
        if (server := self.server) is not None:
            drawn = self.processes.from_first(lambda: server.generate(model, prompts, version=version, **how))
            return drawn[0], {SERVER: drawn[1]}

        def draw(places: list[int]) -> list[list[list[int]]]:
            chosen = [prompts[place] for place in places]
            return sample(model, chosen, numbers=places, rows=settings.decode_batch_size, **how)

        return self.processes.map(draw, range(len(prompts)), list(map(len, prompts))), {}

    def rewards(self, rows: Sequence[Row], responses: Sequence[list[list[int]]]) -> Float[Tensor, "responses"]:
        """Rewards of the responses to these rows, the missing-end rule applied. Raises RewardError."""
        requests = [Request(row.prompt, group, row.row) for row, group in zip(rows, responses, strict=True)]
        ended = torch.tensor([response[-1] in self.end_ids for group in responses for response in group])
        rewards = torch.cat(self.rewards_as_given(requests))
        return apply_missing_end(rewards, ended, self.settings.missing_end)

    def rewards_as_given(self, requests: Sequence[Request]) -> list[Float[Tensor, "responses"]]:
        """What the reward says of the responses of each request. Raises RewardError."""
        assert self.reward is not None
        reward = self.reward

        def each(requests: list[Request]) -> list[Tensor]:
            lengths = [len(request.responses) for request in requests]
            return list(checked(reward(requests), sum(lengths), type(reward).__name__).split(lengths))

        sizes = [len(request.prompt) + sum(map(len, request.responses)) for request in requests]
        return self.processes.map(each, requests, sizes)

    def scores(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        token_budget: int,
        reference: Reference | None = None,
        value_head: nn.Module | None = None,
    ) -> Scores:
        """What the model says of responses at the temperature they are drawn with, without gradient; on the CPU."""

        def each(places: list[int]) -> list[tuple[list[int], Scores]]:
            chosen = [groups[place] for place in places]
            scores = score_in_batches(
                model,
                chosen,
                token_budget=token_budget,
                reference=reference,
                temperature=self.settings.temperature,
                value_head=value_head,
            )
            return [(places, scores.to("cpu"))]

        return join(groups, self.processes.share(each, [group.tokens for group in groups]))


class ReferenceResponses:
    """What π₀ answers to each prompt of a run: drawn, rewarded and scored once, before the first step (theorem 14).

    `rows` are those of the run; rows of one question share its responses. `run` runs passes of the policy.
    """

    def __init__(
        self,
        policy: Policy,
        needs: Needs,
        rollout: Rollout,
        rows: Sequence[Row],
        *,
        args: TrainingArguments,
        metrics: MetricAverager,
        run: RunPass,
    ) -> None:
        self.policy, self.needs, self.rollout, self.metrics, self.run = policy, needs, rollout, metrics, run
        self.rows = list({row.question: row for row in rows}.values())
        self.places = {row.question: place for place, row in enumerate(self.rows)}
        self.batch_size, self.seed = args.per_device_train_batch_size, args.seed
        self.samples_file = samples_file_of(args)
        self.round: Round | None = None

    def draw(self, token_budget: int) -> None:
        """See to it that all responses are drawn, rewarded and scored; what is there already stays. Raises RewardError.

        The policy is the reference before its first step, so it draws where no reference is kept.
        """
        if self.round is not None and len(self.round.tensors) == self.needs.reward + self.needs.reference:
            return
        if self.round is None:
            started = time.perf_counter()
            logger.info("the reference draws %d responses to each of %d prompts, once",
                        self.rollout.settings.num_generations, len(self.rows))  # fmt: skip
            prompts = [row.prompt for row in self.rows]
            responses = self.run(lambda: self._with_reference(lambda model: self._sample(model, prompts)))
            self.round = Round(0, 0, list(range(len(prompts))), prompts, responses)
            self.metrics.add({"rollout_time": time.perf_counter() - started})
        drawn = self.round
        if self.needs.reward and "rewards" not in drawn.tensors:
            started = time.perf_counter()
            # In parts: a function may take `timeout` seconds for each call.
            parts = [slice(start, start + self.batch_size) for start in range(0, len(drawn), self.batch_size)]
            rewards = [self.rollout.rewards(self.rows[part], drawn.responses[part]) for part in parts]
            drawn.tensors["rewards"] = torch.cat(rewards)
            self.metrics.add({"reward_time": time.perf_counter() - started})
        if self.needs.reference and "reference_token_logps" not in drawn.tensors:
            groups = [Group(*both) for both in zip(drawn.prompts, drawn.responses, strict=True)]
            score = self.rollout.scores
            scores = self.run(lambda: self._with_reference(lambda model: score(model, groups, token_budget)))
            drawn.tensors["reference_token_logps"] = scores.token_logps
        if self.rollout.processes.first:
            texts = completion_texts(drawn, self.rows, self.policy, self.rollout.settings)
            write_completions(self.samples_file, 0, texts)

    def _sample(self, model: nn.Module, prompts: Sequence[list[int]]) -> list[list[list[int]]]:
        # Rounds have the numbers from 0.
        version = 0 if self.policy.reference is None else None
        return self.rollout.sample(model, prompts, seed=self.seed, number=-1, version=version)[0]

    def _with_reference(self, function: Callable[[nn.Module], T]) -> T:
        policy = self.policy
        with nullcontext(policy.model) if policy.reference is None else policy.as_reference() as model:
            return function(model)

    def collect(self, rows: Sequence[Row]) -> list[PromptGroup]:
        """The responses to the prompts of these rows, with their constants."""
        assert self.round is not None
        groups = []
        for row in rows:
            place = self.places[row.question]
            responses = self.round.responses[place]
            constants = {name: values[self.round.rows(place)] for name, values in self.round.tensors.items()}
            if "reference_token_logps" in constants:
                constants["behavior_token_logps"] = constants["reference_token_logps"]
            group = Group(row.prompt, responses)
            groups.append(PromptGroup(group, reference=len(responses), reference_constants=constants))
        return groups


class RolloutWorker:
    """The rounds of one run: draws, rewards and scores responses once, and hands them out in batches.

    `rows` are the prompts (or labelled pairs) of the run by number. `run` runs passes of the policy; rewards run
    outside of it. `batches` says which rows are together in a round.
    """

    def __init__(
        self,
        policy: Policy,
        method: Method,
        rollout: Rollout,
        rows: Sequence[Row],
        *,
        args: TrainingArguments,
        monitor: Monitor | None,
        metrics: MetricAverager,
        run: RunPass,
    ) -> None:
        self.policy, self.method, self.rollout, self.rows = policy, method, rollout, rows
        self.needs = method.needs
        self.accumulated, self.seed = args.gradient_accumulation_steps, args.seed
        self.monitor, self.metrics, self.run = monitor, metrics, run
        self.samples_file = samples_file_of(args)
        self.batches = RoundBatches(
            len(rows),
            batch_size=args.per_device_train_batch_size * rollout.processes.count,
            batches=rollout.settings.minibatches * self.accumulated,
            num_iterations=rollout.settings.num_iterations,
            seed=self.seed,
        )
        self.round: Round | None = None
        # The optimizer step that the round began with, and the last round that was logged.
        self._start, self._logged = 0, -1
        self._seen: list[dict[str, Tensor]] = []

    # A round ----------------------------------------------------------------------------------------------------------

    def draw_round(self, indices: Sequence[int], step: int, token_budget: int) -> None:
        """See to it that the round of these rows is drawn, rewarded and scored. Raises RewardError.

        `step` is the number of optimizer steps done. What was drawn before a reward failed is in `round`.
        """
        number, members = self.batches.round_of(indices[0])
        rows, started = [self.rows[index] for index in members], time.perf_counter()
        seconds: dict[str, float] = {}
        if self.round is None or self.round.number != number:
            prompts = [row.prompt for row in rows]
            draw, model = self.rollout.sample, self.policy.model
            responses, constants = self.run(lambda: draw(model, prompts, seed=self.seed, number=number, version=step))
            self.round = Round(number, 0, list(members), prompts, responses, constants)
            self._start, self._seen = step, []
            seconds["rollout_time"] = time.perf_counter() - started
        drawn = self.round
        drawn.position = step - self._start
        # A run that goes on may find a part of this done.
        rewarded = self.needs.reward and (not self.needs.pairs or "sampled" in self.needs.pairs)
        if rewarded and "rewards" not in drawn.tensors:
            started = time.perf_counter()
            drawn.tensors["rewards"] = self.rollout.rewards(rows, drawn.responses)
            seconds["reward_time"] = time.perf_counter() - started
        self.metrics.add(seconds)
        self._score(drawn, token_budget)
        if self._logged != number:
            self._logged = number
            self._log_round(drawn, step)

    def _several_steps(self, drawn: Round) -> bool:
        """Whether the policy moves while the round is used: then it has to be known what drew the responses."""
        return self.batches.batches_of(drawn.indices) > self.accumulated or self.needs.values

    def _score(self, drawn: Round, token_budget: int) -> None:
        """Log-probabilities of the responses where they are needed: of what drew them, and of the reference."""
        needs, several = self.needs, self._several_steps(drawn) or SERVER in drawn.tensors
        behavior = several and "behavior_token_logps" not in drawn.tensors
        # With the full KL of a single step its own pass says what is logged of the reference.
        reference = (several or not needs.kl) and "reference_token_logps" not in drawn.tensors
        groups = [Group(prompt, responses) for prompt, responses in zip(drawn.prompts, drawn.responses, strict=True)]
        if behavior:
            against = self.policy.reference if reference else None
            head = self.policy.value_head if needs.values else None
            scores = self.run(lambda: self.rollout.scores(self.policy.model, groups, token_budget, against, head))
            if scores.reference_token_logps is not None:
                drawn.tensors["reference_token_logps"] = scores.reference_token_logps
            server = drawn.tensors.pop(SERVER, None)
            behavior = scores.token_logps if server is None else self._by_server(server, scores)
            drawn.tensors["behavior_token_logps"] = behavior
            if needs.values:
                self._add_credit(drawn, scores)
        elif reference and self.policy.reference is not None:
            scores = self.run(lambda: self._reference_scores(groups, token_budget))
            drawn.tensors["reference_token_logps"] = scores.token_logps

    def _by_server(self, server: Tensor, scores: Scores) -> Tensor:
        """Behavior log-probabilities of responses that a server drew; its mismatch is logged.

        Only the gradient of `Samples` asks for the server's: pairs may come from anywhere, and PPO clips what it
        takes for steps of the policy.
        """
        settings, engine = self.rollout.settings, scores.token_logps
        clip_max = settings.vllm_importance_sampling_clip_max
        behavior, mismatch = rescored(server, engine, scores.mask, clip_max=clip_max)
        self.metrics.add({"rollout/mismatch_kl": mismatch})
        if settings.top_p == 1 and settings.min_new_tokens == 0:
            try:
                check_mismatch(mismatch)
            except ServerError:
                # Drawn with other weights: a run that goes on draws anew.
                self.round = None
                raise
        corrected = settings.vllm_importance_sampling_correction and self.needs.samples and not self.needs.values
        return behavior if corrected else engine

    def _reference_scores(self, groups: Sequence[Group], token_budget: int) -> Scores:
        with self.policy.as_reference() as reference:
            return self.rollout.scores(reference, groups, token_budget)

    def _add_credit(self, drawn: Round, scores: Scores) -> None:
        assert scores.values is not None
        constants = {name: rows.to(scores.token_logps) for name, rows in drawn.tensors.items()}
        samples = Samples(scores.token_logps, scores.mask, group=scores.group, values=scores.values, **constants)
        drawn.tensors["advantages"], drawn.tensors["returns"] = self.method.credit(samples)

    # A batch of it ----------------------------------------------------------------------------------------------------

    def collect(self, indices: Sequence[int]) -> list[PromptGroup]:
        """The drawn responses of these rows with their constants."""
        assert self.round is not None
        drawn, groups = self.round, []
        for place in map(drawn.indices.index, indices):
            responses = drawn.responses[place]
            constants = {name: rows[drawn.rows(place)] for name, rows in drawn.tensors.items()}
            group = Group(drawn.prompts[place], responses)
            groups.append(PromptGroup(group, drawn=len(responses), constants=constants))
        return groups

    def record(self, scores: Scores, prompts: Sequence[PromptGroup], step: int) -> None:
        """Note what a training pass says of responses that the present policy drew, if no pass before it did."""
        assert self.round is not None
        if not self._seen_in_training(step):
            return
        rows = torch.arange(len(scores.mask), device=scores.mask.device).view(len(prompts), -1)
        rows = rows[:, prompts[0].before_drawn :].reshape(-1)
        seen = {"logps": scores.logps.detach()[rows].cpu()}
        if scores.step_kl is not None:
            seen["kl"] = scores.step_kl.detach().sum(-1)[rows].cpu()
        elif "reference_token_logps" in self.round.tensors:
            reference = torch.cat([prompt.constants["reference_token_logps"].double().sum(-1) for prompt in prompts])
            seen["kl"] = seen["logps"] - reference
        self._seen.append(seen)

    # Logging ----------------------------------------------------------------------------------------------------------

    def finish_batch(self, step: int) -> None:
        """Log entropy, KL and health of the round, once all of it has been seen."""
        assert self.round is not None
        if self._seen_in_training(step):
            parts = [seen for part in self.rollout.processes.gather(self._seen) for seen in part]
            if sum(len(seen["logps"]) for seen in parts) == self.round.starts[-1]:
                self._log_objective({name: torch.cat([seen[name] for seen in parts]) for name in parts[0]}, step)
                self._seen = []

    def _seen_in_training(self, step: int) -> bool:
        """Whether the first training pass over the round's responses is the first pass of all."""
        assert self.round is not None
        return "behavior_token_logps" not in self.round.tensors and step == self._start

    def _log_round(self, drawn: Round, step: int) -> None:
        rows = [self.rows[index] for index in drawn.indices]
        if self.rollout.processes.first:
            texts = completion_texts(drawn, rows, self.policy, self.rollout.settings)
            write_completions(self.samples_file, step, texts)
        if "behavior_token_logps" not in drawn.tensors:
            return
        seen = {"logps": drawn.tensors["behavior_token_logps"].double().sum(-1)}
        if "reference_token_logps" in drawn.tensors:
            seen["kl"] = seen["logps"] - drawn.tensors["reference_token_logps"].double().sum(-1)
        self._log_objective(seen, step)

    def _log_objective(self, seen: dict[str, Float[Tensor, "responses"]], step: int) -> None:
        assert self.round is not None
        rewards = self.round.tensors.get("rewards")
        responses = [response for group in self.round.responses for response in group]
        metrics = {"objective/entropy": float(-seen["logps"].mean())}
        if "kl" in seen:
            metrics["objective/kl"] = float(seen["kl"].mean())
        if rewards is not None:
            metrics["objective/reward"] = float(rewards.mean())
        metrics |= completion_metrics(responses, end_ids=self.rollout.end_ids, rewards=rewards)
        if self.monitor is not None:
            metrics |= self.monitor.update(metrics, step)
        self.metrics.add(metrics)

    # Going on ---------------------------------------------------------------------------------------------------------

    def position_at(self, step: int) -> Round | None:
        """The round as it is to be saved after `step` optimizer steps."""
        if self.round is not None:
            self.round.position = step - self._start
        return self.round

    def begin(self) -> None:
        """Forget the round of an earlier run: it was drawn by other weights."""
        self.round, self._logged = None, -1

    def resume(self, drawn: Round, step: int) -> None:
        """Go on after `step` optimizer steps with the round that a checkpoint held."""
        self.round, self._start = drawn, step - drawn.position
        self._logged = drawn.number if drawn.position > 0 else -1


def samples_file_of(args: TrainingArguments) -> Path:
    """Where the first responses of each round are written."""
    return Path(str(args.output_dir)) / "samples.jsonl"


def completion_texts(
    drawn: Round, rows: Sequence[Row], policy: Policy, settings: RolloutSettings
) -> list[tuple[str, list[str], list[float] | None]]:
    """(prompt, responses, rewards or None) of the first prompts of a round, as many as are to be printed."""

    def text(ids: list[int]) -> str:
        return str(policy.tokenizer.decode(ids, skip_special_tokens=True))

    rewards = drawn.tensors.get("rewards")
    return [
        (
            text(prompt) if row.row is None else plain_text(row.row.prompt),
            [text(response) for response in drawn.responses[i]],
            None if rewards is None else rewards[drawn.rows(i)].tolist(),
        )
        for i, (prompt, row) in enumerate(zip(drawn.prompts, rows, strict=True))
        if i < settings.num_completions_to_print
    ]


def observe(
    policy: Policy, rollout: Rollout, rows: Sequence[Row], *, limit: int, token_budget: int, seed: int, step: int
) -> dict[str, float]:
    """Draw a response to each of `limit` prompts, to look at: entropy, KL to the reference (nats), length, repetition.

    The first different ones that leave the model space to answer; empty if there is none.
    """
    longest = (positions(policy.model.config) or math.inf) - rollout.settings.max_completion_length
    prompts = list({tuple(row.prompt): row.prompt for row in rows if len(row.prompt) <= longest}.values())[:limit]
    if not prompts:
        return {}
    responses, _ = rollout.sample(policy.model, prompts, seed=seed, number=0, n=1, version=step)
    groups = [Group(prompt, drawn) for prompt, drawn in zip(prompts, responses, strict=True)]
    logps = rollout.scores(policy.model, groups, token_budget).logps
    metrics = {"objective/entropy": float(-logps.mean())}
    if policy.reference is not None:
        with policy.as_reference() as reference:
            metrics["objective/kl"] = float((logps - rollout.scores(reference, groups, token_budget).logps).mean())
    return metrics | completion_metrics([drawn for group in responses for drawn in group], end_ids=rollout.end_ids)
