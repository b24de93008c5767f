"""How annotations are checked while the tests run: an int is a float, as everywhere in Python."""

from typing import Any

from beartype import BeartypeConf, beartype

_check: Any = beartype(conf=BeartypeConf(is_pep484_tower=True))
_made: dict[tuple[str, ...], Any] = {}


def check(function: Any) -> Any:
    """What jaxtyping gives has a signature and no body: for a function within a function it is made only once."""
    if "<locals>" not in function.__qualname__:
        return _check(function)
    key = (function.__module__, function.__qualname__, repr(function.__annotations__))
    if key not in _made:
        _made[key] = _check(function)
    return _made[key]
