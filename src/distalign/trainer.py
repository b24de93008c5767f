"""The trainer: read what a method needs, collect exactly that, call its loss, step, log. It never asks which method.

A subclass of `transformers.Trainer`: arguments, checkpoints, schedules, loggers and callbacks are that library's. A
batch is counted in prompts, and the loss is a mean over the prompts of an optimizer step, however they are split.
"""

from __future__ import annotations

import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from distalign.data import EncodedPair
from distalign.engine import Group, micro_batches, score, score_in_batches
from distalign.errors import InputError
from distalign.methods import Method, Pairs
from distalign.policy import Policy
from distalign.preference import preference_logit, preference_nll
from distalign.progress import progress

logger = logging.getLogger("distalign.trainer")

# |implied reward gap| at which labels carry information, in nats: below it every pair is a fair coin, above it certain.
INFORMATIVE = (0.1, 5.0)


class TrainingError(InputError):
    """Training cannot start: says what was found and what to do."""


@dataclass(frozen=True)
class Collected:
    """One prompt of a round with all that stays constant while its loss is computed."""

    group: Group
    probability: float | None = None
    reference_logps: Float[Tensor, "2"] | None = None


def check_trainable(name: str, method: Method) -> None:
    """Raise TrainingError if `method` needs what this trainer cannot collect: responses sampled from the policy."""
    needs = method.needs
    if needs.pairs == "sampled" or needs.samples:
        wanted = "sampled responses and a reward" if needs.reward else "sampled responses"
        hint = "set beta to 0" if needs.pairs == "labelled" else "take a method that learns from labelled pairs"
        raise TrainingError(f"{name}: {method} needs {wanted}, which this version does not collect; {hint}")


class AlignmentTrainer(Trainer):
    """Train a policy by any method whose needs are labelled pairs, or labelled pairs and the reference.

    Metrics, besides the Trainer's own, are means over pairs: `rewards/chosen`, `rewards/rejected`, `rewards/margins`
    (the method's implied reward, nats), `rewards/accuracies`, `logps/chosen`, `logps/rejected` (sums, nats), and
    `tokens_per_second`, `step_time` (s). Every log line is also a line of `metrics.jsonl`.

    `extra_evaluation` is called at each evaluation and adds to its metrics. `reference_cache` keeps the reference's
    log-probabilities of pairs seen (by their `key`); trainers with the same reference and pairs may share it.
    Raises TrainingError for what cannot be trained, and ModelError if the policy does not start at its reference.
    """

    def __init__(
        self,
        policy: Policy,
        method: Method,
        args: TrainingArguments,
        train_pairs: Sequence[EncodedPair],
        eval_pairs: Sequence[EncodedPair] | None = None,
        *,
        token_budget: int,
        label: str = "train",
        patience: int | None = None,
        min_delta: float = 0.0,
        extra_evaluation: Callable[[nn.Module], dict[str, float]] | None = None,
        reference_cache: dict[tuple, Tensor] | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        check_trainable(label, method)
        if args.world_size > 1 or args.n_gpu > 1:
            raise TrainingError(
                f"{max(args.world_size, args.n_gpu)} devices found; this version trains on one: start one process and "
                "show it one device (CUDA_VISIBLE_DEVICES=0)"
            )
        if method.needs.reference and policy.reference is None:
            raise TrainingError(f"{label} needs the reference, but the policy was made without; pass reference=True")
        args.remove_unused_columns = False
        stopping: list[TrainerCallback] = []
        if patience is not None and eval_pairs:
            stopping.append(EarlyStoppingCallback(patience, min_delta))
        super().__init__(
            model=policy.model,
            args=args,
            data_collator=lambda rows: {"rows": rows},
            train_dataset=list(train_pairs),  # pyright: ignore[reportArgumentType]
            eval_dataset=list(eval_pairs) if eval_pairs else None,  # pyright: ignore[reportArgumentType]
            processing_class=policy.tokenizer,
            callbacks=[*(callbacks or []), *stopping],
        )
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.policy, self.method, self.token_budget, self.label = policy, method, token_budget, label
        self.extra_evaluation = extra_evaluation
        self.reference_cache = {} if reference_cache is None else reference_cache
        self.start: dict[str, float] = {}
        self._noted: dict[str, list[tuple[float, int]]] = defaultdict(list)

    # What a step reads ------------------------------------------------------------------------------------------------

    def collect(self, rows: Sequence[EncodedPair]) -> list[Collected]:
        """All that the method needs for these prompts, computed without gradient: here, reference log-probabilities."""
        if self.method.needs.reference:
            self._score_reference(rows)
        return [
            Collected(
                Group(row.prompt, [row.chosen, row.rejected]),
                row.probability,
                self.reference_cache[row.key] if self.method.needs.reference else None,
            )
            for row in rows
        ]

    def _score_reference(self, rows: Sequence[EncodedPair]) -> None:
        missing = [row for row in rows if row.key not in self.reference_cache]
        if not missing:
            return
        assert self.policy.reference is not None
        groups = [Group(row.prompt, [row.chosen, row.rejected]) for row in missing]
        reference = self.policy.reference
        if isinstance(reference, nn.Module):
            logps = score_in_batches(reference, groups, token_budget=self.token_budget).logps
        else:
            with reference() as model:
                training = model.training
                logps = score_in_batches(model.eval(), groups, token_budget=self.token_budget).logps
                model.train(training)
        for row, pair in zip(missing, logps.view(-1, 2), strict=True):
            self.reference_cache[row.key] = pair

    def pairs(self, model: nn.Module, collected: Sequence[Collected]) -> Pairs:
        """What the loss is given: one pass of the policy over the collected prompts."""
        logps = score(model, [one.group for one in collected]).logps.view(-1, 2)
        return self._labelled(logps, collected)

    def _labelled(self, logps: Float[Tensor, "pairs 2"], collected: Sequence[Collected]) -> Pairs:
        soft = any(one.probability is not None for one in collected)
        labels = [1.0 if one.probability is None else one.probability for one in collected]
        references = [one.reference_logps for one in collected if one.reference_logps is not None]
        return Pairs(
            logps=logps,
            reference_logps=torch.stack(references).to(logps) if references else None,
            probability=logps.new_tensor(labels) if soft else None,
        )

    # Steps ------------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """Train, showing progress. As `transformers.Trainer.train`; the start of a run that goes on is behind it."""
        self.args.eval_on_start = self.args.eval_on_start and not resume_from_checkpoint
        if not resume_from_checkpoint:
            rows: Any = self.train_dataset
            self.policy.assert_starts_at_reference([Group(row.prompt, [row.chosen]) for row in rows[:2]])
        with progress(self.label, 1) as self._advance:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> int:
        return sum(len(batch["rows"]) for batch in batch_samples)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Gradients of one batch, micro-batch by micro-batch; returns its part of the mean loss over the step."""
        started = time.perf_counter()
        rows = inputs["rows"]
        model.train()
        collected = self.collect(rows)
        whole = num_items_in_batch or len(rows) * self.current_gradient_accumulation_steps
        total = torch.zeros((), device=self.args.device)
        for indices in micro_batches([one.group for one in collected], self.token_budget):
            micro = [collected[index] for index in indices]
            with self.compute_loss_context_manager():
                pairs = self.pairs(model, micro)
                loss = self.method.loss(pairs, None) * (len(micro) / whole)
            self.accelerator.backward(loss)
            total += loss.detach().to(total.dtype)
            self._note(self._pair_metrics(pairs), len(micro))
        self._note_time(started, collected)
        self._advance(self.state.global_step + 1, self.state.max_steps, f"loss {total * whole / len(rows):.3f}")
        return total

    def _note_time(self, started: float, collected: Sequence[Collected]) -> None:
        seconds = time.perf_counter() - started
        tokens = sum(one.group.tokens for one in collected)
        self._note({"step_time": seconds, "tokens_per_second": tokens / seconds}, 1)

    def _pair_metrics(self, pairs: Pairs) -> dict[str, float]:
        with torch.no_grad():
            rewards = self.method.implied_reward(pairs.logps, pairs.reference_logps)
            margins = rewards[:, 0] - rewards[:, 1]
            first = (margins.sign() + 1) / 2
            label = torch.ones_like(first) if pairs.probability is None else pairs.probability
            means = {
                "rewards/chosen": rewards[:, 0],
                "rewards/rejected": rewards[:, 1],
                "rewards/margins": margins,
                "rewards/accuracies": label * first + (1 - label) * (1 - first),
                "logps/chosen": pairs.logps[:, 0],
                "logps/rejected": pairs.logps[:, 1],
            }
            return {name: float(values.detach().mean()) for name, values in means.items()}

    def _note(self, metrics: dict[str, float], weight: int) -> None:
        for name, value in metrics.items():
            self._noted[name].append((value, weight))

    # Evaluation -------------------------------------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Held-out pairs: `loss` is the negative log-likelihood of the labels, in nats a pair; and the pair metrics."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        assert rows is not None
        collected = self.collect(list(rows))  # pyright: ignore[reportArgumentType]
        model: Any = self.model
        training = model.training
        model.eval()
        logps = score_in_batches(model, [one.group for one in collected], token_budget=self.token_budget).logps
        pairs = self._labelled(logps.view(-1, 2), collected)
        extra = self.extra_evaluation(model) if self.extra_evaluation else {}
        model.train(training)
        rewards = self.method.implied_reward(pairs.logps, pairs.reference_logps)
        logit = preference_logit(rewards, gamma=1.0)
        found = {
            "loss": float(preference_nll(logit, pairs.probability).mean()),
            **self._pair_metrics(pairs),
            "preference/median_logit": float(logit.abs().median()),
        }
        if not self.start:
            # A run that goes on remembers where it started.
            told = [row for row in self.state.log_history if f"{metric_key_prefix}_logps/chosen" in row]
            self.start = {name: told[0][f"{metric_key_prefix}_{name}"] for name in found} if told else found
            self._warn_about_sharpness(self.start["preference/median_logit"])
        found["health/chosen_logps_change"] = found["logps/chosen"] - self.start["logps/chosen"]
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in {**found, **extra}.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.is_in_train and self.state.global_step == 0 and self.args.load_best_model_at_end:
            self._keep_start(metrics)
        return metrics

    def _keep_start(self, metrics: dict[str, float]) -> None:
        """The start is a candidate too: if no step improves on it, it is what load_best_model_at_end restores."""
        best = f"eval_{str(self.args.metric_for_best_model).removeprefix('eval_')}"
        if best not in metrics:
            raise TrainingError(f"{self.label}: metric_for_best_model is {best}; take one of {', '.join(metrics)}")
        model: Any = self.model_wrapped
        self._save_checkpoint(model, trial=None)
        self.state.best_metric = metrics[best]
        self.state.best_global_step = 0
        self.state.best_model_checkpoint = str(self._folder / "checkpoint-0")

    def _warn_about_sharpness(self, median: float) -> None:
        low, high = INFORMATIVE
        if median > high:
            logger.warning(
                "%s: the median held-out pair has |logit| %.3g at the start: labels look certain and gradients vanish; "
                "lower gamma by about %.2g times",
                self.label,
                median,
                median,
            )
        elif 1e-6 < median < low:
            logger.warning(
                "%s: the median held-out pair has |logit| %.3g at the start: labels look like coins; raise gamma",
                self.label,
                median,
            )

    # Telling ----------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the means of what was noted since the last training log, and write the line to metrics.jsonl."""
        if "loss" in logs:
            for name, values in self._noted.items():
                logs[name] = sum(value * weight for value, weight in values) / sum(weight for _, weight in values)
            self._noted.clear()
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
