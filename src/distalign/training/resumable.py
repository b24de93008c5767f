"""What a trainer writes, and how it goes on from that: the policy with its card, here and on the hub; checkpoints.

A run can be stopped at any moment and goes on as if it had not been.
"""

from __future__ import annotations

import logging
import os
import random
import re
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage] of whichever httpx it uses
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from distalign.engine import Group, score_in_batches
from distalign.engine.memory import out_of_memory
from distalign.errors import InputError
from distalign.methods import Method
from distalign.models.card import add_licence, model_card
from distalign.models.policy import MODEL_FILES, whole_distribution
from distalign.models.quantized import quantization_of, write_note
from distalign.rewards import Trained
from distalign.settings import masked
from distalign.training.checkpoint import (
    DRAWN_ONCE,
    LATER,
    ROUND,
    VALUES,
    adapter_settings,
    check_belongs,
    checkpoints,
    defect,
    lasting,
    load_reference,
    load_round,
    load_state,
    model_digest,
    newest_complete,
    prune,
    rows_digest,
    save_reference,
    save_round,
    save_state,
    saving,
    step_of,
)
from distalign.training.config import AlignmentConfig
from distalign.training.guard import Guard
from distalign.training.health import Monitor
from distalign.training.passes import WrappedTrainer
from distalign.training.prompts import MetricAverager, merge_sums
from distalign.training.rollout_settings import RolloutSettings, TrainingError, draws_responses
from distalign.training.rounds import ReferenceResponses, Rollout, RolloutWorker
from distalign.training.run_folder import cut_log, remove, whole_folder

logger = logging.getLogger("distalign.training.trainer")

# Settings of rollouts that may be others where a run goes on: memory, what is shown and where a server is, not results.
FREE_SETTINGS = {"decode_batch_size", "num_completions_to_print", "vllm_server_base_url", "vllm_server_timeout"}
# What the optimizer and its schedule take from the checkpoint: others would be written down and not used.
_FROM_CHECKPOINT = (
    *("learning_rate", "weight_decay", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon"),
    "lr_scheduler_type",
    # Which rows are still to come.
    *("data_seed", "train_sampling_strategy", "dataloader_drop_last"),
)
# On what the rest of a schedule depends, but of one that is the same for a run of any length.
_SCHEDULE, _ENDLESS = ("num_train_epochs", "max_steps", "warmup_steps", "lr_scheduler_kwargs"), "constant"


def fixed_arguments(schedule: str) -> tuple[str, ...]:
    """The settings of training that must be the same for a run to go on; `schedule` is its lr_scheduler_type."""
    return _FROM_CHECKPOINT if schedule == _ENDLESS else (*_FROM_CHECKPOINT, *_SCHEDULE)


# Settings of training that a model card names.
CARD_SETTINGS = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps", "optim", "max_grad_norm"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "bf16"),
)


class ResumableTrainer(WrappedTrainer):
    """What `AlignmentTrainer` does beside training: it writes checkpoints whole, stops on signals, and goes on.

    Of its policy it writes no bad one, and nothing of the run's folder to the hub.
    """

    args: AlignmentConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    label: str
    name: str
    method: Method
    rows: list[Any]
    statistics: dict[str, Any]
    rollout: Rollout
    reward_names: list[str]
    held_out_digest: str
    trained_rewards: list[Trained]
    temperature: float
    guard: Guard
    worker: RolloutWorker | None
    reference_responses: ReferenceResponses | None
    reference_cache: dict[tuple, Tensor]
    monitor: Monitor | None
    metrics: MetricAverager
    whole_run: MetricAverager
    token_budget: int | None
    ended_before = False
    resumed_from: Path | None = None
    # Where a checkpoint is written; the step of the last one of this run.
    _scratch: Path | None = None
    _saved_step = -1
    # What a checkpoint holds if the next step fails half-way, and the random state then; the one that began so.
    _at_step_start: Mapping[str, Any] = MappingProxyType({})
    _random_at_step_start: tuple[Any, ...] = ()
    _half_step: Path | None = None
    _stop_signal: int | None = None

    @property
    def _folder(self) -> Path:
        return Path(str(self.args.output_dir))

    def _budget(self) -> int:
        """Tokens of a micro-batch."""
        raise NotImplementedError

    # Signals ----------------------------------------------------------------------------------------------------------

    @contextmanager
    def _finish_step_on_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM are noted, and heard at the end of the step; a second one stops at once."""
        self._stop_signal = None
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, _: object) -> None:
            if self._stop_signal is not None:
                raise _stop(number)
            self._stop_signal = number
            # print is not safe here: the signal may have come in the middle of another.
            os.write(2, b"stopping after this step; the same again stops at once\n")

        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        # What is ignored (under nohup) stays ignored; what is not Python's cannot be put back.
        before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop_if_told(self) -> None:
        """Save and stop if a signal came, to whichever process."""
        told = [number for number in self.processes.gather(self._stop_signal) if number is not None]
        if told:
            self._save_and_stop(min(told))

    def _save_and_stop(self, number: int) -> None:
        if self._saved_step != self.state.global_step:
            self._save_checkpoint(cast(nn.Module, self.model_wrapped), trial=None)
        place = self._folder / f"checkpoint-{self.state.global_step}"
        logger.warning("%s: stopped; %s holds the run: train(resume_from_checkpoint=True) goes on", self.label, place)
        raise _stop(number)

    # Checkpoints ------------------------------------------------------------------------------------------------------

    @cached_property
    def identity(self) -> dict[str, str]:
        """What a checkpoint must be of for this run to go on from it."""
        settings = {name: value for name, value in sorted(vars(self.method).items()) if not name.startswith("_")}
        rollout = self.rollout.settings.model_dump(exclude=FREE_SETTINGS) if draws_responses(self.method) else None
        args, prompts = self.args, self.args.per_device_train_batch_size * self.processes.count
        schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
        taken = {name: getattr(args, name) for name in fixed_arguments(schedule)}
        if isinstance(self.optimizer, torch.optim.Optimizer):
            # One that was given; its own rates hold.
            groups = [{key: value for key, value in g.items() if key != "params"} for g in self.optimizer.param_groups]
            taken["optimizer"] = f"{type(self.optimizer).__name__} {groups}"
        return {
            "method": f"{type(self.method).__name__} {lasting(masked(settings))}",
            "data": rows_digest(self.rows),
            "held-out pairs": self.held_out_digest,
            **adapter_settings(self.policy.model),
            "model": model_digest(self.policy.model),
            "rollout": str(rollout),
            "ends of a response": str(sorted(self.rollout.end_ids)) if rollout else "none",
            "reward": ", ".join(self.reward_names) or "none",
            "reward_weights": str(args.reward_weights),
            "batches": f"{prompts} prompts, {args.gradient_accumulation_steps} a step",
            "seed": str(args.seed),
            **{name: str(getattr(value, "value", value)) for name, value in taken.items()},
        }

    def _checkpoint(self, resume_from_checkpoint: str | bool | None) -> Path | None:
        """The checkpoint to go on from, which is whole and of this run."""
        if not resume_from_checkpoint:
            return None
        if resume_from_checkpoint is True:
            checkpoint = self.processes.from_first(lambda: newest_complete(self._folder))
            if checkpoint is None:
                raise TrainingError(
                    f"{self._folder}: holds no checkpoint to go on from; set save_strategy, or train anew"
                )
        else:
            checkpoint = Path(resume_from_checkpoint)
            if checkpoint.resolve().parent == (self._folder / LATER).resolve():
                raise TrainingError(
                    f"{checkpoint}: waits there to be removed; move all of {LATER} back into {self._folder}, and go on "
                    "from there"
                )
            if reason := defect(checkpoint):
                raise TrainingError(f"{checkpoint}: {reason}; go on from another checkpoint")
        self.processes.from_first(lambda: check_belongs(checkpoint, self.identity))
        return checkpoint

    def _resume(self, checkpoint: Path) -> None:
        step, state, self.resumed_from = step_of(checkpoint), load_state(checkpoint), checkpoint.parent
        if self.worker is not None and (checkpoint / f"{ROUND}.json").is_file():
            self.worker.resume(load_round(checkpoint), step)
        if self.policy.value_head is not None:
            self.policy.value_head.load_state_dict(load_file(checkpoint / VALUES))
        # After the first step only the files know what the reference drew.
        if self.reference_responses is not None and (step > 0 or (checkpoint / f"{DRAWN_ONCE}.json").is_file()):
            self.reference_responses.round = load_round(checkpoint, DRAWN_ONCE)
        if self._remembers_reference:
            self.reference_cache |= load_reference(self.rows, checkpoint, self.args.device)
        if self.monitor is not None and state["health"] is not None:
            self.monitor.load_state_dict(state["health"])
        if self.token_budget is None:
            self.token_budget = state["token_budget"]
        self.metrics.load_state_dict(state["metrics"])
        self.whole_run.load_state_dict(state["whole_run"])
        self._saved_step = step
        self._half_step = checkpoint if state.get("half_step") else None
        self.ended_before = state["ended_early"]
        if self.ended_before:
            logger.warning(
                "%s: early stopping ended the run at step %d, and nothing more is trained: for more steps train anew "
                "with more patience, or without", self.label, step,
            )  # fmt: skip
        if checkpoint.resolve().parent == self._folder.resolve():
            self.processes.from_first(lambda: self._forget_after(step))

    def _forget_after(self, step: int) -> None:
        """What came after is done again. Metrics of a step are written after it, samples before it.

        Later checkpoints wait in a folder of their own until this run has saved one.
        """
        # The newest first, and then the logs: killed in between, the run goes on from the newest that is left.
        for later in reversed(checkpoints(self._folder)):
            if step_of(later) > step:
                aside = self._folder / LATER / later.name
                logger.warning("%s waits in %s until this run has saved a checkpoint, and then goes", later, aside)
                aside.parent.mkdir(exist_ok=True)
                remove(aside)
                os.replace(later, aside)
        cut_log(self._folder / "metrics.jsonl", step)
        cut_log(self._folder / "samples.jsonl", step - 1)

    def _state(self) -> dict[str, Any]:
        stopping = [own for own in self.callback_handler.callbacks if isinstance(own, EarlyStoppingCallback)]
        return {
            "metrics": self.metrics.state_dict(),
            "whole_run": self.whole_run.state_dict(),
            "health": None if self.monitor is None else self.monitor.state_dict(),
            # Early stopping ends a run; one that a collapse or a callback of the user's stopped goes on.
            "ended_early": self.control.should_training_stop
            and self.state.global_step < self.state.max_steps
            and any(own.early_stopping_patience_counter >= own.early_stopping_patience for own in stopping),
        }

    def _get_output_dir(self, trial: object) -> str:
        # Private, with _save_checkpoint: the one way to have transformers write a checkpoint under another name.
        return str(self._scratch or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        # Private: transformers writes into the checkpoint's own folder and then deletes older ones, with no public way
        # to write more before.
        self._write_checkpoint(model, trial, self._state())

    def _write_checkpoint(self, model: nn.Module, trial: object, state: Mapping[str, Any]) -> None:
        """Write a checkpoint whole, then remove older ones. Raises TrainingError where the disk does not take it."""
        self._check_policy()
        folder, step, best = self._folder, self.state.global_step, self.state.best_global_step
        place = folder / f"checkpoint-{step}"
        if best is not None and (best == step or (folder / f"checkpoint-{best}").is_dir()):
            self.state.best_model_checkpoint = str(folder / f"checkpoint-{best}")
        best_place, together = self.state.best_model_checkpoint, self.processes.together
        state = {**state, **self._merged(state), "token_budget": self._budget()}
        try:
            with ExitStack() as stack:
                scratch = self.processes.from_first(lambda: stack.enter_context(saving(folder, step, self.identity)))
                self._scratch = scratch.parent
                with together():
                    super()._save_checkpoint(model, trial)
                    self.state.best_model_checkpoint = best_place
                    if self.processes.first:
                        self._write_rest(scratch, step, state)
                with together():
                    stack.close()
        except InputError as error:
            whole = newest_complete(folder)
            kept = "no checkpoint was saved before" if whole is None else f"{whole.name} is whole: then --resume"
            raise TrainingError(f"{self.label}: {error}; {kept}") from error
        finally:
            self._scratch = None
        self._saved_step = step
        if self.processes.first:
            if "half_step" not in state:
                remove(folder / LATER)
            prune(folder, {place, *([Path(best_place)] if best_place else [])}, self.args.save_total_limit)

    def _write_rest(self, scratch: Path, step: int, state: Mapping[str, Any]) -> None:
        """What a checkpoint holds besides transformers' files."""
        self.state.save_to_json(str(scratch / "trainer_state.json"))
        if self.worker is not None and (drawn := self.worker.position_at(step)) is not None:
            save_round(drawn, scratch)
        if self.policy.value_head is not None:
            save_file(self.policy.value_head.state_dict(), scratch / VALUES)
        if self.reference_responses is not None and self.reference_responses.round is not None:
            save_round(self.reference_responses.round, scratch, DRAWN_ONCE)
        if self._remembers_reference:
            save_reference(self.rows, self.reference_cache, scratch)
        save_state(state, scratch)

    def _merged(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Numbers for the log of all processes."""
        return {name: merge_sums(self.processes.gather(state[name])) for name in ("metrics", "whole_run")}

    @property
    def _remembers_reference(self) -> bool:
        return "labelled" in self.needs.pairs and self.needs.reference

    def _save_now(self) -> str:
        """Save in the middle of a step: it begins anew where the run goes on."""
        if self._random_at_step_start:
            _set_random_state(self._random_at_step_start)
        self._write_checkpoint(cast(nn.Module, self.model_wrapped), None, {**self._at_step_start, "half_step": True})
        return f"{self._folder / f'checkpoint-{self.state.global_step}'} holds the run"

    @contextmanager
    def save_on_failure(self) -> Iterator[None]:
        """If drawing or rewarding a round fails, the run is saved with what there is of it."""
        try:
            yield
        except Exception as error:
            saved = self._save_now()
            if out_of_memory(error):
                raise TrainingError(
                    f"{self.label}: out of memory while responses were drawn and scored; lower "
                    f"decode_batch_size, token_budget or max_completion_length; {saved}; train on with --resume"
                ) from error
            if not isinstance(error, InputError):
                raise
            raise type(error)(f"{error}; {saved} and the responses of this round: fix it and --resume") from error

    def _save_rewards(self) -> None:
        """A reward that was trained for the run is saved when the folder is the run's: an earlier one lies there."""
        for trained in self.trained_rewards:
            with whole_folder(self._folder / "reward", ours=MODEL_FILES) as scratch:
                trained.save(scratch)
        self.trained_rewards = []

    # The policy -------------------------------------------------------------------------------------------------------

    @property
    def kept_step(self) -> int:
        """The step whose weights the model has after training: the best on the held-out pairs, or the last."""
        best = self.state.best_global_step if self.args.load_best_model_at_end else None
        return self.state.global_step if best is None else best

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model as it is (under LoRA the adapter), the tokenizer and the card."""
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
            # A pickle, with the hub's token in it.
            if self.processes.first:
                folder = Path(output_dir or self._folder)
                (folder / "training_args.bin").unlink(missing_ok=True)
                write_note(self.policy.model, folder)
                whole_distribution(self.temperature, self.rollout.end_ids).save_pretrained(folder)
        else:
            self.save_policy(Path(output_dir or self._folder))
            if self.args.push_to_hub:
                self.push_to_hub()

    def save_policy(self, folder: Path) -> None:
        """Write the model, the tokenizer and the card, and nothing to the hub."""
        self._check_policy()
        sampling = whole_distribution(self.temperature, self.rollout.end_ids)
        with self.whole_weights():
            self.processes.from_first(lambda: self.policy.save(folder, self.card(), sampling=sampling))

    def init_hf_repo(self, token: str | None = None) -> None:
        """Make the repository, before anything is trained. Raises TrainingError where the hub does not."""
        try:
            with self.processes.together():
                super().init_hf_repo(token)
        except (OSError, ValueError, HTTPError) as error:
            reason = " ".join(str(error).split())[:200]
            raise TrainingError(
                f"{self.label}: push_to_hub is set and the hub makes no repository ({reason}); log in with hf auth "
                "login, or leave it out and upload the folder of the model later"
            ) from error

    def push_to_hub(self, commit_message: str | None = "distalign", **kwargs: Any) -> Any:
        """Upload the model as it is, its tokenizer, card and sampling settings: nothing else of the run's folder.

        Takes `token` and `revision` beside the message. Raises TrainingError for anything else, and if the hub fails.
        """
        if unknown := kwargs.keys() - {"token", "revision"}:
            raise TrainingError(
                f"{self.label}: push_to_hub has no {', '.join(sorted(unknown))}; it takes commit_message, token and "
                "revision: for anything else upload the folder that save_model writes (hf upload)"
            )
        if self.hub_model_id is None:
            self.init_hf_repo(kwargs.get("token"))
        with tempfile.TemporaryDirectory() as scratch:
            self.save_policy(Path(scratch))
            if not self.processes.first:
                return None
            try:
                add_licence(Path(scratch) / "README.md", self.policy.source.path)
                return HfApi(token=kwargs.get("token") or self.args.hub_token).upload_folder(
                    repo_id=str(self.hub_model_id),
                    folder_path=scratch,
                    commit_message=commit_message,
                    revision=kwargs.get("revision") or self.args.hub_revision,
                )
            except (OSError, ValueError, RuntimeError, HTTPError) as error:
                reason = " ".join(str(error).split())[:200]
                raise TrainingError(
                    f"{self.label}: the model was not pushed to the hub ({reason}); push it again with "
                    f"hf upload {self.hub_model_id} FOLDER"
                ) from error

    def _check_policy(self) -> None:
        """Raise TrainingError for a policy that diverged: no bad one is saved."""
        groups = [Group(row.prompt, [row.prompt[-1:]]) for row in self.rows[:2]]
        logps = self.run(lambda: score_in_batches(self.policy.model, groups, token_budget=self._budget()).logps)
        with self.whole_weights():
            self.guard.check_policy(self.policy.model, logps, self.state.global_step)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """Write README.md into the run's folder: method, settings, data, results, citation."""
        self._folder.mkdir(parents=True, exist_ok=True)
        card = self.card(model_name=model_name, dataset_name=dataset_name, tags=tags or [])
        (self._folder / "README.md").write_text(card, encoding="utf-8")

    def card(self, **more: Any) -> str:
        """The model card, as Markdown with the hub's metadata."""
        args = self.args
        rollout = [name for name in RolloutSettings.model_fields if not name.startswith("vllm_")]
        names = [*CARD_SETTINGS, *(rollout if draws_responses(self.method) else ())]
        training = {name: getattr(value, "value", value) for name in names for value in [getattr(args, name)]}
        return model_card(
            base_model=self.policy.source.name,
            name=self.name,
            method=self.method,
            data=self.statistics,
            training={**training, "kept_step": self.kept_step, "seed": args.seed},
            results=self.last_evaluation(),
            adapter=self._adapter(),
            quantization=quantization_of(self.policy.model),
            temperature=self.temperature,
            **more,
        )

    def _adapter(self) -> dict[str, Any] | None:
        """Settings of the adapter that is trained; None if all weights are, or if it is merged where it is saved."""
        model = self.policy.model
        if not isinstance(model, PeftModel) or self.policy.source.adapter is not None:
            return None
        config = model.peft_config[str(model.active_adapter)]
        names = [name for name in ("peft_type", "r", "lora_alpha", "lora_dropout") if hasattr(config, name)]
        return {name: getattr(value, "value", value) for name in names for value in [getattr(config, name)]}

    def last_evaluation(self) -> dict[str, float]:
        """The numbers of the evaluation at the step that was kept; empty without one."""
        # Pairs that are evaluated by hand are not measured against the run's start.
        own = re.compile("eval_.*health/chosen_logps_change")
        rows = [row for row in self.state.log_history if any(map(own.fullmatch, row))]
        kept = [row for row in rows if row["step"] == self.kept_step] or rows[-1:]
        return {key: value for key, value in kept[-1].items() if key.startswith("eval_")} if kept else {}


class GoesOn(TrainerCallback):
    """What a run that goes on asks of transformers."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """The best step is looked for where the run's folder is now: it may have been moved, or be named otherwise."""
        if not args.load_best_model_at_end or state.best_global_step is None:
            return
        # A run may go on from a checkpoint in another folder.
        folders = (self.trainer._folder, self.trainer.resumed_from)
        places = [folder / f"checkpoint-{state.best_global_step}" for folder in folders if folder is not None]
        best = next((place for place in places if place.is_dir()), None)
        if best is None:
            raise TrainingError(
                f"{places[-1]}: it held the best step so far and is gone; put it back, or train anew with --overwrite"
            )
        state.best_model_checkpoint = str(best)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """A step that failed half-way begins with the random numbers that it had begun with."""
        if self.trainer._half_step is not None:
            # transformers loads them before an epoch begins, which takes some.
            self.trainer._load_rng_state(str(self.trainer._half_step))
            self.trainer._half_step = None
        self.trainer._random_at_step_start = _random_state()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """A run that had ended is not evaluated and saved once more for the epoch in which it ended."""
        if self.trainer.ended_before:
            control.should_log = control.should_evaluate = control.should_save = False


def _stop(number: int) -> BaseException:
    """What a signal raises: as Python does for SIGINT, and a shell's exit code for SIGTERM."""
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)


def _random_state() -> tuple[Any, ...]:
    """Of Python, numpy, the CPU and CUDA."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), devices


def _set_random_state(state: tuple[Any, ...]) -> None:
    python, numpy, cpu, devices = state
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if devices:
        torch.cuda.set_rng_state_all(devices)
