"""Numbers as people read them, and the sentences that say what a comparison found."""

from __future__ import annotations

import math

import pytest
from report_data import difference, number

from distalign.report import format_estimate, format_interval
from distalign.report.numbers import findings, format_number, format_seconds
from distalign.report.results import Results


def finding(mean, low, high, kept_step=(), **changes):
    """The headline of a comparison of one method whose main metric differs by this much from a reference of 10."""
    results = {
        "columns": [{"key": "forward_kl", "label": "KL", "better": "lower", **changes}],
        "methods": {"reference": {"forward_kl": number(10.0, 0.5)}, "pmle": {"forward_kl": number(10.0 + mean, 0.5)}},
        "paired": {"pmle": {"forward_kl": difference(mean, low, high)}},
        "kept_step": {"pmle": list(kept_step)},
    }
    (headline,) = findings(Results.parse(results))
    return headline.sentence, headline.verdict


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


@pytest.mark.parametrize(
    ("values", "changes", "sentence", "verdict"),
    [
        ((-4.5, -5.7, -3.4), {}, "lowers the forward KL to the target by 45 % [34 %, 57 %]", "better"),
        ((2.0, 1.0, 3.0), {}, "raises the forward KL to the target by 20 % [10 %, 30 %]", "worse"),
        (
            (-0.5, -1.6, 0.6),
            {},
            "shows no clear change in the forward KL to the target: −5 % [−16 %, +6 %], an interval with zero inside",
            "undecided",
        ),
        (
            (0.0, 0.0, 0.0),
            {"kept_step": [8]},
            "does not differ from the reference in the forward KL to the target: every difference is 0",
            "unchanged",
        ),
        # A fraction is not given in per cent of a fraction.
        ((0.5, 0.2, 0.8), {"better": "higher"}, "raises the forward KL to the target by 0.50 [0.20, 0.80]", "better"),
    ],
)
def test_the_headline_has_the_change_and_its_interval(values, changes, sentence, verdict):
    """Per cent of the reference's mean, with the interval turned the way of the verb."""
    assert finding(*values, **changes) == (f"PMLE {sentence}", verdict)


@pytest.mark.parametrize(("steps", "where"), [([0], ""), ([0, 0], " in every seed")])
def test_a_method_that_kept_the_start_is_the_reference(steps, where):
    """Validation kept step 0: the policy is the reference, whatever noise the metric has, and no per cent are given."""
    sentence = f"PMLE is the reference that it started from: step 0 was kept{where}"
    assert finding(0.2, -0.1, 0.5, kept_step=steps) == (sentence, "unchanged")
    assert finding(-4.5, -5.7, -3.4, kept_step=[*steps, 8])[1] == "better"
