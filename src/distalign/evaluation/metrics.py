"""How far a policy is from a known target, and what it became: measured on held-out prompts and pairs.

Divergences are per response, in nats: expectations over sampled responses of the full-vocabulary KL at every step, so
the only noise is that of the responses. What is compared is compared on the same prompts, target samples and pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from distalign.data import EncodedPair, EncodedPrompt, Tokenizer, end_token_id, independent
from distalign.engine import Group, Reference, Scores, score_in_batches
from distalign.engine.forward import evaluating
from distalign.engine.packing import FORWARD_BUDGET
from distalign.errors import InputError
from distalign.models.targets import Target
from distalign.rewards import Request, Reward
from distalign.rollout.sample import end_ids, sample
from distalign.settings import Count, Positive, Section
from distalign.stats.calibration import Bin, expected_calibration_error, reliability_table
from distalign.stats.intervals import (
    Estimate,
    Interval,
    by_cluster,
    clusters_of,
    holm,
    jackknife,
    mean_and_se,
    paired_difference,
    paired_p_value,
    significance_mark,
)
from distalign.stats.text import jackknife_distinct_n, jackknife_self_bleu, repeated_ngram_rate, self_bleu

COLUMNS: list[dict[str, Any]] = [
    dict(zip(("key", "label", "unit", "better", "about"), column, strict=True))
    for column in (
        ("forward_kl", "KL(π*‖π)", "nats", "lower", "Forward KL per response of the target, cut at max_new_tokens."),
        ("reverse_kl", "KL(π‖π*)", "nats", "lower", "Reverse KL to the target, per response of the policy as sampled."),
        ("kl_reference", "KL(π‖π₀)", "nats", None, "How far the policy moved from the reference, per response."),
        ("entropy", "entropy", "nats", None, "Entropy of the policy's responses; the target's own is the aim."),
        ("accuracy", "accuracy", None, "higher", "How often the policy's preference agrees with a held-out label."),
        ("nll", "label NLL", "nats", "lower", "−ln probability of held-out labels under the policy's preference."),
        ("ece", "ECE", None, "lower", "Expected calibration error of the policy's preference probabilities."),
        ("win_rate", "win rate", None, "higher", "P(response of π ≻ response of π₀) by the target's own preference."),
        ("reward", "reward", "nats", None, "Mean of the responses by the learned reward; a collapse maximises it."),
        ("distinct_2", "distinct-2", None, None, "Distinct pairs of neighbouring tokens over all of them."),
        ("self_bleu", "self-BLEU", None, None, "How alike responses are: BLEU of each with the others as references."),
        ("repetition", "repeats", None, None, "Share of a response's 3-grams that stood in it before."),
        ("chosen_change", "Δ ln π(chosen)", "nats", None, "ln π − ln π₀ of chosen responses; below 0: displacement."),
        ("rejected_change", "Δ ln π(rejected)", "nats", None, "ln π − ln π₀ of the other responses of held-out pairs."),
        ("length", "tokens", None, None, "Length of a response, in tokens."),
        ("missing_end", "no end", None, None, "Share of responses cut by the length limit before they ended."),
    )
]
PAIR_KEYS = ("accuracy", "nll", "chosen_change", "rejected_change")

# What a method is marked for, where it differs from the reference.
_TESTED = ("forward_kl", "reverse_kl", "win_rate", "reward", "accuracy", "nll", "entropy", "length")

_FOLDS = 20  # of prompts, for the error of self-BLEU


class EvaluationSettings(Section):
    """How many responses are sampled to compare policies, and how."""

    prompts: Count = 48
    samples: Count = 2
    max_new_tokens: Count = 128
    temperature: Positive = 1.0


@dataclass(frozen=True)
class Task:
    """What policies are measured on. `prompts` and `pairs` are held out; `target` is None for a user's own data.

    `target_logit` is γ Δ ln π* of the pairs in nats, first response minus second. `gamma` is the target's sharpness.
    Divergences and entropies are of the distributions sampled from: softmax(logits / temperature) at every step.
    """

    base: nn.Module
    prompts: Sequence[list[int]]
    pairs: Sequence[EncodedPair]
    end_id: int
    seed: int
    samples: int
    max_new_tokens: int
    temperature: float
    token_budget: int
    gamma: float = 1.0
    target: nn.Module | None = None
    target_groups: Sequence[Group] = ()
    target_logit: Float[Tensor, "pairs"] | None = None

    def pair_groups(self) -> list[Group]:
        """The held-out pairs as the engine takes them, preferred response first."""
        return [Group(pair.prompt, [pair.chosen, pair.rejected]) for pair in self.pairs]


@dataclass
class Measured:
    """A policy's numbers: a value for each prompt (each pair for `PAIR_KEYS`), its responses, and its calibration.

    `confidence` is the probability of the response it prefers, `correct` how probable it is that this one is labelled
    as preferred: 0 or 1 for labels, P_{π*} where the target is known.
    """

    values: dict[str, Tensor]
    responses: list[list[list[int]]]
    confidence: Tensor = field(default_factory=lambda: torch.zeros(0))
    correct: Tensor = field(default_factory=lambda: torch.zeros(0))
    target_logps: Tensor | None = None
    pairs: Sequence[EncodedPair] = ()


def measure_against(
    target: Target | nn.Module,
    policy: nn.Module,
    base: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    *,
    gamma: float,
    samples: int = 2,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    token_budget: int = FORWARD_BUDGET,
    seed: int = 0,
) -> dict[str, Estimate]:
    """How far a policy is from a known target: means over the prompts with their standard errors.

    forward_kl, reverse_kl, entropy: per response, in nats. kl_reference: from π₀, which is `base` as it was before any
    training, and what a `Target` is made of (a model that was trained in place is π₀ no more). win_rate: of the
    policy's responses against those of π₀ by the target's own preference, whose sharpness is `gamma`. target_entropy
    and target_win_rate are the target's own, which a policy at the target has. Each model answers each prompt `samples`
    times. Raises InputError for fewer than two prompts.
    """
    if len(prompts) < 2:
        raise InputError(f"measure_against: {len(prompts)} prompts; standard errors need two: give more")
    # A causal language model may have an attribute `model`, too.
    model = target if isinstance(target, nn.Module) else target.model(base, tokenizer)
    end_id = end_token_id(tokenizer, conversational=bool(tokenizer.chat_template))
    task = Task(
        base, prompts, [], end_id, seed, samples, max_new_tokens, temperature, token_budget, gamma=gamma, target=model
    )
    task = replace(task, target_groups=target_responses(model, task))
    with evaluating(policy):
        measured = measure_samples(policy, task, reference=base)
    start, best = measure_samples(base, task, reference=None), measure_samples(model, task, reference=base)
    values = {name: measured.values[name] for name in ("forward_kl", "reverse_kl", "kl_reference", "entropy")}
    values["win_rate"] = win_probability(measured, start, task)
    values |= {"target_entropy": best.values["entropy"], "target_win_rate": win_probability(best, start, task)}
    return {name: mean_and_se(each) for name, each in values.items()}


def target_responses(target: nn.Module, task: Task) -> list[Group]:
    """Responses of the target to the held-out prompts: the same for every seed, so that seeds differ in training."""
    return _sampled(target, task, seed=10_000)


def _sampled(policy: nn.Module, task: Task, seed: int) -> list[Group]:
    responses = sample(
        policy,
        task.prompts,
        n=task.samples,
        max_new_tokens=task.max_new_tokens,
        temperature=task.temperature,
        end_id=task.end_id,
        seed=seed,
    )
    return [Group(prompt, own) for prompt, own in zip(task.prompts, responses, strict=True)]


def measure_samples(policy: nn.Module, task: Task, *, reference: Reference | None) -> Measured:
    """Sample the policy on the held-out prompts and measure what does not depend on labels.

    `reference` None means that the policy is the reference itself, so that KL(π ‖ π₀) is 0.
    """
    # Not the reference's draws again: a win rate compares independent responses.
    groups = _sampled(policy, task, seed=2 * task.seed + (reference is None))
    responses = [group.responses for group in groups]
    values: dict[str, Tensor] = {}
    target_logps = None
    scores = _scores(policy, groups, task, reference=task.target, entropy=True)
    if task.target is not None:
        assert scores.step_kl is not None
        values["reverse_kl"] = per_prompt(scores.step_kl.sum(-1), task.samples)
        target_logps = scores.reference_logps
        if task.temperature != 1:
            # Preferences are the target's own, whatever the temperature of the samples.
            target_logps = score_in_batches(task.target, groups, token_budget=task.token_budget).logps
        kl_target = _forward_kl(policy, task)
        values["forward_kl"] = per_prompt(kl_target, len(kl_target) // len(task.prompts))
    assert scores.step_entropy is not None
    values["entropy"] = per_prompt(scores.step_entropy.sum(-1), task.samples)
    values["kl_reference"] = torch.zeros_like(values["entropy"])
    if reference is not None:
        step_kl = _scores(policy, groups, task, reference=reference).step_kl
        assert step_kl is not None
        values["kl_reference"] = per_prompt(step_kl.sum(-1), task.samples)
    cut = without_end(responses, end_ids(policy, task.end_id))
    values |= {"length": mean_lengths(responses), "missing_end": per_prompt(cut, task.samples)}
    return Measured(values, responses, target_logps=target_logps)


def mean_lengths(responses: Sequence[Sequence[list[int]]]) -> Float[Tensor, "prompts"]:
    """Length of the responses to each prompt, in tokens."""
    return torch.tensor([[float(len(ids)) for ids in samples] for samples in responses]).double().mean(-1)


def without_end(responses: Sequence[Sequence[list[int]]], ends: Collection[int]) -> Float[Tensor, "responses"]:
    """1 for a response that was cut before its end, else 0."""
    return torch.tensor([float(ids[-1] not in ends) for samples in responses for ids in samples])


def measure_pairs(
    measured: Measured,
    logps: Float[Tensor, "pairs 2"],
    pairs: Sequence[EncodedPair],
    implied: Callable[[Float[Tensor, "pairs 2"]], Float[Tensor, "pairs 2"]],
    target_logit: Float[Tensor, "pairs"] | None = None,
) -> None:
    """Add accuracy, label likelihood and calibration on held-out pairs, given their log-probabilities.

    `implied` makes of them the rewards that the policy stands for, in nats. What is true is the label, or P_{π*} where
    the target's log-odds are given (nats, first minus second).
    """
    rewards = implied(logps)
    logit = (rewards[:, 0] - rewards[:, 1]).double()
    if target_logit is not None:
        truth = target_logit.double().sigmoid()
    else:
        truth = logit.new_tensor([pair.label for pair in pairs])
    measured.pairs = pairs
    first = logit >= 0
    measured.confidence = torch.where(first, logit, -logit).sigmoid()
    measured.correct = torch.where(first, truth, 1 - truth)
    measured.values["accuracy"] = torch.where(logit == 0, torch.full_like(truth, 0.5), measured.correct)
    measured.values["nll"] = -(truth * nn.functional.logsigmoid(logit) + (1 - truth) * nn.functional.logsigmoid(-logit))


def measure_rewards(measured: Measured, reward: Reward, prompts: Sequence[EncodedPrompt]) -> None:
    """Add the reward of the policy's responses to the held-out prompts, a mean over the samples of each prompt."""
    requests = [Request(one.prompt, own, one.row) for one, own in zip(prompts, measured.responses, strict=True)]
    measured.values["reward"] = per_prompt(reward(requests), len(measured.responses[0]))


def win_probability(measured: Measured, baseline: Measured, task: Task) -> Float[Tensor, "prompts"]:
    """P_{π*}(response of the policy ≻ response of the baseline), a mean over the samples of each prompt (eq. 3)."""
    assert measured.target_logps is not None
    assert baseline.target_logps is not None
    logit = task.gamma * (measured.target_logps - baseline.target_logps)
    return per_prompt(logit.sigmoid(), task.samples)


def forward_kl(policy: nn.Module, task: Task, prompts: int) -> Estimate:
    """KL(π* ‖ π) on the target's responses to the first `prompts` held-out prompts, in nats a response."""
    values = _forward_kl(policy, task, prompts)
    return mean_and_se(per_prompt(values, len(values) // min(prompts, len(task.target_groups))))


def _forward_kl(policy: nn.Module, task: Task, prompts: int | None = None) -> Float[Tensor, "responses"]:
    assert task.target is not None
    if policy is task.target:
        return torch.zeros(sum(len(group.responses) for group in task.target_groups[:prompts]))
    step_kl = _scores(task.target, task.target_groups[:prompts], task, reference=policy).step_kl
    assert step_kl is not None
    return step_kl.sum(-1)


def _scores(
    model: nn.Module, groups: Sequence[Group], task: Task, *, reference: Reference | None, entropy: bool = False
) -> Scores:
    return score_in_batches(
        model,
        groups,
        token_budget=task.token_budget,
        reference=reference,
        entropy=entropy,
        temperature=task.temperature,
    )


def per_prompt(values: Float[Tensor, "responses"], each: int) -> Float[Tensor, "prompts"]:
    """Mean over the `each` samples of every prompt."""
    return values.double().cpu().view(-1, each).mean(-1)


# From measurements to results.json ------------------------------------------------------------------------------------


def summarise(runs: Sequence[Measured]) -> dict[str, Estimate]:
    """Mean and standard error of every metric over prompts, for the seeds of one method.

    Seeds share their prompts, so each prompt's values are averaged over the seeds first. So are those of the pairs, if
    the seeds share them; a known target draws new ones for every seed. The pairs of one prompt hang together.
    """
    keys = [key for key in runs[0].values if all(key in run.values for run in runs)]
    summary = {key: mean_and_se(_over_seeds(runs, key)) for key in keys}
    by_prompt = [[own for run in runs for own in run.responses[index]] for index in range(len(runs[0].responses))]
    summary["distinct_2"] = jackknife_distinct_n(by_prompt, n=2)
    summary["repetition"] = repeated_ngram_rate([r for own in by_prompt for r in own], n=3)
    summary["self_bleu"] = _self_bleu(by_prompt)
    if len(runs[0].confidence):
        rows = torch.cat([torch.stack([run.confidence, run.correct], -1) for run in runs])
        clusters = clusters_of(independent(pair for run in runs for pair in run.pairs))
        items = [rows[places] for places in clusters]
        summary["ece"] = jackknife(lambda parts: expected_calibration_error(*torch.cat(parts).unbind(1)), items)
    return summary


def _self_bleu(by_prompt: Sequence[Sequence[list[int]]]) -> Estimate:
    """Among the samples of each prompt, averaged over prompts; with one sample each, among those of all prompts."""
    if len(by_prompt[0]) > 1:
        values = torch.tensor([self_bleu(own) for own in by_prompt], dtype=torch.float64)
        known = values[~values.isnan()]
        return mean_and_se(known) if len(known) else Estimate(math.nan, math.nan, 0)
    if len(by_prompt) < 3:
        return Estimate(math.nan, math.nan, 0)
    folds = [own for own in (by_prompt[start::_FOLDS] for start in range(_FOLDS)) if own]
    mean, se, _ = jackknife_self_bleu([[r for own in fold for r in own] for fold in folds])
    return Estimate(mean, se, len(by_prompt))


def differences(runs: Sequence[Measured], baseline: Sequence[Measured]) -> dict[str, Interval]:
    """Paired differences from the baseline with their 95 % intervals, prompt by prompt."""
    keys = [key for key in runs[0].values if all(key in run.values for run in (*runs, *baseline))]
    return {key: paired_difference(_over_seeds(runs, key), _over_seeds(baseline, key)) for key in keys}


def significance(
    runs: Mapping[str, Sequence[Measured]],
    baseline: Sequence[Measured],
    *,
    seed: int,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Which metrics of which method differ from the baseline's: p by paired bootstrap, and adjusted (Holm) over all.

    A win rate is held against one half. `stars` mark the adjusted p: * below 0.05, ** below 0.01, *** below 0.001.
    """
    tests: list[tuple[str, str, float]] = []
    for name, own in runs.items():
        for key in _TESTED:
            if not all(key in run.values for run in own):
                continue
            values = _over_seeds(own, key)
            if key == "win_rate":
                start = torch.full_like(values, 0.5)
            elif all(key in run.values for run in baseline):
                start = _over_seeds(baseline, key)
            else:
                continue
            tests.append((name, key, paired_p_value(values, start, seed=seed, resamples=4000)))
    if not tests:
        return {}
    adjusted = holm(torch.tensor([p for *_, p in tests], dtype=torch.float64)).tolist()
    marks: dict[str, dict[str, dict[str, Any]]] = {}
    for (name, key, p), corrected in zip(tests, adjusted, strict=True):
        marks.setdefault(name, {})[key] = {"p": p, "holm": corrected, "stars": significance_mark(corrected)}
    return marks


def policy_tables(
    runs: Mapping[str, Sequence[Measured]], compared: Sequence[str], *, seed: int
) -> dict[str, dict[str, Any]]:
    """The tables of results.json: every policy's metrics and calibration, and how those `compared` differ.

    `runs` has the seeds of every policy, and "reference" among them; differences are from it and from each other.
    """
    reference = runs["reference"]
    return {
        "methods": {name: plain(summarise(seeds)) for name, seeds in runs.items()},
        "paired": {name: plain(differences(runs[name], reference)) for name in compared},
        "between": {
            name: {other: plain(differences(runs[name], runs[other])) for other in compared if other != name}
            for name in compared
        },
        "significance": significance({name: runs[name] for name in compared}, reference, seed=seed),
        "calibration": {
            name: [row._asdict() for row in calibration(seeds)]
            for name, seeds in runs.items()
            if len(seeds[0].confidence)
        },
    }


def plain(values: Mapping[str, Estimate | Interval]) -> dict[str, dict[str, float]]:
    """Estimates and intervals by name, as dictionaries."""
    return {key: value._asdict() for key, value in values.items()}


def calibration(runs: Sequence[Measured]) -> list[Bin]:
    """Reliability table of all seeds' pairs: how sure a policy is of the response it prefers, and how often rightly."""
    return reliability_table(torch.cat([r.confidence for r in runs]), torch.cat([r.correct for r in runs]))


def _over_seeds(runs: Sequence[Measured], key: str) -> Float[Tensor, "prompts"]:
    """A number for each prompt, which the seeds share; pairs of one prompt count as one."""
    values = [run.values[key] for run in runs]
    if key not in PAIR_KEYS:
        return torch.stack(values).mean(0)
    return by_cluster(torch.cat(values), clusters_of(independent(pair for run in runs for pair in run.pairs)))
