"""The pages in Chromium: no sideways scrolling, nothing on the console, links and videos work.

Needs playwright and a Chromium (its own, or one on the PATH); skipped without them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reflexarc.eval.compare import compare
from reflexarc.eval.report_html.compare_page import write_comparison
from reflexarc.eval.report_html.run_page import write_report

from .results_folders import every_arm

playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.slow
WIDTHS = (1440, 390)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    with playwright.sync_playwright() as manager:
        if found is None and not Path(manager.chromium.executable_path).exists():
            pytest.skip("no Chromium: playwright install chromium")
        browser = manager.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = every_arm(tmp_path_factory.mktemp("results"))
    written = write_comparison(compare(folder, folder), tmp_path_factory.mktemp("compare"))
    return {"report": write_report(folder), "compare": written[-1]}


def opened(browser: Any, page: Path, width: int, scheme: str) -> tuple[Any, list[str]]:
    context = browser.new_context(
        viewport={"width": width, "height": 844}, color_scheme=scheme, is_mobile=width < 500
    )
    tab, said = context.new_page(), []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda r: said.append(r.url) if r.url.startswith("http") else None)
    tab.goto(page.as_uri())
    return tab, said


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["report", "compare"])
def test_a_page_fits_and_is_silent(
    browser: Any, pages: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    tab, said = opened(browser, pages[name], width, scheme)
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    broken = "[...document.images].filter(i => !i.complete || i.naturalWidth === 0).length"
    assert tab.evaluate(broken) == 0
    assert said == []


def test_a_mark_leads_to_its_film_and_the_film_plays(browser: Any, pages: dict[str, Path]) -> None:
    tab, said = opened(browser, pages["report"], 390, "dark")
    tab.click("a.mark[href='#task0-state40-blank']")  # inside a closed group
    article = tab.locator("article:target")
    article.wait_for(state="visible")
    article.locator("summary").press("Enter")  # by keyboard
    video = article.locator("video")
    video.evaluate("video => video.play()")
    tab.wait_for_function("document.querySelector('article:target video').currentTime > 0")
    assert video.evaluate("video => video.videoWidth") == 128
    assert said == []
