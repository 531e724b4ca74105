"""A real headless Chromium, the system's or Playwright's.

    python -m tests.orchestrator.report.browser PAGE PICTURE.png
"""
from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")


class NoBrowser(Exception):  # noqa: N818 - a reason to skip
    """Neither is installed."""


@contextmanager
def browser() -> Iterator[Any]:
    """NoBrowser says what to install; a browser that is there and does not start is an error."""
    from playwright.sync_api import Error, sync_playwright

    own = next((path for path in map(shutil.which, NAMES) if path), None)
    with sync_playwright() as playwright:
        try:
            chromium = playwright.chromium.launch(executable_path=own, args=["--no-sandbox", "--disable-gpu"])
        except Error as error:
            if own is None and "Executable doesn't exist" in str(error):
                raise NoBrowser(f"none of {', '.join(NAMES)} is on the PATH and Playwright has no browser of its own; "
                                "install one, or: playwright install chromium") from error
            raise
        yield chromium
        chromium.close()


def picture(page: Path, png: Path, width: int = 1280, height: int = 900) -> None:
    """What a person sees first when opening the page."""
    with browser() as chromium:
        tab = chromium.new_page(viewport={"width": width, "height": height})
        tab.goto(page.resolve().as_uri())
        tab.wait_for_selector("#figure-front .plot-container")
        tab.wait_for_timeout(500)  # fonts and the first redraw
        tab.screenshot(path=str(png))


if __name__ == "__main__":
    picture(Path(sys.argv[1]), Path(sys.argv[2]))
