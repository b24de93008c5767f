"""Judges in this process: by a reward (a known target's is the exact judge), or by a Python function."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch

from distalign.data import Pair, Prompt, encode_pair
from distalign.judges.base import Comparison, Ids, JudgeError, Judgement, Progress
from distalign.rewards import Request, Reward, RewardError
from distalign.rewards.function import find_function, outcome_within

# Prompts that a reward is given at once; it makes batches of its own within them.
_AT_ONCE = 64


class RewardJudge:
    """P(first ≻ second) = σ(R(x, first) − R(x, second)), as rewards are in nats of preference (eq. 9).

    verdict: sign makes it 1, 0 or 0.5 by the sign of the difference, for rewards on another scale. With the reward
    γ ln π* of a known target this is P_{π*}, without error (eq. 3).
    """

    def __init__(
        self, reward: Reward, tokenizer: Any, *, verdict: Literal["probability", "sign"] = "probability"
    ) -> None:
        self.reward, self.tokenizer, self.verdict = reward, tokenizer, verdict

    def __call__(self, comparisons: Sequence[Comparison], progress: Progress | None = None) -> list[Judgement]:
        """Both responses of each are rewarded. Raises RewardError, and DataError for texts that cannot be encoded."""
        rewards = self._rewards(comparisons, progress)
        found = []
        for one in comparisons:
            ids = self._ids(one)
            difference = (
                rewards[_place(ids.prompt, ids.first, one.row)] - rewards[_place(ids.prompt, ids.second, one.row)]
            )
            found.append(Judgement(self._verdict(difference)))
        return found

    def _rewards(self, comparisons: Sequence[Comparison], progress: Progress | None) -> dict[_Place, float]:
        """The reward of every response, once however often it is compared; the responses to one prompt together."""
        waiting: dict[tuple[tuple[int, ...], int], Request] = {}
        for one in comparisons:
            ids = self._ids(one)
            # Rows with other columns may be rewarded differently for the same prompt.
            request = waiting.setdefault(
                (tuple(ids.prompt), id(one.row)),
                Request(ids.prompt, [ids.first], one.row or Prompt(one.prompt, one.key)),
            )
            request.responses.extend(own for own in (ids.first, ids.second) if own not in request.responses)
        requests: list[tuple[tuple[tuple[int, ...], int], Request]] = list(waiting.items())
        found: dict[_Place, float] = {}
        for start in range(0, len(requests), _AT_ONCE):
            part = requests[start : start + _AT_ONCE]
            places = [(prompt, tuple(own), row) for (prompt, row), request in part for own in request.responses]
            found |= dict(zip(places, self.reward([request for _, request in part]).double().tolist(), strict=True))
            if progress is not None:
                done = min(start + _AT_ONCE, len(requests))
                progress(len(comparisons) * done // len(requests), len(comparisons))
        return found

    def _verdict(self, difference: float) -> float:
        if self.verdict == "sign":
            return (difference > 0) + 0.5 * (difference == 0)
        return float(torch.tensor(difference, dtype=torch.float64).sigmoid())

    def facts(self) -> dict[str, float]:
        """The reward's."""
        return self.reward.facts()

    def _ids(self, one: Comparison) -> Ids:
        return one.ids or encoded(one, self.tokenizer)


# A response: the ids of its prompt, its own, and which row it belongs to.
_Place = tuple[tuple[int, ...], tuple[int, ...], int]


def _place(prompt: Sequence[int], response: Sequence[int], row: Prompt | Pair | None) -> _Place:
    return tuple(prompt), tuple(response), id(row)


def encoded(one: Comparison, tokenizer: Any) -> Ids:
    """A comparison of texts as ids, both responses with their end token. Raises DataError."""
    first, second = (
        text if isinstance(one.prompt, str) else [{"role": "assistant", "content": text}]
        for text in (one.first, one.second)
    )
    extra = {} if one.row is None else one.row.extra
    pair = encode_pair(tokenizer, Pair(one.prompt, first, second, one.key, extra=extra))
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
        self.name, self.timeout = name, timeout
        try:
            self.function = find_function(name)
        except RewardError as error:
            raise JudgeError(str(error).replace("reward", "judge", 1)) from error
        self.comparisons = self.contradictory = 0

    def __call__(self, comparisons: Sequence[Comparison], progress: Progress | None = None) -> list[Judgement]:
        """The mean of both orders, asked in one call: first all as they are, then all with their responses exchanged.

        Raises JudgeError if the function raises, takes too long, or gives no probabilities.
        """
        if not comparisons:
            return []
        extras = [{} if one.row is None else one.row.extra for one in comparisons] * 2
        offered = {name: [extra.get(name) for extra in extras] for extra in extras for name in extra}
        offered["prompts"] = [one.prompt for one in comparisons] * 2
        offered["completions"] = [[one.first, one.second] for one in comparisons]
        offered["completions"] += [[one.second, one.first] for one in comparisons]
        values = self._checked(self._run(self._wanted(offered)), 2 * len(comparisons))
        both = list(zip(values[: len(comparisons)], values[len(comparisons) :], strict=True))
        self.comparisons += len(comparisons)
        self.contradictory += sum((forward - 0.5) * (backward - 0.5) > 0 for forward, backward in both)
        if progress is not None:
            progress(len(comparisons), len(comparisons))
        return [Judgement((forward + 1 - backward) / 2) for forward, backward in both]

    def facts(self) -> dict[str, float]:
        """Comparisons judged; contradictory: those whose two orders name the same position, so each a winner."""
        return {"comparisons": float(self.comparisons), "contradictory": float(self.contradictory)}

    def _wanted(self, offered: dict[str, list[Any]]) -> dict[str, list[Any]]:
        parameters = inspect.signature(self.function).parameters.values()
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            return offered
        named = [p for p in parameters if p.kind is not p.VAR_POSITIONAL]
        missing = [p.name for p in named if p.default is p.empty and p.name not in offered]
        if missing:
            raise self._error(
                f"it needs {', '.join(missing)}, and the rows have no such column",
                "add the column to the prompts, or give the parameter a default",
            )
        return {p.name: offered[p.name] for p in named if p.name in offered}

    def _run(self, arguments: dict[str, list[Any]]) -> Any:
        outcome = outcome_within(self.timeout, self.function, arguments)
        if "error" in outcome:
            error = outcome["error"]
            raise self._error(f"it raised {type(error).__name__}: {error}", "mend it") from error
        if "value" not in outcome:
            raise self._error(f"no answer after {self.timeout:g} s", "make it faster, or raise judge.timeout")
        return outcome["value"]

    def _checked(self, values: Any, n: int) -> list[float]:
        if hasattr(values, "tolist"):
            values = values.tolist()
        if not isinstance(values, list | tuple):
            raise self._error(f"it returned a {type(values).__name__}", f"return {n} probabilities in a list")
        if len(values) != n:
            raise self._error(f"it returned {len(values)} numbers for {n} prompts", "return one for each prompt")
        values = [value.item() if hasattr(value, "item") else value for value in values]
        for index, value in enumerate(values):
            if not isinstance(value, int | float) or not 0 <= value <= 1:
                raise self._error(
                    f"its answer to prompt {index} is {value!r}",
                    "return the probability, between 0 and 1, that the first completion is preferred",
                )
        return [float(value) for value in values]

    def _error(self, found: str, advice: str) -> JudgeError:
        return JudgeError(f"judge function {self.name}: {found}; {advice}")
