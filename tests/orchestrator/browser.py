"""A real headless Chromium, where one is installed; also `python -m tests.orchestrator.browser PAGE PICTURE.png`."""
from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")


def browser_path() -> str | None:
    return next((path for path in map(shutil.which, NAMES) if path), None)


@contextmanager
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser_path(), args=["--no-sandbox", "--disable-gpu"])
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
