"""What a user can fix: the command line prints it as it is and ends with exit code 2."""

from __future__ import annotations


class InputError(ValueError):
    """Something given cannot be used: the message says where, what was found, and what to do."""


# What reading a file raises that is damaged, or holds values of other types than expected.
DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
