"""The page in a browser: its switches, its zoom, its search, its themes, its widths; and that it asks for nothing."""

from __future__ import annotations

import re
import shutil

import pytest
from report_data import EVIL, write_evaluation, write_training

from distalign.report import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DARK, LIGHT = "rgb(18, 20, 26)", "rgb(247, 246, 243)"


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium; without one, or without playwright, the tests are skipped."""
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser among {', '.join(BROWSERS)}")
    with driver.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=path)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The page of an evaluation, of a training run, and of both with one more."""
    root = tmp_path_factory.mktemp("runs")
    write_evaluation(root / "everything")
    runs = [root / "everything", write_training(root / "slow", 0.5), write_training(root / "fast", 2.0, extra=1)]
    return {
        "evaluation": write_report(runs[0], files=False),
        "training": write_report(runs[1], files=False),
        "set": write_report(runs, root / "set", files=False),
    }


@pytest.fixture
def view(browser, pages, request):
    """Opens a page by its kind; afterwards nothing may have been said on the console, thrown, or asked for."""
    said, asked, opened = [], [], []

    def start(kind, **options):
        page = browser.new_page(**{"viewport": {"width": 1100, "height": 900}, **options})
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda made: asked.append(made.url))
        page.goto(pages[kind].as_uri())
        opened.append((page, pages[kind].as_uri()))
        return page

    yield start
    for page, _ in opened:
        page.close()
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [uri for _, uri in opened]


def drag(page, chart, start, end):
    """Draw a rectangle on a chart, from and to a share of its width and height."""
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in (start, end)]
    page.mouse.move(*places[0])
    page.mouse.down()
    page.mouse.move(*places[1], steps=3)
    page.mouse.up()


def numbers(chart):
    """The texts of a chart that are numbers."""
    return [text for text in chart.locator("text").all_text_contents() if re.fullmatch(r"[−\d.,]+", text)]


@pytest.mark.parametrize("kind", ["evaluation", "training", "set"])
def test_pages_open_in_both_themes(view, kind):
    """Every figure with numbers is drawn by the script, in the theme's colours, and nothing is said or asked for."""
    page = view(kind)
    figures = page.locator("figure[data-panel]")
    assert figures.count() >= 4
    assert figures.locator("svg.chart").count() == figures.count()
    assert figures.locator("> svg:not(.chart)").count() == 0
    color = "([name, key]) => getComputedStyle(document.querySelector(name))[key]"
    for scheme, paper, ink in (("light", LIGHT, "rgb(27, 31, 39)"), ("dark", DARK, "rgb(232, 233, 237)")):
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate(color, ["body", "backgroundColor"]) == paper
        assert page.evaluate(color, ["h1", "color"]) == ink
        assert page.evaluate(color, [".chart .grid", "stroke"]) not in (paper, ink, "none")


@pytest.mark.parametrize("kind", ["evaluation", "training", "set"])
def test_the_page_never_scrolls_sideways(view, kind):
    """On a phone too; what is wider scrolls within its card, and charts follow the width."""
    page = view(kind, viewport={"width": 1400, "height": 800})
    for width in (1400, 700, 380):
        page.set_viewport_size({"width": width, "height": 800})
        page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        ends = page.evaluate("[...document.querySelectorAll('svg.chart')].map((s) => s.getBoundingClientRect().right)")
        assert max(ends) <= width


def test_every_logged_number_can_be_chosen(view):
    """The switch changes the chart's numbers; chips take a policy out of every chart of its section and back."""
    page = view("evaluation")
    chart = page.locator(".explorer svg.chart")
    options = page.locator(".explorer option").all_inner_texts()
    assert {"loss", "grad norm", "entropy", "kl"} <= set(options)
    before = numbers(chart)
    page.locator(".explorer select").select_option(label="entropy")
    assert numbers(chart) != before
    lines = page.locator(".explorer polyline, #health polyline")
    drawn = lines.count()
    chip = page.locator(".explorer .chip", has_text="RKL")
    chip.focus()
    page.keyboard.press("Enter")
    assert chip.get_attribute("aria-pressed") == "false"
    assert lines.count() == drawn / 2
    assert "RKL" not in chart.text_content()
    chip.click()
    assert lines.count() == drawn


def test_dragging_zooms_and_a_double_click_resets(view):
    """A flat drag takes steps and lets the height follow; a rectangle takes both; the button and the keys work."""
    page = view("training")
    chart = page.locator(".explorer svg.chart")
    whole = numbers(chart)
    drag(page, chart, (0.3, 0.5), (0.5, 0.5))
    narrow = numbers(chart)
    assert narrow != whole
    reset = page.locator(".explorer .quiet")
    assert reset.is_visible()
    page.mouse.dblclick(*[chart.bounding_box()[side] + 150 for side in ("x", "y")])
    assert numbers(chart) == whole
    assert not reset.is_visible()
    drag(page, chart, (0.3, 0.3), (0.6, 0.6))
    assert numbers(chart) not in (whole, narrow)
    reset.click()
    assert numbers(chart) == whole
    chart.focus()
    page.keyboard.press("+")
    assert numbers(chart) != whole
    page.keyboard.press("0")
    assert numbers(chart) == whole


def test_a_click_does_not_zoom(view):
    """Only a drag does."""
    page = view("training")
    chart = page.locator(".explorer svg.chart")
    whole = numbers(chart)
    chart.click(position={"x": 200, "y": 100})
    assert numbers(chart) == whole
    assert not page.locator(".explorer .quiet").is_visible()


def test_the_nearest_point_is_read_out(view):
    """Policy, KL and reward with their errors under the pointer."""
    page = view("evaluation")
    plane = page.locator("#plane figure")
    dot = plane.locator("svg svg circle").last
    plane.scroll_into_view_if_needed()
    box = dot.bounding_box()
    page.mouse.move(box["x"] + 6, box["y"] + 5)
    said = plane.locator(".reading").inner_text()
    assert said == f"{EVIL} · KL(π‖π₀) 6 [5.9, 6.1] · reward 1.5 [1.4, 1.6]"
    page.mouse.move(2, 2)
    assert plane.locator(".reading").inner_text() == ""


def test_samples_are_searched_and_policies_picked(view):
    """By the keyboard alone: slash, words, escape; a hidden policy's words are not found."""
    page = view("evaluation")
    cards = page.locator(".sample:visible")
    assert cards.count() == 3
    page.keyboard.press("/")
    page.keyboard.type("ZEBRA")
    assert cards.count() == 1
    assert page.locator("#found").inner_text() == "1 of 3"
    assert page.evaluate("CSS.highlights.get('found').size") == 1
    page.keyboard.press("Escape")
    assert cards.count() == 3
    chip = page.locator("#browser .chip", has_text="RKL")
    chip.click()
    assert page.locator(".answer:visible", has_text="RKL").count() == 0
    page.fill("#search", "zebra")
    assert cards.count() == 0
    chip.click()
    assert cards.count() == 1


def test_the_contents_lead_to_their_sections(view):
    """Every entry has its section, in the order of the page."""
    page = view("evaluation")
    targets = [link.get_attribute("href") for link in page.locator("nav.contents a").all()]
    assert targets[:4] == ["#results", "#changes", "#plane", "#judged"]
    places = [page.locator(target).bounding_box()["y"] for target in targets]
    assert places == sorted(places)


@pytest.mark.parametrize("kind", ["evaluation", "training", "set"])
def test_without_scripts_the_page_is_whole(view, kind):
    """Figures stand as they were drawn, all samples are shown, and no switch that would do nothing."""
    page = view(kind, java_script_enabled=False)
    assert page.locator("figure > svg").count() == page.locator("figure").count()
    assert page.locator(".explorer, #browser").locator("visible=true").count() == 0
    assert page.locator(".sample:visible").count() == page.locator(".sample").count()


def test_no_other_script_may_run(browser, pages):
    """The policy admits the page's own script by its digest; one that got in by another way does not run."""
    page = browser.new_page()
    page.goto(pages["training"].as_uri())
    with page.expect_console_message() as refused:
        page.evaluate("document.body.append(Object.assign(document.createElement('script'), {textContent: 'ran = 1'}))")
    assert "Content Security Policy" in refused.value.text
    assert page.evaluate("typeof ran") == "undefined"
    page.close()
