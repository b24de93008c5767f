"""Evaluate policies on the same prompts and pairs; writes results.json, samples.jsonl and a folder for each policy."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from distalign.data import EncodedPair, EncodedPrompt, Text, Tokenizer, decode_after
from distalign.engine import score_in_batches
from distalign.errors import DAMAGED, InputError
from distalign.evaluation.answers import Answers, is_answered, policy_answers
from distalign.evaluation.frontier import FRONTIER
from distalign.evaluation.metrics import (
    COLUMNS,
    Measured,
    mean_lengths,
    measure_pairs,
    measure_rewards,
    per_prompt,
    policy_tables,
)
from distalign.evaluation.results import RESULTS, Results, environment, forget_results, write_results, write_samples
from distalign.evaluation.setup import Evaluation, EvaluationSetup, load_evaluation, load_setup
from distalign.judges import Comparison, EndpointJudge, Ids, Judge, JudgeSettings, make_judge
from distalign.models.card import CITATION
from distalign.models.targets import Target
from distalign.progress import progress
from distalign.settings import dump_yaml, masked
from distalign.stats.calibration import calibrate
from distalign.stats.intervals import mean_and_se
from distalign.stats.ratings import bradley_terry_over_prompts, length_controlled_win_rate
from distalign.training.processes import refuse_several_processes
from distalign.training.run_folder import check_not_read, locked, writable, write_text

logger = logging.getLogger("distalign.evaluation")


def evaluate(
    settings: Evaluation | str | Path | Mapping[str, Any],
    policies: Mapping[str, str] | None = None,
    target: Target | None = None,
) -> Results:
    """Measure every policy and the reference on the same prompts and pairs, and write the run folder.

    `settings` are settings, or a packaged one's name, a file or a mapping; `policies` are added to theirs, by name.
    What a policy gave is saved in its folder: evaluated again with the same weights, prompts and settings it is not
    run. `target` stands in for the settings' tilt of words. Raises InputError before weights are loaded where it can,
    also where another process works in the folder, and for a judge's endpoint that does not answer before anything is
    sampled.
    """
    refuse_several_processes("an evaluation")
    if not isinstance(settings, Evaluation):
        settings = load_evaluation(settings, [], [f"{name}={place}" for name, place in (policies or {}).items()])
    check_not_read(settings.model_dump(mode="json"), [settings.run_dir / name for name in RESULTS])
    _check_folder(settings)
    with locked(settings.run_dir):
        folder, setup = settings.run_dir, load_setup(settings, target)
        groups, folders = setup.groups, {name: folder / "policies" / name for name in setup.sources}
        endpoint = settings.judge.endpoint if settings.judge is not None else None
        if endpoint is not None and not all(is_answered(setup, name, own, groups) for name, own in folders.items()):
            EndpointJudge(endpoint).reach()
        answers = {name: policy_answers(setup, name, own, groups) for name, own in folders.items()}
        measured = {name: _measure_answers(setup, own, answers["reference"]) for name, own in answers.items()}
        reward = setup.reward()
        if reward is not None:
            for policy in measured.values():
                measure_rewards(policy, reward, setup.prompts)
        judged: dict[str, Any] = {}
        try:
            judged = _judge(setup, measured)
        finally:
            # A judge may fail or be stopped: what was measured without it is not lost.
            results = _results(setup, measured, judged)
            forget_results(folder)
            write_text(folder / "recipe.yaml", dump_yaml(settings.model_dump(mode="json")))
            write_samples(folder, setup.tokenizer, setup.texts, measured)
            write_results(folder, results)
        return Results(folder, results)


def _check_folder(settings: Evaluation) -> None:
    """Raise InputError if the folder holds a run of another kind."""
    folder = writable(settings.run_dir)
    results = folder / "results.json"
    other = (folder / "metrics.jsonl").is_file()
    if results.is_file():
        try:
            other |= json.loads(results.read_text(encoding="utf-8")).get("kind") != "evaluation"
        except DAMAGED:
            logger.warning("%s: cannot be read and is written anew", results)
    if other:
        raise InputError(f"{folder}: holds another run; give the evaluation another name with --set name=…")


def _results(setup: EvaluationSetup, measured: Mapping[str, Measured], judged: Mapping[str, Any]) -> dict[str, Any]:
    """What results.json holds."""
    settings = setup.settings
    judge = judged["win_rates"]["judge"] if judged else "judge"
    about = {
        "win_rate": f"How often the response is preferred to the reference's, by the judge ({judge}).",
        "reward": "Mean reward of the policy's responses, by the settings' reward.",
    }
    others = [name for name in measured if name != "reference"]
    return {
        "name": settings.name,
        "kind": "evaluation",
        "seeds": [settings.seed],
        "columns": [{**column, "about": about.get(column["key"], column["about"])} for column in COLUMNS],
        **policy_tables({name: [policy] for name, policy in measured.items()}, others, seed=settings.seed),
        "points": {name: _points(policy) for name, policy in measured.items()},
        **_forecast(setup),
        "pairs": setup.statistics,
        "settings": masked(settings.model_dump(mode="json")),
        "environment": environment(),
        "seconds": setup.seconds,
        "citation": CITATION,
        **judged,
    }


def _forecast(setup: EvaluationSetup) -> dict[str, Any]:
    """The frontier that was predicted under the same name, if it is of this reference and this reward."""
    path = setup.settings.frontier_dir / FRONTIER
    if not path.is_file():
        return {}
    try:
        frontier = json.loads(path.read_text(encoding="utf-8"))
        same = frontier.pop("of") == setup.identity()
    except DAMAGED:
        same = False
    if not same:
        logger.warning("%s: is not of this reference, reward, prompts and sampling, and is left out", path)
    return {"frontier": frontier} if same else {}


def _points(measured: Measured) -> list[dict[str, Any]]:
    """Length and reward of the answers to each prompt."""
    reward = measured.values.get("reward")
    lengths = measured.values["length"].tolist()
    rewards = [None] * len(lengths) if reward is None else reward.tolist()
    return [{"prompt": i, "length": a, "reward": b} for i, (a, b) in enumerate(zip(lengths, rewards, strict=True))]


# A policy by itself ---------------------------------------------------------------------------------------------------


def _measure_answers(setup: EvaluationSetup, answers: Answers, reference: Answers) -> Measured:
    """A policy's numbers: a value for each prompt, or for each pair."""
    samples = setup.settings.samples
    values = {
        "entropy": per_prompt(answers.scores["entropy"], samples),
        "kl_reference": per_prompt(answers.scores["kl"], samples),
        "length": mean_lengths(answers.responses),
        "missing_end": per_prompt(answers.scores["missing_end"], samples),
    }
    measured = Measured(values, answers.responses)
    if setup.pairs:
        gamma = setup.settings.gamma
        scale = _cross_fitted(answers, setup.pairs) if gamma is None else torch.full((len(setup.pairs), 1), gamma)
        measure_pairs(measured, answers.pair_logps, setup.pairs, lambda logps: scale * logps, _target_logit(setup))
        base = reference.pair_logps if answers.reference_pair_logps is None else answers.reference_pair_logps
        change = answers.pair_logps - base
        measured.values["chosen_change"], measured.values["rejected_change"] = change.unbind(1)
    return measured


def _cross_fitted(answers: Answers, pairs: Sequence[EncodedPair]) -> Tensor:
    """γ of every pair [pairs, 1], fitted on the half that its prompt is not in; just above 0 if none above fits.

    Where a half decides it without doubt (γ → ∞) the likelihood of the other is without bound, and 1 stands for it.
    """
    half = torch.tensor([int(hashlib.sha256(str(pair.prompt).encode()).hexdigest(), 16) % 2 for pair in pairs])
    labels = torch.tensor([pair.label for pair in pairs]).double()
    scale = torch.ones(len(pairs), 1, dtype=torch.float64)
    for side in (0, 1):
        other = half != side
        if not bool(other.any()):
            continue
        try:
            gamma = calibrate(answers.pair_logps[other], labels[other]).gamma.mean
        except ValueError as error:
            logger.warning("%s: no γ from half of the pairs (%s); 1 is taken", answers.name, error)
            continue
        if math.isfinite(gamma):
            scale[half == side] = max(gamma, 1e-6)
        else:
            logger.warning("%s: half of the pairs leaves no doubt about their labels; γ = 1 is taken", answers.name)
    return scale


def _target_logit(setup: EvaluationSetup) -> Float[Tensor, "pairs"] | None:
    """γ Δ ln π* of the pairs, where the target is known."""
    if setup.target is None or setup.gamma is None:
        return None
    logps = score_in_batches(setup.target, setup.groups, token_budget=setup.settings.token_budget).logps.view(-1, 2)
    return setup.gamma * (logps[:, 0] - logps[:, 1])


# Policies against each other ------------------------------------------------------------------------------------------


def _judge(setup: EvaluationSetup, measured: Mapping[str, Measured]) -> dict[str, Any]:
    """Win rates by the judge, by default the target's own preference; they are added to what was measured, too."""
    settings = setup.settings
    judge_settings = settings.judge
    if judge_settings is None and settings.target is not None:
        judge_settings = JudgeSettings(exact=True)
    if judge_settings is None and settings.reward:
        judge_settings = JudgeSettings(reward=settings.reward)
    names = list(measured)
    if judge_settings is None or len(names) < 2:
        return {}
    started = time.monotonic()
    judge = make_judge(
        judge_settings,
        base=setup.base,
        tokenizer=setup.tokenizer,
        token_budget=settings.token_budget,
        target=setup.target,
        gamma=setup.gamma,
    )
    responses = {name: policy.responses for name, policy in measured.items()}
    opponents = all_opponents(names, settings.opponents)
    wins = judge_all(judge, setup.prompts, setup.texts, responses, setup.tokenizer, opponents)
    for name in names:
        if ("reference", name) in wins:
            measured[name].values["win_rate"] = 1 - wins["reference", name]
    judged = win_rates(wins, names, {name: policy.values["length"] for name, policy in measured.items()})
    kind = next(key for key in ("reward", "function", "exact", "endpoint") if getattr(judge_settings, key))
    judged["win_rates"]["judge"] = kind
    setup.seconds["judge"] = time.monotonic() - started
    return judged


def judge_all(
    judge: Judge,
    prompts: Sequence[EncodedPrompt],
    texts: Sequence[Text],
    responses: Mapping[str, list[list[list[int]]]],
    tokenizer: Tokenizer,
    opponents: Sequence[tuple[str, str]],
) -> dict[tuple[str, str], Float[Tensor, "prompts"]]:
    """P(the first's response ≻ the second's) for every prompt, a mean over their samples, by pair of names.

    Raises JudgeError and RewardError as the judge does.
    """
    comparisons = []
    for first, second in opponents:
        for index, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            for number, (one, other) in enumerate(zip(responses[first][index], responses[second][index], strict=True)):
                ids = Ids(prompt.prompt, one, other)
                both = (decode_after(tokenizer, response) for response in (one, other))
                key = f"{first} against {second}, prompt {index + 1}, sample {number + 1}"
                comparisons.append(Comparison(text, *both, key=key, ids=ids, row=prompt.row))
    with progress("judge", len(comparisons)) as advance:
        judgements = judge(comparisons, advance)
    values = torch.tensor([one.probability for one in judgements], dtype=torch.float64)
    values = values.view(len(opponents), len(prompts), -1).mean(-1)
    unparsable = sum(one.unparsable for one in judgements)
    if unparsable:
        logger.warning("%d of %d judgements could not be read and count as ties", unparsable, len(judgements))
    return dict(zip(opponents, values, strict=True))


def all_opponents(names: Sequence[str], which: str) -> list[tuple[str, str]]:
    """Every two of the names, or each with the reference alone."""
    pairs = list(combinations(names, 2))
    return [pair for pair in pairs if which == "all" or "reference" in pair]


def win_rates(
    wins: Mapping[tuple[str, str], Float[Tensor, "prompts"]],
    names: Sequence[str],
    lengths: Mapping[str, Float[Tensor, "prompts"]],
) -> dict[str, Any]:
    """Win rates of every two with standard errors, ratings with intervals, and win rates at equal lengths.

    What cannot be estimated (a policy that never loses, lengths that do not vary) is left out with a warning.
    """
    matrix: dict[str, dict[str, Any]] = {name: {} for name in names}
    for (first, second), values in wins.items():
        matrix[first][second] = mean_and_se(values)._asdict()
        matrix[second][first] = mean_and_se(1 - values)._asdict()
    tables: dict[str, Any] = {"win_rates": {"matrix": {name: row for name, row in matrix.items() if row}}}
    number = {name: index for index, name in enumerate(names)}
    counts = torch.zeros(len(next(iter(wins.values()))), len(names), len(names), dtype=torch.float64)
    for (first, second), values in wins.items():
        counts[:, number[first], number[second]] = values
        counts[:, number[second], number[first]] = 1 - values
    anchor = number["reference"]
    try:
        ratings = bradley_terry_over_prompts(counts, anchor=anchor)
        tables["ratings"] = {name: ratings.difference(number[name], anchor)._asdict() for name in names}
    except ValueError as error:
        logger.warning("no ratings: %s", error)
    controlled = {}
    for name in names:
        values = wins.get((name, "reference"), None if ("reference", name) not in wins else 1 - wins["reference", name])
        if values is None:
            continue
        try:
            one = length_controlled_win_rate(values, lengths[name], lengths["reference"])
        except ValueError as error:
            logger.warning("no win rate of %s at equal lengths: %s", name, error)
            continue
        controlled[name] = {**one.win_rate._asdict(), "length_effect": one.length_effect._asdict()}
    return {**tables, "length_controlled": controlled}
