"""Evaluate policies on the same prompts and pairs, and write results.json, samples.jsonl and a folder a policy."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from distalign.bench import target_prompts
from distalign.calibrate import calibrate
from distalign.card import CITATION
from distalign.data import (
    EncodedPair,
    EncodedPrompt,
    Prompt,
    Text,
    encode_pairs,
    encode_prompt,
    end_token_id,
    plain_text,
    read_pairs,
    read_prompts,
)
from distalign.engine import Group, score_in_batches
from distalign.errors import InputError
from distalign.evaluate.answers import Answers, content_key, draw_answers, load_answers, score_answers
from distalign.evaluate.settings import Evaluation
from distalign.evaluate.standing import all_opponents, judge_all, standings
from distalign.facts import environment, finite, plain
from distalign.judge import JudgeSettings, check_judge, make_judge
from distalign.measure import (
    COLUMNS,
    Measured,
    calibration,
    differences,
    measure_pairs,
    measure_rewards,
    significance,
    summarise,
)
from distalign.policy import Source, find_model
from distalign.reward import Reward, check_rewards, make_reward
from distalign.targets import Target, Tilt

logger = logging.getLogger("distalign.evaluate")


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


def evaluate(settings: Evaluation, target: Target | None = None) -> dict[str, Any]:
    """Measure every policy and the reference; returns what `results.json` holds.

    What a policy gave is kept in its folder: evaluated again with the same weights, prompts and settings it is not run.
    `target` stands in for the settings' tilt of words. Raises InputError before weights are loaded where it can.
    """
    bench = prepare(settings, target)
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    settings.dump(settings.run_dir / "recipe.yaml")
    load_base(bench, target)
    answers = _answers(bench)
    measured = {name: _measured(bench, one, answers["reference"]) for name, one in answers.items()}
    reward = reward_of(bench)
    if reward is not None:
        for one in measured.values():
            measure_rewards(one, reward, bench.prompts)
    standing = _standing(bench, measured, reward)
    results = _results(bench, measured, standing)
    _write_samples(bench, measured)
    text = json.dumps(finite(results), indent=1, ensure_ascii=False)
    (settings.run_dir / "results.json").write_text(text, encoding="utf-8")
    return results


def prepare(settings: Evaluation, target: Target | None) -> Bench:
    """Everything that can be read, and refused, before any weights are loaded."""
    trust = settings.trust_remote_code
    sources = {"reference": find_model(settings.model, trust_remote_code=trust)}
    sources |= {name: find_model(place, trust_remote_code=trust) for name, place in settings.policies.items()}
    tokenizer = sources["reference"].tokenizer()
    for name, source in sources.items():
        if source.tokenizer().get_vocab() != tokenizer.get_vocab():
            raise InputError(
                f"policy {name}: its tokenizer is not that of the reference {settings.model}; policies with other "
                "tokens have no KL to it: evaluate them by themselves, each beside its own reference"
            )
    pairs, facts, rows = _read_pairs(settings, tokenizer)
    if settings.prompts is not None:
        data = read_prompts(settings.prompts, limit=settings.limit)
        rows, facts = data.rows, {"prompts": settings.prompts, "format": data.format, **facts}
    elif settings.pairs is None and settings.target is not None:
        rows = target_prompts(settings.target, tokenizer)[1]
        facts["prompts"] = "the target's, held out"
        facts["format"] = "standard" if isinstance(rows[0].prompt, str) else "conversational"
    encoded = [EncodedPrompt(encode_prompt(tokenizer, row), row.where, row) for row in rows]
    distinct = list({tuple(one.prompt): one for one in encoded}.values())[: settings.limit]
    facts["held-out prompts"] = len(distinct)
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


def _read_pairs(settings: Evaluation, tokenizer: Any) -> tuple[list[EncodedPair], dict[str, Any], list[Any]]:
    """The held-out pairs, what is to be told of them, and the rows whose prompts may be answered."""
    if settings.pairs is None:
        return [], {}, []
    data = read_pairs(settings.pairs)
    pairs, counts = encode_pairs(tokenizer, data, max_length=settings.max_length)
    facts = {"pairs": settings.pairs, "format": data.format, "held-out pairs": len(pairs), "encoding": str(counts)}
    return pairs, facts, [Prompt(row.prompt, row.where, row.extra) for row in data]


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
    bench.base = _load(bench, bench.sources["reference"])
    if settings.target is not None:
        tilt = Tilt(tuple(settings.target.words), settings.target.bonus, settings.target.end_bonus)
        bench.target = (target or tilt).model(bench.base, bench.tokenizer)


def _load(bench: Bench, source: Source) -> Any:
    model: Any = source.model(bench.settings.dtype)
    return model.to(TrainingArguments(output_dir="unused").device).requires_grad_(False)


def _answers(bench: Bench) -> dict[str, Answers]:
    """Of every policy, from its folder or drawn now; scored against the reference in one pass for all."""
    settings, folder = bench.settings, bench.settings.run_dir / "policies"
    found: dict[str, Answers] = {}
    fresh = []
    for number, (name, source) in enumerate(bench.sources.items()):
        started = time.monotonic()
        key = content_key(source, settings, bench.ids, bench.groups)
        kept = load_answers(folder / name, name, key)
        if kept is not None:
            logger.info("%s: its answers are those of %s", name, folder / name)
            found[name] = kept
            continue
        model = bench.base if name == "reference" else _load(bench, source)
        found[name] = draw_answers(
            name,
            key,
            model,
            settings,
            bench.ids,
            bench.groups,
            end_id=bench.end_id,
            reference=bench.base,
            own_draw=number,
        )
        fresh.append(name)
        del model
        bench.seconds[f"answers of {name}"] = time.monotonic() - started
    started = time.monotonic()
    score_answers([found[name] for name in fresh], bench.base, settings, bench.ids)
    bench.seconds["KL to the reference"] = time.monotonic() - started
    for name in fresh:
        found[name].save(folder / name)
    return found


def _measured(bench: Bench, answers: Answers, start: Answers) -> Measured:
    """A policy's numbers, a value a prompt or a pair."""
    samples = bench.settings.samples

    def per_prompt(values: Tensor) -> Tensor:
        return values.double().view(-1, samples).mean(-1)

    flat = [response for own in answers.responses for response in own]
    values = {
        "entropy": per_prompt(answers.scores["entropy"]),
        "kl_reference": per_prompt(answers.scores["kl"]),
        "length": per_prompt(torch.tensor([float(len(one)) for one in flat])),
        "missing_end": per_prompt(torch.tensor([float(one[-1] != bench.end_id) for one in flat])),
    }
    if answers is start:
        values["kl_reference"] = torch.zeros_like(values["entropy"])
    measured = Measured(values, answers.responses)
    if bench.pairs:
        gamma = bench.settings.gamma
        scale = _cross_fitted(answers, bench.pairs) if gamma is None else torch.full((len(bench.pairs), 1), gamma)
        measure_pairs(measured, answers.pair_logps, bench.pairs, lambda logps: scale * logps, _target_logit(bench))
        change = answers.pair_logps - start.pair_logps
        measured.values["chosen_change"], measured.values["rejected_change"] = change.unbind(1)
    return measured


def _cross_fitted(answers: Answers, pairs: Sequence[EncodedPair]) -> Tensor:
    """γ of every pair [pairs, 1], fitted on the half that its prompt is not in; just above 0 if none above fits.

    Where a half decides it without doubt (γ → ∞) the likelihood of the other is without bound, and 1 stands for it.
    """
    half = torch.tensor([int(hashlib.sha256(str(pair.prompt).encode()).hexdigest(), 16) % 2 for pair in pairs])
    labels = torch.tensor([1.0 if pair.probability is None else pair.probability for pair in pairs])
    scale = torch.ones(len(pairs), 1, dtype=torch.float64)
    for own in (0, 1):
        other = half != own
        if not bool(other.any()):
            continue
        try:
            found = calibrate(answers.pair_logps[other], labels[other]).gamma.mean
        except ValueError as error:
            logger.warning("%s: no γ from half of the pairs (%s); 1 is taken", answers.name, error)
            continue
        if math.isfinite(found):
            scale[half == own] = max(found, 1e-6)
        else:
            logger.warning("%s: half of the pairs leaves no doubt about their labels; γ = 1 is taken", answers.name)
    return scale


def _target_logit(bench: Bench) -> Tensor | None:
    """γ Δ ln π* of the pairs, where the target is known."""
    if bench.target is None or bench.settings.target is None:
        return None
    logps = score_in_batches(bench.target, bench.groups, token_budget=bench.settings.token_budget).logps.view(-1, 2)
    return bench.settings.target.gamma * (logps[:, 0] - logps[:, 1])


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


def _standing(bench: Bench, measured: Mapping[str, Measured], reward: Reward | None) -> dict[str, Any]:
    """Win rates by the judge, by default the target's own preference."""
    settings = bench.settings
    judged_by = settings.judge
    if judged_by is None and settings.target is not None:
        judged_by = JudgeSettings(exact=True)
    if judged_by is None and settings.reward:
        judged_by = JudgeSettings(reward=settings.reward)
    names = list(measured)
    if judged_by is None or len(names) < 2:
        return {}
    started = time.monotonic()
    judge = make_judge(
        judged_by,
        base=bench.base,
        tokenizer=bench.tokenizer,
        token_budget=settings.token_budget,
        target=bench.target,
        gamma=None if settings.target is None else settings.target.gamma,
    )
    answers = {name: one.responses for name, one in measured.items()}
    opponents = all_opponents(names, settings.opponents)
    wins = judge_all(judge, bench.prompts, bench.texts, answers, bench.tokenizer, opponents)
    for name in names:
        if ("reference", name) in wins:
            measured[name].values["win_rate"] = 1 - wins["reference", name]
    found = standings(wins, names, {name: one.values["length"] for name, one in measured.items()})
    kind = next(key for key in ("reward", "function", "exact", "endpoint") if getattr(judged_by, key))
    found["win_rates"] |= {"judge": kind, "facts": judge.facts()}
    bench.seconds["judge"] = time.monotonic() - started
    return found


def _results(bench: Bench, measured: Mapping[str, Measured], standing: dict[str, Any]) -> dict[str, Any]:
    settings, start = bench.settings, measured["reference"]
    others = [name for name in measured if name != "reference"]
    return {
        "name": settings.name,
        "kind": "evaluation",
        "seeds": [settings.seed],
        "columns": COLUMNS,
        "methods": {name: plain(summarise([one])) for name, one in measured.items()},
        "paired": {name: plain(differences([measured[name]], [start])) for name in others},
        "between": {
            one: {other: plain(differences([measured[one]], [measured[other]])) for other in others if other != one}
            for one in others
        },
        "significance": significance({name: [measured[name]] for name in others}, [start], seed=settings.seed),
        "calibration": {
            name: [row._asdict() for row in calibration([one])] for name, one in measured.items() if len(one.confidence)
        },
        "points": {name: _points(one) for name, one in measured.items()},
        **standing,
        **_forecast(settings),
        "pairs": bench.facts,
        "settings": settings.model_dump(mode="json"),
        "environment": environment(),
        "seconds": bench.seconds,
        "citation": CITATION,
    }


def _forecast(settings: Evaluation) -> dict[str, Any]:
    """The frontier that was predicted in the same folder, for the report."""
    path = settings.run_dir / "frontier.json"
    return {"frontier": json.loads(path.read_text(encoding="utf-8"))} if path.is_file() else {}


def _points(measured: Measured) -> list[dict[str, Any]]:
    """Length and reward of the answers to each prompt."""
    reward = measured.values.get("reward")
    lengths = measured.values["length"].tolist()
    rewards = [None] * len(lengths) if reward is None else reward.tolist()
    return [{"prompt": i, "length": a, "reward": b} for i, (a, b) in enumerate(zip(lengths, rewards, strict=True))]


def _write_samples(bench: Bench, measured: Mapping[str, Measured]) -> None:
    with (bench.settings.run_dir / "samples.jsonl").open("w", encoding="utf-8") as file:
        for index, text in enumerate(bench.texts):
            responses = {
                name: bench.tokenizer.decode(one.responses[index][0], skip_special_tokens=True)
                for name, one in measured.items()
            }
            file.write(json.dumps({"prompt": plain_text(text), "responses": responses}, ensure_ascii=False) + "\n")
