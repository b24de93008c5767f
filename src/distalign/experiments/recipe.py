"""A run's settings: read from YAML and `--set` flags, all checked before anything is loaded.

The methods' own dataclasses are the schema of `methods`, `transformers.TrainingArguments` that of `training`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from distalign.engine.packing import FORWARD_BUDGET
from distalign.evaluation.metrics import EvaluationSettings
from distalign.methods import METHODS, Method
from distalign.models.policy import Lora
from distalign.models.targets import TargetSettings
from distalign.rewards import RewardSettings
from distalign.settings import (
    Count,
    NotNegative,
    RecipeError,
    Section,
    Share,
    dump_yaml,
    explain,
    find_recipe,
    lower_first,
    read_settings,
    several,
    switch,
    unknown_setting,
)
from distalign.training.health import HealthSettings
from distalign.training.rounds import RolloutSettings

# What people call a setting elsewhere, and what it is here.
_ELSEWHERE = {
    ("dpo", "beta"): "DPO's beta is the preference sharpness, which is called gamma here: write gamma",
    ("training", "output_dir"): "the run's folder is output_dir and name at the top of the recipe",
    ("training", "seed"): "the seed is at the top of the recipe",
    ("training", "label_smoothing_factor"): "no preference loss reads it; give soft labels in the column p_chosen",
    ("training", "neftune_noise_alpha"): "the engine adds no noise to embeddings",
}

# What stands beside a method's own settings: its changes to these sections.
_BESIDE = ("training", "rollout")


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


class EarlyStopping(Section):
    """Stop after `patience` evaluations in a row that improve the held-out loss by no more than `min_delta`."""

    patience: Count = 3
    min_delta: NotNegative = 0.0


class Recipe(Section):
    """One experiment: a model, pairs (the user's or a known target's), and the methods to compare on them."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    output_dir: str = "runs"
    seed: Annotated[int, Field(ge=0)] = 0
    model: str
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    trust_remote_code: bool = False
    lora: Annotated[Lora | None, BeforeValidator(switch)] = None
    data: DataSettings | None = None
    target: TargetSettings | None = None
    methods: dict[str, Any]
    compare: list[str] | None = None
    rollout: RolloutSettings = RolloutSettings()
    reward: Annotated[tuple[RewardSettings, ...], BeforeValidator(several)] = ()
    health: HealthSettings = HealthSettings()
    training: Annotated[dict[str, Any], Field(default_factory=dict)]
    token_budget: Count | None = None
    recompute: Literal["none", "selective", "full"] = "none"
    early_stopping: Annotated[EarlyStopping | None, BeforeValidator(switch)] = EarlyStopping()
    evaluation: EvaluationSettings = EvaluationSettings()

    @model_validator(mode="before")
    @classmethod
    def _same_length(cls, raw: object) -> object:
        """Responses are as long in rollouts as in evaluations, unless the recipe says otherwise."""
        if not isinstance(raw, dict) or not isinstance(raw.get("rollout", {}), dict):
            return raw
        evaluation = raw.get("evaluation")
        length = evaluation.get("max_new_tokens") if isinstance(evaluation, dict) else None
        default = EvaluationSettings().max_new_tokens if length is None else length
        return {**raw, "rollout": {"max_completion_length": default, **raw.get("rollout", {})}}

    @field_validator("training", mode="before")
    @classmethod
    def _check_training(cls, values: object) -> object:
        return _training("training", values)

    @field_validator("methods", mode="before")
    @classmethod
    def _check_methods(cls, entries: object) -> object:
        return _methods(entries)

    @model_validator(mode="after")
    def _one_checkpointing(self) -> Recipe:
        for key in ("gradient_checkpointing", "activation_checkpointing"):
            if self.recompute != "none" and self.training.get(key):
                raise ValueError(
                    f"recompute is {self.recompute} and training.{key} true: two settings of one thing; keep one"
                )
        return self

    @model_validator(mode="after")
    def _known_methods(self) -> Recipe:
        for name in self.methods:
            self.rollout_for(name)
        for name in self.compare or ():
            if name not in self.methods:
                raise ValueError(f"compare: {_unknown_method(name, self.methods, 'recipe')}")
        return self

    @model_validator(mode="after")
    def _one_source_of_pairs(self) -> Recipe:
        if (self.data is None) == (self.target is None):
            found = "neither data nor target" if self.data is None else "both data and target"
            raise ValueError(f"recipe has {found}; give one of them: your pairs, or a known target that makes pairs")
        return self

    def method(self, name: str) -> Method:
        """The method with this recipe's settings."""
        return _build(name, {key: value for key, value in self._entry(name).items() if key not in _BESIDE})

    def only(self, names: Sequence[str]) -> Recipe:
        """This recipe with some of its methods. Raises RecipeError for one that it does not have."""
        methods = {name: self._entry(name) for name in names}
        return self.model_copy(update={"methods": methods, "compare": None})

    def rollout_for(self, name: str) -> RolloutSettings:
        """The rollouts of one method: `rollout`, and what its own `rollout` changes. Raises ValueError."""
        own = self._entry(name).get("rollout", {})
        try:
            return RolloutSettings.model_validate({**self.rollout.model_dump(), **own})
        except ValidationError as error:
            problems = [{**problem, "loc": ("rollout", *problem["loc"])} for problem in error.errors()]
            lines = [f"methods.{name}.{line}" for problem in problems for line in explain(problem, Recipe)]
            raise ValueError("\n".join(lines)) from None

    def training_for(self, name: str) -> dict[str, Any]:
        """The `TrainingArguments` settings of one method: `training`, and what its own `training` changes."""
        return {**self.training, **self._entry(name).get("training", {})}

    @property
    def forward_budget(self) -> int:
        """Tokens of a batch that is scored without gradient."""
        return self.token_budget or FORWARD_BUDGET

    @property
    def target_gamma(self) -> float | None:
        """The known target's sharpness."""
        return None if self.target is None else self.target.gamma

    @property
    def run_dir(self) -> Path:
        """The run's folder, output_dir/name."""
        return Path(self.output_dir) / self.name

    def dump(self, path: str | Path) -> None:
        """Write the recipe as resolved, every default filled in; `load_recipe` reads it back equal."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(dump_yaml(self.model_dump(mode="json")), encoding="utf-8")

    def _entry(self, name: str) -> dict[str, Any]:
        if name not in self.methods:
            raise RecipeError(f'{self.name}: recipe has no method "{name}"; it has {", ".join(self.methods)}')
        return self.methods[name]


def load_recipe(path: str | Path, overrides: Sequence[str] = (), method: str | None = None) -> Recipe:
    """Read and check a recipe.

    `overrides` are `section.key=value` with a YAML value, as `--set` takes them; `method` keeps one of the methods.
    Data paths count from the working directory, or else from the recipe's folder. Raises RecipeError, every line of
    which says where, what was found and what to do.
    """

    def keep(raw: dict[str, Any], where: str) -> None:
        if method is None or not isinstance(raw.get("methods"), dict):
            return
        if method not in raw["methods"]:
            raise RecipeError(f"{where}: {_unknown_method(method, raw['methods'], 'recipe')}; add it under methods")
        raw["methods"] = {method: raw["methods"][method]}
        raw.pop("compare", None)

    files = {"data": ("train", "eval", "prompts"), "target": ("prompts",)}
    return read_settings(Recipe, find_recipe(path), overrides, files=files, change=keep)


def _methods(entries: object) -> dict[str, Any]:
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f"methods is {entries!r}; name at least one of {', '.join(METHODS)}, each with its settings")
    checked, problems = {}, []
    for name, settings in entries.items():
        try:
            checked[name] = _method(name, {} if settings is None else settings)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return checked


def _method(name: str, settings: object) -> dict[str, Any]:
    """A method's settings, its defaults filled in, and its own `training`."""
    if name not in METHODS:
        raise ValueError(_unknown_method(name, METHODS, "distalign"))
    if not isinstance(settings, dict):
        raise ValueError(f"methods.{name} is {settings!r}; write its settings below it, setting: value")
    own = {key: value for key, value in settings.items() if key not in _BESIDE}
    built: Any = _build(name, own)
    checked = {field.name: getattr(built, field.name) for field in dataclasses.fields(built) if field.init}
    if settings.get("training"):
        checked["training"] = _training(f"{name}.training", settings["training"])
    if settings.get("rollout"):
        if not isinstance(settings["rollout"], dict):
            raise ValueError(f"methods.{name}.rollout is {settings['rollout']!r}; write setting: value below it")
        checked["rollout"] = settings["rollout"]
    return checked


def _build(name: str, settings: Mapping[str, Any]) -> Method:
    factory: type[Any] = METHODS[name]
    names = [field.name for field in dataclasses.fields(factory) if field.init]  # pyright: ignore[reportArgumentType]
    values = _checked(name, settings, names, get_type_hints(factory).__getitem__, _BESIDE)
    try:
        return factory(**values)
    except (TypeError, ValueError) as error:
        reason = str(error).removeprefix(f"{getattr(factory, '__name__', name)}: ")
        raise ValueError(f"methods.{name}: {reason}") from None


def _training(section: str, values: object) -> dict[str, Any]:
    if not values:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{section} is {values!r}; write setting: value with transformers.TrainingArguments' settings")
    from transformers import TrainingArguments

    types = {field.name: field.type for field in dataclasses.fields(TrainingArguments) if field.init}
    checked = _checked(section, values, list(types), types.__getitem__)
    # As written, so that TrainingArguments sees what its own documentation describes; only text may become a number.
    return {
        key: checked[key] if isinstance(value, str) and isinstance(checked[key], bool | int | float) else value
        for key, value in values.items()
    }


def _checked(
    section: str,
    values: Mapping[str, Any],
    names: Sequence[str],
    type_of: Callable[[str], Any],
    more: Sequence[str] = (),
) -> dict[str, Any]:
    """The values as their types want them: known by name, a number written as text made a number."""
    problems, checked = [], {}
    for key, value in values.items():
        elsewhere = _ELSEWHERE.get((section.split(".")[-1], key))
        if elsewhere or key not in names:
            problems.append(unknown_setting(section, str(key), [*names, *more], elsewhere))
            continue
        adapter = TypeAdapter(type_of(key), config=ConfigDict(arbitrary_types_allowed=True))
        try:
            fit = adapter.validate_python(value)
        except ValidationError as error:
            problems.append(f"{section}.{key} is {value!r}; {lower_first(error.errors()[0]['msg'])}")
            continue
        checked[key] = fit
    if problems:
        raise ValueError("\n".join(problems))
    return checked


def _unknown_method(name: str, known: Iterable[str], owner: str) -> str:
    near = get_close_matches(str(name).lower(), list(known), 1)
    return f'{owner} has no method "{name}"; it has {", ".join(known)}' + (
        f'; did you mean "{near[0]}"?' if near else ""
    )
