"""The status page's answers over HTTP: what they show, to whom, and how much they keep."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from PIL import Image

from reflexarc.client import PolicyClient
from reflexarc.contract import ActionChunk, Observation, ReflexarcError
from reflexarc.contract.errors import CodecError, ConfigError
from reflexarc.server import BackgroundServer, NullPolicy
from reflexarc.server.exchange import Exchange
from reflexarc.server.page.access import PageAccess
from reflexarc.server.page.last_seen import LastSeen
from reflexarc.server.page.timeline import KEPT_SECONDS, Timeline

MakeObservation = Callable[..., Observation]
PATHS = ("/", "/page/page.js", "/v1/status", "/v1/sessions/x", "/v1/sessions/x/images/agentview")


def get(server: BackgroundServer, path: str, **headers: str) -> httpx.Response:
    return httpx.get(f"{server.http_url}{path}", headers=headers, timeout=20)


def status(server: BackgroundServer, sessions: int) -> dict[str, Any]:
    """The status once it knows of so many sessions: it hears of a request after its reply."""
    until = time.monotonic() + 10
    while len((found := get(server, "/v1/status").json())["sessions"]) < sessions:
        assert time.monotonic() < until, found
        time.sleep(0.02)
    return found


def test_a_session_is_shown_with_its_last_images_and_chunk(
    make_observation: MakeObservation,
) -> None:
    with BackgroundServer(NullPolicy) as server:
        observation = make_observation(session_id="secret-robot", step_index=12, seed=3)
        picture = np.zeros((224, 224, 3), np.uint8)
        picture[:112, :, 0], picture[112:, :, 2] = 255, 255  # red above blue
        observation.images["agentview"][:] = picture  # type: ignore[index]
        with PolicyClient(server.url) as client:
            chunk = client.infer(observation)
            client.infer(make_observation())  # of the connection's own session
        found = status(server, 2)
        assert "secret-robot" not in str(found)
        assert (found["phase"], found["waiting"], found["active"]) == ("ready", 0, 2)
        assert found["contract"]["action"]["names"][-1] == "gripper"
        tag = next(
            session["tag"]
            for session in found["sessions"]
            if get(server, f"/v1/sessions/{session['tag']}").json()["step"] == 12
        )
        shown = get(server, f"/v1/sessions/{tag}").json()
        assert shown["instruction"] == observation.instruction
        np.testing.assert_allclose(shown["actions"], chunk.actions, atol=5e-5)
        assert shown["cameras"] == ["agentview", "eye_in_hand"]
        answer = get(server, f"/v1/sessions/{tag}/images/agentview")
        assert answer.headers["content-type"] == "image/jpeg"
        pixels = np.asarray(Image.open(io.BytesIO(answer.content)))
        assert np.abs(pixels.astype(int) - picture).mean() < 3
        for path in (f"/v1/sessions/{tag}/images/none", "/v1/sessions/secret-robot"):
            assert get(server, path).status_code == 404


def test_the_contract_and_past_seconds_are_sent_once(
    null_server: BackgroundServer, make_observation: MakeObservation
) -> None:
    with PolicyClient(null_server.url) as client:
        client.infer(make_observation())
    until, answered = time.monotonic() + 10, []
    while not answered:
        assert time.monotonic() < until
        time.sleep(0.1)
        first = get(null_server, "/v1/status").json()
        answered = [second for second in first["timeline"] if second["answered"]]
    past = first["timeline"][-1]
    assert 0 < answered[-1]["p50"] <= answered[-1]["p95"]
    again = f"/v1/status?since={past['at']}&contract={first['contract_tag']}"
    second = get(null_server, again).json()
    assert "contract" not in second
    assert all(row["at"] > past["at"] for row in second["timeline"])
    for junk in ("?since=-1", "?since=1e99", "?since=" + "9" * 5000, "?since=²", "?contract=%00"):
        assert get(null_server, f"/v1/status{junk}").status_code == 200


@pytest.mark.parametrize("path", PATHS)
def test_other_sites_and_other_names_are_refused(null_server: BackgroundServer, path: str) -> None:
    for headers in (
        {"Origin": "http://evil.example"},
        {"Host": "evil.example"},  # a name that was made to resolve to this machine
        {"Host": f"evil.example:{null_server.port}"},
        {"Host": "[::1"},
    ):
        assert get(null_server, path, **headers).status_code == 403, headers
    other_site = get(null_server, path, **{"Sec-Fetch-Site": "cross-site"})
    assert other_site.status_code == (200 if path == "/" else 403)  # a link to the page is fine


@pytest.mark.parametrize("path", PATHS)
def test_no_answer_may_run_or_frame_anything(null_server: BackgroundServer, path: str) -> None:
    headers = get(null_server, path).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy and "http" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cross-origin-resource-policy"] == "same-origin"


def test_the_page_names_no_other_host_and_holds_no_inline_script(
    null_server: BackgroundServer,
) -> None:
    page = get(null_server, "/").text
    for name in ("page.js", "charts.js", "page.css"):
        text = get(null_server, f"/page/{name}").text
        assert "https://" not in text and "innerHTML" not in text
        assert name == "charts.js" or f"/page/{name}" in page
    assert "<script>" not in page and "style=" not in page and "onclick" not in page


@pytest.mark.parametrize(
    ("hosts", "client", "host", "let_in"),
    [
        ([], "127.0.0.1", "localhost:8000", True),
        ([], "::1", "[::1]:8000", True),
        ([], "::ffff:127.0.0.1", "127.0.0.1", True),
        ([], "192.168.1.20", "192.168.1.5:8000", False),
        (["192.168.1.20"], "192.168.1.20", "192.168.1.5:8000", True),
        (["192.168.1.0/24"], "192.168.1.77", "192.168.1.5:8000", True),
        (["192.168.1.0/24"], "::ffff:192.168.1.77", "192.168.1.5:8000", True),
        (["192.168.1.0/24"], "192.168.2.77", "192.168.1.5:8000", False),
        (["192.168.1.0/24"], "192.168.1.77", "robots.example.org", False),
        (["192.168.1.0/24", "Robots.example.org"], "192.168.1.77", "robots.example.org", True),
        (["robots.example.org"], "192.168.1.77", "robots.example.org", False),  # anybody's to say
        (["0.0.0.0/0"], "not an address", "127.0.0.1", False),
    ],
)
def test_who_is_let_in(hosts: list[str], client: str, host: str, let_in: bool) -> None:
    app, access = FastAPI(), PageAccess(hosts)

    @app.get("/")
    async def asked(request: Request) -> bool:
        return access.refusal(request) is None

    asking = TestClient(app, client=(client, 5000), headers={"Host": host})
    assert asking.get("/").json() is let_in


def test_a_host_that_is_none_is_named() -> None:
    with pytest.raises(ConfigError, match="'a b'"):
        PageAccess(["a b"])


def exchange(session: str | None, observation: Observation | None, **fields: Any) -> Exchange:
    values = {"bytes_in": 1000, "dialect": "native", **fields}
    return Exchange(received_at=time.time(), session=session, observation=observation, **values)


def test_at_most_so_many_sessions_are_kept_the_silent_leave_first(
    make_observation: MakeObservation,
) -> None:
    seen = LastSeen(max_sessions=3)
    observation = make_observation(size=8)
    for name in ("a", "b", "c", "a", "d"):
        seen(exchange(name, observation))
    assert [session.count for session in seen] == [1, 2, 1]  # d, a, c
    (first, *_) = seen
    assert first.observation is observation, "kept by reference"


def test_images_are_let_go_where_they_are_too_many(make_observation: MakeObservation) -> None:
    seen = LastSeen(max_bytes=10_000)
    for name in "abcdefgh":
        seen(exchange(name, make_observation(size=8), bytes_in=4000))
    assert [session.observation is not None for session in seen] == [True] * 2 + [False] * 6
    seen(exchange("huge", make_observation(size=8), bytes_in=20_000))
    assert [session.observation for session in seen] == [None] * 9
    assert sum(session.kept_bytes for session in seen) == 0


def test_a_refused_request_leaves_the_last_image_and_chunk(
    make_observation: MakeObservation,
) -> None:
    seen, observation = LastSeen(), make_observation(size=8)
    chunk = ActionChunk(np.zeros((10, 7), np.float32), seed=1)
    seen(exchange("a", observation, chunk=chunk))
    seen(exchange("a", None, error=CodecError("no")))
    (session,) = seen
    assert (session.observation, session.chunk) == (observation, chunk)
    assert (session.count, session.refused) == (2, 1)


def test_sessions_without_a_name_are_shown_by_dialect() -> None:
    seen = LastSeen()
    for session in (None, None, "openpi"):
        seen(exchange(session, None, dialect="openpi"))
    assert seen.get("openpi") is not None and seen.get("openpi").count == 2  # type: ignore[union-attr]
    assert len(seen) == 2, "a client cannot take a dialect's place by its session's id"


def test_the_timeline_is_bounded_and_leaves_out_the_second_that_goes_on() -> None:
    now = [1000.0]
    timeline = Timeline(clock=lambda: now[0])
    for second in range(KEPT_SECONDS + 50):
        now[0] = 1000.5 + second
        for total in range(100):
            timing = {"total_ms": float(total), "device_ms": 4.0, "batch_size": 2.0}
            chunk = ActionChunk(np.zeros((1, 7), np.float32), seed=1)
            timeline(exchange(None, None, chunk=chunk, timing=timing))
        timeline(exchange(None, None, error=ReflexarcError("no")))
    rows = timeline.since(0)
    assert len(rows) == KEPT_SECONDS - 1
    assert rows[-1]["at"] == int(now[0]) - 1
    assert (rows[0]["answered"], rows[0]["refused"]) == (100, 1)
    assert rows[0]["batch_sizes"] == {"2": 100}
    assert rows[0]["stages"][3] == 4.0
    now[0] += 10 * KEPT_SECONDS
    assert timeline.since(0) == []
