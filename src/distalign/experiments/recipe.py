"""A run's settings: read from YAML and `--set` flags, all checked before anything is loaded.

The methods' own dataclasses are the schema of `methods`, `transformers.TrainingArguments` that of `training`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_type_hints

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
from distalign.rewards import Rewards, follow_gamma
from distalign.settings import (
    Count,
    NotNegative,
    Quantization,
    RecipeError,
    Section,
    Seed,
    Share,
    dump_yaml,
    explain,
    find_file,
    find_recipe,
    lower_first,
    masked,
    read_settings,
    shown,
    switch,
    unknown_setting,
)
from distalign.training.health import HealthSettings
from distalign.training.rollout_settings import RolloutSettings
from distalign.training.run_folder import write_text
from distalign.user_code import load_named

# What people call a setting elsewhere, and what it is here.
_ELSEWHERE = {
    ("dpo", "beta"): "DPO's beta is the preference sharpness, which is called gamma here: write gamma",
    ("training", "output_dir"): "the run's folder is output_dir and name at the top of the recipe",
    ("training", "seed"): "the seed is at the top of the recipe",
    ("training", "resume_from_checkpoint"): "a run goes on with --resume",
    ("training", "label_smoothing_factor"): "no preference loss reads it; give soft labels in the column p_chosen",
    ("training", "neftune_noise_alpha"): "the engine adds no noise to embeddings",
}

# What stands beside a method's own settings: the user's class that it is, and its changes to these sections.
_CLASS = "class"
_BESIDE = (_CLASS, "training", "rollout")

# What a γ or a β may be instead of a number: it is chosen when the pairs have been read (`experiments/auto.py`).
AUTO = "auto"

# A method is a folder of its run and a row of its results, and these are others'.
_TAKEN = ("reference", "target", "reward", "train", "evaluation", "frontier", "policies", "tables", "figures")


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


class StudySettings(Section):
    """A grid of comparisons: settings by their dotted names with the values each takes, and the seeds of every cell."""

    grid: Annotated[dict[str, Annotated[list[Any], Field(min_length=1)]], Field(min_length=1)]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0, 1, 2)


class Recipe(Section):
    """One experiment: a model, pairs (the user's or a known target's), and the methods to compare on them."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    output_dir: str = "runs"
    seed: Seed = 0
    model: str
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    trust_remote_code: bool = False
    quantization: Quantization = None
    lora: Annotated[Lora | None, BeforeValidator(switch)] = None
    data: DataSettings | None = None
    target: TargetSettings | None = None
    methods: dict[str, Any]
    compare: list[str] | None = None
    rollout: RolloutSettings = RolloutSettings()
    reward: Rewards = ()
    health: HealthSettings = HealthSettings()
    training: Annotated[dict[str, Any], Field(default_factory=dict)]
    token_budget: Count | None = None
    recompute: Literal["none", "selective", "full"] = "none"
    early_stopping: Annotated[EarlyStopping | None, BeforeValidator(switch)] = EarlyStopping()
    evaluation: EvaluationSettings = EvaluationSettings()
    study: StudySettings | None = None

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
    def _reward_trainable_in_4bit(self) -> Recipe:
        for one in self.reward:
            if self.quantization is not None and one.train is not None:
                one.train.check_4bit()
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
        return _build(name, self._entry(name))

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

    def automatic(self, setting: str) -> list[str]:
        """The methods whose `setting` is auto."""
        return [name for name, settings in self.methods.items() if settings.get(setting) == AUTO]

    def with_numbers(self, setting: str, numbers: Mapping[str, float]) -> Recipe:
        """This recipe with a number for `setting` of some methods.

        On the user's pairs a reward that is trained with no gamma of its own follows a γ that was auto.
        """
        methods = {**self.methods, **{name: {**self.methods[name], setting: one} for name, one in numbers.items()}}
        changes: dict[str, Any] = {"methods": methods}
        if setting == "gamma" and self.target is None and numbers:
            changes["reward"] = tuple(follow_gamma(one, next(iter(numbers.values()))) for one in self.reward)
        return self.model_copy(update=changes)

    @property
    def forward_budget(self) -> int:
        """Tokens of a batch that is scored without gradient."""
        return self.token_budget or FORWARD_BUDGET

    @property
    def target_gamma(self) -> float | None:
        """The known target's sharpness."""
        return None if self.target is None else self.target.gamma

    @property
    def has_gamma(self) -> bool:
        """Whether a reward without a gamma of its own gets one: a known target's, or the methods' if that is auto."""
        return self.target is not None or bool(self.automatic("gamma"))

    @property
    def run_dir(self) -> Path:
        """The folder of the recipe's runs, output_dir/name: a comparison's, with a folder for each method in it."""
        return Path(self.output_dir) / self.name

    @property
    def train_dir(self) -> Path:
        """Where single runs are: a folder for each method, and the reward that is trained alone."""
        return self.run_dir / "train"

    def dump(self, path: str | Path) -> None:
        """Write the recipe as resolved, every default filled in; `load_recipe` reads it back equal."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_text(Path(path), dump_yaml(self.model_dump(mode="json")))

    def _entry(self, name: str) -> dict[str, Any]:
        if name not in self.methods:
            raise RecipeError(f'{self.name}: recipe has no method "{name}"; it has {", ".join(self.methods)}')
        return self.methods[name]


def load_recipe(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), method: str | None = None
) -> Recipe:
    """Read and check a recipe: a file, a packaged recipe by its name, or the settings as a mapping.

    `overrides` are `section.key=value` with a YAML value, as `--set` takes them; `method` keeps one of the methods, or
    is a class of the user's, `file.py:Class`. Paths of data and of such files count from the working directory, or else
    from the recipe's folder. Raises RecipeError, every line of which says where, what was found and what to do.
    """

    def keep(raw: dict[str, Any], where: str, folder: Path) -> None:
        methods = raw.get("methods")
        if not isinstance(methods, dict):
            return
        methods = raw["methods"] = _by_name(methods, folder)
        if method is None:
            return
        given = _by_name({method: None}, Path())
        (name,) = given
        if name not in methods and given[name] is None:
            raise RecipeError(f"{where}: {_unknown_method(method, methods, 'recipe')}; add it under methods")
        raw["methods"] = {name: _merged(methods.get(name), given[name])}
        raw.pop("compare", None)

    files = {"data": ("train", "eval", "prompts"), "target": ("prompts", "class")}
    place = source if isinstance(source, Mapping) else find_recipe(source)
    return read_settings(Recipe, place, overrides, files=files, change=keep)


RecipeSource = Recipe | str | Path | Mapping[str, Any]


def as_recipe(source: RecipeSource, method: str | None = None) -> Recipe:
    """A recipe as it is; a name, a file or a mapping as `load_recipe` reads it. Raises RecipeError."""
    return source if isinstance(source, Recipe) else load_recipe(source, method=method)


# Methods --------------------------------------------------------------------------------------------------------------


def _by_name(methods: Mapping[Any, Any], folder: Path) -> dict[Any, Any]:
    """The entries of `methods`; one that is named `file.py:Class` is called by its class, in small letters."""
    named: dict[Any, Any] = {}
    for name, settings in methods.items():
        if isinstance(name, str) and ":" in name:
            settings = _merged(settings, {_CLASS: find_file(name, folder)})
            name = name.rpartition(":")[2].lower()
        elif isinstance(settings, dict) and isinstance(settings.get(_CLASS), str) and settings[_CLASS] not in METHODS:
            settings = {**settings, _CLASS: find_file(settings[_CLASS], folder)}
        named[name] = _merged(named.get(name), settings)
    return named


def _merged(settings: object, more: object) -> object:
    """Both, if both are settings; else the one that is there."""
    if isinstance(settings, dict) and isinstance(more, dict):
        return {**settings, **more}
    return settings if more is None else more


def find_method(name: str) -> type[Method]:
    """The user's class that `file.py:Class` or `module:Class` names. Raises RecipeError."""

    def is_method(value: object) -> bool:
        return isinstance(value, type) and issubclass(value, Method) and value is not Method

    label = f"method {name}"
    found: Any = load_named(name, "Class", is_method, label=label, error=RecipeError)
    if not (is_method(found) and dataclasses.is_dataclass(found)):
        raise RecipeError(f"{label}: it is no dataclass that derives from distalign.methods.Method; make it one")
    missing = sorted(getattr(found, "__abstractmethods__", ()))
    missing += [each for each in ("equation", "source", "optimum") if not hasattr(found, each)]
    if missing:
        raise RecipeError(f"{label}: it lacks {', '.join(missing)}; add it as docs/adding-a-method.md shows")
    return cast("type[Method]", found)


def _methods(entries: object) -> dict[str, Any]:
    if not isinstance(entries, dict) or not entries:
        raise ValueError(
            f"methods is {shown(entries)}; name at least one of {', '.join(METHODS)}, each with its settings"
        )
    checked, problems = {}, []
    for name, settings in entries.items():
        if not isinstance(name, str):
            problems.append(f"methods: {shown(name)} is no name; write one of {', '.join(METHODS)}, or one in quotes")
            continue
        try:
            checked[name] = _method(name, {} if settings is None else settings)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return checked


def _method(name: str, settings: object) -> dict[str, Any]:
    """A method's settings, its defaults filled in, and what stands beside them."""
    if not isinstance(settings, dict):
        raise ValueError(f"methods.{name} is {shown(settings)}; write its settings below it, setting: value")
    built: Any = _build(name, settings)
    checked = {_CLASS: settings[_CLASS]} if _CLASS in settings else {}
    for field in dataclasses.fields(built):
        if field.init:
            automatic = field.name in _may_be_auto(type(built)) and settings.get(field.name) == AUTO
            checked[field.name] = AUTO if automatic else getattr(built, field.name)
    if settings.get("training"):
        checked["training"] = _training(f"{name}.training", settings["training"])
    if settings.get("rollout"):
        if not isinstance(settings["rollout"], dict):
            raise ValueError(f"methods.{name}.rollout is {shown(settings['rollout'])}; write setting: value below it")
        checked["rollout"] = settings["rollout"]
    return checked


def _build(name: str, settings: Mapping[str, Any]) -> Method:
    """The method of an entry; 1 stands for what is still auto. Raises ValueError."""
    factory = _class_of(name, settings.get(_CLASS))
    automatic = [key for key in _may_be_auto(factory) if settings.get(key) == AUTO]
    free = "beta" in automatic and settings.get("gamma") not in (0, "0", "0.0")
    if settings.get("beta") == AUTO and hasattr(factory, "beta") and not free:
        raise ValueError(
            f"methods.{name}: beta is auto, but this β decides what the method ends at ({factory.optimum}), with any "
            "number of pairs; give a number: distalign frontier predicts what each gives"
        )
    settings = {key: value for key, value in settings.items() if key not in _BESIDE}
    settings |= dict.fromkeys(automatic, 1.0)
    types, names = get_type_hints(factory), [field.name for field in dataclasses.fields(factory) if field.init]
    values = _checked(name, settings, {key: types[key] for key in names}, _BESIDE[1:])
    try:
        return factory(**values)
    except (TypeError, ValueError) as error:
        reason = str(error).removeprefix(f"{getattr(factory, '__name__', name)}: ")
        raise ValueError(f"methods.{name}: {reason}") from None


def _may_be_auto(factory: type[Any]) -> list[str]:
    """Which of gamma and beta may be auto: any γ, and a β that the method reaches π* without."""
    names = {field.name for field in dataclasses.fields(factory) if field.init}
    free = "gamma" in names and factory.theorem is not None
    return [key for key in ("gamma", "beta") if key in names and (key == "gamma" or free)]


def _class_of(name: str, source: object) -> type[Any]:
    if source is None:
        if name not in METHODS:
            raise ValueError(_unknown_method(name, METHODS, "distalign"))
        return METHODS[name]
    if not isinstance(source, str):
        raise ValueError(
            f"methods.{name}.{_CLASS} is {shown(source)}; write file.py:Class, or one of {', '.join(METHODS)}"
        )
    # A known method under another name: its variants side by side.
    method = METHODS[source] if source in METHODS else find_method(source)
    if name in METHODS or name in _TAKEN or not re.fullmatch(r"[^\W_][\w.-]*", name):
        raise ValueError(f"methods.{name}: {source} cannot be called {name}; give the class another name")
    return method


def _training(section: str, values: object) -> dict[str, Any]:
    if not values:
        return {}
    if not isinstance(values, dict):
        raise ValueError(
            f"{section} is {shown(values)}; write setting: value with transformers.TrainingArguments' settings"
        )
    from transformers import TrainingArguments

    # A field's own type is changed by transformers.HfArgumentParser.
    hints = get_type_hints(TrainingArguments)
    types = {field.name: hints[field.name] for field in dataclasses.fields(TrainingArguments) if field.init}
    checked = _checked(section, values, types)
    wrong = [key for key, value in checked.items() if isinstance(value, float) and not math.isfinite(value)]
    if wrong:
        lines = [f"{section}.{key} is {checked[key]}; a finite number is needed" for key in wrong]
        raise ValueError("\n".join(lines))
    # As written, so that TrainingArguments sees what its own documentation describes; only text may become a number.
    return {
        key: checked[key] if isinstance(value, str) and isinstance(checked[key], bool | int | float) else value
        for key, value in values.items()
    }


def _checked(
    section: str, values: Mapping[str, Any], types: Mapping[str, Any], more: Sequence[str] = ()
) -> dict[str, Any]:
    """The values as their types want them: known by name, a number written as text made a number."""
    problems, checked = [], {}
    for key, value in values.items():
        elsewhere = _ELSEWHERE.get((section.split(".")[-1], key))
        if elsewhere or key not in types:
            problems.append(unknown_setting(section, str(key), [*types, *more], elsewhere))
            continue
        adapter = TypeAdapter(types[key], config=ConfigDict(arbitrary_types_allowed=True))
        try:
            checked[key] = adapter.validate_python(value)
        except ValidationError as error:
            problems.append(
                f"{section}.{key} is {shown(masked(value, str(key)))}; {lower_first(error.errors()[0]['msg'])}"
            )
    if problems:
        raise ValueError("\n".join(problems))
    return checked


def _unknown_method(name: str, known: Iterable[str], owner: str) -> str:
    known = list(map(str, known))
    near = get_close_matches(str(name).lower(), known, 1)
    return f'{owner} has no method "{name}"; it has {", ".join(known)}' + (
        f'; did you mean "{near[0]}"?' if near else ""
    )
