"""Photograph the top of a report: `python scripts/screenshot.py RUN OUT.png` (README's picture of the quickstart).

RUN is a run folder, whose report is drawn again first, or an HTML file. Needs Chromium, and the playwright package.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def main() -> None:
    """Read the command line and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("out", type=Path, metavar="OUT.png")
    parser.add_argument("--width", type=int, default=1180, help="of the window, in CSS pixels (default: %(default)s)")
    parser.add_argument("--until", default="results", help="id of the last section in it (default: %(default)s)")
    parser.add_argument("--whole", action="store_true", help="photograph the whole page")
    parser.add_argument("--dark", action="store_true", help="in the dark theme")
    arguments = parser.parse_args()
    browser = next((found for name in NAMES if (found := shutil.which(name))), None)
    if browser is None:
        sys.exit(f"no browser found, looked for {', '.join(NAMES)}; install Chromium")
    page = arguments.run
    if page.is_dir():
        from distalign.report import write_report

        page = write_report(page)
    section = None if arguments.whole else f"#{arguments.until}"
    photograph(page, arguments.out, browser, width=arguments.width, section=section, dark=arguments.dark)
    print(arguments.out)


def photograph(page: Path, out: Path, browser: str, *, width: int, section: str | None, dark: bool = False) -> None:
    """Save a page, at twice its size, from its top to the end of a section (an id that begins with #), or whole."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=browser)
        scheme = "dark" if dark else "light"
        view = opened.new_page(viewport={"width": width, "height": 900}, device_scale_factor=2, color_scheme=scheme)
        view.goto(page.resolve().as_uri())
        height = view.evaluate("document.documentElement.scrollHeight")
        if section is not None:
            place = view.locator(section).bounding_box()
            if place is None:
                sys.exit(f"{page}: no section {section}; choose one of the page's own")
            height = min(height, place["y"] + place["height"] + 32)
        clip = {"x": 0, "y": 0, "width": width, "height": height}
        view.screenshot(path=str(out), full_page=True, clip=clip)
        opened.close()


if __name__ == "__main__":
    main()
