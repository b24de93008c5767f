"""The lab's page: what it says of claims, how its figures are drawn, and what a broken lab.json is told."""

from __future__ import annotations

import io
import json
import math
import re
from itertools import combinations

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from distalign.report import ReportError, write_report
from distalign.report.drawing import label_ends
from distalign.report.lab import write_lab_report
from distalign.report.numbers import format_number
from distalign.report.panels import log_ticks, looks
from distalign.report.shown import Curve, Panel

EVIL = "<script>alert('x')</script>"


def curve(label="pmle", y=(1.0, 0.1, 0.01), **changes):
    """A curve as lab.json has it."""
    return {"label": label, "x": [10.0, 100.0, 1000.0], "y": list(y), **changes}


def panel(*curves, **changes):
    """A figure as lab.json has it."""
    return {"title": "KL against n", "about": "Medians.", "x": "n", "y": "nats", "curves": list(curves), **changes}


def measured(name="figure1", **shown):
    """An experiment's lab.json; `shown` replaces parts of what it shows."""
    claims = [
        {"promised": "falls like 1/n", "found": "slope −1.02", "holds": True},
        {"promised": "levels off", "found": "35 % too low", "holds": False},
    ]
    table = {"title": "KL", "about": "In nats.", "columns": ["method", "n", "KL"], "rows": [["pmle", 65536, 0.012345]]}
    parts = {"title": "Who gets there", "about": "A toy.", "claims": claims, "tables": [table]}
    parts["panels"] = [panel(curve(), curve("pmle limit", (0.02, 0.02, 0.02), kind="bound"))]
    return {"experiment": name, "settings": {"seed": 3, "gamma": 0.5}, "shown": {**parts, **shown}, "seconds": 12.0}


def report(folder, *experiments):
    """Write experiments into sub-folders and return the text of their page."""
    for one in experiments:
        (folder / one["experiment"]).mkdir()
        (folder / one["experiment"] / "lab.json").write_text(json.dumps(one), encoding="utf-8")
    return write_report(folder).read_text(encoding="utf-8")


def overlaps(boxes):
    """Pairs of boxes that cover each other by more than a pixel."""
    return [(a, b) for a, b in combinations(boxes, 2) if a.y1 > b.y0 + 1 and b.y1 > a.y0 + 1]


def test_claims_are_told_in_words_and_marks(tmp_path):
    """Promised, found, and whether it holds; how many hold is the headline."""
    source = report(tmp_path, measured())
    assert '<th scope="col" class="words">method</th><th scope="col">n</th>' in source
    page = " ".join(re.sub(r"<[^>]+>", " ", source).split())
    assert "1 of 2 claims hold; 1 does not" in page
    assert "✓ holds falls like 1/n Found: slope −1.02" in page
    assert "✗ does not hold levels off Found: 35 % too low" in page
    assert "seed: 3" in page
    assert "12 s" in page
    assert "pmle 65,536 0.0123" in page


def test_one_experiment_or_all(tmp_path):
    """A folder with sub-folders makes one page of them all; a folder with lab.json makes the page of that one."""
    page = report(tmp_path, measured("a", title="First"), measured("b", title="Second"))
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["First", "Second"]
    assert re.findall(r'<a href="#(\w+)">', page) == re.findall(r'<section id="(\w+)"', page) == ["a", "b"]
    one = write_lab_report(tmp_path / "b")
    assert one == tmp_path / "b" / "report.html"
    text = one.read_text(encoding="utf-8")
    assert "<h1>Second</h1>" in text
    assert "First" not in text


def test_every_figure_is_a_png_beside_its_numbers(tmp_path):
    """White, with something drawn on it, named after the title; a title that comes twice is numbered."""
    title = "RKL's entropy as β → 0"
    report(tmp_path, measured(panels=[panel(curve(), title=title), panel(curve(y=(3, 2, 1)), title=title)]))
    files = sorted((tmp_path / "figure1").glob("*.png"))
    assert [file.name for file in files] == ["rkls-entropy-as-beta-0-2.png", "rkls-entropy-as-beta-0.png"]
    first, second = (imread(file) for file in files)
    assert first[0, -1].tolist() == [1, 1, 1, 1]
    assert 0.005 < (first[..., :3].min(-1) < 0.9).mean() < 0.5
    assert first.shape != second.shape or bool((first != second).any())


def test_everything_from_files_is_escaped(tmp_path):
    """No text of an experiment can become markup: titles, claims, labels, axes, cells, settings, its own name."""
    poisoned = measured(
        title=EVIL,
        about=EVIL,
        claims=[{"promised": EVIL, "found": EVIL, "holds": False}],
        panels=[panel(curve(EVIL), title=EVIL, about=EVIL, x=EVIL, y=EVIL)],
        tables=[{"title": EVIL, "about": EVIL, "columns": [EVIL, EVIL], "rows": [[EVIL, EVIL]]}],
    )
    (tmp_path / "x").mkdir()
    text = json.dumps({**poisoned, "experiment": EVIL, "settings": {EVIL: EVIL}})
    (tmp_path / "x" / "lab.json").write_text(text, encoding="utf-8")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert page.count("alert(") >= 14
    assert "<script" not in page


def test_page_asks_the_network_for_nothing(tmp_path):
    """No address outside the page, and the policy forbids what would be missed here."""
    page = report(tmp_path, measured("a"), measured("b"))
    assert not re.search(r"https?:|url\(\s*['\"]?(?!#)|@import|<link(?! rel=\"icon\" href=\"data:,\")", page)
    assert all(target[0] in "#d" for target in re.findall(r"\b(?:src|href)=\"([^\"]+)", page))
    assert "default-src 'none'" in page


def test_figures_follow_the_pages_colours(tmp_path):
    """Every colour is a variable of the page; a limit has the colour of its line and is dashed."""
    (figure,) = re.findall(r"<svg.*?</svg>", report(tmp_path, measured()), flags=re.S)
    assert not re.search(r"(?:fill|stroke): #(?!none)|#0[1-5]0[0-9a-f]{3}\b", figure)
    dashed = [style for style in re.findall(r'style="([^"]*)"', figure) if "stroke-dasharray" in style]
    assert len(dashed) == 1
    assert "var(--c1)" in dashed[0]
    assert figure.count(">pmle limit<") == 1
    assert ">100<" in figure


def test_looks_tell_curves_apart():
    """One look a curve, also beyond eight; a bound shares its own line's, the longest that its label begins with."""

    def panels(*labels, kind="line"):
        curves = [Curve(label=label, x=[1], y=[1], kind=kind) for label in labels]
        return [Panel(title="", about="", x="", y="", curves=curves)]

    (many,) = looks(panels(*map(str, range(20))))
    assert len(set(many.values())) == 20
    lines, bounds = panels("rkl", "rkl tuned"), panels("rkl tuned limit", "rkl limit", "reference", kind="bound")
    found = looks(lines + bounds)
    assert found[0] == found[1]
    assert found[0]["rkl tuned limit"] == found[0]["rkl tuned"] != found[0]["rkl limit"] == found[0]["rkl"]
    assert found[0]["reference"].color == "var(--muted)"
    apart = looks(panels(*map(str, range(8))) + panels("other"))
    assert apart[1]["other"].color == "var(--c1)"


@pytest.mark.parametrize("scale", ["linear", "log"])
@pytest.mark.parametrize("values", [(1.0, 1.0, 1.0), (1e-9, 1e-8, 1.0, 0.99, 0.98), (5.0, 1e-3, 1e-3), (2.0, 1.0, 0.1)])
def test_labels_at_line_ends_do_not_overlap(scale, values):
    """On linear and logarithmic axes, in the order of the values, labels of two lines included."""
    figure = Figure(figsize=(5.6, 3.7), layout="constrained")
    axes = figure.subplots()
    axes.set_yscale(scale)
    axes.set_ylim(min(values) / 2, 2 * max(values))
    label_ends(
        axes, [(value, f"a label\n{i}" if i == 1 else f"{i}", "black") for i, value in enumerate(values)], thin=""
    )
    figure.savefig(io.BytesIO())
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == len(values)
    assert not overlaps(boxes)
    heights = [box.y0 + box.y1 for box in boxes]
    assert heights == sorted(heights)
    frame = axes.get_window_extent()
    assert all(frame.y0 - 25 < (box.y0 + box.y1) / 2 < frame.y1 + 25 for box in boxes)


def test_a_label_stands_at_the_height_of_its_value_on_a_log_axis():
    """In the middle of the logarithms, not of the values."""
    figure = Figure()
    axes = figure.subplots()
    axes.set(yscale="log", ylim=(0.01, 100))
    label_ends(axes, [(1.0, "one", "black")], thin="")
    assert axes.texts[0].get_position()[1] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.5, 2000.0, [1, 10, 100, 1000]),
        (0.5, 50.0, [1, 3, 10, 30]),
        (1.04, 1.26, [1.05, 1.1, 1.15, 1.2, 1.25]),
        (1e-30, 1e5, [1e-30, 1e-24, 1e-18, 1e-12, 1e-6, 1]),
    ],
)
def test_log_axes_have_few_round_ticks(low, high, ticks):
    """Powers of ten where there are enough of them, something finer where there are not."""
    assert log_ticks(low, high) == pytest.approx(ticks)


def test_what_an_axis_cannot_hold_is_left_out_and_said(tmp_path):
    """Zero on a logarithmic axis, null, NaN, infinity: the others are drawn, the number of those left out is told."""
    page = report(tmp_path, measured(panels=[panel(curve(y=(0.0, None, math.inf)), curve("pd"))], tables=[]))
    assert "Not drawn: 3 points (not finite, or not above zero on a logarithmic axis)." in page
    assert ">pd<" in page
    assert ">pmle<" not in page


def test_a_figure_without_points_is_said_to_be_empty(tmp_path):
    """No empty axes, no file."""
    page = report(tmp_path, measured(panels=[panel(curve(y=(0.0, -1.0, None)))]))
    assert "No point can be drawn." in page
    assert "<svg" not in page
    assert not list((tmp_path / "figure1").glob("*.png"))


def test_the_same_folder_gives_the_same_page(tmp_path):
    """A report can be compared with the one before."""
    page = report(tmp_path, measured(panels=[panel(curve(low=[0.5, 0.0, 0.001], high=[2, 0.2, 0.1]))]))
    assert write_report(tmp_path).read_text(encoding="utf-8") == page


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
    ("content", "message"),
    [
        ('{\n "a": }', r"x/lab.json:2: not JSON .*; run the experiment again"),
        ("[]", r"x/lab.json: the top level: .* found \[\]; run the experiment again"),
        (json.dumps({**measured(), "shown": {"about": ""}}), r"x/lab.json: shown.title: Field required"),
        (
            json.dumps(measured(panels=[panel(curve(y=["a"]))])),
            r"x/lab.json: shown.panels.0.curves.0.y.0: .*found \"a\"",
        ),
        (json.dumps(measured(panels=[panel(curve(y=[1]))])), r"curves.0: .*as many x as y.*'x': 3, 'y': 1"),
        (json.dumps(measured(panels=[panel(curve(kind="bar"))])), r"curves.0.kind: .*found \"bar\""),
        (
            json.dumps(measured(tables=[{"title": "", "about": "", "columns": ["a"], "rows": [[1, 2]]}])),
            r"tables.0: .*row 0 has 2 values for 1 columns",
        ),
    ],
)
def test_a_broken_file_is_told_where_and_what_to_do(tmp_path, content, message):
    """The path, the value, what was found, what to do; and nothing is written."""
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "lab.json").write_text(content, encoding="utf-8")
    with pytest.raises(ReportError, match=message):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_folder_without_experiments(tmp_path):
    """Asked for the lab's page, it says which file it looked for."""
    with pytest.raises(ReportError, match=r"no lab\.json here or in a sub-folder; give the folder"):
        write_lab_report(tmp_path)
