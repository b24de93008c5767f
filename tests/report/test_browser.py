"""The page in a browser: its search, its themes, its widths; and that it asks for nothing."""

from __future__ import annotations

import copy
import json
import shutil
from itertools import pairwise

import pytest
from report_data import COMPARISON, difference, number, write_evaluation, write_training

from distalign.report import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DARK, LIGHT = "rgb(18, 20, 26)", "rgb(247, 246, 243)"


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium; without one, or without playwright, the tests are skipped."""
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser among {', '.join(BROWSERS)}")
    with driver.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=path)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The page of an evaluation, of a training run, of both with one more, and of a comparison on a known target."""
    root = tmp_path_factory.mktemp("runs")
    write_evaluation(root / "everything")
    known = root / "known"
    known.mkdir()
    content = copy.deepcopy(COMPARISON)
    for name, wins in (("target", 0.55), ("pmle", 0.5), ("dpo", 0.8)):
        content["methods"][name] |= {key: number(100 * wins, 2) for key in ("entropy", "length")}
        content["methods"][name]["win_rate"] = number(wins, 0.02)
    content["paired"]["dpo"]["forward_kl"] = difference(20.0, 15.0, 25.0)  # the marks of the others come close
    content["columns"].append({"key": "win_rate", "label": "win rate"})
    (known / "results.json").write_text(json.dumps(content), encoding="utf-8")
    runs = [root / "everything", write_training(root / "slow", 0.5), write_training(root / "fast", 2.0, extra=1)]
    return {
        "evaluation": write_report(runs[0], files=False),
        "training": write_report(runs[1], files=False),
        "set": write_report(runs, root / "set", files=False),
        "known target": write_report(known, files=False),
    }


@pytest.fixture
def view(browser, pages):
    """Opens a page by its kind; afterwards nothing may have been said on the console, thrown, or asked for."""
    messages, requests, opened = [], [], []

    def start(kind, **options):
        page = browser.new_page(**{"viewport": {"width": 1100, "height": 900}, **options})
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(pages[kind].as_uri())
        opened.append((page, pages[kind].as_uri()))
        return page

    yield start
    for page, _ in opened:
        page.close()
    assert messages == []
    assert [url for url in requests if not url.startswith("data:")] == [uri for _, uri in opened]


KINDS = pytest.mark.parametrize("kind", ["evaluation", "training", "set", "known target"])


@KINDS
def test_pages_open_in_both_themes(view, kind):
    """Figures and text in the theme's colours, and nothing is said or asked for."""
    page = view(kind)
    assert page.locator("figure > svg").count() == page.locator("figure").count() >= 3
    color = "([name, key]) => getComputedStyle(document.querySelector(name))[key]"
    for scheme, paper, ink in (("light", LIGHT, "rgb(27, 31, 39)"), ("dark", DARK, "rgb(232, 233, 237)")):
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate(color, ["body", "backgroundColor"]) == paper
        assert page.evaluate(color, ["h1", "color"]) == ink
        assert page.evaluate(color, ["figure svg text", "fill"]) not in (paper, ink, "none", "rgb(0, 0, 0)")


@KINDS
def test_the_page_never_scrolls_sideways(view, kind):
    """On a phone too; what is wider scrolls within its card."""
    page = view(kind, viewport={"width": 1400, "height": 800})
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    for width in (1400, 700, 390):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_bars_keep_to_their_cards(view):
    """Beside the picture and on a phone: no row is under another, no text outside of its card, no mark on a mark's."""
    page = view("known target", viewport={"width": 1180, "height": 900})
    boxes = "(all) => all.map((one) => one.getBoundingClientRect()).map((b) => [b.left, b.right, b.top, b.bottom])"
    for width, apart in ((1180, False), (390, True)):
        page.set_viewport_size({"width": width, "height": 900})
        bars, picture = (page.locator(f"header {name}").evaluate_all(boxes)[0] for name in (".forest", "figure"))
        assert (picture[2] >= bars[3]) is apart
        for card in page.locator(".forest").all():
            ((left, right, top, bottom),) = card.evaluate_all(boxes)
            rows = card.locator("> div").evaluate_all(boxes)
            assert all(above[3] <= below[2] + 1 for above, below in pairwise(rows))
            inside = card.locator("b, .text, .scale i").evaluate_all(boxes)
            assert all(left <= a and b <= right and top <= c and d <= bottom for a, b, c, d in inside)
            marks = card.locator(".scale i").evaluate_all(boxes)
            assert all(a[1] <= b[0] or b[1] <= a[0] or a[3] <= b[2] + 4 for a, b in pairwise(marks))


def test_the_main_table_fits_a_screen(view):
    """At 1,400 px nothing of it has to be scrolled to."""
    page = view("evaluation", viewport={"width": 1400, "height": 800})
    fits = "(table) => table.scrollWidth <= table.parentElement.clientWidth"
    assert page.locator("#estimates").evaluate(fits)


def test_samples_are_searched(view):
    """By words of prompts and responses; how many have them is said."""
    page = view("evaluation")
    samples = page.locator(".sample:visible")
    assert samples.count() == 3
    page.fill("#search", "ZEBRA")
    assert samples.count() == 1
    assert page.locator("#count").inner_text() == "1 of 3"
    page.fill("#search", "")
    assert samples.count() == 3


@KINDS
def test_without_scripts_the_page_is_whole(view, kind):
    """All samples are shown, and no search that would do nothing."""
    page = view(kind, java_script_enabled=False)
    assert page.locator(".sample:visible").count() == page.locator(".sample").count()
    assert not page.locator(".searchbar").locator("visible=true").count()


def test_no_other_script_may_run(browser, pages):
    """The policy admits the page's own script by its digest; one that got in by another way does not run."""
    page = browser.new_page()
    page.goto(pages["training"].as_uri())
    with page.expect_console_message() as refused:
        page.evaluate("document.body.append(Object.assign(document.createElement('script'), {textContent: 'ran = 1'}))")
    assert "Content Security Policy" in refused.value.text
    assert page.evaluate("typeof ran") == "undefined"
    page.close()
