"""What an evaluation adds to the page, several runs on one page, and the tables and figures as files."""

from __future__ import annotations

import csv
import html
import json
import re

import pytest
from matplotlib.image import imread
from report_data import EVIL, evaluation, metrics, write_evaluation, write_lines, write_training

from distalign.report import ReportError, results_markdown, write_report
from distalign.report.logs import _thinned
from distalign.report.results import Results
from distalign.report.sections import settings_table


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """The folder of an evaluation with all that there can be, and its page."""
    folder = write_evaluation(tmp_path_factory.mktemp("runs") / "everything")
    return folder, write_report(folder).read_text(encoding="utf-8")


def panels(page):
    """The figures that the page's script draws, as data, by title."""
    found = [json.loads(html.unescape(text)) for text in re.findall(r' data-panel="([^"]*)"', page)]
    return {panel["title"]: panel for panel in found}


def texts(page, pattern):
    """What a pattern finds, as plain text."""
    parts = re.findall(pattern, page, flags=re.S)
    return [" ".join(html.unescape(re.sub(r"<[^>]+>", " ", part)).split()) for part in parts]


def read_csv(path):
    """Rows of a CSV file as dictionaries."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_nothing_from_files_becomes_markup(everything):
    """Names, judges, notes, data of figures: the one script is the page's own, and its digest is in the policy."""
    page = everything[1]
    assert page.count("alert(") >= 12
    assert "<script>alert" not in page
    assert page.count("<script") == 1
    assert re.search(r"script-src 'sha256-[\w+/]+='", html.unescape(page))
    assert not re.search(r"https?:|url\(\s*['\"]?(?!#)|@import", page)


def test_every_policy_is_on_the_plane(everything):
    """At its KL and reward with one standard error; the reference at KL 0 though it has no column for it."""
    curves = {(c["label"], c["kind"]): c for c in panels(everything[1])["Reward against KL"]["curves"]}
    assert curves["reference", "points"]["x"] == [0.0]
    rkl = curves["RKL", "points"]
    assert (rkl["x"], rkl["y"]) == ([4.0], [1.0])
    assert [*rkl["x_low"], *rkl["x_high"], *rkl["low"], *rkl["high"]] == [3.9, 4.1, 0.9, 1.1]
    assert curves[EVIL, "points"]["color"] == "var(--c3)"


def test_predictions_are_on_the_plane(everything):
    """Those to be trusted as a curve a γ by increasing KL, the others hollow; best of n at its bound."""
    curves = {(c["label"], c["kind"]): c for c in panels(everything[1])["Reward against KL"]["curves"]}
    trusted = curves["γ = 0 (RLHF)", "bound"]
    assert trusted["x"] == [1.0, 2.0, 4.0]
    assert trusted["low"][0] == 0.9
    assert trusted["high"] == [None, None, None]
    assert trusted["notes"][2] == "β = 0.25, effective samples 100"
    assert curves["γ = 0.1", "hollow"]["x"] == [10.0]
    assert "too few to trust" in curves["γ = 0.1", "hollow"]["notes"][0]
    assert curves["best of n", "points"]["x"] == pytest.approx([0.193147, 0.636294])


def test_win_rates_ratings_and_stars_are_told(everything):
    """The matrix by row and column, ratings against the fixed reference, win rates at equal length, Holm's p."""
    page = everything[1]
    (table,) = re.findall(r'<table id="win-rates".*?</table>', page, flags=re.S)
    rows = [texts(row, r"<t[hd].*?</t[hd]>") for row in re.findall(r"<tr.*?</tr>", table, flags=re.S)]
    assert rows[0] == ["", "reference", "PMLE", "RKL", EVIL]
    assert rows[2] == ["PMLE", "0.60 ± 0.05 n = 40", "–", "0.40 ± 0.05 n = 40", "0.30 ± 0.05 n = 40"]
    (ratings,) = re.findall(r'id="ratings">.*?\n</div>', page, flags=re.S)
    assert texts(ratings, r'<span class="text">.*?</span>')[:2] == ["0", "+0.40 [+0.20, +0.60]"]
    (controlled,) = re.findall(r'id="length-controlled">.*?\n</div>', page, flags=re.S)
    assert texts(controlled, r'<span class="text">.*?</span>')[0] == "0.550 [0.520, 0.580]"
    assert '<sup title="p = 0.0012">**</sup>' in page
    assert texts(page, r"<td>(?:(?!</td>).)*p = 0.0012.*?</td>")[-1].endswith("better n = 40 · p = 0.0012")


def test_length_is_set_against_reward_on_common_axes(everything):
    """A figure a policy with the reference behind it; the correlation is the figure's sentence."""
    found = panels(everything[1])
    own, other = found["PMLE"], found["RKL"]
    assert [curve["label"] for curve in own["curves"]] == ["reference", "PMLE"]
    assert (own["x_limits"], own["y_limits"]) == (other["x_limits"], other["y_limits"])
    assert all(own["x_limits"][0] < x < own["x_limits"][1] for curve in own["curves"] for x in curve["x"])
    assert re.search(r"<h3>RKL</h3><p>correlation 0\.9\d \(n = 40\)", everything[1])


def test_health_and_all_logs_are_read_from_the_runs(everything):
    """A line a method from its sub-folder; every number that was logged can be chosen."""
    page = everything[1]
    entropy = panels(page)["Entropy"]
    assert [curve["label"] for curve in entropy["curves"]] == ["PMLE", "RKL"]
    assert entropy["curves"][1]["y"][-1] == pytest.approx(40 - 2 * 60 / 10)
    (data,) = re.findall(r' data-panels="([^"]*)"', page)
    names = [name for name, _ in json.loads(html.unescape(data))]
    assert names == sorted({key for row in metrics() for key in row} - {"step"})


def test_the_logs_of_every_seed_are_drawn(tmp_path):
    """Seeds in their order, one line each, the method named once in the static figure."""
    (tmp_path / "results.json").write_text(json.dumps(evaluation()), encoding="utf-8")
    for seed in (0, 2, 10):
        write_lines(tmp_path / f"seed-{seed}" / "pmle" / "metrics.jsonl", metrics(1.0 + seed, steps=5))
        write_lines(tmp_path / f"seed-{seed}" / "rkl" / "metrics.jsonl", metrics(1.0, steps=5))
    page = write_report(tmp_path, files=False).read_text(encoding="utf-8")
    ends = [c["y"][-1] for c in panels(page)["Entropy"]["curves"] if c["label"] == "PMLE"]
    assert ends == pytest.approx([40 - 0.5 * (1 + seed) for seed in (0, 2, 10)])
    (figure,) = re.findall(r"<h3>Entropy</h3>.*?</svg>", page, flags=re.S)
    assert figure.count(">PMLE<") == 1


def test_long_logs_keep_their_extremes():
    """Thinned to what a screen can show: order, first and last stretch, the spike and the dip stay."""
    points = [(float(i), float(i % 10)) for i in range(10_000)]
    points[4321], points[7777] = (4321.0, 99.0), (7777.0, -99.0)
    kept = _thinned(points)
    assert len(kept) <= 400
    assert {points[4321], points[7777]} <= set(kept)
    assert kept == sorted(kept)
    assert _thinned(points[:400]) == points[:400]


def test_settings_are_set_side_by_side():
    """By dotted path, in order; only what differs, and how many are the same; what one lacks is empty."""
    runs = {
        "a": {"seed": 0, "method": {"gamma": 0.1}, "lora": None},
        "b": {"seed": 0, "method": {"gamma": 0.2, "k": [1]}},
    }
    found = settings_table(runs, only_different=True)
    assert found == {
        "columns": ["A", "B"],
        "rows": [("method.gamma", ["0.1", "0.2"]), ("lora", ["none", ""]), ("method.k", ["", "[1]"])],
        "same": 1,
    }
    assert settings_table({"a": runs["a"], "c": runs["a"]}, only_different=True) is None


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """An evaluation and two training runs of the same folder name, on one page."""
    root = tmp_path_factory.mktemp("set")
    runs = [
        write_evaluation(root / "everything"),
        write_training(root / "one" / "train", 0.5),
        write_training(root / "two" / "train", 2.0, extra=7),
    ]
    return root, write_report(runs, root / "out").read_text(encoding="utf-8")


def test_several_runs_make_one_page(together):
    """All policies and runs in one table under names that tell them apart; a last value stands without an error."""
    root, page = together
    assert (root / "out" / "report.html").is_file()
    assert not (root / "everything" / "report.html").exists()
    (table,) = re.findall(r'<table id="estimates".*?</table>', page, flags=re.S)
    names = texts(table, r'<th scope="row">.*?</th>')
    assert [name.split(": ")[-1] for name in names] == ["reference", "PMLE", "RKL", EVIL, "one/train", "two/train"]
    rows = [texts(row, r"<td.*?</td>") for row in re.findall(r"<tr.*?</tr>", table, flags=re.S)]
    assert rows[-1][2:4] == ["60", "0.135"]
    assert "<b>" not in table


def test_several_runs_are_compared_in_curves_settings_and_samples(together):
    """A line a run, what their recipes differ in, the answers to one prompt side by side."""
    _, page = together
    labels = [curve["label"] for curve in panels(page)["Entropy"]["curves"]]
    assert labels[-2:] == ["one/train", "two/train"]
    (table,) = re.findall(r'<table id="settings-table".*?</table>', page, flags=re.S)
    assert ["extra", "–", "–", "7"] in [
        texts(row, r"<t[hd].*?</t[hd]>") for row in re.findall(r"<tr.*?</tr>", table, flags=re.S)
    ]


@pytest.mark.parametrize(
    ("given", "out", "message"),
    [
        ([], "out", "no run folder was given"),
        (["a", "b"], None, "say which folder it is to be written into"),
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


def test_a_broken_recipe_is_told(tmp_path):
    """Where, and what to do."""
    write_training(tmp_path)
    (tmp_path / "recipe.yaml").write_text("a: [", encoding="utf-8")
    with pytest.raises(ReportError, match=r"recipe.yaml: not YAML .*line 1.*; restore the file"):
        write_report(tmp_path)


def test_tables_are_written_as_csv(everything):
    """Every number of results.json as it is there, a line each; text that has commas and quotes comes back."""
    folder = everything[0]
    results = Results.parse(evaluation())
    rows = read_csv(folder / "tables" / "estimates.csv")
    assert len(rows) == sum(len(row) for row in results.methods.values())
    for row in rows:
        measure = results.methods[row["policy"]][row["metric"]]
        assert (float(row["mean"]), float(row["se"]), int(row["n"])) == (measure.mean, measure.se, measure.n)
    assert [row["p_holm"] for row in rows if row["p_holm"]] == ["0.0012"]
    wins = {
        (row["policy"], row["against"]): float(row["mean"]) for row in read_csv(folder / "tables" / "win_rates.csv")
    }
    assert wins["rkl", "pmle"] == pytest.approx(0.6)
    assert len(wins) == 12
    assert {row["policy"] for row in read_csv(folder / "tables" / "ratings.csv")} == {"reference", "pmle", "rkl", EVIL}
    assert (
        len(read_csv(folder / "tables" / "differences.csv"))
        == len(read_csv(folder / "tables" / "length_controlled.csv"))
        == 3
    )


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(1)", "\t=1", " =1", "＝1", "-2;=1"])
def test_no_name_is_a_formula(tmp_path, name):
    """Names behind an apostrophe and quoted, wherever they stand; numbers stay numbers, negative ones too."""
    content = json.loads(json.dumps(evaluation()).replace('"pmle"', json.dumps(name)))
    content["paired"][name]["reward"] = {"mean": -0.5, "low": -0.7, "high": -0.3}
    content["columns"][0].update(key=name, unit=name)
    for part in ("methods", "paired"):
        for row in content[part].values():
            row[name] = row.pop("reward")
    (tmp_path / "results.json").write_text(json.dumps(content), encoding="utf-8")
    write_report(tmp_path)
    found = read_csv(tmp_path / "tables" / "differences.csv")[0]
    assert [found[key] for key in ("policy", "metric", "unit")] == [f"'{name}"] * 3
    assert [found[key] for key in ("mean", "low", "high", "n")] == ["-0.5", "-0.7", "-0.3", ""]
    tables = list((tmp_path / "tables").iterdir())
    assert len(tables) == 5
    for table in tables:
        names = table.read_text(encoding="utf-8")
        assert names.count(name) == names.count(f'"\'{name}"') > 0


def test_no_metrics_name_is_a_formula(tmp_path):
    """What a training run logged under such a name."""
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "=1+1": -2.5}])
    write_report(tmp_path)
    assert read_csv(tmp_path / "tables" / "last.csv") == [{"metric": "'=1+1", "value": "-2.5", "step": "1.0"}]


ILLEGAL = "\0\x1b\x7f\x85\ud800\ufdd0\uffff\U0010fffe"


def test_what_html_does_not_admit_is_replaced(tmp_path):
    """NUL, other controls, half surrogates, noncharacters: U+FFFD on the page, in its data and in every other file."""
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
        data = [json.loads(html.unescape(part)) for part in re.findall(r' data-panels?="([^"]*)"', shown)]
        shown += "".join(path.read_text(encoding="utf-8") for path in page.parent.glob("tables/*.csv"))
        assert not re.search(r"[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\ud800\ufdd0\uffff\U0010fffe]", shown)
        assert not re.search(r"\\[xuU]", repr(data))
        assert "\ufffd" in repr(data)
    page, clean = pages[0].read_text(encoding="utf-8"), "\ufffd" * len(ILLEGAL)
    for part in (f"one{clean}\ttwo\nthree", f"a{clean}b", f"k{clean}: {clean}", ">p\ufffd<"):
        assert part in page
    assert "| p\ufffd |" in results_markdown(json.loads(text))
    assert {row["policy"] for row in read_csv(folder / "tables" / "ratings.csv")} > {"p\ufffd"}


def test_a_training_runs_last_values_are_written_as_csv(tmp_path):
    """Numbers as they were logged."""
    write_report(write_training(tmp_path, 2.0))
    rows = {row["metric"]: row for row in read_csv(tmp_path / "tables" / "last.csv")}
    assert float(rows["objective/entropy"]["value"]) == 28.0
    assert float(rows["eval_loss"]["step"]) == 60
    assert [path.name for path in (tmp_path / "tables").iterdir()] == ["last.csv"]


def test_figures_are_written_as_png(everything):
    """One each under the page's names, on white, with something drawn on it; names cannot leave the folder."""
    files = sorted((everything[0] / "figures").iterdir())
    assert "reward-against-kl.png" in [file.name for file in files]
    assert all(re.fullmatch(r"[\w-]+\.png", file.name) for file in files)
    assert len(files) == everything[1].count("<figure")
    for file in files:
        image = imread(file)[..., :3].min(-1)
        assert image[0, -1] == 1
        assert (image < 0.9).mean() > 0.003


def test_no_files_on_demand(tmp_path):
    """The page alone."""
    write_report(write_training(tmp_path), files=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "recipe.yaml", "report.html"]


def test_markdown_of_an_evaluation():
    """Stars that stay stars, the matrix, ratings and win rates at equal length."""
    text = results_markdown(evaluation())
    assert r"| PMLE | 0.50 ± 0.10\*\* | 2.00 ± 0.10 |" in text
    assert "| PMLE | 0.60 ± 0.05 | – | 0.40 ± 0.05 | 0.30 ± 0.05 |" in text
    assert "| RKL | +0.80 [+0.60, +1.00] | 0.600 [0.570, 0.630] |" in text
    assert "| reference | 0 | – |" in text
    assert "Stars: one, two, three where p is below" in text
