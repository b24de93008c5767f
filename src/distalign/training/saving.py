"""What a run saves besides its checkpoints: the policy with its card and sampling settings, here and on the hub."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from httpx import HTTPError
from huggingface_hub import HfApi
from peft import PeftModel

from distalign.engine import Group, score_in_batches
from distalign.methods import Method
from distalign.models.card import add_licence, model_card
from distalign.models.policy import whole_distribution
from distalign.models.quantized import quantization_of, write_note
from distalign.training.config import AlignmentConfig
from distalign.training.guard import Guard
from distalign.training.passes import WrappedTrainer
from distalign.training.rollout_settings import RolloutSettings, TrainingError, draws_responses
from distalign.training.rounds import Rollout

# Settings of training that a model card names.
CARD_SETTINGS = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps", "optim", "max_grad_norm"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "bf16"),
)


class SavingTrainer(WrappedTrainer):
    """What `AlignmentTrainer` writes of its policy: never a bad one, and nothing of the run's folder to the hub."""

    args: AlignmentConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    label: str
    name: str
    method: Method
    rows: list[Any]
    statistics: dict[str, Any]
    rollout: Rollout
    temperature: float
    guard: Guard

    @property
    def _folder(self) -> Path:
        return Path(str(self.args.output_dir))

    def _budget(self) -> int:
        """Tokens of a micro-batch."""
        raise NotImplementedError

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
        """Upload the model as it is, its tokenizer, card and sampling settings: nothing else of the run's folder."""
        with tempfile.TemporaryDirectory() as scratch:
            self.save_policy(Path(scratch))
            if not self.processes.first:
                return None
            add_licence(Path(scratch) / "README.md", self.policy.source.path)
            return HfApi(token=kwargs.get("token") or self.args.hub_token).upload_folder(
                repo_id=str(self.hub_model_id),
                folder_path=scratch,
                commit_message=commit_message,
                revision=kwargs.get("revision") or self.args.hub_revision,
            )

    def _check_policy(self) -> None:
        """Raise TrainingError for a policy that diverged: no bad one is saved."""
        groups = [Group(row.prompt, [row.prompt[-1:]]) for row in self.rows[:2]]
        logps = self.run(lambda: score_in_batches(self.policy.model, groups, token_budget=self._budget()).logps)
        with self.whole_weights():
            self.guard.check_policy(self.policy.model, logps, self.state.global_step)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: list[str] | None = None
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
        rows = [row for row in self.state.log_history if any(name.startswith("eval_") for name in row)]
        kept = [row for row in rows if row["step"] == self.kept_step] or rows[-1:]
        return {key: value for key, value in kept[-1].items() if key.startswith("eval_")} if kept else {}
