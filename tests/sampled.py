"""Cells of a test that `make test-all` tries and `make test` leaves out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def sampled(cells: Iterable[Any], *quick: Any) -> list[Any]:
    """All cells, those that are not named as quick marked slow."""
    cells = list(cells)
    assert set(quick) < set(cells)
    return [cell if cell in quick else pytest.param(cell, marks=pytest.mark.slow) for cell in cells]
