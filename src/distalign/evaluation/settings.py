"""The settings of an evaluation, from YAML and `--set` flags: which policies, on what, judged by whom."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from distalign.judges import JudgeSettings
from distalign.models.targets import TargetSettings
from distalign.rewards import RewardSettings
from distalign.settings import Count, Positive, RecipeError, Section, dump_yaml, find_recipe, read_settings, several

_NAME = re.compile(r"\w[\w.-]{0,79}")


class Evaluation(Section):
    """Policies on the same held-out prompts.

    model: the reference π₀, which every policy shares its tokenizer with. policies: name → folder, adapter or hub id.
    prompts: a file of prompts (null: those of `pairs`, or the held-out ones of `target`). pairs: held-out labelled
    pairs, for what policies prefer. limit: the prompts to answer; rows count as one only if their prompt and all their
    other columns are the same. target: a known target made of `model`. reward scores responses, judge compares
    them (null: by the target's own preference, or by the reward where there is one; without either nothing is
    compared). opponents: every two policies, or each with the reference alone. gamma: sharpness of P_π (null: found on
    the pairs by each policy, half judging the other half).
    """

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    output_dir: str = "runs"
    seed: Annotated[int, Field(ge=0)] = 0
    model: str
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    trust_remote_code: bool = False
    policies: Annotated[dict[str, str], Field(default_factory=dict)]
    prompts: str | None = None
    pairs: str | None = None
    limit: Annotated[int, Field(ge=2)] = 200
    target: TargetSettings | None = None
    reward: Annotated[tuple[RewardSettings, ...], BeforeValidator(several)] = ()
    judge: JudgeSettings | None = None
    opponents: Literal["all", "reference"] = "all"
    gamma: Positive | None = None
    samples: Count = 1
    max_new_tokens: Count = 128
    temperature: Positive = 1.0
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
            if one.exact and self.target is None:
                raise ValueError("reward.exact is the known target's; add target, or take another reward")
        return self

    @property
    def run_dir(self) -> Path:
        """The folder, output_dir/name."""
        return Path(self.output_dir) / self.name

    def dump(self, path: Path) -> None:
        """Write the settings as resolved."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dump_yaml(self.model_dump(mode="json")), encoding="utf-8")


def load_evaluation(path: str | Path, overrides: list[str], policies: list[str]) -> Evaluation:
    """Read and check the settings; `policies` are `name=place`, or places that are named by their last parts.

    They are added to those of the file. Raises RecipeError, every line of which says where, what was found and what to
    do.
    """

    def add(raw: dict[str, Any], where: str) -> None:
        given = raw.get("policies") or {}
        if isinstance(given, dict):
            raw["policies"] = given | _named(policies, given)

    files = {"": ("prompts", "pairs"), "target": ("prompts",)}
    return read_settings(Evaluation, find_recipe(path, "evaluate"), overrides, files=files, change=add)


def _named(policies: list[str], taken: dict[str, str]) -> dict[str, str]:
    """Names of policies: what stands before =, or as much of the end of the path as tells them apart."""
    named: dict[str, str] = {}
    for policy in policies:
        name, equals, place = policy.partition("=")
        if not equals or "/" in name:
            place = policy
            parts = [part for part in Path(policy).parts if part not in ("/", ".", "..", "model")]
            name = parts[-1] if parts else policy
            depth = 2
            while name in named or name in taken or name in ("reference", "target"):
                name = "-".join(parts[-depth:]) if depth <= len(parts) else f"{name}-{len(named) + 1}"
                depth += 1
        name = name.replace("/", "-")
        if name in named:
            raise RecipeError(
                f"policies: two are named {name}, {named[name]} and {place}; give them names of their own"
            )
        named[name] = place
    return named
