"""What a method may ask for (`Needs`) and what it is given (`Pairs`, `Samples`).

A method reads nothing else. The trainer collects exactly what `needs` declares; a field that was not declared arrives
as None.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Needs:
    """What a method reads, and so which fields of `Pairs` and `Samples` are filled.

    pairs: "" none, "labelled" the pairs of the data (column 0 preferred), "sampled" two responses drawn from the
    policy.
    samples: single responses drawn from the policy, token by token.
    reward: a score for every sampled response, in nats.
    reference: log-probabilities of these responses under the model that training starts from.
    kl, entropy: full-vocabulary values at each step of the samples, the KL being to that model; they cost more.
    values: a value function, trained with the policy; the method then has `credit` too.

    Always filled: `Pairs.logps`; `Samples.token_logps`, `mask` and `group`. `Pairs.probability` comes with labelled
    pairs that carry one, `Pairs.behavior_logps` with sampled pairs. `Samples.behavior_token_logps` is None while the
    policy is still the one that drew the samples.
    """

    pairs: Literal["", "labelled", "sampled"] = ""
    samples: bool = False
    reward: bool = False
    reference: bool = False
    kl: bool = False
    entropy: bool = False
    values: bool = False


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
    answers: leave-one-out baselines are taken within it (None: no baseline). `behavior_token_logps` are those of the
    policy that drew the samples. `step_kl` and `step_entropy` are full-vocabulary values at each step, `values` those
    of the value function before each token; `advantages` and `returns` are what `credit` made of them when the samples
    were drawn. `token_logps`, `step_kl`, `step_entropy` and `values` carry the gradient, everything else is constant.
    """

    token_logps: Float[Tensor, "samples steps"]
    mask: Bool[Tensor, "samples steps"]
    behavior_token_logps: Float[Tensor, "samples steps"] | None = None
    reference_token_logps: Float[Tensor, "samples steps"] | None = None
    step_kl: Float[Tensor, "samples steps"] | None = None
    step_entropy: Float[Tensor, "samples steps"] | None = None
    rewards: Float[Tensor, "samples"] | None = None
    group: Int[Tensor, "samples"] | None = None
    values: Float[Tensor, "samples steps"] | None = None
    advantages: Float[Tensor, "samples steps"] | None = None
    returns: Float[Tensor, "samples steps"] | None = None


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


class Credit(NamedTuple):
    """What each token of a round of samples is worth, and what the value function should have said, in nats."""

    advantages: Float[Tensor, "samples steps"]
    returns: Float[Tensor, "samples steps"]


class UsesValues(Protocol):
    """The further face of a method that declares `values`."""

    def credit(self, samples: Samples) -> Credit:
        """Advantages and returns of all samples of a round, computed once, when they have been drawn."""
        ...


MethodFactory = Callable[..., Method]

T = TypeVar("T")


def declared(value: T | None, name: str) -> T:
    """The value, which the method declared in `needs`; ValueError naming the field if it did not arrive."""
    if value is None:
        raise ValueError(f"{name} is missing; pass what the method's `needs` declares")
    return value


def penalised_rewards(pairs: Pairs, beta: float) -> Float[Tensor, "pairs 2"]:
    """Rewards of sampled pairs with the KL term folded in, in nats: R̂ − β ln π_t/π₀, π_t being what drew the pair."""
    rewards = declared(pairs.rewards, "pairs.rewards")
    if beta == 0:
        return rewards
    behavior = declared(pairs.behavior_logps, "pairs.behavior_logps")
    return rewards - beta * (behavior - declared(pairs.reference_logps, "pairs.reference_logps"))


def check_choice(method: object, name: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless the setting is one of `choices`."""
    value = getattr(method, name)
    if value not in choices:
        raise ValueError(f"{type(method).__name__}: {name} is {value!r}; set it to one of {', '.join(choices)}")


def check_setting(method: object, name: str, *, zero: bool = False) -> None:
    """Raise ValueError unless the setting is a finite number above zero (or exactly zero, if `zero` allows it)."""
    value, default = getattr(method, name), getattr(type(method), name)
    if not (math.isfinite(value) and (value > 0 or (zero and value == 0))):
        wanted = "zero or more" if zero else "more than zero"
        raise ValueError(
            f"{type(method).__name__}: {name} is {value}; set it to a finite number, {wanted} (default {default})"
        )
