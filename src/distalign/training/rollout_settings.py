"""The settings of rollouts, and which methods take them: checked before a model is loaded."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distalign.errors import InputError
from distalign.methods import Method
from distalign.settings import Count, Positive, Section


class TrainingError(InputError):
    """Training cannot start or go on: says what was found and what to do."""


class MissingEnd(Section):
    """What becomes of the reward of a response that was cut before its end: nothing, `value` added, or `value`."""

    rule: Literal["none", "penalty", "replace"] = "none"
    value: Annotated[float, Field(allow_inf_nan=False)] = -1.0


class RolloutSettings(Section):
    """How a method that learns from its own responses samples them, and how often each is used.

    docs/rollouts.md says what each setting does. A recipe without `max_completion_length` takes the evaluation's
    max_new_tokens.
    """

    num_generations: Count = 4
    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_completion_length: Count = 128
    min_new_tokens: Annotated[int, Field(ge=0)] = 0
    decode_batch_size: Count = 64
    missing_end: MissingEnd = MissingEnd()
    minibatches: Count = 1
    num_iterations: Count = 1
    pairing: Literal["all", "best_worst"] = "all"
    num_completions_to_print: Annotated[int, Field(ge=0)] = 2
    use_vllm: bool = False
    vllm_server_base_url: Annotated[str, Field(pattern=r"^https?://[^\s/]+")] = "http://127.0.0.1:8000"
    vllm_server_timeout: Positive = 240.0
    vllm_importance_sampling_correction: bool = True
    vllm_importance_sampling_clip_max: Positive | None = 3.0

    @model_validator(mode="after")
    def _corrected(self) -> RolloutSettings:
        cut = self.top_p < 1 or self.min_new_tokens > 0
        if self.use_vllm and self.vllm_importance_sampling_correction and cut:
            raise ValueError(
                f"rollout: top_p is {self.top_p:g} and min_new_tokens {self.min_new_tokens}; the correction of vLLM's "
                "responses is for 1 and 0: take these, or set vllm_importance_sampling_correction to false"
            )
        return self

    @model_validator(mode="after")
    def _lengths(self) -> RolloutSettings:
        if self.min_new_tokens > self.max_completion_length:
            raise ValueError(
                f"rollout.min_new_tokens is {self.min_new_tokens} and max_completion_length "
                f"{self.max_completion_length}; lower the first or raise the second"
            )
        return self


def is_on_policy(method: Method) -> bool:
    """Whether a method learns from responses that the policy itself draws."""
    return method.needs.samples or "sampled" in method.needs.pairs


def draws_responses(method: Method) -> bool:
    """Whether responses are drawn for a method: by the policy, or by the reference before the first step."""
    return is_on_policy(method) or "reference" in method.needs.pairs


def check_rollout(label: str, method: Method, settings: RolloutSettings) -> None:
    """Raise TrainingError for `rollout` settings that do not go with the method."""
    needs = method.needs
    if settings.num_generations == 1 and not needs.values:
        raise TrainingError(
            f"{label}: num_generations is 1, but pairs and leave-one-out baselines are made of several "
            "responses to one prompt; set it to 2 or more"
        )
    if settings.pairing == "best_worst" and needs.pairs not in ("", "labelled") and not needs.reward:
        raise TrainingError(f"{label}: pairing is best_worst, but the method has no reward; take all")
