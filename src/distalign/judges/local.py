"""Judges in this process: by a reward (a known target's is the exact judge), or by a Python function."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from distalign.data import Pair, Prompt, encode_pair
from distalign.judges.base import Comparison, Ids, JudgeError, Judgement, Progress
from distalign.rewards import Request, Reward
from distalign.rewards.function import UserFunction

logger = logging.getLogger("distalign.judges.local")

# Prompts that a reward is given at once; it makes batches of its own within them.
_AT_ONCE = 64


class RewardJudge:
    """P(first ≻ second) = σ(R(x, first) − R(x, second)), as rewards are in nats of preference (eq. 9).

    verdict: sign makes it 1, 0 or 0.5 by the sign of the difference, for rewards on another scale. With the reward
    γ ln π* of a known target this is P_{π*}, without error (eq. 3).
    """

    def __init__(
        self,
        reward: Reward,
        tokenizer: PreTrainedTokenizerBase,
        *,
        verdict: Literal["probability", "sign"] = "probability",
    ) -> None:
        self.reward, self.tokenizer, self.verdict = reward, tokenizer, verdict

    def __call__(self, comparisons: Sequence[Comparison], progress: Progress | None = None) -> list[Judgement]:
        """Every response is rewarded once, however often it is compared; the responses to one prompt together.

        Raises RewardError, and DataError for texts that cannot be encoded.
        """
        encoded = [comparison.ids or encode(comparison, self.tokenizer) for comparison in comparisons]
        # Rows with other columns may be rewarded differently for the same prompt.
        keys = [(tuple(ids.prompt), id(one.row)) for ids, one in zip(encoded, comparisons, strict=True)]
        requests: dict[tuple[tuple[int, ...], int], Request] = {}
        for key, ids, comparison in zip(keys, encoded, comparisons, strict=True):
            row = comparison.row or Prompt(comparison.prompt, comparison.key)
            responses = requests.setdefault(key, Request(ids.prompt, [ids.first], row)).responses
            responses += [ids.first] * (ids.first not in responses)
            responses += [ids.second] * (ids.second not in responses)
        waiting, rewards = list(requests.values()), []
        for start in range(0, len(waiting), _AT_ONCE):
            rewards += self.reward(waiting[start : start + _AT_ONCE]).double().tolist()
            if progress is not None:
                done = min(start + _AT_ONCE, len(waiting))
                progress(len(comparisons) * done // len(waiting), len(comparisons))
        values = iter(rewards)
        found = {key: {tuple(r): next(values) for r in request.responses} for key, request in requests.items()}
        return [
            Judgement(self._probability(found[key][tuple(ids.first)] - found[key][tuple(ids.second)]))
            for key, ids in zip(keys, encoded, strict=True)
        ]

    def _probability(self, difference: float) -> float:
        if self.verdict == "sign":
            return (difference > 0) + 0.5 * (difference == 0)
        return float(torch.tensor(difference, dtype=torch.float64).sigmoid())


def encode(comparison: Comparison, tokenizer: Any) -> Ids:
    """A comparison of texts as ids, both responses with their end token. Raises DataError."""
    first, second = (
        text if isinstance(comparison.prompt, str) else [{"role": "assistant", "content": text}]
        for text in (comparison.first, comparison.second)
    )
    columns = {} if comparison.row is None else comparison.row.extra
    pair = encode_pair(tokenizer, Pair(comparison.prompt, first, second, comparison.key, extra=columns))
    return Ids(pair.prompt, pair.chosen, pair.rejected)


class FunctionJudge:
    """A function `(prompts, completions, **columns) -> list[float]`: P(first ≻ second) of every comparison.

    `completions` has a pair of strings [first, second] for every prompt; prompts are strings or lists of messages.
    Every comparison is in the lists twice, the second time with its responses exchanged; p of one order and 1 − p of
    the other are averaged, so a function that prefers a position wins nothing by it. Columns of the rows come as to a
    reward's function: None where a row lacks one, and only those it names unless it takes `**`. It runs in a thread of
    its own, which a timeout (seconds) leaves behind.
    """

    def __init__(self, name: str, *, timeout: float) -> None:
        self.function = UserFunction(name, timeout=timeout, role="judge", error=JudgeError)

    def __call__(self, comparisons: Sequence[Comparison], progress: Progress | None = None) -> list[Judgement]:
        """The mean of both orders, asked in one call: first all as they are, then all with their responses exchanged.

        Raises JudgeError if the function raises, takes too long, or gives no probabilities.
        """
        if not comparisons:
            return []
        n = len(comparisons)
        columns = [{} if one.row is None else one.row.extra for one in comparisons] * 2
        offered: dict[str, list[object]] = {name: [row.get(name) for row in columns] for row in columns for name in row}
        offered["prompts"] = [one.prompt for one in comparisons] * 2
        offered["completions"] = [
            *([one.first, one.second] for one in comparisons),
            *([one.second, one.first] for one in comparisons),
        ]
        values = self.function(offered, 2 * n)
        for index, value in enumerate(values):
            if not 0 <= value <= 1:
                raise self.function.error(
                    f"its answer to completion {index} is {value}",
                    "return the probability, between 0 and 1, that the first of the two is preferred",
                )
        both = list(zip(values[:n], values[n:], strict=True))
        if contradictory := sum((forward - 0.5) * (backward - 0.5) > 0 for forward, backward in both):
            logger.warning("judge function %s: for %d of %d comparisons both orders name the same position, and so "
                           "disagree about the winner", self.function.name, contradictory, n)  # fmt: skip
        if progress is not None:
            progress(n, n)
        return [Judgement((forward + 1 - backward) / 2) for forward, backward in both]
