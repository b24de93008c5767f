"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest

from distalign.report.numbers import format_estimate, format_interval, format_number, format_seconds


@pytest.mark.parametrize(
    ("mean", "se", "text"),
    [
        (10.9, 0.9, "10.9 ± 0.9"),
        (5.3, 0.4, "5.3 ± 0.4"),
        (0.758, 0.012, "0.758 ± 0.012"),
        (-4.26, 0.31, "−4.3 ± 0.3"),
        (-0.01, 0.4, "0.0 ± 0.4"),
        (1234.4, 56.0, "1234 ± 56"),
        (0.0, 0.0, "0 ± 0"),
        (3.14159, math.nan, "3.14 ± ?"),
        (math.nan, math.nan, "n/a"),
        (math.inf, math.nan, "∞"),
    ],
)
def test_an_estimate_has_the_digits_its_error_leaves(mean, se, text):
    """One or two digits of the error, and the mean to the same place."""
    assert format_estimate(mean, se) == text


@pytest.mark.parametrize(
    ("values", "sign", "text"),
    [
        ((-4.9, -6.2, -3.6), "+", "−4.9 [−6.2, −3.6]"),
        ((0.102, 0.03, 0.17), "+", "+0.10 [+0.03, +0.17]"),
        ((0.62, 0.55, 0.69), "", "0.62 [0.55, 0.69]"),
        ((1.0, math.nan, math.nan), "+", "+1 [?, ?]"),
        ((0.0, 0.0, 0.0), "+", "0"),
    ],
)
def test_an_interval_has_the_digits_its_ends_leave(values, sign, text):
    """Differences show their direction."""
    assert format_interval(*values, sign=sign) == text


def test_a_duration_has_two_units():
    """Those that matter."""
    texts = ["0.25 s", "41 s", "2 min 30 s", "2 min", "3 h 5 min"]
    assert [format_seconds(seconds) for seconds in (0.25, 41.0, 150.0, 120.0, 11100.0)] == texts


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (65536, "65,536"),
        (0.012345, "0.0123"),
        (1.25e-16, "1.25·10⁻¹⁶"),
        (1e5, "10⁵"),
        (99999.0, "10⁵"),
        (1234.5, "1,230"),
        (-0.5, "−0.5"),
        (0.0, "0"),
        (math.nan, "n/a"),
        (-math.inf, "−∞"),
    ],
)
def test_numbers_have_three_digits(value, text):
    """Whole numbers keep theirs, powers are written as powers."""
    assert format_number(value) == text


def test_a_whole_number_that_no_float_holds_keeps_its_digits():
    """As files of others may have it."""
    assert format_number(10**399) == "1" + ",000" * 133
