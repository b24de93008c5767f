"""The sections of a recipe, each with its settings, their types and their defaults."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Count = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def switch(value: Any) -> Any:
    """True and false for a section: its defaults, or none of it."""
    return {True: {}, False: None}[value] if isinstance(value, bool) else value


def several(value: Any) -> Any:
    """One section for a list of one."""
    return [value] if isinstance(value, dict) else ([] if value is None else value)


class Section(BaseModel):
    """A part of a recipe: unknown settings are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Lora(Section):
    """Low-rank adapters; `layers` adapts the top ones only (null: all)."""

    r: Count = 8
    alpha: Positive = 16
    dropout: Share = 0.0
    layers: Count | None = None
    target_modules: str | list[str] = "all-linear"


class DataSettings(Section):
    """The user's own pairs. Without `eval`, a share `held_out` of the prompts of `train` is kept back.

    `prompts` are further prompts, without labels, that methods which sample from the policy answer too.
    """

    train: str
    eval: str | None = None
    prompts: str | None = None
    split: str = "train"
    eval_split: str | None = None
    held_out: Share = 0.1
    limit: Count | None = None
    eval_limit: Count | None = None
    max_length: Count | None = None
    max_response_tokens: Count | None = None
    too_long: Literal["error", "drop"] = "error"
    drop_ties: bool = False


class TargetSettings(Section):
    """A known target: the model with `bonus` nats on the logits of some words, which labels pairs it can also score."""

    words: Annotated[list[str], Field(min_length=1)]
    bonus: float = 4.0
    end_bonus: float = 0.0
    gamma: Positive = 0.15
    pairs: Count = 256
    eval_pairs: Count = 64
    strengths: Annotated[list[float], Field(min_length=1)] = [0.0, 0.5, 1.0, 1.5]
    temperature: Positive = 0.8
    max_new_tokens: Count = 20
    prompts: str | list[str] | None = None


class EarlyStopping(Section):
    """Stop after `patience` evaluations in a row that improve the held-out loss by no more than `min_delta`."""

    patience: Count = 3
    min_delta: NotNegative = 0.0


class EvaluationSettings(Section):
    """How many responses are sampled to compare policies, and how."""

    prompts: Count = 48
    samples: Count = 2
    max_new_tokens: Count = 20
    temperature: Positive = 1.0


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


class RewardTraining(Section):
    """A reward model trained on the recipe's pairs (eq. 9). Null settings are chosen by the kind of backbone.

    init: policy is R = γ ln π₀ + a learned correction that starts at zero; scratch an ordinary scalar head. `gamma` is
    the sharpness of the labels (a known target's own, if not given). backbone: frozen computes its features once.
    """

    init: Literal["policy", "scratch"] = "policy"
    backbone: Literal["frozen", "lora", "full"] = "frozen"
    gamma: Positive | None = None
    learning_rate: Positive | None = None
    weight_decay: NotNegative | None = None
    batch_size: Count = 32
    epochs: Count | None = None
    patience: Count = 5
    lora: Lora = Lora()


class RewardSettings(Section):
    """Where rewards come from: one of a trained model, `train` one on the pairs, a Python function, or a known target.

    model: a folder or hub id of AutoModelForSequenceClassification with one label, or what `distalign reward` wrote.
    function: `file.py:name` or `module:name`. exact: γ ln π* of the recipe's target. Several rewards are summed with
    their `weight`. `timeout` bounds one call of a function, in seconds.
    """

    model: str | None = None
    train: Annotated[RewardTraining | None, BeforeValidator(switch)] = None
    function: str | None = None
    exact: bool = False
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    max_length: Count | None = None
    timeout: Positive = 60.0

    @model_validator(mode="after")
    def _one_kind(self) -> RewardSettings:
        given = [self.model is not None, self.train is not None, self.function is not None, self.exact]
        if sum(given) != 1:
            raise ValueError(f"reward names {sum(given)} of model, train, function and exact; give one each")
        if self.max_length is not None and self.model is None:
            raise ValueError("reward.max_length is the length that a judge reads; only model has one: leave it out")
        return self


class HealthSettings(Section):
    """When a run is called unhealthy. Thresholds against the start of the run, over the policy's own responses.

    A crossed one prints one warning; with `stop_on_collapse` the run saves and stops at the first of entropy,
    repetition and distinct.
    """

    stop_on_collapse: bool = False
    entropy: Share = 0.2
    kl: Positive = 50.0
    chosen_logps: Positive = 50.0
    distinct: Share = 0.3
    repetition: Annotated[float, Field(gt=0, le=1)] = 0.5
    missing_end: Annotated[float, Field(gt=0, le=1)] = 0.5
    length_correlation: Annotated[float, Field(gt=0, le=1)] = 0.8
    prompts: Count = 8
