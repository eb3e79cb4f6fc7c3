"""The status page in Chromium: it fits, stays silent, follows the server, and runs nothing foreign.

Needs playwright and a Chromium (its own, or one on the PATH); skipped without them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from reflexarc.client import PolicyClient
from reflexarc.contract import Observation, ReflexarcError
from reflexarc.server import BackgroundServer, NullPolicy

playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.slow
MakeObservation = Callable[..., Observation]
HOSTILE = "<img src=x onerror=\"document.title='taken'\"> </script><script>alert(1)</script>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    with playwright.sync_playwright() as manager:
        if found is None and not Path(manager.chromium.executable_path).exists():
            pytest.skip("no Chromium: playwright install chromium")
        browser = manager.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def server() -> Iterator[BackgroundServer]:
    with BackgroundServer(NullPolicy) as server:
        yield server


def opened(
    browser: Any, server: BackgroundServer, width: int, scheme: str
) -> tuple[Any, list[str]]:
    context = browser.new_context(
        viewport={"width": width, "height": 844}, color_scheme=scheme, is_mobile=width < 500
    )
    tab, said = context.new_page(), []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda r: None if r.url.startswith(server.http_url) else said.append(r.url))
    tab.goto(server.http_url)
    return tab, said


def until(tab: Any, expression: str) -> None:
    """Wait until it is true; playwright's own way evaluates a string, which the page forbids."""
    for _ in range(200):
        if tab.evaluate(expression):
            return
        tab.wait_for_timeout(50)
    pytest.fail(f"never true: {expression}")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 768, 390])
def test_the_page_fits_and_is_silent(
    browser: Any,
    server: BackgroundServer,
    make_observation: MakeObservation,
    width: int,
    scheme: str,
) -> None:
    with PolicyClient(server.url) as client:
        for pixels in range(20):
            client.infer(make_observation(pixels, session_id=f"robot-{pixels % 3}"))
    tab, said = opened(browser, server, width, scheme)
    playwright.expect(tab.locator("img")).to_have_count(2)
    until(tab, "[...document.images].every(i => i.naturalWidth == 224)")
    tab.wait_for_selector("#latency svg .curve, #latency svg .dot", state="attached")
    assert tab.locator("#phase").inner_text() == "ready"
    playwright.expect(tab.locator("#sessions tr")).to_have_count(3)
    assert tab.locator(".action b").all_inner_texts() == [
        "delta_x", "delta_y", "delta_z", "delta_rx", "delta_ry", "delta_rz", "gripper",
    ]  # fmt: skip
    assert tab.locator(".action svg .curve").count() == 7
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    assert said == []


def test_the_page_follows_a_chosen_session(
    browser: Any, server: BackgroundServer, make_observation: MakeObservation
) -> None:
    tab, said = opened(browser, server, 1440, "dark")
    tab.wait_for_selector("#no-sessions")
    with PolicyClient(server.url) as client:
        client.infer(make_observation(0, session_id="one", step_index=5, instruction="first"))
        tab.wait_for_selector("#instruction:text('first')")
        client.infer(make_observation(1, session_id="two", step_index=7, instruction="second"))
        playwright.expect(tab.locator("#sessions tr")).to_have_count(2)
        assert tab.locator("#instruction").inner_text() == "first", "the choice stays"
        tab.locator("#sessions button[aria-pressed=false]").press("Enter")  # by keyboard
        tab.wait_for_selector("#instruction:text('second')")
        before = tab.locator("#images img").first.get_attribute("src")
        curve = tab.locator(".action .curve").first.get_attribute("d")
        client.infer(
            make_observation(2, session_id="two", step_index=15, instruction="third", seed=8)
        )
        tab.wait_for_selector("#instruction:text('third')")
        assert "step 15" in tab.locator("#session-step").inner_text()
        assert tab.locator("#images img").first.get_attribute("src") != before
        assert tab.locator(".action .curve").first.get_attribute("d") != curve
        assert tab.evaluate("document.activeElement.dataset.tag") is not None, "focus was lost"
    assert said == []


def test_what_clients_send_is_text(
    browser: Any, server: BackgroundServer, make_observation: MakeObservation
) -> None:
    with PolicyClient(server.url) as client:
        fields = {"session_id": HOSTILE[:100], "request_id": HOSTILE[:100]}
        client.infer(make_observation(instruction=HOSTILE, **fields))
        with pytest.raises(ReflexarcError):
            client.infer(
                Observation(
                    images={HOSTILE: [], **make_observation().images}, state=[0.0], **fields
                )  # type: ignore[arg-type, dict-item]
            )
    tab, said = opened(browser, server, 390, "light")
    tab.wait_for_selector("#instruction:not(:empty)")
    assert tab.locator("#instruction").inner_text() == HOSTILE
    tab.wait_for_selector("#session-error:not([hidden])")
    assert tab.locator("#session img").count() == 2
    assert tab.title() == "null - Reflexarc policy server"
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    assert said == []


def test_a_server_that_ends_is_noticed_and_one_that_comes_back_too(browser: Any) -> None:
    with BackgroundServer(NullPolicy) as first:
        tab, _ = opened(browser, first, 1440, "light")
        tab.wait_for_selector("#phase.ready")
    tab.wait_for_selector("#trouble:not([hidden])", timeout=15_000)
    assert tab.locator("#phase").inner_text() == "no answer"
    with BackgroundServer(NullPolicy, port=first.port):
        tab.wait_for_selector("#phase.ready", timeout=15_000)
        assert tab.locator("#trouble").is_hidden()
