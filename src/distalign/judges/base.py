"""What a judge is: comparisons of two responses to one prompt go in, how probably the first is preferred comes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

from distalign.data import Pair, Prompt, Text
from distalign.errors import InputError

# Called with the number of comparisons judged, and of all.
Progress = Callable[[int, int], object]


class JudgeError(InputError):
    """A judge that cannot be made or gave no judgement: says which, what was found, and what to do."""


class Ids(NamedTuple):
    """A comparison as ids of the policies' tokenizer, each response up to its end token if it has one."""

    prompt: list[int]
    first: list[int]
    second: list[int]


@dataclass(frozen=True)
class Comparison:
    """Two responses to the same prompt: a string, or a chat that ends with the turn to answer.

    `key` names it in messages. `ids` are read by judges that read tokens, and keep what text loses: whether a response
    ended. `row` is what the prompt was made of; a Python function is given its other columns.
    """

    prompt: Text
    first: str
    second: str
    key: str = "comparison"
    ids: Ids | None = field(default=None, repr=False)
    row: Prompt | Pair | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Judgement:
    """`probability` that the first response is preferred, in [0, 1]: 1 and 0 are certain, 0.5 is a tie.

    `answers` of an endpoint: with the first response shown first, then with the second. `tokens`: read and written for
    these answers, those from the cache included, where the server counts them. `unparsable`: an answer was no verdict,
    which is why this is a tie. Raises ValueError for a probability outside [0, 1].
    """

    probability: float
    answers: tuple[str, ...] = ()
    tokens: int = 0
    unparsable: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(f"the probability of a judgement is {self.probability}; it lies between 0 and 1")


@runtime_checkable
class Judge(Protocol):
    """Compares responses, whoever wrote them."""

    def __call__(self, comparisons: Sequence[Comparison], progress: Progress | None = None) -> list[Judgement]:
        """One judgement per comparison, in order. Raises JudgeError, and RewardError where a reward judges."""
        ...
