"""The Markdown of a comparison: its numbers, its intervals, and a verdict that both intervals have to carry."""

from __future__ import annotations

import copy
import math

import pytest
from test_report import COMPARISON, difference, estimate

from distalign.report import ReportError, results_markdown


def three_seeds(gaps):
    """The comparison over three seeds in which PMLE lies below DPO by these gaps."""
    content = copy.deepcopy(COMPARISON)
    content["seeds"] = [0, 1, 2]
    content["by_seed"] = {
        "reference": [{"forward_kl": estimate(10.0, 1.0)}] * 3,
        "pmle": [{"forward_kl": estimate(6.0 + k, 0.5)} for k in range(3)],
        "dpo": [{"forward_kl": estimate(6.0 + k + gap, 0.5)} for k, gap in enumerate(gaps)],
    }
    content["between"] = {"pmle": {"dpo": {"forward_kl": difference(-2.0, -2.5, -1.5)}}}
    return content


def test_the_table_has_every_number_with_its_error():
    """Rows and columns of the terminal's table, and what each column means."""
    text = results_markdown(COMPARISON, "distalign compare quickstart.yaml")
    assert "Made by `distalign compare quickstart.yaml`." in text
    assert "| PMLE | 6.0 ± 0.5 | 0.758 ± 0.012 | 40 ± 1 |" in text.replace("40.0 ± 1.0", "40 ± 1")
    assert "* KL(π*‖π): Distance." in text
    assert text.count("| reference") == 1 or "π₀" in text


def test_the_interval_over_seeds_is_students():
    """Three gaps −1, −2, −3: mean −2, t interval ± 4.30 · 1/√3."""
    text = results_markdown(three_seeds([1.0, 2.0, 3.0]))
    half = 4.30 / math.sqrt(3)
    assert f"−2.0 [−{2 + half:.1f}, +{half - 2:.1f}] (n = 3)" in text
    assert "does not" in text
    assert "Separate: none." in text


@pytest.mark.parametrize(("gaps", "verdict"), [([2.0, 2.1, 1.9], "separates"), ([0.1, 2.0, 4.0], "does not")])
def test_a_pair_separates_only_if_both_intervals_say_so(gaps, verdict):
    """Paired by prompt it is clear in both cases; over seeds in one."""
    (row,) = [line for line in results_markdown(three_seeds(gaps)).splitlines() if line.startswith("| PMLE − DPO")]
    assert row.endswith(f"| {verdict} |")


def test_one_seed_says_that_nothing_is_known_over_seeds():
    """The interval over prompts decides, and the page says what it leaves out."""
    content = {**copy.deepcopy(COMPARISON), "between": {"pmle": {"dpo": {"forward_kl": difference(-2.0, -2.5, -1.5)}}}}
    text = results_markdown(content)
    assert "one seed: nothing is known over seeds" in text
    assert "Separate: PMLE − DPO." in text


def test_what_is_no_comparison_is_refused():
    """With the place and what to do."""
    with pytest.raises(ReportError, match="run the comparison again"):
        results_markdown({"methods": {}})
