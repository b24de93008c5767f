"""Rewards by a Python function, with the signature that TRL's reward functions have."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import numbers
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from distalign.rewards.base import Request, RewardError, spoken

SIGNATURE = "(prompts, completions, **columns) -> list of floats"
# What a function is offered beside the columns of the rows.
_OFFERED = ("prompts", "completions", "completion_ids")


class FunctionReward:
    """A function `(prompts, completions, **columns) -> list[float]`: flat lists, one entry a response.

    Chats are given as message lists, a completion as one assistant message. Columns that only some rows have are None
    in the others; `completion_ids` are the response's ids. A function without `**` gets what it names. It runs in a
    thread of its own, which a timeout (seconds) leaves behind.
    """

    def __init__(self, name: str, tokenizer: Any, *, timeout: float) -> None:
        self.name, self.tokenizer, self.timeout = name, tokenizer, timeout
        self.function = find_function(name)
        self.responses = self.calls = 0

    def __call__(self, requests: Sequence[Request]) -> Float[Tensor, "responses"]:
        """Its return value, checked. Raises RewardError if it raises, takes too long, or gives anything but numbers."""
        rows = spoken(requests, self.tokenizer)
        columns = {
            name: [row.extra.get(name) for row in rows] for name in dict.fromkeys(n for r in rows for n in r.extra)
        }
        offered = {
            **columns,
            "prompts": [row.prompt for row in rows],
            "completions": [row.completion for row in rows],
            "completion_ids": [row.ids for row in rows],
        }
        values = self._checked(self._run(self._wanted(offered)), len(rows))
        self.responses += len(rows)
        self.calls += 1
        return torch.tensor(values, dtype=torch.float32)

    def facts(self) -> dict[str, float]:
        """Responses rewarded and calls made."""
        return {"responses": float(self.responses), "calls": float(self.calls)}

    def _wanted(self, offered: dict[str, list[Any]]) -> dict[str, list[Any]]:
        parameters = _parameters(self.function)
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            return offered
        missing = [p.name for p in parameters if p.default is p.empty and p.name not in offered]
        if missing:
            found = ", ".join(name for name in offered if name not in _OFFERED) or "none"
            raise self._error(
                f"it needs {', '.join(missing)}, and the rows have no such column (found {found})",
                "add the column to the data, or give the parameter a default",
            )
        return {p.name: offered[p.name] for p in parameters if p.name in offered}

    def _run(self, arguments: dict[str, list[Any]]) -> Any:
        outcome = outcome_within(self.timeout, self.function, arguments)
        if "error" in outcome:
            error = outcome["error"]
            raise self._error(f"it raised {type(error).__name__}: {error}", "mend it") from error
        if "value" not in outcome:
            raise self._error(
                f"no answer after {self.timeout:g} s", "make it faster, or raise timeout in the recipe's reward"
            )
        return outcome["value"]

    def _checked(self, values: Any, n: int) -> list[float]:
        if isinstance(values, str | bytes | dict) or not hasattr(values, "__len__") or not hasattr(values, "__iter__"):
            raise self._error(f"it returned a {type(values).__name__}", f"return {n} numbers, one for each completion")
        values = [value.item() if hasattr(value, "item") and _one(value) else value for value in values]
        if len(values) != n:
            raise self._error(
                f"it returned {len(values)} rewards for {n} completions", "return one number for each completion"
            )
        for index, value in enumerate(values):
            if not isinstance(value, numbers.Real) or not math.isfinite(value):
                raise self._error(
                    f"its reward of completion {index} is {value!r}", "return a finite number for each completion"
                )
        return [float(value) for value in values]

    def _error(self, found: str, advice: str) -> RewardError:
        return RewardError(f"reward function {self.name}: {found}; {advice}")


def _one(value: Any) -> bool:
    """Whether a tensor or array holds a single value."""
    return math.prod(getattr(value, "shape", ())) == 1


def find_function(name: str) -> Callable[..., Any]:
    """The function that `file.py:name` or `module:name` names, imported and its parameters checked. Raises RewardError.

    A module must be importable as it stands; a path is relative to the working directory.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise RewardError(f"reward function {name}: write file.py:function or module:function")
    module = _module(name, place)
    function = getattr(module, attribute, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        near = (get_close_matches(attribute, functions, 1) or functions or ["none"])[0]
        raise RewardError(f'reward function {name}: {place} has no function "{attribute}"; did you mean "{near}"?')
    try:
        parameters = _parameters(function)
    except ValueError as error:
        raise RewardError(f"reward function {name}: {error}; write it as {SIGNATURE}") from None
    names = {p.name for p in parameters}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if ("completions" not in names and not takes_all) or any(
        p.kind is p.POSITIONAL_ONLY and p.default is p.empty for p in parameters
    ):
        found = ", ".join(map(str, parameters)) or "nothing"
        raise RewardError(f"reward function {name}: it takes ({found}); write it as {SIGNATURE}")
    if inspect.iscoroutinefunction(function):
        raise RewardError(f"reward function {name}: it is async; write an ordinary function {SIGNATURE}")
    return function


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_POSITIONAL]


def _module(name: str, place: str) -> Any:
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        path = Path(place).expanduser()
        if not path.is_file():
            raise RewardError(f"reward function {name}: there is no file {place}; paths start at the working directory")
        key = f"distalign_reward_{path.stem}"
        spec = importlib.util.spec_from_file_location(key, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[key] = module
        spec.loader.exec_module(module)
        return module
    except RewardError:
        raise
    except Exception as error:
        raise RewardError(
            f"reward function {name}: importing {place} raised {type(error).__name__}: {error}; mend it, or install "
            "what it needs"
        ) from error


def outcome_within(timeout: float, function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """What a user's function gave: its "value", or the "error" it raised, or neither after `timeout` seconds.

    It runs in a thread of its own, which a timeout leaves behind.
    """
    outcome: dict[str, Any] = {}

    def call() -> None:
        try:
            outcome["value"] = function(**arguments)
        except BaseException as error:
            outcome["error"] = error

    thread = Thread(target=call, daemon=True, name=getattr(function, "__name__", "function"))
    thread.start()
    thread.join(timeout)
    return outcome
