"""The Markdown of a comparison: its numbers, its intervals, and a verdict that both intervals have to carry."""

from __future__ import annotations

import copy
import json
import math

import pytest
from markdown_it import MarkdownIt
from test_page import COMPARISON, difference, estimate

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
    assert r"* KL(π\*‖π): Distance." in text
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


@pytest.mark.parametrize(
    "name",
    [
        "a|b",
        r"a\|b\\",
        "`a`",
        "``a` b",
        "a\n\n# b\r\nc",
        "<b>a</b>",
        "a & &lt;",
        "**a** _b_ c_d_e ~~f~~",
        "[a](b)",
        "![a][b]",
    ],
)
def test_no_name_or_setting_is_markup(name):
    """A Markdown reader finds the same tables, headings and lists as with a plain name, and every text as it is."""
    content = json.loads(json.dumps(three_seeds([2.0, 2.1, 1.9])).replace('"dpo"', json.dumps(name)))
    content["columns"].append({"key": "length", "label": name, "about": name, "unit": name})
    content["methods"][name]["length"] = estimate(3.0, 0.1)
    content["win_rates"] = {"judge": name, "matrix": {name: {"pmle": estimate(0.5, 0.1)}}}
    content["ratings"] = {name: difference(1.0, 0.5, 1.5)}
    content.update(name=name, environment={"device": name, "torch": name})
    other = json.loads(json.dumps(content).replace(json.dumps(name), '"plain-name"'))
    tokens, plain = read_markdown(content), read_markdown(other)
    assert [token.type for token in tokens if token.type != "inline"] == [t.type for t in plain if t.type != "inline"]
    shown = " ".join(name.split())
    found, wanted = ([text(token) for token in each if token.type == "inline"] for each in (tokens, plain))
    assert sum("plain-name" in part for part in wanted) == 12
    assert found == [part.replace("plain-name", shown) for part in wanted]


def read_markdown(content):
    """The parts of a comparison's Markdown as a reader with tables finds them."""
    reader = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    return reader.parse(results_markdown(content, f"run {content['name']}"))


def text(token):
    """The text of a part; what is markup of its own within is marked."""
    return "".join(c.content if c.type in ("text", "code_inline") else f"<{c.type}>" for c in token.children)


def test_what_is_no_comparison_is_refused():
    """With the place and what to do."""
    with pytest.raises(ReportError, match="run the comparison again"):
        results_markdown({"methods": {}})
