"""The pages: what stands on them, that nothing becomes markup, and what a broken folder is told."""

from __future__ import annotations

import copy
import html
import json
import math
import re
import subprocess
import sys

import pytest
from matplotlib.image import imread
from report_data import (
    COMPARISON,
    EVIL,
    curve,
    evaluation,
    measured,
    number,
    panel,
    write_evaluation,
    write_lab,
    write_lines,
    write_training,
)

from distalign.report import ReportError, results_markdown, write_report
from distalign.report.results import read_samples


def comparison(folder, change=None, samples=()):
    """Write a comparison into the folder, changed by a function, and return its page."""
    results = copy.deepcopy(COMPARISON)
    if change:
        change(results)
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    if samples:
        write_lines(folder / "samples.jsonl", samples)
    return write_report(folder, files=False).read_text(encoding="utf-8")


def lab_page(folder, *experiments):
    """Write experiments into sub-folders and return their page."""
    return write_report(write_lab(folder, *experiments)).read_text(encoding="utf-8")


def words(text):
    """The text of a part of a page."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())


def texts(page, pattern):
    """The parts of a page that a pattern matches, as plain text."""
    return [words(part) for part in re.findall(pattern, page, flags=re.S)]


def table_cells(page, name):
    """Rows of a table on the page, as lists of texts."""
    (table,) = re.findall(rf'<table id="{name}".*?</table>', page, flags=re.S)
    return [texts(row, r"<t[hd].*?</t[hd]>") for row in re.findall(r"<tr.*?</tr>", table, flags=re.S)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """An evaluation with all that there can be, and two training runs of the same folder name."""
    root = tmp_path_factory.mktemp("runs")
    return [
        write_evaluation(root / "everything"),
        write_training(root / "one" / "train", 0.5),
        write_training(root / "two" / "train", 2.0, extra=7),
    ]


@pytest.fixture(scope="module")
def everything(runs):
    """The page of the evaluation."""
    return write_report(runs[0]).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def together(runs):
    """The one page of all three."""
    return write_report(runs, runs[0].parent / "out").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def pages(everything, together, tmp_path_factory):
    """A page of every kind, with evil texts wherever a file has texts."""

    def poison(results):
        results.update(name=EVIL, citation=EVIL, settings={EVIL: EVIL}, environment={EVIL: EVIL})
        results["pairs"], results["seconds"] = {EVIL: EVIL}, {EVIL: 1.0}
        results["columns"][0].update(label=EVIL, about=EVIL, unit=EVIL)
        for part in ("methods", "paired", "curves", "calibration"):
            results[part][EVIL] = results[part]["pmle"]

    root = tmp_path_factory.mktemp("pages")
    (root / "comparison").mkdir()
    sample = {"step": 3, "prompt": EVIL, "responses": {EVIL: EVIL, "pmle": "</p><img src=x>"}}
    training = write_training(root / "training", note=EVIL)
    write_lines(training / "samples.jsonl", [{**sample, "responses": ["one", EVIL]}])
    experiment = measured(
        EVIL,
        title=EVIL,
        about=EVIL,
        claims=[{"promised": EVIL, "found": EVIL, "holds": False}],
        panels=[panel(curve(EVIL), title=EVIL, about=EVIL, x=EVIL, y=EVIL)],
        tables=[{"title": EVIL, "about": EVIL, "columns": [EVIL, EVIL], "rows": [[EVIL, EVIL]]}],
    )
    return {
        "evaluation": everything,
        "set": together,
        "comparison": comparison(root / "comparison", poison, [sample]),
        "training": write_report(training, files=False).read_text(encoding="utf-8"),
        "lab": lab_page(root / "lab", experiment | {"settings": {EVIL: EVIL}}, measured()),
    }


KINDS = ("evaluation", "set", "comparison", "training", "lab")


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_from_files_becomes_markup(pages, kind):
    """Names, titles, labels, notes, settings, samples, cells: the one script is the search, and the policy names it."""
    page = pages[kind]
    assert page.count("alert(") >= {"training": 3}.get(kind, 12)
    assert "<script>alert" not in page
    assert "<img" not in page
    assert page.count("<script") == (kind != "lab")
    assert re.search(r"script-src 'none'" if kind == "lab" else r"script-src 'sha256-[\w+/]+='", html.unescape(page))


@pytest.mark.parametrize("kind", KINDS)
def test_page_asks_the_network_for_nothing(pages, kind):
    """No address outside the page, no link, no imported style; the policy forbids what would be missed here."""
    page = pages[kind]
    assert not re.search(r"https?:|url\(\s*['\"]?(?!#)|@import|<link(?! rel=\"icon\" href=\"data:,\")", page)
    assert all(target[0] in "#d" for target in re.findall(r"\b(?:src|href)=\"([^\"]+)", page))
    assert "default-src 'none'" in page


@pytest.mark.parametrize("kind", KINDS)
def test_figures_follow_the_pages_colours(pages, kind):
    """Every colour in a figure is a variable of the page; words in it stay words."""
    figures = re.findall(r"<svg.*?</svg>", pages[kind], flags=re.S)
    assert figures
    assert not re.search(r"(?:fill|stroke): #(?!none)|#0[1-5]0[0-9a-f]{3}\b", "".join(figures))
    assert all("<text" in figure for figure in figures)


def test_the_first_screen_says_what_was_trained_and_what_came_out(tmp_path):
    """What was trained, who moved nearer, the bars and the distance against steps, how sure; then the contents."""
    page = comparison(tmp_path)
    (header,) = re.findall(r"<header>.*?</header>", page, flags=re.S)
    finding = (
        "PMLE moves nearer to the target, by 45 % [34 %, 57 %] of the reference's distance; DPO shows no clear change."
    )
    assert texts(header, r"<h1.*?</h1>") == [finding]
    places = [header.index(part) for part in ("Trained by", "<h1", 'id="forest"', "<svg", "Bars: 95 %", "<nav")]
    assert places == sorted(places)
    assert re.findall("<h3>(.*?)</h3>", header) == [
        "Distance to the target (forward KL), nats",
        "Distance to the target",
    ]
    assert page.count("<h3>Distance to the target</h3>") == 1
    assert comparison(tmp_path) == page


def test_a_known_targets_own_win_rate_and_entropy_stand_beside_everyones(tmp_path):
    """What collapses with a way to the samples, what a win rate would have told, and the target's row in the tables."""

    def change(results):
        results["columns"].append({"key": "win_rate", "label": "win rate", "better": "higher"})
        for name, entropy, wins in (("target", 60.0, 0.55), ("pmle", 58.0, 0.5), ("dpo", 20.0, 0.8)):
            results["methods"][name] |= {"entropy": number(entropy, 1.0), "win_rate": number(wins, 0.02)}

    page = comparison(tmp_path, change, [{"prompt": "a", "responses": {"pmle": "b"}}])
    (header,) = re.findall(r"<header>.*?</header>", page, flags=re.S)
    assert words(header).index("Read what they answer .") < header.index("<nav")
    assert re.findall(r'<section id="([\w-]+)"', page)[:3] == ["collapse", "told", "results"]
    assert texts(page, r'<p class="finding">.*?</p>')[0].startswith("DPO has clearly less entropy than the target")
    assert texts(page, r'<p class="finding">.*?</p>')[1].endswith("By win rate one would choose DPO, by distance PMLE.")
    rows = {row[0]: row for row in table_cells(page, "estimates")}
    assert rows[""][2] == "win rate n = 40"  # no arrow
    assert (rows["target"][2], rows["DPO"][2]) == (
        "0.550 ± 0.020 [0.510, 0.590]",
        "0.800 ± 0.020 [0.760, 0.840]",
    )
    assert table_cells(page, "more")[1] == ["target", "60.0 ± 1.0"]
    assert "What collapses" not in comparison(tmp_path)


def test_table_numbers_equal_the_input(tmp_path):
    """Target and reference first; mean ± se with the difference and its verdict, a dash where there is no number."""
    page = comparison(tmp_path)
    assert table_cells(page, "estimates") == [
        ["", "KL(π*‖π) ↓ nats · n = 48", "accuracy ↑ n = 128"],
        ["target", "0 ± 0", "0.79 ± 0.04"],
        ["reference", "10.9 ± 0.9", "0.66 ± 0.04"],
        ["PMLE", "6.0 ± 0.5 −4.9 [−6.2, −3.7] better", "0.758 ± 0.012 +0.10 [+0.03, +0.17] better"],
        ["DPO", "10.4 ± 0.8 −0.5 [−1.6, +0.6]", "0.70 ± 0.04 +0.05 [−0.02, +0.12]"],
    ]
    assert table_cells(page, "more")[3] == ["PMLE", "40.0 ± 1.0"]
    assert len(re.findall("<svg", page)) == 3  # forward KL, held-out loss, one calibration plot


def test_the_main_table_has_the_distance_win_rate_reward_kl_and_length_first(tmp_path):
    """In this order, whatever that of the file; the others stand in a collapsed table below."""
    keys = ["entropy", "length", "kl_reference", "reward", "accuracy", "win_rate", "forward_kl"]

    def change(results):
        results["columns"] = [{"key": key, "label": key} for key in keys]
        results["methods"] = {"reference": {}, "pmle": {key: number(0.5) for key in keys}}

    page = comparison(tmp_path, change)
    heads = [cell.split()[0] for cell in table_cells(page, "estimates")[0][1:]]
    assert heads == ["forward_kl", "win_rate", "reward", "kl_reference", "length", "accuracy"]
    assert [cell.split()[0] for cell in table_cells(page, "more")[0][1:]] == ["entropy"]
    assert re.search(r'<details class="card"><summary>1 more metric: entropy</summary>.*?id="more"', page, flags=re.S)


def test_missing_parts_leave_their_sections_out(tmp_path):
    """A comparison on a user's own pairs: no target, no KL, no curves."""

    def strip(results):
        for part in ("curves", "kept_step", "calibration", "pairs", "settings", "environment", "seconds", "citation"):
            del results[part]
        del results["methods"]["target"]
        for row in (*results["methods"].values(), *results["paired"].values()):
            row.pop("forward_kl")

    page = comparison(tmp_path, strip)
    assert "PMLE</span> raises held-out accuracy from 0.66 to 0.758, by 0.10 [0.03, 0.17]." in page
    assert "KL(π*‖π)" not in page
    assert "<svg" not in page
    assert not {"Calibration", "Samples", "Settings and environment"} & set(re.findall(r"<h2>(.*?)</h2>", page))


def test_numbers_that_could_not_be_computed_do_not_break_the_page(tmp_path):
    """null, NaN and infinity arrive in results; without a finite difference there is no claim."""

    def break_numbers(results):
        results["methods"]["pmle"].update(forward_kl=number(math.inf, math.nan, 48), accuracy=None, entropy=3.5)
        results["paired"] = {"pmle": {"forward_kl": {"mean": math.inf, "low": None, "high": None}}}
        results["curves"]["pmle"][1]["forward_kl"] = {"mean": None, "se": None, "n": 0}

    page = comparison(tmp_path, break_numbers)
    assert "<h1>quickstart</h1>" in page
    assert ["PMLE", "∞ ∞ [?, ?]", "n/a"] in table_cells(page, "estimates")
    assert ["PMLE", "3.5 ± ?"] in table_cells(page, "more")


def test_win_rates_ratings_and_stars(everything):
    """The matrix by row and column, ratings against the fixed reference, win rates at equal length, Holm's p."""
    rows = table_cells(everything, "win-rates")
    assert rows[0] == ["", "reference", "PMLE", "RKL", EVIL]
    assert rows[2] == ["PMLE", "0.60 ± 0.05 n = 40", "–", "0.40 ± 0.05 n = 40", "0.30 ± 0.05 n = 40"]
    (ratings,) = re.findall(r'id="ratings">.*?\n</div>', everything, flags=re.S)
    assert texts(ratings, r'<span class="text">.*?</span>')[:2] == ["0", "+0.40 [+0.20, +0.60]"]
    (controlled,) = re.findall(r'id="length-controlled">.*?\n</div>', everything, flags=re.S)
    assert texts(controlled, r'<span class="text">.*?</span>')[0] == "0.550 [0.520, 0.580]"
    assert '<sup title="p = 0.0012">**</sup>' in everything


def test_the_contents_lead_to_their_sections(everything):
    """Every entry has its section, in the order of the page."""
    targets = re.findall(r'<a href="#([\w-]+)">', everything)
    assert targets[:3] == ["results", "plane", "judged"]
    assert targets == re.findall(r'<section id="([\w-]+)"', everything)


def test_training_run(tmp_path):
    """Curves of what was logged, the last value of everything with its step, settings and samples."""
    lines = [
        {"step": s, "loss": 1 / s, "logps/chosen": -s, "logps/rejected": -2 * s, "grad_norm": 1.0} for s in (1, 2, 3)
    ]
    lines += [{"step": 3, "eval_loss": 0.4321}, {"train_runtime": 12.0, "note": "text"}]
    write_lines(tmp_path / "metrics.jsonl", lines)
    (tmp_path / "recipe.yaml").write_text("method: pmle\n", encoding="utf-8")
    write_lines(tmp_path / "samples.jsonl", [{"step": 3, "prompt": "Hello", "responses": ["one", "two"]}])
    page = write_report(tmp_path).read_text(encoding="utf-8")
    titles = re.findall(r"<figcaption><h3>(.*?)</h3>", page)
    assert titles == ["Loss", "ln π of the responses", "Gradient norm"]
    assert ["eval_loss", "0.4321", "3"] in table_cells(page, "last")
    assert ["train_runtime", "12", "3"] in table_cells(page, "last")
    for part in (">held out<", ">optimizer step<", "method: pmle", "response 2", "step 3"):
        assert part in page


def test_several_runs_make_one_page(runs, together):
    """All policies and runs in one table under names that tell them apart; a last value stands without an error."""
    assert (runs[0].parent / "out" / "report.html").is_file()
    assert not (runs[1] / "report.html").exists()
    rows = table_cells(together, "estimates")[1:]
    names = [row[0].split(": ")[-1] for row in rows]
    assert names == ["reference", "PMLE", "RKL", EVIL, "one/train", "two/train"]
    assert table_cells(together, "more")[-1][1:3] == ["60", "0.135"]


def test_several_runs_are_compared_in_curves_and_samples(together):
    """One line per run, the recipe of each, the answers to one prompt below it."""
    (figure,) = re.findall(r"<h3>Entropy</h3>.*?</svg>", together, flags=re.S)
    assert {"one/train", "two/train"} <= set(texts(figure, r"<text.*?</text>"))
    assert {"one/train: Recipe as it was run", "two/train: Recipe as it was run"} <= set(
        texts(together, "<summary>.*?</summary>")
    )
    answers = [name.split("/")[-1] for name in texts(together, r'<div class="turn answer".*?</h3>')]
    assert answers[0].startswith("everything: reference")
    assert answers[1].startswith("everything: PMLE")


def test_samples_are_turns_sorted_from_gain_to_loss(tmp_path):
    """Collapsed; by verdict, with reward and verdict beside each response; messages are turns of their own."""
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    samples = [
        {
            "prompt": [{"role": "user", "content": f"number {i}"}] if i else chat,
            "responses": {"reference": "a", "pmle": "b"},
            "rewards": {"reference": 1.0, "pmle": 2.5},
            "verdicts": {"pmle": verdict},
        }
        for i, verdict in enumerate((0.25, 0.9, 0.5))
    ]
    page = comparison(tmp_path, samples=samples)
    shown = re.findall(r'<details class="card sample">.*?</details>', page, flags=re.S)
    assert [words(re.search("<summary>.*?</summary>", part, flags=re.S)[0]) for part in shown] == [
        "+0.4 number 1",
        "0 number 2",
        "−0.25 Hello",
    ]
    assert texts(shown[2], "<h3>.*?</h3>") == [
        "system",
        "user",
        "reference reward 1",
        "PMLE 25 % preferred to the reference's reward 2.5",
    ]


@pytest.mark.parametrize(
    ("prompt", "turns"),
    [
        ("plain", [("user", "plain")]),
        ("user\nHi\n\nAssistant:", [("user", "user\nHi\n\nAssistant:")]),
        ([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], [("system", "s"), ("user", "u")]),
        ([], [("user", "")]),
    ],
)
def test_messages_are_turns_and_a_text_is_the_user_s(tmp_path, prompt, turns):
    """Whatever words are in it."""
    write_lines(tmp_path / "samples.jsonl", [{"prompt": prompt, "response": "x"}])
    (sample,) = read_samples(tmp_path / "samples.jsonl")
    assert sample.prompt == turns


def test_many_samples_keep_both_ends(tmp_path):
    """The largest gains and the largest losses, and how many there are."""
    rows = [
        {"prompt": f"p{i}", "responses": {"reference": "a", "pmle": "b"}, "verdicts": {"pmle": i / 300}}
        for i in range(300)
    ]
    page = comparison(tmp_path, samples=rows)
    assert page.count('class="card sample"') == 200
    assert "300 prompts, of which 200 are shown" in page
    assert ">p299<" in page
    assert ">p0<" in page
    assert ">p150<" not in page


def test_figures_are_written_as_png(everything, runs):
    """One each under the page's names, on white, with something drawn on it; names cannot leave the folder."""
    files = sorted((runs[0] / "figures").iterdir())
    assert "reward-against-kl.png" in [file.name for file in files]
    assert all(re.fullmatch(r"[\w-]+\.png", file.name) for file in files)
    assert len(files) == everything.count("<figure")
    for file in files:
        image = imread(file)[..., :3].min(-1)
        assert image[0, -1] == 1
        assert (image < 0.9).mean() > 0.003


def test_no_files_on_demand(tmp_path):
    """The page alone."""
    write_report(write_training(tmp_path), files=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "recipe.yaml", "report.html"]


ILLEGAL = "\0\x1b\x7f\x85\ud800\ufdd0\uffff\U0010fffe"


def test_what_html_does_not_admit_is_replaced(tmp_path):
    """NUL, other controls, half surrogates, noncharacters: U+FFFD on the page and in every other file."""
    content = evaluation() | {"settings": {f"k{ILLEGAL}": ILLEGAL}, "citation": ILLEGAL}
    text = json.dumps(content).replace('"pmle"', r'"p\u0000"')
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "results.json").write_text(text, encoding="utf-8")
    sample = {"prompt": f"one{ILLEGAL}\ttwo\nthree", "responses": {"p\0": f"a{ILLEGAL}b"}}
    write_lines(folder / "samples.jsonl", [sample])
    run = write_training(tmp_path / "run\x01", note=ILLEGAL)
    write_lines(run / "metrics.jsonl", [{"step": step, "loss": step, f"l{ILLEGAL}": step} for step in (1, 2)])
    pages = [write_report(folder), write_report(run), write_report([folder, run], tmp_path / "out")]
    for page in pages:
        shown = page.read_text(encoding="utf-8")
        shown += "".join(path.read_text(encoding="utf-8") for path in page.parent.glob("tables/*.csv"))
        assert not re.search(r"[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\ud800\ufdd0\uffff\U0010fffe]", shown)
        assert "\ufffd" in shown
    page, clean = pages[0].read_text(encoding="utf-8"), "\ufffd" * len(ILLEGAL)
    for part in (f"one{clean}\ttwo\nthree", f"a{clean}b", f"k{clean}: {clean}", ">p\ufffd<"):
        assert part in page
    assert "| p\ufffd |" in results_markdown(json.loads(text))
    assert '"p\ufffd"' in (folder / "tables" / "ratings.csv").read_text(encoding="utf-8")


def test_claims_of_the_lab_have_words_and_marks(tmp_path):
    """Promised, found, and whether it holds; how many hold is the headline."""
    source = lab_page(tmp_path, measured())
    assert '<th scope="col" class="words">method</th><th scope="col">n</th>' in source
    page = words(source)
    for part in (
        "1 of 2 claims hold; 1 does not",
        "✓ holds falls like 1/n Found: slope −1.02",
        "✗ does not hold levels off Found: 35 % too low",
        "seed: 3",
        "12 s",
        "pmle 65,536 0.0123",
    ):
        assert part in page


def test_the_labs_figure_comes_before_its_claims(tmp_path):
    """One sees what happened, then what was claimed."""
    page = lab_page(tmp_path, measured())
    assert page.index("<figure") < page.index("card claims") < page.index("<table")


def test_one_experiment_or_all(tmp_path):
    """A folder with sub-folders makes one page of them all; a folder with lab.json makes the page of that one."""
    page = lab_page(tmp_path, measured("a", title="First"), measured("b", title="Second"))
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["First", "Second"]
    assert re.findall(r'<a href="#(\w+)">', page) == re.findall(r'<section id="(\w+)"', page) == ["a", "b"]
    path = write_report(tmp_path / "b")
    assert path == tmp_path / "b" / "report.html"
    text = path.read_text(encoding="utf-8")
    assert "<h1>Second</h1>" in text
    assert "First" not in text


def test_every_figure_of_the_lab_is_a_png_beside_its_numbers(tmp_path):
    """White, with something drawn on it, named after the title; a title that comes twice is numbered."""
    title = "RKL's entropy as β → 0"
    banded = curve(y=(3, 2, 1), low=[0.5, 0.0, 0.001], high=[3, 2.2, 1.1])
    page = lab_page(tmp_path, measured(panels=[panel(curve(), title=title), panel(banded, title=title)]))
    files = sorted((tmp_path / "figure1").glob("*.png"))
    assert [file.name for file in files] == ["rkls-entropy-as-beta-0-2.png", "rkls-entropy-as-beta-0.png"]
    first, second = (imread(file) for file in files)
    assert first[0, -1].tolist() == [1, 1, 1, 1]
    assert 0.005 < (first[..., :3].min(-1) < 0.9).mean() < 0.5
    assert first.shape != second.shape or bool((first != second).any())
    assert write_report(tmp_path).read_text(encoding="utf-8") == page


def test_a_limit_has_the_colour_of_its_line_and_is_dashed(tmp_path):
    """And both are named."""
    (figure,) = re.findall(r"<svg.*?</svg>", lab_page(tmp_path, measured()), flags=re.S)
    (dashed,) = [style for style in re.findall(r'style="([^"]*)"', figure) if "stroke-dasharray" in style]
    assert "var(--c1)" in dashed
    assert figure.count(">pmle limit<") == figure.count(">pmle<") == 1
    assert ">100<" in figure


def test_what_an_axis_cannot_hold_is_left_out_and_said(tmp_path):
    """Zero on a logarithmic axis, null, NaN, infinity: the others are drawn; without any there is no figure."""
    empty = panel(curve(y=(0.0, -1.0, None)), title="Empty")
    page = lab_page(tmp_path, measured(panels=[panel(curve(y=(0.0, None, math.inf)), curve("pd")), empty], tables=[]))
    assert page.count("Not drawn: 3 points (not finite, or not above zero on a logarithmic axis).") == 2
    assert ">pd<" in page
    assert ">pmle<" not in page
    assert page.count("No point can be drawn.") == page.count("<svg") == 1
    assert [file.name for file in (tmp_path / "figure1").glob("*.png")] == ["kl-against-n.png"]


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
        (
            {"metrics.jsonl": '{"step": 1}', "recipe.yaml": "a: ["},
            r"recipe.yaml: not YAML .*line 1.*; restore the file",
        ),
        ({"lab.json": '{\n "a": }'}, r"lab.json:2: not JSON .*; run the experiment again"),
        ({"lab.json": "[]"}, r"lab.json: the top level: .* found \[\]; run the experiment again"),
        ({"lab.json": {**measured(), "shown": {"about": ""}}}, r"lab.json: shown.title: Field required"),
        ({"lab.json": measured(panels=[panel(curve(y=["a"]))])}, r"shown.panels.0.curves.0.y.0: .*found \"a\""),
        ({"lab.json": measured(panels=[panel(curve(y=[1]))])}, r"curves.0: .*as many x as y.*'x': 3, 'y': 1"),
        ({"lab.json": measured(panels=[panel(curve(), x_limits=[1, math.nan])])}, r"x_limits.1: .*finite number"),
        ({"lab.json": measured(panels=[panel(curve(kind="bar"))])}, r"curves.0.kind: .*found \"bar\""),
    ],
)
def test_a_broken_folder_is_told_where_and_what_to_do(tmp_path, files, message):
    """Where, what was found, what to do; and nothing is written."""
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    with pytest.raises(ReportError, match=message):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("given", "out", "message"),
    [
        (["nothing"], "out", "no such folder"),
        ([], "out", "no run folder was given"),
        (["a", "b"], None, "say with --out which folder"),
        (["a", "a"], "out", "given twice; give every run folder once"),
        (["a", "empty"], "out", r"empty: no results.json and no metrics.jsonl \(found: nothing\)"),
    ],
)
def test_a_set_that_cannot_be_is_refused(tmp_path, given, out, message):
    """With what to do, and before anything is written."""
    write_training(tmp_path / "a"), write_training(tmp_path / "b")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReportError, match=message):
        write_report([tmp_path / name for name in given], out and tmp_path / out)
    assert not (tmp_path / "out").exists()


def test_importing_the_report_loads_neither_torch_nor_matplotlib():
    """The terminal table answers at once."""
    code = "import sys, distalign.report; sys.exit(bool({'torch', 'matplotlib', 'jinja2'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
