"""Evaluate policies on the same prompts and pairs, and write results.json, samples.jsonl and a folder a policy."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distalign.data import (
    EncodedPair,
    plain_text,
)
from distalign.engine import score_in_batches
from distalign.errors import InputError
from distalign.evaluation.answers import Answers, content_key, draw_answers, load_answers
from distalign.evaluation.metrics import (
    COLUMNS,
    Measured,
    calibration,
    differences,
    measure_pairs,
    measure_rewards,
    significance,
    summarise,
)
from distalign.evaluation.results import environment, finite, forget_results, plain
from distalign.evaluation.settings import Evaluation
from distalign.evaluation.setup import Bench, frontier_of, load, load_base, prepare, reward_of
from distalign.evaluation.win_rates import all_opponents, judge_all, standings
from distalign.judges import JudgeSettings, make_judge
from distalign.models.card import CITATION
from distalign.models.targets import Target
from distalign.rewards import Reward
from distalign.stats.calibration import calibrate
from distalign.stats.metrics import mean_and_se

logger = logging.getLogger("distalign.evaluation")

# The file beside an evaluation's results: its report draws the policies on the frontier.
FRONTIER = "frontier.json"


def evaluate(settings: Evaluation, target: Target | None = None) -> dict[str, Any]:
    """Measure every policy and the reference; returns what `results.json` holds.

    What a policy gave is kept in its folder: evaluated again with the same weights, prompts and settings it is not run.
    `target` stands in for the settings' tilt of words. Raises InputError before weights are loaded where it can.
    """
    bench = prepare(settings, target)
    _claim(settings)
    load_base(bench, target)
    answers = _answers(bench)
    measured = {name: _measured(bench, one, answers["reference"]) for name, one in answers.items()}
    reward = reward_of(bench)
    if reward is not None:
        for one in measured.values():
            measure_rewards(one, reward, bench.prompts)
    results = _results(bench, measured)
    _write_samples(bench, measured)
    _write(bench, results)
    standing = _standing(bench, measured, reward)
    if standing:
        # Written before, too: a judge may fail.
        results = _judged(results, bench, measured, standing)
        _write(bench, results)
    return results


def _claim(settings: Evaluation) -> None:
    """Make the folder this evaluation's own. Raises InputError if it holds a run of another kind."""
    folder = settings.run_dir
    other = (folder / "metrics.jsonl").is_file()
    results = folder / "results.json"
    if results.is_file():
        try:
            other |= json.loads(results.read_text(encoding="utf-8")).get("kind") != "evaluation"
        except ValueError:
            logger.warning("%s: cannot be read and is written anew", results)
    if other:
        raise InputError(f"{folder}: holds another run; give the evaluation another name with --set name=…")
    forget_results(folder)
    settings.dump(folder / "recipe.yaml")


def _write(bench: Bench, results: Mapping[str, Any]) -> None:
    text = json.dumps(finite(results), indent=1, ensure_ascii=False)
    (bench.settings.run_dir / "results.json").write_text(text, encoding="utf-8")


def _answers(bench: Bench) -> dict[str, Answers]:
    """Of every policy, from its folder or drawn and scored now; the reference comes first."""
    settings, folder = bench.settings, bench.settings.run_dir / "policies"
    found: dict[str, Answers] = {}
    for name, source in bench.sources.items():
        started = time.monotonic()
        base = bench.sources["reference"]
        key = content_key(name, source, base, settings, bench.ids, bench.groups, bench.end_id)
        kept = load_answers(folder / name, name, key)
        if kept is not None:
            logger.info("%s: its answers are those of %s", name, folder / name)
            found[name] = kept
            continue
        model = bench.base if name == "reference" else load(bench, source)
        found[name] = draw_answers(
            name, key, model, settings, bench.ids, bench.groups, end_id=bench.end_id, reference=bench.base
        )
        found[name].save(folder / name)
        del model
        bench.seconds[f"answers of {name}"] = time.monotonic() - started
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


def _results(bench: Bench, measured: Mapping[str, Measured]) -> dict[str, Any]:
    """What results.json holds but for the judge's part."""
    settings, start = bench.settings, measured["reference"]
    others = _others(measured)
    return {
        "name": settings.name,
        "kind": "evaluation",
        "seeds": [settings.seed],
        "columns": _columns("judge"),
        "methods": {name: plain(summarise([one])) for name, one in measured.items()},
        "paired": {name: plain(differences(own, [start])) for name, own in others.items()},
        "between": _between(measured),
        "significance": significance(others, [start], seed=settings.seed),
        "calibration": {
            name: [row._asdict() for row in calibration([one])] for name, one in measured.items() if len(one.confidence)
        },
        "points": {name: _points(one) for name, one in measured.items()},
        **_forecast(bench),
        "pairs": bench.facts,
        "settings": settings.model_dump(mode="json"),
        "environment": environment(),
        "seconds": bench.seconds,
        "citation": CITATION,
    }


def _judged(
    results: Mapping[str, Any], bench: Bench, measured: Mapping[str, Measured], standing: Mapping[str, Any]
) -> dict[str, Any]:
    """Those results with what the judge said: its tables, and the win rate wherever a metric stands."""
    methods = dict(results["methods"])
    for name, one in measured.items():
        if "win_rate" in one.values:
            methods[name] = {**methods[name], **plain({"win_rate": mean_and_se(one.values["win_rate"])})}
    return {
        **results,
        "columns": _columns(standing["win_rates"]["judge"]),
        "methods": methods,
        "between": _between(measured),
        "significance": significance(
            _others(measured), [measured["reference"]], seed=bench.settings.seed, known=results["significance"]
        ),
        **standing,
    }


def _others(measured: Mapping[str, Measured]) -> dict[str, list[Measured]]:
    return {name: [one] for name, one in measured.items() if name != "reference"}


def _between(measured: Mapping[str, Measured]) -> dict[str, dict[str, Any]]:
    """Paired differences of every two policies, both ways."""
    others = _others(measured)
    return {
        one: {other: plain(differences(own, others[other])) for other in others if other != one}
        for one, own in others.items()
    }


def _columns(judge: str) -> list[dict[str, Any]]:
    """The columns, with what they are of here."""
    about = {
        "accuracy": "How often the policy's preference agrees with a held-out label.",
        "win_rate": f"How often the response is preferred to the reference's, by the judge ({judge}).",
        "reward": "Mean reward of the policy's responses, by the settings' reward.",
    }
    return [{**column, "about": about.get(column["key"], column["about"])} for column in COLUMNS]


def _forecast(bench: Bench) -> dict[str, Any]:
    """The frontier that was predicted in the same folder, if it is of this reference and this reward."""
    path = bench.settings.run_dir / FRONTIER
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        same = found.pop("of") == frontier_of(bench)
    except (ValueError, KeyError, AttributeError):
        same = False
    if not same:
        logger.warning("%s: is not of this reference and reward, and is left out", path)
    return {"frontier": found} if same else {}


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
