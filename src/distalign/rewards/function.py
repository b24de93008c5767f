"""Rewards by a Python function, with the signature that TRL's reward functions have."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from threading import Thread
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distalign.errors import InputError
from distalign.rewards.base import LARGEST, Request, Reward, RewardError, as_text
from distalign.user_code import load_named

SIGNATURE = "(prompts, completions, **columns) -> list of floats"
# What a function is offered beside the columns of the rows.
_OFFERED = ("prompts", "completions", "completion_ids")


class UserFunction:
    """A function of the user's, or its place `file.py:name`: called with the columns that it names, its answer checked.

    It runs for at most `timeout` seconds, in a thread of its own, which a timeout leaves behind. `role` is "reward" or
    "judge": messages name the function by it, and are raised as `error`.
    """

    def __init__(
        self,
        function: str | Callable[..., object],
        *,
        timeout: float,
        role: Literal["reward", "judge"],
        error: type[InputError],
    ) -> None:
        self.timeout, self.role, self.error_class = timeout, role, error
        if isinstance(function, str):
            self.name, self.function = function, find_function(function, role=role, error=error)
        else:
            self.name = getattr(function, "__name__", type(function).__name__)
            self.function = check_function(function, f"{role} function {self.name}", error)

    def __call__(self, offered: Mapping[str, list[object]], n: int) -> list[float]:
        """`n` finite numbers. Raises the error if the function raises, takes too long, or gives anything else."""
        return self._checked(self._run(self._wanted(offered)), n)

    def error(self, found: str, advice: str) -> InputError:
        """The error that names the function."""
        return self.error_class(f"{self.role} function {self.name}: {found}; {advice}")

    def _wanted(self, offered: Mapping[str, list[object]]) -> Mapping[str, list[object]]:
        parameters = _parameters(self.function)
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            return offered
        missing = [p.name for p in parameters if p.default is p.empty and p.name not in offered]
        if missing:
            columns = ", ".join(name for name in offered if name not in _OFFERED) or "none"
            raise self.error(
                f"it needs {', '.join(missing)}, and the rows have no such column (found {columns})",
                "add the column to the data, or give the parameter a default",
            )
        return {p.name: offered[p.name] for p in parameters if p.name in offered}

    def _run(self, arguments: Mapping[str, list[object]]) -> object:
        outcome: dict[str, object] = {}

        def call() -> None:
            try:
                outcome["value"] = self.function(**arguments)
            except BaseException as error:
                outcome["error"] = error

        thread = Thread(target=call, daemon=True, name=self.name)
        thread.start()
        thread.join(self.timeout)
        error = outcome.get("error")
        if isinstance(error, BaseException):
            raise self.error(f"it raised {type(error).__name__}: {error}", "fix it") from error
        if "value" not in outcome:
            raise self.error(
                f"no answer after {self.timeout:g} s", f"make it faster, or raise the {self.role}'s timeout"
            )
        return outcome["value"]

    def _checked(self, values: object, n: int) -> list[float]:
        if isinstance(values, str | bytes | Mapping | Set) or not isinstance(values, Collection):
            raise self.error(f"it returned a {type(values).__name__}", f"return {n} numbers, one for each completion")
        if len(values) != n:
            raise self.error(f"it returned {len(values)} numbers for {n} completions", "return one number for each")
        checked: list[float] = []
        for index, value in enumerate(map(_number, values)):
            if not isinstance(value, numbers.Real) or not abs(float(value)) <= LARGEST:
                raise self.error(
                    f"its answer to completion {index} is {value!r}",
                    f"return a finite number below {LARGEST:g} for each completion",
                )
            checked.append(float(value))
        return checked


def _number(value: object) -> object:
    """The value of a tensor or array that holds a single one."""
    item = getattr(value, "item", None)
    return item() if item is not None and math.prod(getattr(value, "shape", ())) == 1 else value


class FunctionReward(Reward):
    """A function `(prompts, completions, **columns) -> list[float]`: flat lists, one entry per response.

    Chats are given as message lists, a completion as one assistant message. Columns that only some rows have are None
    in the others; `completion_ids` are the response's ids. A function without `**` gets what it names. It runs in a
    thread of its own, which a timeout (seconds) leaves behind.
    """

    def __init__(
        self, function: str | Callable[..., object], tokenizer: PreTrainedTokenizerBase, *, timeout: float
    ) -> None:
        self.function = UserFunction(function, timeout=timeout, role="reward", error=RewardError)
        self.tokenizer = tokenizer

    def __call__(self, requests: Sequence[Request]) -> Float[Tensor, "responses"]:
        """Its return value, checked. Raises RewardError if it raises, takes too long, or gives anything but numbers."""
        responses = as_text(requests, self.tokenizer)
        offered: dict[str, list[object]] = {
            name: [response.columns.get(name) for response in responses]
            for name in dict.fromkeys(name for response in responses for name in response.columns)
        }
        offered["prompts"] = [response.prompt for response in responses]
        offered["completions"] = [response.completion for response in responses]
        offered["completion_ids"] = [response.ids for response in responses]
        return torch.tensor(self.function(offered, len(responses)), dtype=torch.float32)


def find_function(name: str, *, role: str = "reward", error: type[InputError] = RewardError) -> Callable[..., object]:
    """The function that `file.py:name` or `module:name` names, imported and its parameters checked. Raises `error`.

    A module must be importable as it stands; a path is relative to the working directory.
    """
    label = f"{role} function {name}"
    function = load_named(name, "function", inspect.isfunction, label=label, error=error)
    return check_function(function, label, error)


def check_function(
    function: Callable[..., object], label: str, error: type[InputError] = RewardError
) -> Callable[..., object]:
    """The function, if it can be called as a reward function is. Raises `error`, naming it by its `label`."""
    try:
        parameters = _parameters(function)
    except ValueError as reason:
        raise error(f"{label}: {reason}; write it as {SIGNATURE}") from None
    takes_completions = any(p.name == "completions" or p.kind is p.VAR_KEYWORD for p in parameters)
    if not takes_completions or any(p.kind is p.POSITIONAL_ONLY and p.default is p.empty for p in parameters):
        raise error(f"{label}: it takes ({', '.join(map(str, parameters)) or 'nothing'}); write it as {SIGNATURE}")
    if inspect.iscoroutinefunction(function):
        raise error(f"{label}: it is async; write an ordinary function {SIGNATURE}")
    return function


def _parameters(function: Callable[..., object]) -> list[inspect.Parameter]:
    return [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_POSITIONAL]
