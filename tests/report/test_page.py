"""The report: what is on the page, what the headline says, and what a broken folder is told."""

from __future__ import annotations

import copy
import html
import io
import json
import math
import re
import subprocess
import sys

import pytest
from rich.console import Console

from distalign.report import ReportError, format_estimate, format_interval, results_table, write_report
from distalign.report.numbers import findings, format_seconds
from distalign.report.results import Results

EVIL = "<script>alert('x')</script>"


def estimate(mean, se, n=48):
    """A number as results.json has it."""
    return {"mean": mean, "se": se, "n": n}


def difference(mean, low, high, n=48):
    """A paired difference as results.json has it."""
    return {"mean": mean, "low": low, "high": high, "n": n}


COMPARISON = {
    "name": "quickstart",
    "title": "A known target",
    "seeds": [0],
    "columns": [
        {"key": "forward_kl", "label": "KL(π*‖π)", "unit": "nats", "better": "lower", "about": "Distance."},
        {"key": "accuracy", "label": "accuracy", "unit": None, "better": "higher", "about": "Share of pairs."},
        {"key": "entropy", "label": "entropy", "unit": "nats", "better": None, "about": "Spread."},
    ],
    "methods": {
        "target": {"forward_kl": estimate(0.0, 0.0), "accuracy": estimate(0.789, 0.036, 128)},
        "reference": {"forward_kl": estimate(10.9, 0.9), "accuracy": estimate(0.656, 0.042, 128)},
        "pmle": {
            "forward_kl": estimate(5.97, 0.53),
            "accuracy": estimate(0.758, 0.012, 128),
            "entropy": estimate(40, 1),
        },
        "dpo": {"forward_kl": estimate(10.4, 0.8), "accuracy": estimate(0.705, 0.04, 128), "entropy": estimate(29, 2)},
    },
    "paired": {
        "pmle": {"forward_kl": difference(-4.93, -6.21, -3.7), "accuracy": difference(0.102, 0.03, 0.17, 128)},
        "dpo": {"forward_kl": difference(-0.5, -1.6, 0.6), "accuracy": difference(0.049, -0.02, 0.12, 128)},
    },
    "curves": {
        name: [
            {"seed": 0, "step": step, "forward_kl": estimate(10.9 - rate * step, 0.8, 24), "eval_loss": 0.8 - step / 99}
            for step in (0, 8, 16)
        ]
        for name, rate in (("pmle", 0.3), ("dpo", 0.05))
    },
    "kept_step": {"pmle": [16], "dpo": [8]},
    "calibration": {
        "pmle": [{"predicted": 0.05, "observed": 0.11, "n": 31}, {"predicted": 0.9, "observed": 0.8, "n": 9}]
    },
    "pairs": {"train": 320, "held_out": 128, "median_logit": 1.0},
    "settings": {"model": "tiny", "methods": {"pmle": {"gamma": 0.15}}},
    "environment": {"torch": "2.9.1"},
    "seconds": {"data": 120.0, "pmle": 150.0},
    "citation": "arXiv 2506.01523",
}


def comparison(folder, change=None, samples=()):
    """Write a comparison into the folder, changed by a function, and return its report's text."""
    results = copy.deepcopy(COMPARISON)
    if change:
        change(results)
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    if samples:
        (folder / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples), encoding="utf-8")
    return write_report(folder, files=False).read_text(encoding="utf-8")


def table_cells(page, name):
    """Rows of a table on the page, as lists of texts."""
    table = re.search(rf'<table id="{name}".*?</table>', page, flags=re.S)
    assert table
    rows = re.findall(r"<tr.*?</tr>", table[0], flags=re.S)
    cells = [re.findall(r"<t[hd].*?</t[hd]>", row, flags=re.S) for row in rows]
    return [[" ".join(html.unescape(re.sub(r"<[^>]+>", " ", c)).split()) for c in row] for row in cells]


def said(mean, low, high, kept_step=(), **changes):
    """The headline of a comparison of one method whose main metric differs by this much from a reference of 10."""
    results = {
        "columns": [{"key": "forward_kl", "label": "KL", "better": "lower", **changes}],
        "methods": {
            "reference": {"forward_kl": estimate(10.0, 0.5)},
            "pmle": {"forward_kl": estimate(10.0 + mean, 0.5)},
        },
        "paired": {"pmle": {"forward_kl": difference(mean, low, high)}},
        "kept_step": {"pmle": list(kept_step)},
    }
    (finding,) = findings(Results.parse(results))
    return finding


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


def test_an_interval_is_signed_and_a_duration_has_two_units():
    """Differences show their direction; times are readable."""
    assert format_interval(-4.9, -6.2, -3.6) == "−4.9 [−6.2, −3.6]"
    assert format_interval(0.102, 0.03, 0.17) == "+0.10 [+0.03, +0.17]"
    assert format_interval(1.0, math.nan, math.nan) == "+1 [?, ?]"
    assert format_interval(0.0, 0.0, 0.0) == "0"
    assert [format_seconds(s) for s in (0.25, 41.0, 150.0, 120.0, 11100.0)] == [
        "0.25 s",
        "41 s",
        "2 min 30 s",
        "2 min",
        "3 h 5 min",
    ]


def test_headline_of_an_improvement():
    """Per cent of the reference's mean, with the interval turned the way of the verb."""
    finding = said(-4.5, -5.7, -3.4)
    assert finding.sentence == "PMLE lowers the forward KL to the target by 45 % [34 %, 57 %]"
    assert finding.verdict == "better"


def test_headline_of_a_change_for_the_worse():
    """The verb says which way it went, without praise."""
    finding = said(2.0, 1.0, 3.0)
    assert finding.sentence == "PMLE raises the forward KL to the target by 20 % [10 %, 30 %]"
    assert finding.verdict == "worse"


def test_headline_when_undecided():
    """An interval with zero inside claims nothing."""
    finding = said(-0.5, -1.6, 0.6)
    assert finding.sentence.startswith("PMLE shows no clear change in the forward KL to the target: −5 % [−16 %, +6 %]")
    assert finding.verdict == "undecided"


@pytest.mark.parametrize(("kept", "where"), [([0], ""), ([0, 0], " in every seed")])
def test_headline_of_a_method_that_kept_the_start(kept, where):
    """Validation kept step 0: the policy is the reference, whatever noise the metric has, and no per cent are told."""
    finding = said(0.2, -0.1, 0.5, kept_step=kept)
    assert finding.sentence == f"PMLE is the reference that it started from: step 0 was kept{where}"
    assert finding.verdict == "unchanged"
    assert said(-4.5, -5.7, -3.4, kept_step=[*kept, 8]).verdict == "better"


def test_headline_without_any_difference():
    """The same number on every prompt claims no more than that."""
    finding = said(0.0, 0.0, 0.0, kept_step=[8])
    assert finding.sentence == (
        "PMLE does not differ from the reference in the forward KL to the target: every difference is 0"
    )
    assert finding.verdict == "unchanged"


def test_headline_where_higher_is_better_is_in_the_metrics_own_unit():
    """A fraction is not given in per cent of a fraction."""
    finding = said(0.5, 0.2, 0.8, better="higher")
    assert finding.sentence == "PMLE raises the forward KL to the target by 0.50 [0.20, 0.80]"
    assert finding.verdict == "better"


def test_the_largest_improvement_comes_first(tmp_path):
    """The headline is the best method's; the others follow as sentences."""
    page = comparison(tmp_path)
    heading = re.search(r"<h1>(.*?)</h1>", page, flags=re.S)
    assert heading
    assert re.sub(r"<[^>]+>", "", heading[1]) == "PMLE lowers the forward KL to the target by 45 % [34 %, 57 %]."
    assert "</b> shows no clear change in the forward KL" in page
    assert "seed 0 · n = 48 · 95 % intervals" in page


def test_table_numbers_equal_the_input(tmp_path):
    """Target and reference first, mean ± se with n in every cell, a dash where there is no number."""
    page = comparison(tmp_path)
    assert table_cells(page, "estimates")[1:] == [
        ["target", "0 ± 0 n = 48", "0.79 ± 0.04 n = 128", "–"],
        ["reference", "10.9 ± 0.9 n = 48", "0.66 ± 0.04 n = 128", "–"],
        ["PMLE", "6.0 ± 0.5 n = 48", "0.758 ± 0.012 n = 128", "40.0 ± 1.0 n = 48"],
        ["DPO", "10.4 ± 0.8 n = 48", "0.70 ± 0.04 n = 128", "29.0 ± 2.0 n = 48"],
    ]
    assert table_cells(page, "differences")[1:] == [
        ["PMLE", "−4.9 [−6.2, −3.7] better n = 48", "+0.10 [+0.03, +0.17] better n = 128"],
        ["DPO", "−0.5 [−1.6, +0.6] n = 48", "+0.05 [−0.02, +0.12] n = 128"],
    ]


def test_the_best_mean_of_a_column_is_marked(tmp_path):
    """Not the target's, and nothing where no direction is better."""
    assert re.findall(r"<td><b>(.*?)</b>", comparison(tmp_path)) == ["6.0 ± 0.5", "0.758 ± 0.012"]


def test_everything_from_files_is_escaped(tmp_path):
    """No text of a run can become markup: names, labels, settings, samples, citation."""

    def poison(results):
        results.update(name=EVIL, title=EVIL, citation=EVIL, settings={EVIL: EVIL}, environment={EVIL: EVIL})
        results["pairs"], results["seconds"] = {EVIL: EVIL}, {EVIL: 1.0}
        results["columns"][0].update(label=EVIL, about=EVIL, unit=EVIL)
        for part in ("methods", "paired", "curves", "calibration"):
            results[part][EVIL] = results[part]["pmle"]

    page = comparison(tmp_path, poison, [{"prompt": EVIL, "responses": {EVIL: EVIL, "pmle": "</p><img src=x>"}}])
    assert "alert(" in page
    assert "<script>alert" not in page
    assert "<img" not in page
    assert page.count("<script") == 1  # the search


def test_page_asks_the_network_for_nothing(tmp_path):
    """No address outside the page, no link, no imported style; the policy forbids what would be missed here."""
    page = comparison(tmp_path, samples=[{"prompt": "Hello", "responses": {"pmle": "Hi"}}])
    assert not re.search(r"https?:|url\(\s*['\"]?(?!#)|@import|<link(?! rel=\"icon\" href=\"data:,\")", page)
    assert all(target[0] in "#d" for target in re.findall(r"\b(?:src|href)=\"([^\"]+)", page))
    assert "default-src 'none'" in page


def test_figures_follow_the_pages_colours(tmp_path):
    """Every colour in a figure is a variable of the page, one accent a method; words in it stay words."""
    page = comparison(tmp_path)
    figures = re.findall(r"<svg.*?</svg>", page, flags=re.S)
    assert len(figures) == 3  # forward KL, held-out loss, one calibration plot
    assert not re.findall(r"#0[1-5]0[0-9a-f]{3}\b", page)
    assert not re.search(r"(?:fill|stroke): #(?!none)", "".join(figures))
    assert "var(--c1)" in figures[0]
    assert all(word in figures[0] for word in (">PMLE<", ">DPO<", ">optimizer step<"))


def test_missing_parts_leave_their_sections_out(tmp_path):
    """A comparison on a user's own pairs: no target, no KL, no curves."""

    def strip(results):
        for part in ("curves", "kept_step", "calibration", "pairs", "settings", "environment", "seconds", "citation"):
            del results[part]
        del results["methods"]["target"]
        for row in (*results["methods"].values(), *results["paired"].values()):
            row.pop("forward_kl")

    page = comparison(tmp_path, strip)
    assert "PMLE</span> raises the preference accuracy by 0.10 [0.03, 0.17]." in page
    assert "KL(π*‖π)" not in page
    assert "<svg" not in page
    assert not {"Calibration", "Samples", "Settings", "Time", "Citation"} & set(re.findall(r"<h2>(.*?)</h2>", page))


def test_numbers_that_could_not_be_computed_do_not_break_the_page(tmp_path):
    """null, NaN and infinity arrive in results; without a finite difference there is no claim."""

    def break_numbers(results):
        results["methods"]["pmle"].update(forward_kl=estimate(math.inf, math.nan), accuracy=None, entropy=3.5)
        results["paired"] = {"pmle": {"forward_kl": {"mean": math.inf, "low": None, "high": None}}}
        results["curves"]["pmle"][1]["forward_kl"] = {"mean": None, "se": None, "n": 0}

    page = comparison(tmp_path, break_numbers)
    assert "<h1>A known target</h1>" in page
    assert ["PMLE", "∞ n = 48", "n/a", "3.5 ± ?"] in table_cells(page, "estimates")


def test_several_seeds(tmp_path):
    """Every seed is a line of its own with its kept step, and a method is labelled once."""

    def two_seeds(results):
        results["seeds"] = [0, 1]
        results["curves"]["pmle"] += [{**row, "seed": 1} for row in results["curves"]["pmle"]]
        results["kept_step"]["pmle"] = [16, 8]

    page = comparison(tmp_path, two_seeds)
    assert "seeds 0, 1 · " in page
    assert re.findall(r"<svg.*?</svg>", page, flags=re.S)[0].count(">PMLE<") == 1


def training(folder, lines):
    """Write a training run's metrics into the folder."""
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    return folder


def test_training_run(tmp_path):
    """Curves of what was logged, the last value of everything with its step, settings and samples."""
    lines = [
        {"step": s, "loss": 1 / s, "logps/chosen": -s, "logps/rejected": -2 * s, "grad_norm": 1.0} for s in (1, 2, 3)
    ]
    training(tmp_path, [*lines, {"step": 3, "eval_loss": 0.4321}, {"train_runtime": 12.0, "note": EVIL}])
    (tmp_path / "recipe.yaml").write_text(f"method: pmle\nnote: {EVIL}\n", encoding="utf-8")
    sample = {"step": 3, "prompt": EVIL, "responses": ["one", EVIL]}
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample), encoding="utf-8")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    titles = re.findall(r"<figcaption><h3>(.*?)</h3>", page)
    assert titles == ["Loss", "ln π of the responses", "Gradient norm"]
    assert ["eval_loss", "0.4321", "3"] in table_cells(page, "last")
    assert ["train_runtime", "12", "3"] in table_cells(page, "last")
    assert ">held out<" in page
    assert "method: pmle" in page
    assert "response 2" in page
    assert "<script>alert" not in page


def test_the_same_folder_gives_the_same_page(tmp_path):
    """A report can be compared with the one before."""
    assert comparison(tmp_path) == comparison(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"model.txt": ""}, r"no results.json and no metrics.jsonl \(found: model.txt\); give the folder of"),
        ({"results.json": '{\n "name": }'}, r"results.json:2: not JSON .*; run the comparison again"),
        ({"results.json": "[]"}, r"results.json: the top level: .* found \[\]; run"),
        ({"results.json": '{"columns": [{"key": "a", "label": "a"}]}'}, r"results.json: methods: Field required"),
        ({"metrics.jsonl": '{"step": 1}\n{"step": '}, r"metrics.jsonl:2: not JSON .*; repair or remove the line"),
        ({"metrics.jsonl": "[1]"}, r"metrics.jsonl:1: found \[1\], not a JSON object"),
        ({"metrics.jsonl": ""}, r"metrics.jsonl: no lines; let the run log"),
        (
            {"metrics.jsonl": '{"step": 1}', "samples.jsonl": '{"prompt": "a"}'},
            r"samples.jsonl:1: found \['prompt'\]; give",
        ),
    ],
)
def test_a_broken_folder_is_told_where_and_what_to_do(tmp_path, files, message):
    """Where, what was found, what to do."""
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ReportError, match=message):
        write_report(tmp_path)


def test_a_folder_that_is_not_there(tmp_path):
    """A wrong path is an error, not a new folder."""
    with pytest.raises(ReportError, match="no such folder"):
        write_report(tmp_path / "nothing")


def test_terminal_table():
    """Mean ± se of every row, with seeds and counts in the title; markup in names stays text."""
    results = copy.deepcopy(COMPARISON)
    results["methods"]["[red]mine"] = {"forward_kl": estimate(7.0, 0.5)}
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(results_table(results))
    text = console.export_text()
    for part in ("A known target (seed 0, n = 48–128)", "KL(π*‖π), nats ↓", "10.9 ± 0.9", "0.758 ± 0.012", "[red]mine"):
        assert part in text
    with pytest.raises(ReportError, match="columns"):
        results_table({"methods": {}})


def test_importing_the_report_loads_neither_torch_nor_matplotlib():
    """The terminal table answers at once."""
    code = "import sys, distalign.report; sys.exit(bool({'torch', 'matplotlib', 'jinja2'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("width", [60, 100, 300])
def test_rows_keep_their_names_at_any_width(width):
    """A table with many columns cuts numbers in a narrow terminal, never the names; a pipe is wide enough for all."""
    content = copy.deepcopy(COMPARISON)
    content["columns"] += [{"key": f"more_{i}", "label": f"one more {i}"} for i in range(10)]
    for row in content["methods"].values():
        row.update({f"more_{i}": estimate(1.234, 0.05) for i in range(10)})
    console = Console(width=width, file=io.StringIO())
    console.print(results_table(content))
    lines = console.file.getvalue().splitlines()
    for name in ("target", "reference", "PMLE", "DPO"):
        assert any(name in line for line in lines)
    assert width < 300 or not any("…" in line for line in lines)
