"""Policies against each other: who wins how often, Bradley-Terry ratings, the win rate at equal lengths."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from distalign.data import EncodedPrompt, Text
from distalign.judges import Comparison, Ids, Judge
from distalign.progress import progress
from distalign.stats.intervals import mean_and_se
from distalign.stats.ratings import bradley_terry_over_prompts, length_controlled_win_rate

logger = logging.getLogger("distalign.evaluation")


def judge_all(
    judge: Judge,
    prompts: Sequence[EncodedPrompt],
    texts: Sequence[Text],
    answers: Mapping[str, list[list[list[int]]]],
    tokenizer: Any,
    opponents: Sequence[tuple[str, str]],
) -> dict[tuple[str, str], Float[Tensor, "prompts"]]:
    """P(the first's response ≻ the second's) for every prompt, a mean over their samples, by pair of names.

    Raises JudgeError and RewardError as the judge does.
    """
    comparisons, owner = [], []
    for first, second in opponents:
        for index, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            for number, (one, other) in enumerate(zip(answers[first][index], answers[second][index], strict=True)):
                ids = Ids(prompt.prompt, one, other)
                both = (tokenizer.decode(response, skip_special_tokens=True) for response in (one, other))
                key = f"{first} against {second}, prompt {index + 1}, sample {number + 1}"
                comparisons.append(Comparison(text, *both, key=key, ids=ids, row=prompt.row))
                owner.append(index)
    with progress("judge", len(comparisons)) as advance:
        found = judge(comparisons, advance)
    values = torch.tensor([one.probability for one in found], dtype=torch.float64).view(len(opponents), -1)
    samples = values.shape[1] // len(prompts)
    unparsable = sum(one.unparsable for one in found)
    if unparsable:
        logger.warning("%d of %d judgements could not be read and count as ties", unparsable, len(found))
    return dict(zip(opponents, values.view(len(opponents), len(prompts), samples).mean(-1), strict=True))


def all_opponents(names: Sequence[str], which: str) -> list[tuple[str, str]]:
    """Every two of the names, or each with the reference alone."""
    pairs = list(combinations(names, 2))
    return [pair for pair in pairs if which == "all" or "reference" in pair]


def standings(
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
    found: dict[str, Any] = {"win_rates": {"matrix": {name: row for name, row in matrix.items() if row}}}
    number = {name: index for index, name in enumerate(names)}
    counts = torch.zeros(len(next(iter(wins.values()))), len(names), len(names), dtype=torch.float64)
    for (first, second), values in wins.items():
        counts[:, number[first], number[second]] = values
        counts[:, number[second], number[first]] = 1 - values
    anchor = number["reference"]
    try:
        ratings = bradley_terry_over_prompts(counts, anchor=anchor)
        found["ratings"] = {name: ratings.difference(number[name], anchor)._asdict() for name in names}
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
    return {**found, "length_controlled": controlled}
