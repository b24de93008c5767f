"""The tables of a comparison: in the terminal, as Markdown with its verdicts, and as CSV files."""

from __future__ import annotations

import copy
import csv
import io
import json
import math

import pytest
from markdown_it import MarkdownIt
from report_data import COMPARISON, EVIL, difference, evaluation, number, write_lines, write_training
from rich.console import Console

from distalign.report import ReportError, results_markdown, results_table, write_report
from distalign.report.results import Results
from distalign.report.tables import write_tables
from distalign.report.terminal import Fitting, Texts


def three_seeds(gaps):
    """The comparison over three seeds in which PMLE lies below DPO by these gaps."""
    content = copy.deepcopy(COMPARISON)
    content["seeds"] = [0, 1, 2]
    content["by_seed"] = {
        "reference": [{"forward_kl": number(10.0, 1.0)}] * 3,
        "pmle": [{"forward_kl": number(6.0 + k, 0.5)} for k in range(3)],
        "dpo": [{"forward_kl": number(6.0 + k + gap, 0.5)} for k, gap in enumerate(gaps)],
    }
    content["between"] = {"pmle": {"dpo": {"forward_kl": difference(-2.0, -2.5, -1.5)}}}
    return content


def read_csv(path):
    """Rows of a CSV file as dictionaries."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def printed(content, width, *, wide=False):
    """The terminal's table as text."""
    console = Console(width=width, file=io.StringIO())
    console.print(results_table(content).at(width, wide=wide))
    return console.file.getvalue()


def test_terminal_table():
    """Mean ± se of every row, with seeds and counts in the title; markup in names stays text."""
    content = copy.deepcopy(COMPARISON)
    content["methods"]["[red]mine"] = {"forward_kl": number(7.0, 0.5)}
    text = printed(content, 120)
    for part in (
        "quickstart (seed 0, n = 40–128)",
        "KL(π*‖π) ↓",
        "nats",
        "10.9 ± 0.9",
        "0.758 ± 0.012",
        "[red]mine",
    ):
        assert part in text


@pytest.mark.parametrize("width", [60, 80, 120, 160, 300])
def test_every_number_is_whole_at_any_width(width):
    """Fewer columns in a narrow terminal, the important first, the others named; all of them with --wide."""
    content = copy.deepcopy(COMPARISON)
    content["columns"] += [{"key": f"more_{i}", "label": f"one more {i}"} for i in range(10)]
    for row in content["methods"].values():
        row.update({f"more_{i}": number(1.234 + i, 0.05) for i in range(10)})
    text, wide = printed(content, width), printed(content, width, wide=True)
    for shown in (text, wide):
        assert all(name in shown for name in ("target", "reference", "PMLE", "DPO"))
        assert "…" not in shown
        assert max(map(len, shown.splitlines())) <= width
        assert "10.9 ± 0.9" in shown
    assert all(f"{1.234 + i:.2f} ± 0.05" in wide for i in range(10))
    assert ("10.23 ± 0.05" in text) == (width == 300)
    assert ("with --wide: " in text) == (width < 300)


def test_a_column_wider_than_the_terminal_is_broken_between_words():
    """No word of it is lost."""
    table = Fitting(Texts("name", ["first"]), [Texts("about", ["some words " * 9], right=False)])
    console = Console(width=40, file=io.StringIO())
    console.print(table.at(40))
    assert console.file.getvalue().split().count("words") == 9
    assert "first" in console.file.getvalue()


@pytest.mark.parametrize("table", [results_table, results_markdown])
def test_what_is_no_comparison_is_refused(table):
    """With the place and what to do."""
    with pytest.raises(ReportError, match=r"columns: Field required.*run the comparison again"):
        table({"methods": {}})


def test_the_table_has_every_number_with_its_error():
    """Rows and columns of the terminal's table, and what each column means."""
    text = results_markdown(COMPARISON, "distalign compare quickstart.yaml")
    assert "Made by distalign compare quickstart.yaml." in text
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
    content["methods"][name]["length"] = number(3.0, 0.1)
    content["win_rates"] = {"judge": name, "matrix": {name: {"pmle": number(0.5, 0.1)}}}
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


def test_markdown_of_an_evaluation():
    """Stars that stay stars, the matrix, ratings and win rates at equal length."""
    text = results_markdown(evaluation())
    assert r"| PMLE | 0.50 ± 0.10\*\* | 2.00 ± 0.10 |" in text
    assert "| PMLE | 0.60 ± 0.05 | – | 0.40 ± 0.05 | 0.30 ± 0.05 |" in text
    assert "| RKL | +0.80 [+0.60, +1.00] | 0.600 [0.570, 0.630] |" in text
    assert "| reference | 0 | – |" in text
    assert "Stars: one, two, three where p is below" in text


def test_tables_are_written_as_csv(tmp_path):
    """Every number of results.json as it is there, one line each; text that has commas and quotes comes back."""
    results = Results.parse(evaluation())
    write_tables(results, tmp_path / "tables")
    tables = {path.stem: read_csv(path) for path in (tmp_path / "tables").iterdir()}
    rows = tables["estimates"]
    assert len(rows) == sum(len(row) for row in results.methods.values())
    for row in rows:
        measure = results.methods[row["policy"]][row["metric"]]
        assert (float(row["mean"]), float(row["se"]), int(row["n"])) == (measure.mean, measure.se, measure.n)
    assert [row["p_holm"] for row in rows if row["p_holm"]] == ["0.0012"]
    wins = {(row["policy"], row["against"]): float(row["mean"]) for row in tables["win_rates"]}
    assert wins["rkl", "pmle"] == pytest.approx(0.6)
    assert len(wins) == 12
    assert {row["policy"] for row in tables["ratings"]} == {"reference", "pmle", "rkl", EVIL}
    assert len(tables["differences"]) == len(tables["length_controlled"]) == 3


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(1)", "\t=1", " =1", "＝1", "-2;=1"])
def test_no_name_is_a_formula(tmp_path, name):
    """Names behind an apostrophe and quoted, wherever they stand; numbers stay numbers, negative ones too."""
    content = json.loads(json.dumps(evaluation()).replace('"pmle"', json.dumps(name)))
    content["paired"][name]["reward"] = {"mean": -0.5, "low": -0.7, "high": -0.3}
    content["columns"][0].update(key=name, unit=name)
    for part in ("methods", "paired"):
        for metrics in content[part].values():
            metrics[name] = metrics.pop("reward")
    write_tables(Results.parse(content), tmp_path / "tables")
    row = read_csv(tmp_path / "tables" / "differences.csv")[0]
    assert [row[key] for key in ("policy", "metric", "unit")] == [f"'{name}"] * 3
    assert [row[key] for key in ("mean", "low", "high", "n")] == ["-0.5", "-0.7", "-0.3", ""]
    tables = list((tmp_path / "tables").iterdir())
    assert len(tables) == 5
    for table in tables:
        names = table.read_text(encoding="utf-8")
        assert names.count(name) == names.count(f'"\'{name}"') > 0


def test_a_training_runs_last_values_are_written_as_csv(tmp_path):
    """Numbers as they were logged; a name that would be a formula is none."""
    write_report(write_training(tmp_path / "run", 2.0))
    rows = {row["metric"]: row for row in read_csv(tmp_path / "run" / "tables" / "last.csv")}
    assert float(rows["objective/entropy"]["value"]) == 28.0
    assert float(rows["eval_loss"]["step"]) == 60
    assert [path.name for path in (tmp_path / "run" / "tables").iterdir()] == ["last.csv"]
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "=1+1": -2.5}])
    write_report(tmp_path)
    assert read_csv(tmp_path / "tables" / "last.csv") == [{"metric": "'=1+1", "value": "-2.5", "step": "1.0"}]
