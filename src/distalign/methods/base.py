"""What a method may ask for (`Needs`), what it is given (`Pairs`, `Samples`), and what it says of itself (`Method`).

A method reads nothing else: reading a field that `needs` does not declare raises NotCollected. `behavior_*` and
`probability` have defaults, so they are always there.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NoReturn, TypeVar, get_args, get_type_hints

from jaxtyping import Bool, Float, Int
from torch import Tensor, arange, ones_like

R = TypeVar("R", bound="Record")
# The default of a field that may be left out: a factory of None, which `Record.__post_init__` then deletes.
_MISSING: Any = type(None)
# Where pairs come from.
SOURCES = ("labelled", "reference", "sampled")


@dataclass(frozen=True)
class Needs:
    """What a method reads, and so which fields of `Pairs` and `Samples` are collected.

    pairs: "" none, "labelled" the pairs of the data (column 0 preferred), "reference" two responses that π₀ drew before
    the first step, "sampled" two responses drawn from the policy; or several of these, "labelled+sampled".
    samples: single responses drawn from the policy, token by token.
    reward: a score in nats of both responses of each pair; without pairs, of each of the samples.
    reference: log-probabilities of these responses under the model that training starts from.
    kl, entropy: full-vocabulary values at each step of the samples, the KL being to that model; they cost more.
    values: a value function, trained with the policy; `Method.credit` then makes advantages of its values.
    """

    pairs: str = ""
    samples: bool = False
    reward: bool = False
    reference: bool = False
    kl: bool = False
    entropy: bool = False
    values: bool = False

    def __post_init__(self) -> None:
        if self.pairs and not set(self.pairs.split("+")) <= set(SOURCES):
            raise ValueError(
                f"Needs: pairs is {self.pairs!r}; write one of {', '.join(SOURCES)}, or several with + between"
            )
        for name, possible in (
            ("reward", self.samples or self.pairs),
            ("kl", self.samples),
            ("entropy", self.samples),
            ("values", self.samples),
            ("reference", self.samples or self.pairs),
        ):
            if getattr(self, name) and not possible:
                raise ValueError(f"Needs: {name} is of drawn responses; declare samples (or pairs) to go with it")


class NotCollected(AttributeError):
    """A field was read that the method's `needs` do not declare."""


@dataclass(frozen=True, eq=False, repr=False)
class Record:
    """Tensors of which some were collected. Reading one that was not raises NotCollected; `hasattr` asks first."""

    def __post_init__(self) -> None:
        for each in fields(self):
            if vars(self)[each.name] is None:
                object.__delattr__(self, each.name)

    def __getattr__(self, name: str) -> NoReturn:
        # Python asks here for what is not there.
        raise NotCollected(f"{type(self).__name__}.{name} was not collected; declare it in the method's `needs`")

    def replace(self: R, **changes: Tensor) -> R:
        """A copy with other values for some fields; what was not collected stays so."""
        collected = {each.name: getattr(self, each.name) for each in fields(self) if hasattr(self, each.name)}
        return type(self)(**{**collected, **changes})

    def _default(self, name: str, value: Tensor) -> None:
        if not hasattr(self, name):
            object.__setattr__(self, name, value)


@dataclass(frozen=True, eq=False, repr=False)
class Pairs(Record):
    """Two responses to one prompt, a row for each pair. All values are sums over response tokens, in nats.

    The end-of-sequence token is a response token. Column 0 is the preferred response when the pairs are labelled;
    `probability` is the probability of that label (1 if not given). `behavior_logps` are those of the policy that
    sampled the pair (`logps` if not given; π₀'s own pairs have them where `reference` is declared). `logps` carry the
    gradient, everything else is constant.
    """

    logps: Float[Tensor, "pairs 2"] = field(default_factory=_MISSING)
    reference_logps: Float[Tensor, "pairs 2"] = field(default_factory=_MISSING)
    behavior_logps: Float[Tensor, "pairs 2"] = field(default_factory=_MISSING)
    rewards: Float[Tensor, "pairs 2"] = field(default_factory=_MISSING)
    probability: Float[Tensor, "pairs"] = field(default_factory=_MISSING)

    def __post_init__(self) -> None:
        super().__post_init__()
        if hasattr(self, "logps"):
            self._default("behavior_logps", self.logps.detach())
            self._default("probability", ones_like(self.logps[:, 0]))


@dataclass(frozen=True, eq=False, repr=False)
class Samples(Record):
    """Responses drawn from the policy, a row for each response, token by token, in nats.

    `mask` is True on response tokens, the end-of-sequence token included. `group` numbers the prompt that a row
    answers: leave-one-out baselines are taken within it (every row is alone if not given). `behavior_token_logps` are
    those of the policy that drew the samples (`token_logps` if not given: the policy has not moved since). `step_kl`
    and `step_entropy` are full-vocabulary values at each step, `values` those of the value function before each token;
    `advantages` and `returns` are what `Method.credit` made of them when the samples were drawn. `token_logps`,
    `step_kl`, `step_entropy` and `values` carry the gradient, everything else is constant.
    """

    token_logps: Float[Tensor, "samples steps"] = field(default_factory=_MISSING)
    mask: Bool[Tensor, "samples steps"] = field(default_factory=_MISSING)
    behavior_token_logps: Float[Tensor, "samples steps"] = field(default_factory=_MISSING)
    reference_token_logps: Float[Tensor, "samples steps"] = field(default_factory=_MISSING)
    step_kl: Float[Tensor, "samples steps"] = field(default_factory=_MISSING)
    step_entropy: Float[Tensor, "samples steps"] = field(default_factory=_MISSING)
    rewards: Float[Tensor, "samples"] = field(default_factory=_MISSING)
    group: Int[Tensor, "samples"] = field(default_factory=_MISSING)
    values: Float[Tensor, "samples steps"] = field(default_factory=_MISSING)
    advantages: Float[Tensor, "samples steps"] = field(default_factory=_MISSING)
    returns: Float[Tensor, "samples steps"] = field(default_factory=_MISSING)

    def __post_init__(self) -> None:
        super().__post_init__()
        if hasattr(self, "token_logps"):
            self._default("behavior_token_logps", self.token_logps.detach())
            self._default("group", arange(len(self.token_logps), device=self.token_logps.device))


class Method(ABC):
    """An objective. A subclass is a frozen dataclass whose fields are its settings, checked in `__post_init__`.

    equation: the loss in short. source: where it comes from. optimum: what it tends to with unlimited pairs.
    theorem: what promises that it reaches π* at 1/n if its β is 0; None where nothing does.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    equation: ClassVar[str]
    source: ClassVar[str]
    optimum: ClassVar[str]
    theorem: ClassVar[str | None] = None

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What `loss` reads, given the settings."""

    @abstractmethod
    def loss(self, pairs: Pairs, samples: Samples) -> Float[Tensor, ""]:
        """The objective to minimise: a mean over the pairs and samples given, with a correct gradient."""

    @abstractmethod
    def implicit_reward(
        self, logps: Float[Tensor, "*shape"], reference_logps: Float[Tensor, "*shape"] | None
    ) -> Float[Tensor, "*shape"]:
        """The reward that the policy stands for, in nats: the preference probability is σ of its difference."""

    @property
    def rate(self) -> str | None:
        """How fast KL(π*‖π) falls with n labelled pairs at these settings; None: it has a floor (see `optimum`)."""
        return f"1/n ({self.theorem})" if self.theorem and getattr(self, "beta", 0) == 0 else None

    def credit(self, samples: Samples) -> tuple[Float[Tensor, "samples steps"], Float[Tensor, "samples steps"]]:
        """(advantages, returns) of all samples of a round, in nats, computed once, when they have been drawn.

        Only methods whose `needs` declare `values` have it. Raises TypeError for another.
        """
        raise TypeError(f"{type(self).__name__} declares no values, so it gives no credit")


def require_reference(
    reference_logps: Float[Tensor, "*shape"] | None,
) -> Float[Tensor, "*shape"]:
    """The reference's log-probabilities. Raises ValueError if there are none."""
    if reference_logps is None:
        raise ValueError("reference_logps is missing; this method's implicit reward is relative to the reference")
    return reference_logps


def check_choice(method: object, name: str, choices: tuple[str, ...] = ()) -> None:
    """Raise ValueError unless the setting is one of `choices`: if not given, those of the field's own `Literal`."""
    value, choices = getattr(method, name), choices or get_args(get_type_hints(type(method))[name])
    if value not in choices:
        raise ValueError(f"{type(method).__name__}: {name} is {value!r}; set it to one of {', '.join(choices)}")


def check_setting(method: object, name: str, *, zero: bool = False) -> None:
    """Raise ValueError unless the setting is a finite number above zero (or exactly zero, if `zero` allows it)."""
    value, default = getattr(method, name), getattr(type(method), name)
    if not (hasattr(value, "__float__") and math.isfinite(value) and (value > 0 or (zero and value == 0))):
        wanted = "zero or more" if zero else "more than zero"
        raise ValueError(
            f"{type(method).__name__}: {name} is {value!r}; set it to a finite number, {wanted} (default {default})"
        )
