"""The trainer: collect what the method needs, score it, call its loss, step, log. It never asks which method it is.

A subclass of `transformers.Trainer`: arguments, checkpoints, schedules, loggers and callbacks are that library's. A
batch is counted in prompts, and the loss is a mean over the prompts of an optimizer step, however they are split.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from jaxtyping import Float
from peft import PeftConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
)

from distalign.data import EncodedPair
from distalign.engine import Group, Scores, score, score_in_batches
from distalign.engine.forward import evaluating
from distalign.engine.lm_head import precision
from distalign.engine.memory import LESS, MemoryEstimate, asked_for, available, estimate, out_of_memory
from distalign.engine.packing import FORWARD_BUDGET
from distalign.methods import Method, Pairs, Samples
from distalign.methods.estimators import importance_weights
from distalign.methods.preference import preference_nll
from distalign.models.policy import Policy
from distalign.progress import progress
from distalign.rewards import Request, WeightedSum
from distalign.rollout.sample import end_ids
from distalign.training.checkpoint import LATER, held_out_digest, set_aside, step_of
from distalign.training.config import AlignmentConfig, names_what_was_meant
from distalign.training.guard import ADVICE, Guard
from distalign.training.health import Monitor
from distalign.training.inputs import (
    Model,
    adapter_of,
    as_method,
    check_trained,
    expected_lengths,
    load_policy,
    read_given,
    server_of,
    temperature_of,
)
from distalign.training.passes import gathered, keep_outer_weights, shard
from distalign.training.processes import Processes
from distalign.training.prompts import (
    Batch,
    MetricAverager,
    MicroBatch,
    PromptGroup,
    check_sharpness,
    effective_share,
    implicit_rewards,
    labelled_pairs,
    merge,
    pair_metrics,
)
from distalign.training.resumable import GoesOn, ResumableTrainer
from distalign.training.reward_funcs import RewardFunc, load_rewards, reward_name
from distalign.training.rollout_settings import TrainingError, is_on_policy
from distalign.training.rounds import ReferenceResponses, Rollout, RolloutWorker, Row, observe
from distalign.training.rows import RowSource, check_kind
from distalign.training.run_folder import locked

logger = logging.getLogger("distalign.training.trainer")


@dataclass
class StepTotals:
    """Sums over the batches of one optimizer step, in this process: seconds, tokens, loss, and what is averaged.

    `gaps` are absolute differences of implicit rewards (nats) and `weights` importance weights, a tensor for each pass.
    """

    seconds: float = 0.0
    tokens: int = 0
    loss: float = 0.0
    gaps: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)


@names_what_was_meant(
    {
        "tokenizer": "it is called processing_class",
        "ref_model": "the reference is the model that training starts from: leave it out",
        "compute_metrics": "evaluations measure held-out pairs: leave it out, or use extra_evaluation",
    }
)
class AlignmentTrainer(ResumableTrainer):
    """Train a language model by any method, on labelled pairs, on responses that it draws itself, or on both.

        trainer = AlignmentTrainer(
            model="HuggingFaceTB/SmolLM2-135M-Instruct",
            method=PMLE(gamma=0.02, beta=0.0),
            args=AlignmentConfig(output_dir="out"),
            train_dataset=rows,
        )

    model: a hub id, a folder, a `PreTrainedModel` (trained in place) or a `PeftModel` (its reference: the adapter off).
    method: a `Method`, or its name. train_dataset: a path, a hub id, a `datasets.Dataset` or a list of dicts in TRL's
    columns: pairs, or for methods without labels prompts. eval_dataset: pairs, or a dict of several sets. reward_funcs,
    for methods that read a reward: functions in TRL's convention, classifiers (name or model), the folder of a trained
    reward, `RewardTraining(gamma=…)` to train one on the pairs first, `ColumnReward(scale=…)` for the pairs' own, or a
    list of them (`args.reward_weights`).
    processing_class: the tokenizer, if not the model's own. peft_config: train a new adapter instead of all weights.

    Metrics, besides the Trainer's own: over labelled pairs `rewards/chosen`, `rewards/rejected`, `rewards/margins` (the
    method's implicit reward, nats), `rewards/accuracies`, `logps/chosen`, `logps/rejected` (sums, nats); over the
    responses of a round, fresh from the policy, `objective/reward`, `objective/kl`, `objective/entropy` (per sequence,
    nats), `completions/*`, `health/*`; `rollout/effective_samples` is the share that importance weights leave of them,
    `rollout/mismatch_kl` how far a vLLM server that drew them is from the policy (nats per token);
    `tokens_per_second`, `step_time`, `rollout_time`, `reward_time` (s). Log lines are lines of `metrics.jsonl`.

    `label` names the run in messages. `extra_evaluation` is called at each evaluation and adds to its metrics.
    `reference_cache` keeps the reference's log-probabilities of pairs seen (by their `key`); trainers with the same
    reference and pairs may share it. Raises InputError for what cannot be trained, before a model is loaded where it
    can be known then, and ModelError if the policy does not start at its reference.
    """

    memory: MemoryEstimate | None = None

    def __init__(
        self,
        model: Model | Policy,
        method: str | Method,
        args: AlignmentConfig | None = None,
        train_dataset: RowSource | None = None,
        eval_dataset: RowSource | Mapping[str, RowSource] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        peft_config: PeftConfig | None = None,
        reward_funcs: RewardFunc | Sequence[RewardFunc] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        label: str | None = None,
        extra_evaluation: Callable[[nn.Module], dict[str, float]] | None = None,
        reference_cache: dict[tuple, Tensor] | None = None,
    ):
        model = str(model) if isinstance(model, Path) else model
        self.name, self.method = as_method(method)
        self.needs, self.on_policy = self.method.needs, is_on_policy(self.method)
        self.label = label or f"train {self.name}"
        args = AlignmentConfig(f"out-{self.name}") if args is None else args
        if type(self).compute_loss is not AlignmentTrainer.compute_loss:
            raise TrainingError(
                f"{self.label}: {type(self).__name__} has a compute_loss, which is not called: the loss is "
                "the method's; write it as a Method (docs/adding-a-method.md)"
            )
        check_kind("callbacks", callbacks, list | None, "a list")
        check_kind("optimizers", optimizers, tuple | list, "(optimizer, schedule), with None for the default")
        given = read_given(
            self.label,
            self.method,
            args,
            model=model,
            processing_class=processing_class,
            train=train_dataset,
            held_out=eval_dataset,
            reward_funcs=reward_funcs,
        )
        server = server_of(self.label, self.method, args, given.source, adapter_of(model, peft_config))
        policy, base = load_policy(self.label, self.method, args, given, model, peft_config, optimizers[0])
        self.policy, self.statistics, self._encode = policy, given.rows.statistics, given.encode
        self.rows: list[Any] = given.rows.train
        self.processes = Processes.here()
        # The forward that accelerate wraps in its autocast; it is put back after training.
        self._own_forward = vars(policy.model).get("forward")
        super().__init__(
            model=policy.model,
            args=args,
            data_collator=lambda items: {"indices": [i for i, _ in items], "rows": [row for _, row in items]},
            train_dataset=list(enumerate(self.rows)),  # pyright: ignore[reportArgumentType]
            eval_dataset=given.rows.held_out,  # pyright: ignore[reportArgumentType]
            processing_class=given.tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # Else the order of rows would be that of torch's global seed when training begins.
        self.accelerator.dataloader_config.data_seed = args.seed if args.data_seed is None else args.data_seed
        if isinstance(policy.reference, nn.Module):
            # The Trainer has put the policy where it is trained.
            policy.reference.to(args.device)
            if self.is_fsdp_enabled or self.is_sharded:
                shard(policy.reference)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.token_budget = args.token_budget
        budget = self.token_budget or FORWARD_BUDGET
        reward, self.trained_rewards = load_rewards(
            given.rewards, given.rows, base or policy.model, given.tokenizer, given.source, args, token_budget=budget
        )
        ends = end_ids(policy.model, given.end_id)
        self.reward_names = [reward_name(reward) for reward in given.rewards]
        self.held_out_digest = held_out_digest(given.rows.held_out)
        self.rollout = Rollout(args.rollout, given.end_id, reward, ends, self.processes, server)
        self.extra_evaluation = extra_evaluation
        self.temperature = temperature_of(self.method, args)
        # Others' log-probabilities are of full precision.
        shared = reference_cache is not None and self.temperature == 1 and self.accelerator.mixed_precision == "no"
        self.reference_cache: dict[tuple, Tensor] = reference_cache if shared and reference_cache is not None else {}
        health = args.health_settings
        self.monitor = Monitor(health, self.label) if health is not None else None
        self.guard = Guard(self.label)
        # Numbers for the next log line, and for the last one.
        self.metrics, self.whole_run = MetricAverager(self.processes), MetricAverager(self.processes)
        self._pair_rewards: dict[tuple, Tensor] = {}
        self.worker, self.reference_responses = None, None
        if self.on_policy:
            self.worker = RolloutWorker(
                policy, self.method, self.rollout, self.rows,
                args=args, monitor=self.monitor, metrics=self.metrics, run=self.run,
            )  # fmt: skip
        if "reference" in self.needs.pairs:
            self.reference_responses = ReferenceResponses(
                policy, self.needs, self.rollout, self.rows, args=args, metrics=self.metrics, run=self.run
            )
        self.start: dict[str, dict[str, float]] = {}
        self._step = StepTotals()
        self.add_callback(GoesOn(self))

    def get_train_dataloader(self) -> DataLoader:
        """As the Trainer's; by rounds for a method that draws responses.

        Each of several processes gets the batches of all: `training_step` deals their prompts.
        """
        dataset: Any = self.train_dataset
        batch = self.args.per_device_train_batch_size * self.processes.count
        if self.worker is not None:
            loader = DataLoader(dataset, batch_sampler=self.worker.batches, collate_fn=self.data_collator)
        elif self.args.dataloader_drop_last and len(self.rows) < batch:
            raise TrainingError(
                f"{self.label}: dataloader_drop_last leaves out a batch that is not full, and {len(self.rows)} rows "
                f"are less than one of {batch}; leave it out, or lower per_device_train_batch_size"
            )
        elif self.processes.count == 1:
            return super().get_train_dataloader()
        else:
            loader = DataLoader(
                dataset,
                batch_size=batch,
                sampler=RandomSampler(dataset),
                collate_fn=self.data_collator,
                drop_last=self.args.dataloader_drop_last,
            )
        seed = self.accelerator.dataloader_config.data_seed
        return prepare_data_loader(loader, num_processes=1, process_index=0, use_seedable_sampler=True, data_seed=seed)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As the Trainer's. Raises TrainingError for settings that torch refuses only here."""
        with self._explain_optimizer():
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> torch.optim.lr_scheduler.LRScheduler:
        """As the Trainer's. Raises TrainingError for settings that transformers refuses only here."""
        with self._explain_optimizer():
            return super().create_scheduler(*args, **kwargs)

    @contextmanager
    def _explain_optimizer(self) -> Iterator[None]:
        try:
            yield
        except (TypeError, ValueError, ImportError) as error:
            raise TrainingError(
                f"{self.label}: the optimizer or its schedule cannot be made ({' '.join(str(error).split())[:200]}); "
                "see optim, optim_args, adam_beta1, lr_scheduler_type and lr_scheduler_kwargs"
            ) from error

    # A step -----------------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: int | None = None) -> Tensor:
        """Gradients of one batch, micro-batch by micro-batch; returns its part of the mean loss over the step."""
        if self.memory is None:
            keep_outer_weights(self._wrapper)
            self.memory = self.estimate_memory()
        started = time.perf_counter()
        model.train()
        rows, step = inputs["rows"], self.state.global_step
        batch = self.collect(rows, inputs["indices"], num_items_in_batch)
        total = torch.zeros((), device=self.args.device)
        micro_batches = batch.micro_batches(self._budget(), self.processes)
        with self._weights_for_gradients():
            for number, micro in enumerate(micro_batches, 1):
                with self.explain_out_of_memory(micro), self._meeting(last=number == len(micro_batches)):
                    with self.processes.together():
                        scores = self.score([prompt.group for prompt in micro.prompts])
                        pairs, samples = micro.inputs(scores, self.needs, self.rollout.settings.pairing)
                        loss = self.method.loss(pairs, samples) * micro.weight
                        self.guard.check_loss(loss, scores, [rows[index] for index in micro.indices], step)
                    # Its share of the step is in the weight: accelerate divides by nothing more, but by the processes.
                    self.accelerator.backward(loss * self.processes.count)
                if micro.weight:
                    self.record(micro, scores, samples)
                total += loss.detach().to(total.dtype)
        if self.accelerator.sync_gradients:
            self.guard.check_gradients(model.parameters(), step, scaled=self.accelerator.scaler is not None)
        return self.log_step(batch, total, started)

    def collect(self, rows: Sequence[Row], indices: Sequence[int], step_prompts: int | None = None) -> Batch:
        """All that the method needs for these prompts, computed without gradient. `indices` are their row numbers.

        `step_prompts` is the number of prompts of the optimizer step, over all its batches.
        """
        sources: list[list[PromptGroup]] = []
        if "labelled" in self.needs.pairs:
            sources.append(self.labelled(rows, reference=self.needs.reference, rewards=self.needs.reward))
        if self.reference_responses is not None:
            with self.save_on_failure():
                self.reference_responses.draw(self._budget())
            sources.append(self.reference_responses.collect(rows))
        if self.worker is not None:
            with self.save_on_failure():
                self.worker.draw_round(indices, self.state.global_step, self._budget())
            sources.append(self.worker.collect(indices))
        prompts = [reduce(merge, groups) for groups in zip(*sources, strict=True)]
        return Batch(prompts, step_prompts or len(rows) * self.args.gradient_accumulation_steps)

    def score(self, groups: Sequence[Group]) -> Scores:
        """One pass of the policy over some groups, with what the method's loss reads of it."""
        needs, policy = self.needs, self.policy
        return self.run(
            lambda: score(
                policy.model,
                groups,
                reference=policy.reference if needs.kl else None,
                entropy=needs.entropy,
                temperature=self.temperature,
                value_head=policy.value_head,
            ),
            gradient=True,
        )

    def record(self, micro: MicroBatch, scores: Scores, samples: Samples) -> None:
        """Take from a pass what the next log line says."""
        needs = self.needs
        if "labelled" in needs.pairs:
            pairs = micro.labelled(scores)
            self.metrics.add(pair_metrics(self.method, pairs), len(micro.prompts))
            if self.state.global_step == 0 and not self.start:
                rewards = implicit_rewards(self.method, pairs).detach()
                self._step.gaps.append((rewards[:, 0] - rewards[:, 1]).abs())
        if needs.samples and not needs.values and "behavior_token_logps" in micro.prompts[0].constants:
            self._step.weights.append(importance_weights(samples)[:, -1])
        if self.worker is not None:
            self.worker.record(scores, micro.prompts, self.state.global_step)

    def log_step(self, batch: Batch, total: Tensor, started: float) -> Tensor:
        """Take what is known once all micro-batches of a batch, and all batches of a step, are through."""
        step = self.state.global_step
        if self.worker is not None:
            self.worker.finish_batch(step)
            self._stop_if_collapsed()
        totals = self._step
        totals.seconds += time.perf_counter() - started
        totals.tokens += batch.tokens
        totals.loss += float(total)
        if self.accelerator.sync_gradients:
            # transformers' own sums are not in its checkpoints: a run that goes on would log other means.
            count = self.processes.count
            gaps, weights = self._of_all(totals.gaps, totals.weights)
            if len(gaps):
                check_sharpness(self.label, float(gaps.median()))
            metrics = {"step_time": totals.seconds, "tokens_per_second": totals.tokens / totals.seconds}
            if len(weights):
                metrics["rollout/effective_samples"] = effective_share(weights)
            self.metrics.add({"loss": totals.loss * count, **metrics})
            self.whole_run.add({"train_loss": totals.loss * count})
            self._step = StepTotals()
        mean = total * self.processes.count * batch.step_prompts / len(batch.prompts)
        self._advance(step + 1, self.state.max_steps, f"loss {mean:.3f}")
        return total

    def _of_all(self, *parts: list[Tensor]) -> list[Tensor]:
        """For each of these, the numbers of all processes in one row on the CPU; a process may have none of its own."""
        gathered = zip(*self.processes.gather(parts), strict=True)
        return [torch.cat([torch.zeros(0), *(p.detach().cpu() for own in each for p in own)]) for each in gathered]

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], int]:
        """As the Trainer's: the batches of an optimizer step; with the number of their prompts.

        Here a step begins, or does not: where the run was asked to stop, or had ended before it was gone on with.
        """
        self._stop_if_told()
        self.ended_before = self.ended_before or self.state.global_step >= self.state.max_steps
        if self.ended_before:
            self.control.should_training_stop = True
            return [], 0
        self._at_step_start, self._step = self._state(), StepTotals()
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, sum(len(batch["rows"]) for batch in batches)

    def _stop_if_collapsed(self) -> None:
        monitor = self.monitor
        if monitor is None or monitor.collapsed is None or not monitor.settings.stop_on_collapse:
            return
        logger.warning("%s stops at step %d: %s", self.label, self.state.global_step, monitor.collapsed)
        self.control.should_save = self.control.should_training_stop = True

    # Labelled pairs ---------------------------------------------------------------------------------------------------

    def labelled(self, rows: Sequence[Any], *, reference: bool, rewards: bool = False) -> list[PromptGroup]:
        """Labelled pairs; with log-probabilities under the reference, and rewards, if they are asked for."""
        if reference:
            self._score_reference(rows)
        if rewards:
            with self.save_on_failure():
                self._reward_pairs(rows)
        return [
            PromptGroup(
                Group(row.prompt, [row.chosen, row.rejected]),
                labelled=2,
                probability=row.label,
                reference_logps=self.reference_cache[row.key] if reference else None,
                rewards=self._pair_rewards[_reward_key(row)] if rewards else None,
            )
            for row in rows
        ]

    def _reward_pairs(self, rows: Sequence[EncodedPair]) -> None:
        """Each pair is rewarded once in a run."""
        missing = [row for row in rows if _reward_key(row) not in self._pair_rewards]
        if missing:
            started = time.perf_counter()
            requests = [Request(row.prompt, [row.chosen, row.rejected], row.row) for row in missing]
            for row, pair in zip(missing, self.rollout.rewards_as_given(requests), strict=True):
                self._pair_rewards[_reward_key(row)] = pair
            self.metrics.add({"reward_time": time.perf_counter() - started})

    def _score_reference(self, rows: Sequence[EncodedPair]) -> None:
        missing = [row for row in rows if row.key not in self.reference_cache]
        if missing:
            logps = self.run(lambda: self._pair_logps(missing, of_reference=True))
            for row, pair in zip(missing, logps, strict=True):
                self.reference_cache[row.key] = pair

    def _pair_logps(self, rows: Sequence[EncodedPair], *, of_reference: bool = False) -> Float[Tensor, "pairs 2"]:
        groups = [Group(row.prompt, [row.chosen, row.rejected]) for row in rows]
        budget, temperature = self._budget(), self.temperature
        sizes = [group.tokens for group in groups]
        with self.policy.as_reference() if of_reference else nullcontext(self.policy.model) as model:

            def each(some: list[Group]) -> list[Tensor]:
                return list(
                    score_in_batches(model, some, token_budget=budget, temperature=temperature).logps.cpu().view(-1, 2)
                )

            return torch.stack(self.processes.map(each, groups, sizes)).to(self.args.device)

    def held_out(self, rows: Sequence[EncodedPair]) -> Pairs:
        """Log-probabilities of labelled pairs under the policy, and under the reference where there is one."""
        prompts = self.labelled(rows, reference=self.policy.reference is not None)
        return labelled_pairs(self.run(lambda: self._pair_logps(rows)), prompts)

    # A run ------------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train, showing progress. As `transformers.Trainer.train`; a resumed run skips the checks of the start.

        True goes on from the newest complete checkpoint; a run that had ended trains no step. SIGINT and SIGTERM let
        the step end, save, and raise KeyboardInterrupt and SystemExit(143). Raises InputError where another process
        trains in the folder, and for a checkpoint that is not whole or is of another run.
        """
        if self.needs.values and self.policy.value_head is None:
            raise TrainingError(f"{self.label}: has trained, and its critic is gone; make a new trainer")
        check_trained(self.label, self.policy.model, None)
        # Of the weights before the first step.
        with gathered(self.policy.model):
            _ = self.identity
        with ExitStack() as stack, self._finish_step_on_signals():
            self.processes.from_first(lambda: stack.enter_context(locked(self._folder)))
            # `accelerate launch --cpu` starts one, whatever number it is given.
            if self.processes.count > 1 or "ACCELERATE_USE_CPU" in os.environ:
                each, kind = self.args.per_device_train_batch_size, self.accelerator.distributed_type.value
                logger.info("%s: processes: %d (%s), %d prompts each", self.label, self.processes.count, kind, each)
            checkpoint = self._checkpoint(resume_from_checkpoint)
            self.processes.from_first(self._save_rewards)
            self.args.eval_on_start = self.args.eval_on_start and checkpoint is None
            self.ended_before, self._saved_step, self._half_step = False, -1, None
            if self.worker is not None:
                self.worker.begin()
            if checkpoint is not None:
                self._resume(checkpoint)
            else:
                if self.state.global_step == 0:
                    groups = [Group(row.prompt, [row.prompt[-1:]]) for row in self.rows[:2]]
                    self.run(lambda: self.policy.assert_starts_at_reference(groups))
                self.processes.from_first(lambda: set_aside(self._folder))
                for old in [*self._folder.glob(LATER), *self._folder.glob("metrics.jsonl")]:
                    logger.warning("%s is of an earlier run, and could be taken for one of this: remove it", old)
            shown = progress(self.label, 1) if self.processes.first else nullcontext(lambda *_: None)
            with shown as self._advance, self._explain_out_of_memory_outside():
                try:
                    result = super().train(resume_from_checkpoint=checkpoint and str(checkpoint), **kwargs)
                    if checkpoint is not None and self.state.global_step == step_of(checkpoint):
                        step = step_of(checkpoint)
                        self._advance(step, step, "had ended")
                        logger.info("%s: had ended at step %d: nothing is trained", self.label, step)
                    self._stop_if_told()
                    return result
                finally:
                    self.policy.remove_value_head()
                    self._put_forward_back()

    def _put_forward_back(self) -> None:
        """Take off the autocast that accelerate put around the model's forward."""
        vars(self.policy.model).pop("_original_forward", None)
        if self._own_forward is None:
            vars(self.policy.model).pop("forward", None)
        else:
            self.policy.model.forward = self._own_forward

    # Memory -----------------------------------------------------------------------------------------------------------

    def _budget(self) -> int:
        """Tokens of a micro-batch: the setting, or the largest power of two that takes half of what fits in memory."""
        if self.token_budget is None:
            most = 4096 if self.args.device.type == "cpu" else 16_384
            fits = self._estimate(1).largest_budget()
            budget = min(self.processes.gather(most if fits is None else max(1, min(most, fits // 2))))
            self.token_budget = 1 << (budget.bit_length() - 1)
            logger.info("%s: token_budget is %d, chosen from free memory", self.label, self.token_budget)
        return self.token_budget

    def estimate_memory(self) -> MemoryEstimate:
        """What the run will need, measured on the model as it is trained; logged, with a warning if it does not fit."""
        memory = self._estimate(self._budget())
        logger.info("%s", memory)
        logger.info("%s: %s", self.label, self.run(lambda: precision(self.policy.model)))
        if not memory.fits():
            logger.warning("%s is likely to run out of memory: %s", self.label, memory.advice())
        return memory

    def _estimate(self, token_budget: int) -> MemoryEstimate:
        reward = self.rollout.reward
        parts = [part for _, part in reward.parts] if isinstance(reward, WeightedSum) else [reward]
        others = [self.policy.reference, *(m for part in parts for m in getattr(part, "__dict__", {}).values())]
        # No backward follows: DDP must not wait for one.
        with self._weights_for_gradients(), self._meeting(last=False):
            return estimate(
                self.policy.model,
                self.score,
                expected_lengths(self.rows, self.method, self.rollout.settings),
                token_budget=token_budget,
                batch=self.args.per_device_train_batch_size,
                free=available(self.args.device),
                state=2.0 if self.args.optim in ("adamw_torch", "adamw_torch_fused") else None,
                resident=[module for module in others if isinstance(module, nn.Module)],
            )

    @contextmanager
    def explain_out_of_memory(self, micro: MicroBatch) -> Iterator[None]:
        """Turn a lack of memory in a micro-batch into a TrainingError that says what to set; the run is saved first."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or self.memory is None:
                raise
            # What the pass holds is let go, so that there is memory to save with.
            traceback.clear_frames(error.__traceback__)
            # Several processes save together, and the others are in the pass.
            saved = f"; {self._save_now()}: go on with --resume" if self.processes.count == 1 else ""
            raise TrainingError(
                f"{self.label}: out of memory at step {self.state.global_step + 1}, in a micro-batch of {micro.tokens} "
                f"tokens{asked_for(error)}; {self.memory.advice(micro.tokens)}{saved}"
            ) from error

    @contextmanager
    def _explain_out_of_memory_outside(self) -> Iterator[None]:
        """As `explain_out_of_memory`, outside micro-batches. Nothing is saved: an update may be half-way."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise TrainingError(
                f"{self.label}: out of memory outside a micro-batch, for the optimizer's state or in an evaluation "
                f"({' '.join(str(error).split())[:200]}); {LESS}, or an optimizer with less state (training.optim)"
            ) from error

    # Evaluation -------------------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Held-out pairs: `loss` is the logistic NLL of the labels under the implicit reward, in nats.

        So methods compare, and early stopping has one meaning. With it come the pair metrics. Of several sets each has
        its name in its metrics. Against its start a run is measured on its own sets, and its health is watched on the
        first of them; one of them may be asked for by its name. Raises TrainingError if there are no held-out pairs.
        """
        sets: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(self.eval_dataset, Mapping) and isinstance(sets, str) and sets in self.eval_dataset:
            sets = {sets: self.eval_dataset[sets]}
        if sets is None:
            raise TrainingError(f"{self.label}: nothing to evaluate on; pass eval_dataset, held-out pairs")
        prefixes = (
            {f"{metric_key_prefix}_{name}": rows for name, rows in sets.items()}
            if isinstance(sets, Mapping)
            else {metric_key_prefix: sets}
        )
        metrics: dict[str, float] = {}
        for number, (prefix, rows) in enumerate(prefixes.items()):
            encoded = self._encode(rows, prefix)
            values = self._measure(encoded)
            if eval_dataset is None:
                values |= self._since_start(values, prefix)
                values |= self._watch(values["logps/chosen"], encoded) if number == 0 else {}
            metrics |= {f"{prefix}_{name}": value for name, value in values.items()}
        if self.extra_evaluation is not None:
            metrics |= {f"{metric_key_prefix}_{name}": value for name, value in self.run(self._extra).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.is_in_train and self.args.load_best_model_at_end and eval_dataset is None:
            # Only a step that is saved can be kept.
            self.control.should_save = True
            if self.state.global_step == 0:
                self._keep_start(metrics)
        return metrics

    def _measure(self, rows: list[EncodedPair]) -> dict[str, float]:
        pairs = self.held_out(rows)
        rewards = implicit_rewards(self.method, pairs)
        logit = rewards[:, 0] - rewards[:, 1]
        values = {
            "loss": float(preference_nll(logit, pairs.probability).mean()),
            **pair_metrics(self.method, pairs),
            "preference/median_logit": float(logit.abs().median()),
        }
        if not math.isfinite(values["loss"]):
            raise TrainingError(f"{self.label}: the held-out loss is {values['loss']}; {ADVICE}")
        return values

    def _since_start(self, values: dict[str, float], prefix: str) -> dict[str, float]:
        if prefix not in self.start:
            # A run that goes on remembers where it started.
            logged = [row for row in self.state.log_history if f"{prefix}_health/chosen_logps_change" in row]
            self.start[prefix] = {name: logged[0][f"{prefix}_{name}"] for name in values} if logged else values
            if self.state.global_step == 0:
                check_sharpness(self.label, self.start[prefix]["preference/median_logit"])
        return {"health/chosen_logps_change": values["logps/chosen"] - self.start[prefix]["logps/chosen"]}

    def _extra(self) -> dict[str, float]:
        assert self.extra_evaluation is not None
        with evaluating(self.policy.model):
            return self.extra_evaluation(self.policy.model)

    def _watch(self, chosen_logps: float, rows: list[EncodedPair]) -> dict[str, float]:
        """Health at an evaluation. A method that draws no responses itself has some drawn, only to be looked at."""
        if self.monitor is None:
            return {}
        if self.on_policy:
            return self.monitor.update({"logps/chosen": chosen_logps}, self.state.global_step)
        limit, budget, seed = self.monitor.settings.prompts, self._budget(), self.args.seed
        step, policy, rollout = self.state.global_step, self.policy, self.rollout
        metrics = self.run(
            lambda: observe(policy, rollout, rows, limit=limit, token_budget=budget, seed=seed, step=step)
        )
        if not metrics:
            return {}
        metrics |= self.monitor.update({**metrics, "logps/chosen": chosen_logps}, self.state.global_step)
        self._stop_if_collapsed()
        return metrics

    def _keep_start(self, metrics: dict[str, float]) -> None:
        """The start is a candidate too: if no step improves on it, it is what load_best_model_at_end restores."""
        best = f"eval_{str(self.args.metric_for_best_model).removeprefix('eval_')}"
        if best not in metrics:
            raise TrainingError(f"{self.label}: metric_for_best_model is {best}; take one of {', '.join(metrics)}")
        self.state.best_metric = metrics[best]
        self.state.best_global_step = 0
        self.state.best_model_checkpoint = str(self._folder / "checkpoint-0")
        self._save_checkpoint(self._wrapper, trial=None)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Not of a policy. Raises TrainingError that says what to call."""
        raise TrainingError(
            f"{self.label}: predict is for classifiers; evaluate(pairs) measures held-out pairs, and "
            "`distalign evaluate` drawn responses"
        )

    # Logging ----------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the means of what was added since the last training log, and write the line to metrics.jsonl."""
        if "loss" in logs:
            logs |= self.metrics.take()
        if "train_loss" in logs:
            # The last step has ended, and the best is not loaded yet.
            self._stop_if_told()
            logs |= self.whole_run.take()
        super().log(logs, start_time)
        if self.is_world_process_zero():
            line = {"step": self.state.global_step, **logs}
            with (self._folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def _reward_key(row: EncodedPair) -> tuple:
    """What the reward of a pair depends on: rows of the same text, and of one place, may have other columns."""
    return row.key, row.where, hash(repr(row.row))
