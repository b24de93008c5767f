"""What policies are evaluated on: the settings (YAML and `--set` flags), and the models, prompts and pairs they name.

Everything that can be read without weights is read, and refused, before they are loaded.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from transformers import PreTrainedModel, TrainingArguments

from distalign.data import (
    EncodedPair,
    EncodedPrompt,
    Prompt,
    Text,
    Tokenizer,
    encode_pairs,
    encode_prompt,
    end_token_id,
    read_pairs,
    read_prompts,
)
from distalign.engine import Group
from distalign.errors import InputError
from distalign.judges import JudgeSettings, check_judge
from distalign.models.load import Source, check_positions, check_token_ids, find_model, weights_digest
from distalign.models.policy import trained_temperature
from distalign.models.quantized import check_installed
from distalign.models.targets import Target, TargetSettings, make_target, target_prompts
from distalign.rewards import Reward, Rewards, check_rewards, make_reward
from distalign.settings import (
    Count,
    Positive,
    Quantization,
    RecipeError,
    Section,
    Seed,
    find_recipe,
    read_settings,
)
from distalign.user_code import files_digests

logger = logging.getLogger("distalign.evaluation")

_NAME = re.compile(r"\w[\w.-]{0,79}")


class Evaluation(Section):
    """Policies on the same held-out prompts.

    model: the reference π₀, which every policy shares its tokenizer with. quantization: "4bit" has its weights in 4
    bits, as below adapters that were trained so (which are read as they were trained in any case). policies: name →
    folder, adapter or hub id. prompts: a file of prompts (null: those of `pairs`, or the held-out ones of `target`).
    pairs: held-out labelled pairs, for what policies prefer. limit: the prompts to answer; rows count as one only if
    their prompt and all their other columns are the same. target: a known target made of `model`. reward scores
    responses, judge compares them (null: by the target's own preference, or by the reward where there is one; without
    either nothing is compared). opponents: every two policies, or each with the reference alone. temperature: of what
    is sampled and measured (null: the policies' own, which training wrote into their generation_config.json); pairs are
    measured at the policies' own. gamma: sharpness of P_π (null: found on the pairs by each policy, half judging the
    other half).
    """

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    output_dir: str = "runs"
    seed: Seed = 0
    model: str
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    trust_remote_code: bool = False
    quantization: Quantization = None
    policies: Annotated[dict[str, str], Field(default_factory=dict)]
    prompts: str | None = None
    pairs: str | None = None
    limit: Annotated[int, Field(ge=2)] = 200
    target: TargetSettings | None = None
    reward: Rewards = ()
    judge: JudgeSettings | None = None
    opponents: Literal["all", "reference"] = "all"
    gamma: Positive | None = None
    samples: Count = 1
    max_new_tokens: Count = 128
    temperature: Positive | None = None
    max_length: Count | None = None
    token_budget: Count = 4096
    rows: Count = 64

    @field_validator("policies")
    @classmethod
    def _free_names(cls, policies: dict[str, str]) -> dict[str, str]:
        for name in policies:
            if name in ("reference", "target") or not _NAME.fullmatch(name):
                raise ValueError(
                    f'policies: "{name[:80]}" cannot be a policy\'s name; take at most 80 letters, digits, . _ -, '
                    "another than reference and target"
                )
        return policies

    @model_validator(mode="after")
    def _something_to_answer(self) -> Evaluation:
        if self.prompts is None and self.pairs is None and self.target is None:
            raise ValueError("evaluation has neither prompts nor pairs; give prompts to answer, or held-out pairs")
        for one in self.reward:
            if one.train is not None:
                raise ValueError("reward.train: an evaluation trains nothing; run distalign reward and name its folder")
        return self

    @property
    def run_dir(self) -> Path:
        """The folder of an evaluation, output_dir/name/evaluation."""
        return Path(self.output_dir) / self.name / "evaluation"

    @property
    def frontier_dir(self) -> Path:
        """The folder of a predicted frontier, output_dir/name/frontier; an evaluation of the same name shows it."""
        return Path(self.output_dir) / self.name / "frontier"


def load_evaluation(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), policies: Sequence[str] = ()
) -> Evaluation:
    """Read and check the settings: of a file, a packaged recipe by its name, or a mapping.

    `policies` are `name=place`, or places that are named by the last part; they are added to those of the settings.
    Raises RecipeError, every line of which says where, what was found and what to do.
    """

    def add(raw: dict[str, Any], *_: object) -> None:
        given = raw.get("policies") or {}
        if isinstance(given, dict):
            raw["policies"] = given | _named(policies, given)

    files = {"": ("prompts", "pairs"), "target": ("prompts", "class")}
    place = source if isinstance(source, Mapping) else find_recipe(source, "evaluate")
    return read_settings(Evaluation, place, overrides, files=files, change=add)


def _named(policies: Sequence[str], taken: Mapping[str, str]) -> dict[str, str]:
    """Names of policies: what stands before =, or the last part of the path, which must be free."""
    named: dict[str, str] = {}
    for policy in policies:
        name, equals, place = policy.partition("=")
        given = equals and "/" not in name
        if not given:
            parts = [part for part in Path(policy).parts if part not in ("/", ".", "..", "model")]
            name, place = parts[-1] if parts else policy, policy
        if not place.strip():
            raise RecipeError(f"policies: {policy!r} names no place; write name=folder")
        others = named if given else {**taken, **named}
        if name in others:
            raise RecipeError(
                f"policies: two are named {name}, {others[name]} and {place}; give them names of their own (name=place)"
            )
        named[name] = place
    return named


# What the settings name -----------------------------------------------------------------------------------------------


@dataclass
class EvaluationSetup:
    """What all policies are measured on, and the reference's weights. `statistics` count what was read."""

    settings: Evaluation
    sources: dict[str, Source]
    tokenizer: Any  # a transformers tokenizer: their classes do not declare what they all have
    prompts: list[EncodedPrompt]
    pairs: list[EncodedPair]
    end_id: int
    statistics: dict[str, Any]
    base: PreTrainedModel
    target: PreTrainedModel | None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def ids(self) -> list[list[int]]:
        """The prompts alone."""
        return [one.prompt for one in self.prompts]

    @property
    def texts(self) -> list[Text]:
        """The prompts as they were read."""
        return [one.row.prompt if one.row is not None else "" for one in self.prompts]

    @property
    def groups(self) -> list[Group]:
        """The pairs as the engine takes them, preferred response first."""
        return [Group(pair.prompt, [pair.chosen, pair.rejected]) for pair in self.pairs]

    @property
    def gamma(self) -> float | None:
        """The known target's sharpness."""
        return None if self.settings.target is None else self.settings.target.gamma

    def policy(self, name: str) -> PreTrainedModel:
        """A policy's weights, frozen; those of the reference are `base`."""
        return self.base if name == "reference" else _load(self.settings, self.sources[name])

    def reward(self) -> Reward | None:
        """The settings' reward, None without one. Raises RewardError."""
        if not self.settings.reward:
            return None
        return make_reward(
            self.settings.reward,
            base=self.base,
            tokenizer=self.tokenizer,
            token_budget=self.settings.token_budget,
            target=self.target,
            gamma=self.gamma,
        )

    def identity(self) -> dict[str, Any]:
        """What a frontier is of: the reference's weights, the reward and its files, prompts and sampling."""
        settings, rewards = self.settings, self.settings.reward
        return {
            "reference": weights_digest(self.sources["reference"]),
            "reward": [one.model_dump(mode="json") for one in rewards],
            "files": files_digests((one.function for one in rewards), (one.model for one in rewards)),
            "prompts": self.ids,
            "sampling": [settings.temperature, settings.max_new_tokens],
        }


def load_setup(settings: Evaluation, target: Target | None = None) -> EvaluationSetup:
    """Read and check everything, and then load the reference, and make the known target of it if there is one.

    `target` stands in for the settings' own. Raises InputError.
    """
    trust = settings.trust_remote_code
    reference = find_model(settings.model, trust_remote_code=trust)
    sources = {"reference": reference if settings.quantization is None else reference.in_4bit()}
    sources |= {name: find_model(place, trust_remote_code=trust) for name, place in settings.policies.items()}
    tokenizer = sources["reference"].tokenizer()
    _check_tokenizers(settings, sources, tokenizer)
    _check_quantization(settings, sources)
    pairs, rows, statistics = _read(settings, sources, tokenizer)
    prompts = _distinct(rows, tokenizer, settings.limit)
    statistics["held-out prompts"] = len(prompts)
    if len(prompts) < 2:
        raise InputError(f"{settings.name}: {len(prompts)} different prompts; standard errors need two: give more")
    conversational = bool(tokenizer.chat_template) and statistics["format"] == "conversational"
    known = settings.target is not None or target is not None
    gamma = None if settings.target is None else settings.target.gamma
    if settings.reward:
        check_rewards(settings.reward, conversational=conversational, target=settings.target is not None)
    if settings.judge is not None:
        check_judge(settings.judge, conversational=conversational, target=known, gamma=gamma)
    ids = [one.prompt for one in prompts]
    read = [*ids, *(part for pair in pairs for part in (pair.prompt, pair.chosen, pair.rejected))]
    for name, source in sources.items():
        # An adapter may bring embeddings of its own.
        if source.adapter is None:
            check_token_ids(f"of policy {name}", source.config(), read)
        check_positions(f"of policy {name}", source.config(), ids, settings.max_new_tokens, "max_new_tokens")
    end_id = end_token_id(tokenizer, conversational=conversational)
    settings = settings.model_copy(update={"temperature": _temperature(settings, sources)})
    if settings.target is not None:
        target = target or make_target(settings.target, sources["reference"], tokenizer)
    base = _load(settings, sources["reference"])
    target_model = None if settings.target is None or target is None else target.model(base, tokenizer)
    return EvaluationSetup(settings, sources, tokenizer, prompts, pairs, end_id, statistics, base, target_model)


def _check_quantization(settings: Evaluation, sources: Mapping[str, Source]) -> None:
    """Raise ModelError where 4-bit weights cannot be read; warn of distances that count their rounding."""
    quantized = [name for name, source in sources.items() if source.quantization is not None]
    if quantized:
        check_installed(settings.name)
    if quantized and "reference" not in quantized:
        logger.warning(
            "%s: %s was trained on 4-bit weights, and the reference's are not: distances between them count the "
            "rounding too; set quantization=4bit",
            settings.name, ", ".join(quantized),
        )  # fmt: skip


def _temperature(settings: Evaluation, sources: Mapping[str, Source]) -> float:
    """The setting; else the temperature that the policies were trained at, which says what their distribution is."""
    folders = {name: source.adapter or source.path for name, source in sources.items()}
    trained = {name: found for name, place in folders.items() if (found := trained_temperature(place)) is not None}
    start = trained.pop("reference", None)
    listed = ", ".join(f"{name} at {value:g}" for name, value in trained.items())
    temperature = settings.temperature
    if temperature is None:
        if len(set(trained.values())) > 1:
            raise InputError(
                f"{settings.name}: policies were trained at several temperatures ({listed}); set temperature"
            )
        temperature = next(iter(trained.values()), 1.0)
    elif any(value != temperature for value in trained.values()):
        logger.warning(
            "%s: temperature is %g, and policies were trained at another (%s): that is the distribution they learned",
            settings.name, temperature, listed,
        )  # fmt: skip
    if start not in (None, temperature):
        logger.warning(
            "%s: the reference was trained at temperature %g, and is sampled and compared at %g", settings.name, start,
            temperature,
        )  # fmt: skip
    return temperature


def _load(settings: Evaluation, source: Source) -> PreTrainedModel:
    """A policy's weights, frozen, on the device that training would take."""
    return source.model(settings.dtype, TrainingArguments(output_dir="unused").device).requires_grad_(False)


def _read(
    settings: Evaluation, sources: Mapping[str, Source], tokenizer: Tokenizer
) -> tuple[list[EncodedPair], Sequence[Prompt], dict[str, Any]]:
    """The held-out pairs, the rows whose prompts may be answered, and what they are."""
    pairs: list[EncodedPair] = []
    rows: Sequence[Prompt] = []
    statistics: dict[str, Any] = {}
    if settings.pairs is not None:
        data = read_pairs(settings.pairs)
        limits = (settings.max_length, *(source.max_length() for source in sources.values()))
        shortest = min((limit for limit in limits if limit is not None), default=None)
        pairs, counts = encode_pairs(tokenizer, data, max_length=shortest)
        statistics = {"pairs": settings.pairs, "format": data.format}
        statistics |= {"held-out pairs": len(pairs), "encoding": str(counts)}
        rows = [Prompt(row.prompt, row.where, row.extra) for row in data]
    if settings.prompts is not None:
        prompts = read_prompts(settings.prompts)
        if prompts.format != statistics.get("format", prompts.format):
            raise InputError(
                f"{settings.name}: prompts holds {prompts.format} rows and pairs {statistics['format']} ones, whose "
                "responses end otherwise; write both as strings or both as messages"
            )
        rows, statistics = prompts.rows, {"prompts": settings.prompts, "format": prompts.format, **statistics}
    elif settings.pairs is None and settings.target is not None:
        rows = target_prompts(settings.target, tokenizer)[1]
        statistics["prompts"] = "the target's, held out"
        statistics["format"] = "standard" if isinstance(rows[0].prompt, str) else "conversational"
    return pairs, rows, statistics


def _check_tokenizers(settings: Evaluation, sources: Mapping[str, Source], tokenizer: Any) -> None:
    """Refuse policies of other tokens than the reference's; warn of other chat templates."""
    for name, source in sources.items():
        if source.tokenizer_path == sources["reference"].tokenizer_path:
            continue
        own = source.tokenizer()
        if own.chat_template != tokenizer.chat_template:
            logger.warning("policy %s: has another chat template than the reference, by whose all are asked", name)
        if own.get_vocab() != tokenizer.get_vocab():
            raise InputError(
                f"policy {name}: its tokenizer is not that of the reference {settings.model}; policies with other "
                "tokens have no KL to it: evaluate them by themselves, each beside its own reference"
            )


def _distinct(rows: Sequence[Prompt], tokenizer: Tokenizer, limit: int) -> list[EncodedPrompt]:
    """The first `limit` rows that differ in their prompt or another column, encoded; what comes later is not read."""
    distinct: dict[object, EncodedPrompt] = {}
    for row in rows:
        if len(distinct) == limit:
            break
        prompt = EncodedPrompt(encode_prompt(tokenizer, row), row.where, row)
        distinct.setdefault(prompt.question, prompt)
    return list(distinct.values())
