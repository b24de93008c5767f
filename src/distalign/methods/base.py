"""What a method may ask for (`Needs`) and what it is given (`Pairs`, `Samples`).

A method reads nothing else. The trainer collects exactly what `needs` declares; a field that was not declared arrives
as None.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeVar, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Needs:
    """What a method reads, and so which fields of `Pairs` and `Samples` are filled.

    pairs: "" none, "labelled" the pairs of the data (column 0 preferred), "sampled" two responses drawn from the
    policy.
    samples: single responses drawn from the policy, token by token.
    reward: a score for every sampled response, in nats.
    reference: log-probabilities under the model that training starts from, and `step_kl` against it.

    Always filled: `Pairs.logps`; `Samples.token_logps`, `mask`, `step_entropy` and `group`. `Pairs.probability` comes
    with labelled pairs that carry one, `Pairs.behavior_logps` with sampled pairs.
    """

    pairs: Literal["", "labelled", "sampled"] = ""
    samples: bool = False
    reward: bool = False
    reference: bool = False


@dataclass(frozen=True)
class Pairs:
    """Two responses to one prompt, a row a pair. All values are sums over response tokens, in nats.

    The end-of-sequence token is a response token. Column 0 is the preferred response when the pairs are labelled;
    `probability` is the probability of that label (None: certain). `behavior_logps` are those of the policy that
    sampled the pair. `logps` carry the gradient, everything else is constant.
    """

    logps: Float[Tensor, "pairs 2"]
    reference_logps: Float[Tensor, "pairs 2"] | None = None
    behavior_logps: Float[Tensor, "pairs 2"] | None = None
    rewards: Float[Tensor, "pairs 2"] | None = None
    probability: Float[Tensor, "pairs"] | None = None


@dataclass(frozen=True)
class Samples:
    """Responses drawn from the policy, a row a response, token by token, in nats.

    `mask` is True on response tokens, the end-of-sequence token included. `group` numbers the prompt that a row
    answers: leave-one-out baselines are taken within it (None: no baseline). `step_kl` and `step_entropy` are
    full-vocabulary values at each step. `reference_token_logps` are constants; `token_logps`, `step_kl` and
    `step_entropy` carry the gradient.
    """

    token_logps: Float[Tensor, "samples steps"]
    mask: Bool[Tensor, "samples steps"]
    reference_token_logps: Float[Tensor, "samples steps"] | None = None
    step_kl: Float[Tensor, "samples steps"] | None = None
    step_entropy: Float[Tensor, "samples steps"] | None = None
    rewards: Float[Tensor, "samples"] | None = None
    group: Int[Tensor, "samples"] | None = None


@runtime_checkable
class Method(Protocol):
    """The face of a method: a frozen dataclass whose fields are its settings."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    equation: ClassVar[str]
    source: ClassVar[str]
    rate: ClassVar[str | None]

    @property
    def needs(self) -> Needs:
        """What `loss` reads, given the settings."""
        ...

    def loss(self, pairs: Pairs | None, samples: Samples | None) -> Float[Tensor, ""]:
        """The objective to minimise: a mean over the pairs and samples given, with a correct gradient."""
        ...

    def implied_reward(
        self, logps: Float[Tensor, "*shape"], reference_logps: Float[Tensor, "*shape"] | None
    ) -> Float[Tensor, "*shape"]:
        """The reward that the policy stands for, in nats: the preference probability is σ of its difference."""
        ...


MethodFactory = Callable[..., Method]

T = TypeVar("T")


def declared(value: T | None, name: str) -> T:
    """The value, which the method declared in `needs`; ValueError naming the field if it did not arrive."""
    if value is None:
        raise ValueError(f"{name} is missing; pass what the method's `needs` declares")
    return value


def check_setting(method: object, name: str, *, zero: bool = False) -> None:
    """Raise ValueError unless the setting is a finite number above zero (or exactly zero, if `zero` allows it)."""
    value, default = getattr(method, name), getattr(type(method), name)
    if not (math.isfinite(value) and (value > 0 or (zero and value == 0))):
        wanted = "zero or more" if zero else "more than zero"
        raise ValueError(
            f"{type(method).__name__}: {name} is {value}; set it to a finite number, {wanted} (default {default})"
        )
