"""The settings of `AlignmentTrainer`: `transformers.TrainingArguments`, and what is ours beside it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from inspect import signature
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import torch
from pydantic import Field, ValidationError
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_utils import HubStrategy

from distalign.engine.memory import Recompute
from distalign.settings import Count, NotNegative, Positive, Section, Seed, lower_first, unknown_setting
from distalign.training.health import HealthSettings
from distalign.training.rollout_settings import MissingEnd, RolloutSettings, TrainingError

Kind = TypeVar("Kind")

# What TRL's users write, and where it is here.
_ELSEWHERE = {
    "max_new_tokens": "it is called max_completion_length here",
    "label_smoothing": "no preference loss reads it; give soft labels in the column p_chosen",
    "padding_free": "rows are always packed without padding: leave it out",
    "vllm_mode": "a server draws (vllm serve): leave it out",
    "vllm_server_host": "give vllm_server_base_url, such as http://127.0.0.1:8000",
    "vllm_server_port": "give vllm_server_base_url, such as http://127.0.0.1:8000",
    "vllm_importance_sampling_mode": "weights of whole responses are truncated: leave it out",
    "top_k": "it would cut the distribution that is learned: leave it out",
    "scale_rewards": "rewards are in nats and are not scaled: leave it out",
    "ref_model": "the reference is the model that training starts from: leave it out",
    "beta": "it is the method's: DPO(gamma=…) has TRL's beta under the name gamma, the others have gamma and beta",
    "loss_type": "each loss is a method: PMLE, PD, RKL, DPO, REBEL, RLHF",
    "max_prompt_length": "prompts are never cut: max_length bounds prompt and response together",
    "truncation_mode": "nothing is cut silently: max_length, too_long and max_response_tokens say what happens",
    "precompute_ref_log_probs": "the reference's log-probabilities are computed once and kept: leave it out",
}


class _Checked(Section):
    """Fields that no other section has, with what they can be."""

    too_long: Literal["error", "drop"]
    recompute: Recompute
    token_budget: Count | None
    max_length: Count | None
    max_response_tokens: Count | None
    end_token_id: Annotated[int, Field(ge=0)] | None
    per_device_train_batch_size: Count
    per_device_eval_batch_size: Count
    gradient_accumulation_steps: Count
    learning_rate: NotNegative
    seed: Seed
    reward_weights: list[Annotated[float, Field(allow_inf_nan=False)]] | None
    reward_timeout: Positive
    missing_end: dict[str, Any] | None
    model_init_kwargs: dict[str, Any] | None
    health: dict[str, Any] | None


# Metrics of which the smallest is the best; transformers takes the largest of any whose name does not end in "loss".
_BETTER_SMALL = re.compile(r"(?:^|[/_])(?:kl|nll|ece)$|loss$")


def names_what_was_meant(elsewhere: Mapping[str, str]) -> Callable[[type[Kind]], type[Kind]]:
    """Let a class refuse an argument that there is not and name the one that was meant: Python's own error does not.

    `elsewhere` says of some names where they are, or why they are not.
    """

    def decorate(kind: type[Kind]) -> type[Kind]:
        init, names = kind.__init__, list(signature(kind).parameters)

        @wraps(init)
        def checked(self: Kind, *args: object, **given: object) -> None:
            unknown = [key for key in given if key not in names]
            if unknown:
                lines = [unknown_setting(kind.__name__, key, names, elsewhere.get(key)) for key in unknown]
                raise TrainingError("\n".join(lines))
            init(self, *args, **given)

        kind.__init__ = checked
        return kind

    return decorate


@names_what_was_meant(_ELSEWHERE)
@dataclass
class AlignmentConfig(TrainingArguments):
    """Settings of a run: `transformers.TrainingArguments`, and the fields below, under TRL's names where it has one.

    Lengths are in tokens. The method's own settings (γ, β) are the method's: `PMLE(gamma=0.02, beta=0.0)`.

    Data:
        max_length: the longest prompt and response together (None: the model's positions). Nothing is cut silently.
        max_response_tokens: cut longer responses here; they then have no end token (None: never cut).
        too_long: what to do with a pair that exceeds `max_length`: "error", or "drop" it and log how many.
        drop_ties: leave out pairs whose responses are the same, instead of refusing them.
    Responses that the policy draws (methods that learn from them, and a few at each evaluation to watch any run):
        num_generations: responses to each prompt, of the policy in each round, or of the reference once.
        end_token_id: the token that ends them (None: the one that the tokenizer or its chat template writes).
        max_completion_length: a response is cut there; its end token counts.
        min_new_tokens: tokens before the end may be drawn.
        temperature, top_p: of sampling; `temperature` also of every log-probability of the method.
        num_iterations: how often a round of responses is gone through.
        minibatches: optimizer steps that one round is drawn for.
        pairing: how pairs are made of more than two responses: "all", or "best_worst" by reward.
        missing_end: reward of a response without an end, such as {"rule": "penalty", "value": -1.0} (None: as it is).
        decode_batch_size: responses decoded at once: memory, not results.
        num_completions_to_print: prompts of each round whose responses go to samples.jsonl.
        use_vllm: a running `vllm serve` draws them (docs/rollouts.md), not this process.
        vllm_server_base_url, vllm_server_timeout: where it is, and how many seconds it is waited for.
        vllm_importance_sampling_correction: weight responses by what the engine's probability is of the server's.
        vllm_importance_sampling_clip_max: the largest such weight (None: any).
        reward_weights: a weight for each of `reward_funcs` (None: 1).
        reward_timeout: seconds that one call of a reward function may take.
    Model and memory:
        model_init_kwargs: for a model given by name: "dtype" ("float32", "bfloat16", "auto"), "trust_remote_code" and
            "quantization_config" (a BitsAndBytesConfig of 4 bits, or its arguments; it wants an adapter).
        token_budget: tokens of a micro-batch (None: chosen once from free memory, saved and kept on resume).
        recompute: what the backward pass computes again to need less memory: "none", "selective" or "full".
    Health:
        health: thresholds that warn when the policy degenerates (docs/rollouts.md), such as
            {"stop_on_collapse": True}; None watches nothing.

    Raises TrainingError for a value that cannot be used.
    """

    # Fields that may be JSON text, as a command line gives them.
    _VALID_DICT_FIELDS: ClassVar = [*TrainingArguments._VALID_DICT_FIELDS, "missing_end", "model_init_kwargs", "health"]

    # Defaults that suit preference learning, the same as a recipe's.
    per_device_train_batch_size: int = 16
    num_train_epochs: float = 1.0
    logging_steps: float = 1
    hub_strategy: HubStrategy | str = "end"  # the model that is kept, once
    logging_nan_inf_filter: bool = False  # a loss that is no number is logged as such
    save_strategy: str = "steps"
    save_steps: float = 0.1
    save_total_limit: int | None = 1
    remove_unused_columns: bool = False
    restore_callback_states_from_checkpoint: bool = True
    ddp_find_unused_parameters: bool | None = False  # every pass reads all weights that are trained
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available)

    max_length: int | None = None
    max_response_tokens: int | None = None
    too_long: Literal["error", "drop"] = "error"
    drop_ties: bool = False
    end_token_id: int | None = None

    num_generations: int = 4
    max_completion_length: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    num_iterations: int = 1
    minibatches: int = 1
    pairing: Literal["all", "best_worst"] = "all"
    missing_end: dict[str, Any] | str | None = None
    decode_batch_size: int = 64
    num_completions_to_print: int = 2
    use_vllm: bool = False
    vllm_server_base_url: str = "http://127.0.0.1:8000"
    vllm_server_timeout: float = 240.0
    vllm_importance_sampling_correction: bool = True
    vllm_importance_sampling_clip_max: float | None = 3.0
    reward_weights: list[float] | None = None
    reward_timeout: float = 60.0

    model_init_kwargs: dict[str, Any] | str | None = None
    token_budget: int | None = None
    recompute: Recompute = "none"

    health: dict[str, Any] | str | None = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.load_best_model_at_end or self.metric_for_best_model) and self.save_total_limit == 1:
            # The best, and the last: only from this a run goes on, and transformers would remove it at the end.
            self.save_total_limit = 2
        if self.greater_is_better is None and _BETTER_SMALL.search(self.metric_for_best_model or ""):
            self.greater_is_better = False
        started = os.environ.get("WORLD_SIZE", "1")
        unset = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if started != "1" and (not started.isdigit() or unset):
            what = f"and {', '.join(unset)} is not set" if unset else "which is no number"
            raise TrainingError(
                f"WORLD_SIZE is {started!r}, {what}: unset it, or start the processes by torchrun or accelerate launch"
            )
        # accelerate counts processes without an accelerator only where it is told so.
        self.use_cpu = self.use_cpu or (started != "1" and not torch.accelerator.is_available())
        if self.bf16 and not self.use_cpu and not torch.accelerator.is_available():
            raise TrainingError(
                "bf16 (or dtype: bfloat16) is set and there is only a CPU; leave it out, or set use_cpu: true too"
            )
        super().__post_init__()
        if int(started) != self.world_size:
            raise TrainingError(
                f"{started} processes were started (WORLD_SIZE) and this one counts {self.world_size}: each would "
                "train alone; start them by torchrun, or by accelerate launch with num_processes in its configuration"
            )
        if self.deepspeed_plugin is not None:
            # Models are loaded whole, and verified; ZeRO-3 deals them when training begins.
            unset_hf_deepspeed_config()
        self._check()

    def _check(self) -> None:
        """Raise TrainingError for values that cannot be used; a number that is text becomes one."""
        try:
            vars(self).update(dict(_Checked(**{name: getattr(self, name) for name in _Checked.model_fields})))
            vars(self).update({name: value for name, value in self.rollout if name != "missing_end"})
            _ = self.health_settings
        except ValidationError as error:
            lines = [
                f"{'.'.join(map(str, problem['loc']))} is {problem['input']!r}; {lower_first(problem['msg'])}"
                if problem["loc"]
                else problem["msg"].removeprefix("Value error, ")
                for problem in error.errors()
            ]
            raise TrainingError("\n".join(f"AlignmentConfig: {line}" for line in lines)) from None
        dtype = str(self.model_settings.get("dtype", "auto")).removeprefix("torch.")
        if dtype not in ("float32", "bfloat16", "float16", "auto"):
            raise TrainingError(f"AlignmentConfig: dtype is {dtype}; take one of float32, bfloat16, float16, auto")
        unknown = set(self.model_settings) - {"dtype", "trust_remote_code", "quantization_config"}
        if unknown:
            raise TrainingError(
                f"AlignmentConfig: model_init_kwargs has {', '.join(sorted(unknown))}; by name a model takes dtype, "
                "trust_remote_code and quantization_config: for anything else load it yourself and pass the model"
            )
        config = self.model_settings.get("quantization_config")
        four_bit = config.get("load_in_4bit") if isinstance(config, Mapping) else getattr(config, "load_in_4bit", False)
        if config is not None and not four_bit:
            raise TrainingError(
                "AlignmentConfig: quantization_config is not of 4 bits; give BitsAndBytesConfig(load_in_4bit=True, "
                'bnb_4bit_quant_type="nf4"), or load the model yourself and pass it'
            )

    @property
    def model_settings(self) -> dict[str, Any]:
        """How a model that is given by name is loaded."""
        return self.model_init_kwargs if isinstance(self.model_init_kwargs, dict) else {}

    @property
    def rollout(self) -> RolloutSettings:
        """How responses are drawn, as a recipe's `rollout` section holds it."""
        values = {name: getattr(self, name) for name in RolloutSettings.model_fields}
        return RolloutSettings(**{**values, "missing_end": MissingEnd.model_validate(self.missing_end or {})})

    @property
    def health_settings(self) -> HealthSettings | None:
        """When a run is called unhealthy; None if nobody watches."""
        return None if self.health is None else HealthSettings.model_validate(self.health)
