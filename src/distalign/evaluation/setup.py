"""What an evaluation is measured on: everything read and refused before weights are, the reference, the reward."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from distalign.data import (
    EncodedPair,
    EncodedPrompt,
    Prompt,
    Text,
    encode_pairs,
    encode_prompt,
    end_token_id,
    read_pairs,
    read_prompts,
)
from distalign.engine import Group
from distalign.errors import InputError
from distalign.evaluation.settings import Evaluation
from distalign.judges import check_judge
from distalign.models.load import Source, find_model, weights_digest
from distalign.models.targets import Target, Tilt, target_prompts
from distalign.rewards import Reward, check_rewards, make_reward

logger = logging.getLogger("distalign.evaluation")

# How the names of a tokenizer's files begin; a template of chats is none of its vocabulary.
_OF_TOKENIZERS = ("tokeniz", "vocab", "merges", "added_tokens", "special_tokens")


@dataclass
class Bench:
    """What all policies are measured on."""

    settings: Evaluation
    sources: dict[str, Source]
    tokenizer: Any
    prompts: list[EncodedPrompt]
    texts: list[Text]
    pairs: list[EncodedPair]
    end_id: int
    facts: dict[str, Any]
    base: Any = None
    target: Any = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def ids(self) -> list[list[int]]:
        """The prompts alone."""
        return [one.prompt for one in self.prompts]

    @property
    def groups(self) -> list[Group]:
        """The pairs as the engine takes them, preferred response first."""
        return [Group(pair.prompt, [pair.chosen, pair.rejected]) for pair in self.pairs]


def prepare(settings: Evaluation, target: Target | None) -> Bench:
    """Everything that can be read, and refused, before any weights are loaded."""
    trust = settings.trust_remote_code
    sources = {"reference": find_model(settings.model, trust_remote_code=trust)}
    sources |= {name: find_model(place, trust_remote_code=trust) for name, place in settings.policies.items()}
    tokenizer = sources["reference"].tokenizer()
    _check_tokenizers(settings, sources, tokenizer)
    pairs, facts, rows = _read_pairs(settings, tokenizer)
    if settings.prompts is not None:
        data = read_prompts(settings.prompts)
        rows, facts = data.rows, {"prompts": settings.prompts, "format": data.format, **facts}
    elif settings.pairs is None and settings.target is not None:
        rows = target_prompts(settings.target, tokenizer)[1]
        facts["prompts"] = "the target's, held out"
        facts["format"] = "standard" if isinstance(rows[0].prompt, str) else "conversational"
    distinct = _distinct(rows, tokenizer, settings.limit, facts)
    if len(distinct) < 2:
        raise InputError(f"{settings.name}: {len(distinct)} different prompts; standard errors need two: give more")
    conversational = bool(tokenizer.chat_template) and facts["format"] == "conversational"
    known = settings.target is not None or target is not None
    gamma = settings.target.gamma if settings.target is not None else None
    if settings.reward:
        check_rewards(settings.reward, conversational=conversational, target=known, gamma=gamma)
    if settings.judge is not None:
        check_judge(settings.judge, conversational=conversational, target=known, gamma=gamma)
    _check_room(settings, sources, distinct)
    return Bench(
        settings=settings,
        sources=sources,
        tokenizer=tokenizer,
        prompts=distinct,
        texts=[one.row.prompt if one.row is not None else "" for one in distinct],
        pairs=pairs,
        end_id=end_token_id(tokenizer, conversational=conversational),
        facts=facts,
    )


def _check_tokenizers(settings: Evaluation, sources: Mapping[str, Source], tokenizer: Any) -> None:
    """Refuse policies of other tokens than the reference's. A tokenizer is loaded only if its files are new."""
    vocabulary, alike = tokenizer.get_vocab(), [sources["reference"].tokenizer_path]
    for name, source in sources.items():
        if any(_same_files(source.tokenizer_path, one) for one in alike):
            continue
        if source.tokenizer().get_vocab() != vocabulary:
            raise InputError(
                f"policy {name}: its tokenizer is not that of the reference {settings.model}; policies with other "
                "tokens have no KL to it: evaluate them by themselves, each beside its own reference"
            )
        alike.append(source.tokenizer_path)


def _same_files(one: str, other: str) -> bool:
    """Whether two tokenizers are read from one place, or from folders whose every file of a tokenizer is equal."""
    if one == other:
        return True
    first, second = (
        {
            file.name: file.read_bytes()
            for file in Path(place).glob("*")
            if file.name.startswith(_OF_TOKENIZERS) and file.is_file()
        }
        for place in (one, other)
    )
    return "tokenizer.json" in first and first == second


def _read_pairs(settings: Evaluation, tokenizer: Any) -> tuple[list[EncodedPair], dict[str, Any], list[Any]]:
    """The held-out pairs, what is to be told of them, and the rows whose prompts may be answered."""
    if settings.pairs is None:
        return [], {}, []
    data = read_pairs(settings.pairs)
    pairs, counts = encode_pairs(tokenizer, data, max_length=settings.max_length)
    facts = {"pairs": settings.pairs, "format": data.format, "held-out pairs": len(pairs), "encoding": str(counts)}
    return pairs, facts, [Prompt(row.prompt, row.where, row.extra) for row in data]


def _distinct(rows: Sequence[Prompt], tokenizer: Any, limit: int, facts: dict[str, Any]) -> list[EncodedPrompt]:
    """The first `limit` rows that differ in their prompt or another column, encoded; what they are is put into facts.

    Functions that reward or judge are given the columns, so the same prompt with others is another row.
    """
    found: dict[tuple[tuple[int, ...], str], EncodedPrompt] = {}
    folded = 0
    for row in rows:
        if len(found) == limit:
            break
        one = EncodedPrompt(encode_prompt(tokenizer, row), row.where, row)
        key = tuple(one.prompt), json.dumps(row.extra, sort_keys=True, default=repr)
        folded += key in found
        found.setdefault(key, one)
    facts["held-out prompts"] = len(found)
    if folded:
        facts["repeated rows left out"] = folded
        logger.info("%d rows repeat another, prompt and columns, and are left out", folded)
    shared = len(found) - len({prompt for prompt, _ in found})
    if shared:
        facts["prompts that are another's with other columns"] = shared
        logger.warning(
            "%d of %d prompts are another's with other columns; standard errors count each as a prompt of its own",
            shared,
            len(found),
        )
    return list(found.values())


def _check_room(settings: Evaluation, sources: Mapping[str, Source], prompts: Sequence[EncodedPrompt]) -> None:
    longest = max(len(one.prompt) for one in prompts)
    for name, source in sources.items():
        limit = source.max_length()
        if limit is not None and longest + settings.max_new_tokens > limit:
            raise InputError(
                f"policy {name}: the longest prompt has {longest} tokens and max_new_tokens is "
                f"{settings.max_new_tokens}, but the model has {limit} positions; lower it or leave out long prompts"
            )


def load_base(bench: Bench, target: Target | None) -> None:
    """Load the reference, and make the known target of it if there is one."""
    settings = bench.settings
    bench.base = load(bench, bench.sources["reference"])
    if settings.target is not None:
        tilt = Tilt(tuple(settings.target.words), settings.target.bonus, settings.target.end_bonus)
        bench.target = (target or tilt).model(bench.base, bench.tokenizer)


def load(bench: Bench, source: Source) -> Any:
    """A policy's weights, frozen, on the device that training would take."""
    model = source.model(bench.settings.dtype, TrainingArguments(output_dir="unused").device)
    return model.requires_grad_(False)


def reward_of(bench: Bench) -> Reward | None:
    """The settings' reward, None without one. Raises RewardError."""
    settings = bench.settings
    if not settings.reward:
        return None
    return make_reward(
        settings.reward,
        base=bench.base,
        tokenizer=bench.tokenizer,
        token_budget=settings.token_budget,
        target=bench.target,
        gamma=None if settings.target is None else settings.target.gamma,
    )


def frontier_of(bench: Bench) -> dict[str, Any]:
    """What a frontier is of: the reference's weights, and the reward."""
    reward = [one.model_dump(mode="json") for one in bench.settings.reward]
    return {"reference": weights_digest(bench.sources["reference"]), "reward": reward}
