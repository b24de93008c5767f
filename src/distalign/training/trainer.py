"""The trainer: read what a method needs, collect exactly that, call its loss, step, log. It never asks which method.

A subclass of `transformers.Trainer`: arguments, checkpoints, schedules, loggers and callbacks are that library's. A
batch is counted in prompts, and the loss is a mean over the prompts of an optimizer step, however they are split.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from distalign.data import EncodedPair
from distalign.engine import Group, Scores, micro_batches, score, score_in_batches
from distalign.engine.available import available
from distalign.engine.forward import evaluating
from distalign.engine.room import DRAWING, Room, explained, measure, out_of_memory
from distalign.errors import InputError
from distalign.methods import Method, Pairs
from distalign.methods.estimators import importance_weights
from distalign.methods.preference import preference_logit, preference_nll
from distalign.models.policy import Policy
from distalign.progress import progress
from distalign.training.actor import Actor, effective_share, observe
from distalign.training.health import Monitor
from distalign.training.prompts import (
    Collected,
    Notes,
    beside,
    labelled_pairs,
    look,
    pair_metrics,
    reference_of,
    warn_about_sharpness,
)
from distalign.training.rounds import Rollout, TrainingError, acts, check_arguments, check_needs, without_autocast

logger = logging.getLogger("distalign.training.trainer")


class AlignmentTrainer(Trainer):
    """Train a policy by any method, on labelled pairs or on responses that it draws itself, or on both.

    `train_rows` are labelled pairs where the method needs them, else prompts. Methods that draw responses need
    `rollout`, with a reward if they read one; with it, others are watched by a few samples at each evaluation.

    Metrics, besides the Trainer's own: over labelled pairs `rewards/chosen`, `rewards/rejected`, `rewards/margins` (the
    method's implied reward, nats), `rewards/accuracies`, `logps/chosen`, `logps/rejected` (sums, nats); over the
    responses of a round, fresh from the policy, `objective/reward`, `objective/kl`, `objective/entropy` (per sequence,
    nats), `completions/*`, `health/*`; `rollout/effective_samples` is the share that importance weights leave of them;
    `tokens_per_second`, `step_time`, `rollout_time`, `reward_time` (s). Log lines are lines of `metrics.jsonl`.

    `extra_evaluation` is called at each evaluation and adds to its metrics. `reference_cache` keeps the reference's
    log-probabilities of pairs seen (by their `key`); trainers with the same reference and pairs may share it.
    Raises TrainingError for what cannot be trained, and ModelError if the policy does not start at its reference.
    """

    def __init__(
        self,
        policy: Policy,
        method: Method,
        args: TrainingArguments,
        train_rows: Sequence[Any],
        eval_pairs: Sequence[EncodedPair] | None = None,
        *,
        token_budget: int,
        label: str = "train",
        patience: int | None = None,
        min_delta: float = 0.0,
        rollout: Rollout | None = None,
        health: Any = None,
        extra_evaluation: Callable[[nn.Module], dict[str, float]] | None = None,
        reference_cache: dict[tuple, Tensor] | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        self.policy, self.method, self.token_budget, self.label = policy, method, token_budget, label
        self.rollout, self.acts = rollout, acts(method)
        check_arguments(label, args)
        check_needs(label, method, reference=policy.reference is not None, rollout=rollout)
        args.remove_unused_columns = False
        stopping: list[TrainerCallback] = []
        if patience is not None and eval_pairs:
            stopping.append(EarlyStoppingCallback(patience, min_delta))
        if self.acts:
            policy.disable_dropout()
        if method.needs.values:
            policy.add_value_head()
        self.rows = list(train_rows)
        super().__init__(
            model=policy.model,
            args=args,
            data_collator=lambda items: {"indices": [i for i, _ in items], "rows": [row for _, row in items]},
            train_dataset=list(enumerate(self.rows)),  # pyright: ignore[reportArgumentType]
            eval_dataset=list(eval_pairs) if eval_pairs else None,  # pyright: ignore[reportArgumentType]
            processing_class=policy.tokenizer,
            callbacks=[*(callbacks or []), *stopping],
        )
        if isinstance(policy.reference, nn.Module):
            # The Trainer has put the policy where it is trained.
            policy.reference.to(args.device)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.extra_evaluation = extra_evaluation
        # The policy of a run that samples is softmax(logits / temperature), in every term.
        self.temperature = rollout.settings.temperature if rollout is not None and self.acts else 1.0
        # Others' log-probabilities are of full precision.
        shared = reference_cache is not None and self.temperature == 1 and self.accelerator.mixed_precision == "no"
        self.reference_cache: dict[tuple, Tensor] = reference_cache if shared and reference_cache is not None else {}
        self.monitor = Monitor(health, label) if health is not None else None
        self.notes = Notes()
        self.actor = self._actor() if self.acts else None
        self.start: dict[str, float] = {}
        self.room: Room | None = None
        self._seconds, self._tokens, self._weights = 0.0, 0, list[Tensor]()

    def _actor(self) -> Actor:
        assert self.rollout is not None
        settings: Any = {"args": self.args, "token_budget": self.token_budget, "monitor": self.monitor}
        settings["autocast"] = self.accelerator.autocast
        return Actor(self.policy, self.method, self.rollout, self.rows, note=self.notes.add, **settings)

    def get_train_dataloader(self) -> DataLoader:
        """As the Trainer's; by rounds for a method that draws responses."""
        if self.actor is None:
            return super().get_train_dataloader()
        settings: Any = {"batch_sampler": self.actor.batches, "collate_fn": self.data_collator}
        return self.accelerator.prepare(DataLoader(self.train_dataset, **settings))  # pyright: ignore

    # What a step reads ------------------------------------------------------------------------------------------------

    def collect(self, model: nn.Module, rows: Sequence[Any], indices: Sequence[int]) -> list[Collected]:
        """All that the method needs for these prompts, computed without gradient. `indices` are their row numbers."""
        step = self.state.global_step
        drawn = [] if self.actor is None else self.actor.collect(model, indices, step)
        if self.method.needs.pairs != "labelled":
            return drawn
        pairs = self.labelled(rows, reference=self.method.needs.reference)
        return pairs if self.actor is None else [beside(pair, own) for pair, own in zip(pairs, drawn, strict=True)]

    def labelled(self, rows: Sequence[EncodedPair], *, reference: bool) -> list[Collected]:
        """Labelled pairs; with log-probabilities under the reference if they are asked for."""
        if reference:
            self._score_reference(rows)
        return [
            Collected(
                Group(row.prompt, [row.chosen, row.rejected]),
                labelled=2,
                probability=row.probability,
                reference_logps=self.reference_cache[row.key] if reference else None,
            )
            for row in rows
        ]

    def _score_reference(self, rows: Sequence[EncodedPair]) -> None:
        missing = [row for row in rows if row.key not in self.reference_cache]
        if not missing:
            return
        groups = [Group(row.prompt, [row.chosen, row.rejected]) for row in missing]
        with self.accelerator.autocast(), self.policy.as_reference() as model:
            logps = score_in_batches(model, groups, token_budget=self.token_budget, temperature=self.temperature).logps
        for row, pair in zip(missing, logps.view(-1, 2), strict=True):
            self.reference_cache[row.key] = pair

    def score(self, model: nn.Module, collected: Sequence[Collected]) -> Scores:
        """One pass of the policy over the collected prompts, with what the method's loss reads of it."""
        needs = self.method.needs
        return score(
            model,
            [one.group for one in collected],
            reference=self.policy.reference if needs.kl else None,
            entropy=needs.entropy,
            temperature=self.temperature,
            value_head=self.policy.value_head,
        )

    # Steps ------------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """Train, showing progress. As `transformers.Trainer.train`; the start of a run that goes on is behind it."""
        self.args.eval_on_start = self.args.eval_on_start and not resume_from_checkpoint
        if resume_from_checkpoint:
            self._resume(Path(str(resume_from_checkpoint)))
        else:
            with self.accelerator.autocast():
                self.policy.assert_starts_at_reference([Group(row.prompt, [row.prompt[-1:]]) for row in self.rows[:2]])
        self._free = available(self.args.device)
        with progress(self.label, 1) as self._advance, explained(self.label):
            try:
                return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
            finally:
                self.policy.remove_value_head()
                without_autocast(self.model)

    def _resume(self, checkpoint: Path) -> None:
        if self.actor is not None:
            state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            self.actor.load(checkpoint, state.global_step)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = self._folder / f"checkpoint-{self.state.global_step}"
        if self.actor is not None and folder.is_dir():
            self.actor.save(folder, self.state.global_step)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> int:
        return sum(len(batch["rows"]) for batch in batch_samples)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Gradients of one batch, micro-batch by micro-batch; returns its part of the mean loss over the step."""
        if self.room is None:
            self.room = self._find_room(model)
        started = time.perf_counter()
        rows, indices = inputs["rows"], inputs["indices"]
        model.train()
        if self.actor is not None:
            self._enter_round(model, indices)
        collected = self.collect(model, rows, indices)
        whole = num_items_in_batch or len(rows) * self.current_gradient_accumulation_steps
        total = torch.zeros((), device=self.args.device)
        for batch in micro_batches([one.group for one in collected], self.token_budget):
            micro = [collected[index] for index in batch]
            tokens = sum(one.group.tokens for one in micro)
            with self.room.within(tokens, self.state.global_step + 1, self._keep):
                loss = self._micro_batch(model, micro, whole)
            total += loss.to(total.dtype)
        if self.actor is not None:
            self.actor.finish_batch(self.state.global_step)
            self._stop_if_collapsed()
        self._finish_step(started, collected)
        self._advance(self.state.global_step + 1, self.state.max_steps, f"loss {total * whole / len(rows):.3f}")
        return total

    def _micro_batch(self, model: nn.Module, micro: Sequence[Collected], whole: int) -> Tensor:
        # accelerate's own autocast is around the model's forward, which the engine does not call.
        with self.accelerator.autocast():
            scores = self.score(model, micro)
            pairing = "all" if self.rollout is None else self.rollout.settings.pairing
            pairs, samples = look(scores, micro, self.method.needs, pairing)
            loss = self.method.loss(pairs, samples) * (len(micro) / whole)
        self.accelerator.backward(loss)
        if self.method.needs.pairs == "labelled":
            self.notes.add(pair_metrics(self.method, pairs), len(micro))
        if "behavior_token_logps" in micro[0].tensors and self.method.needs.samples and not self.method.needs.values:
            self._weights.append(importance_weights(samples)[:, -1])
        if self.actor is not None:
            self.actor.saw(scores, micro, self.state.global_step)
        return loss.detach()

    def _enter_round(self, model: nn.Module, indices: Sequence[int]) -> None:
        """Draw and reward the round of these rows if it is a new one. If that fails, what there is is saved first."""
        assert self.actor is not None
        try:
            self.actor.enter(model, indices, self.state.global_step, self._folder / "samples.jsonl")
        except Exception as error:
            kept = self._keep()
            if out_of_memory(error):
                raise TrainingError(f"{self.label}: {DRAWING}; {kept}; train on with --resume") from error
            if not isinstance(error, InputError):
                raise
            raise type(error)(f"{error}; {kept} and the responses of this round: mend it and --resume") from error

    def _keep(self) -> str:
        self._save_checkpoint(self.model_wrapped, trial=None)
        return f"{self._folder / f'checkpoint-{self.state.global_step}'} holds the run"

    def _find_room(self, model: nn.Module) -> Room:
        """What the run will need, measured on the model as it is trained."""

        def score(groups: list[Group]) -> Scores:
            return self.score(model, [Collected(group) for group in groups])

        needs = self.method.needs
        settings: Any = {"args": self.args, "token_budget": self.token_budget, "free": self._free}
        with self.accelerator.autocast():
            room = measure(self.label, self.policy, score, self.rows, needs, self.rollout, **settings)
        room.tell()
        return room

    def _stop_if_collapsed(self) -> None:
        monitor = self.monitor
        if monitor is None or monitor.collapsed is None or not monitor.settings.stop_on_collapse:
            return
        logger.warning("%s stops at step %d: %s", self.label, self.state.global_step, monitor.collapsed)
        self.control.should_save = self.control.should_training_stop = True

    def _finish_step(self, started: float, collected: Sequence[Collected]) -> None:
        """Note what is known once all batches of an optimizer step are through."""
        self._seconds += time.perf_counter() - started
        self._tokens += sum(one.group.tokens for one in collected)
        if not self.accelerator.sync_gradients:
            return
        self.notes.add({"step_time": self._seconds, "tokens_per_second": self._tokens / self._seconds}, 1)
        if self._weights:
            self.notes.add({"rollout/effective_samples": effective_share(torch.cat(self._weights))}, 1)
        self._seconds, self._tokens, self._weights = 0.0, 0, []

    # Evaluation -------------------------------------------------------------------------------------------------------

    def held_out(self, rows: Sequence[EncodedPair]) -> Pairs:
        """Log-probabilities of labelled pairs under the policy, and under the reference where there is one."""
        collected = self.labelled(rows, reference=self.policy.reference is not None)
        model: Any = self.model
        groups = [one.group for one in collected]
        with self.accelerator.autocast(), evaluating(model):
            logps = score_in_batches(model, groups, token_budget=self.token_budget, temperature=self.temperature).logps
        return labelled_pairs(logps.view(-1, 2), collected)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Held-out pairs: `loss` is the negative log-likelihood of the labels, in nats a pair; and the pair metrics."""
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        model: Any = self.model
        pairs = self.held_out(rows)
        with self.accelerator.autocast(), evaluating(model):
            extra = self.extra_evaluation(model) if self.extra_evaluation else {}
        rewards = self.method.implicit_reward(pairs.logps, reference_of(pairs))
        logit = preference_logit(rewards, gamma=1.0)
        found = {
            "loss": float(preference_nll(logit, pairs.probability).mean()),
            **pair_metrics(self.method, pairs),
            "preference/median_logit": float(logit.abs().median()),
        }
        if not self.start:
            # A run that goes on remembers where it started.
            told = [row for row in self.state.log_history if f"{metric_key_prefix}_logps/chosen" in row]
            self.start = {name: told[0][f"{metric_key_prefix}_{name}"] for name in found} if told else found
            warn_about_sharpness(self.label, self.start["preference/median_logit"])
        found["health/chosen_logps_change"] = found["logps/chosen"] - self.start["logps/chosen"]
        found |= self._watch(model, found)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in {**found, **extra}.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.is_in_train and self.state.global_step == 0 and self.args.load_best_model_at_end:
            self._keep_start(metrics)
        return metrics

    def _watch(self, model: nn.Module, found: dict[str, float]) -> dict[str, float]:
        """Health at an evaluation. A method that draws no responses itself has some drawn, only to be looked at."""
        if self.rollout is None or self.monitor is None:
            return {}
        if self.acts:
            return self.monitor.update({"logps/chosen": found["logps/chosen"]}, self.state.global_step)
        rows: Any = self.eval_dataset
        limit, seed = self.monitor.settings.prompts, self.args.seed
        with self.accelerator.autocast():
            metrics = observe(self.policy, self.rollout, model, rows, limit, self.token_budget, seed)
        if not metrics:
            return {}
        metrics |= self.monitor.update({**metrics, "logps/chosen": found["logps/chosen"]}, self.state.global_step)
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
        model: Any = self.model_wrapped
        self._save_checkpoint(model, trial=None)

    # Telling ----------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the means of what was noted since the last training log, and write the line to metrics.jsonl."""
        if "loss" in logs:
            logs |= self.notes.take()
        super().log(logs, start_time)
        if self.is_world_process_zero():
            line = {"step": self.state.global_step, **logs}
            with (self._folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    @property
    def _folder(self) -> Path:
        return Path(str(self.args.output_dir))

    @property
    def kept_step(self) -> int:
        """The step whose weights the model has after training: the best on the held-out pairs, or the last."""
        best = self.state.best_global_step if self.args.load_best_model_at_end else None
        return self.state.global_step if best is None else best
