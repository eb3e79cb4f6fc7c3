"""API keys, caps and refusals on real sockets."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute, APIWebSocketRoute
from PIL import Image
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from reflexarc.client import PolicyClient
from reflexarc.contract import ActionChunk, EncodedImage, Observation, pack
from reflexarc.contract.errors import CodecError
from reflexarc.server import BackgroundServer, NullPolicy, PolicyService, create_app, protection
from reflexarc.server.api_keys import ApiKeys
from reflexarc.server.dialects.conversions import upright_to_camera
from reflexarc.server.inference import handshake
from reflexarc.server.protection import OPEN_PATHS, Protection
from reflexarc.server.recording import Recorder

MakeObservation = Callable[..., Observation]
KEY, OTHER = "a-key-of-the-robot-cell-7", "a-key-of-somebody-else-in-the-lab"
WITH_KEY = {"Authorization": f"Api-Key {KEY}"}
MSGPACK = {"Content-Type": "application/msgpack"}


def routes() -> Iterator[Any]:
    """Every route of the application, included routers' too."""

    def walk(found: Any) -> Iterator[Any]:
        for route in found:
            inner = getattr(route, "original_router", route)
            if hasattr(inner, "routes"):
                yield from walk(inner.routes)
            else:
                yield route

    return walk(create_app(PolicyService(NullPolicy)).routes)


HTTP = sorted(
    {
        (method, re.sub(r"\{\w+\}", "x", route.path))
        for route in routes()
        for method in getattr(route, "methods", None) or ()
    }
)
WEBSOCKETS = sorted(route.path for route in routes() if isinstance(route, APIWebSocketRoute))


@pytest.fixture(scope="module")
def guarded() -> Iterator[BackgroundServer]:
    with BackgroundServer(NullPolicy, protection=Protection(ApiKeys([OTHER, KEY]))) as server:
        yield server


@pytest.fixture(scope="module")
def http(guarded: BackgroundServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=guarded.http_url) as client:
        yield client


def test_every_http_route_asks_for_a_key(http: httpx.Client) -> None:
    asked = {path for _, path in HTTP}
    assert {"/", "/metrics", "/docs", "/openapi.json", "/act", "/v1/status"} <= asked
    for method, path in HTTP:
        reply = http.request(method, path)
        if path in OPEN_PATHS and method in ("GET", "HEAD"):
            assert reply.status_code == 200, path
            continue
        assert reply.status_code == 401, (method, path)
        assert "Api-Key" in reply.headers["www-authenticate"]
        if method != "HEAD":
            error = reply.json()["error"]
            assert error["code"] == "unauthorized" and "asks for an API key" in error["message"]
        assert http.request(method, path, headers=WITH_KEY).status_code != 401, (method, path)


def test_unknown_paths_tell_strangers_nothing(http: httpx.Client) -> None:
    for path in ("/nothing", "/livez/", "/livez/x", "//livez", "/LIVEZ", "/%2flivez"):
        assert http.get(path).status_code == 401, path
    assert http.post("/livez").status_code == 401
    assert http.get("/nothing", headers=WITH_KEY).status_code == 404


@pytest.mark.parametrize("path", WEBSOCKETS)
def test_every_websocket_asks_for_a_key_before_it_is_accepted(
    guarded: BackgroundServer, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    for headers in ({}, {"Authorization": "Api-Key wrong"}, {"Authorization": "Bearer "}):
        with pytest.raises(InvalidStatus) as refused:
            connect(f"{guarded.url}{path}", additional_headers=headers)
        response = refused.value.response
        assert response.status_code == 401
        assert json.loads(response.body)["error"]["code"] == "unauthorized"
        assert "Bearer" in response.headers.get_all("www-authenticate")[1]
    for scheme in ("Api-Key", "api-key", "Bearer", "BEARER"):
        headers = {"Authorization": f"{scheme} {KEY}"}
        connect(f"{guarded.url}{path}", additional_headers=headers).close()
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR], "a refusal is no error"


def test_no_body_is_waited_for(guarded: BackgroundServer) -> None:
    head = b"POST /v1/actions HTTP/1.1\r\nHost: x\r\nContent-Length: 60000000\r\n\r\n"
    with socket.create_connection((guarded.host, guarded.port), timeout=10) as client:
        client.sendall(head)
        assert client.recv(100).startswith(b"HTTP/1.1 401")


def test_a_refusal_is_read_by_who_sends_a_large_body(http: httpx.Client) -> None:
    for _ in range(3):
        assert http.post("/v1/actions", content=bytes(8_000_000)).status_code == 401


def test_two_keys_in_a_request_are_none(http: httpx.Client) -> None:
    twice = [("Authorization", f"Bearer {KEY}"), ("Authorization", f"Bearer {KEY}")]
    assert http.get("/v1/contract", headers=twice).status_code == 401


def test_a_browser_may_look_but_not_move(http: httpx.Client) -> None:
    reply = http.get("/")
    assert 'Basic realm="reflexarc"' in reply.headers["www-authenticate"]
    assert http.get("/", auth=("", KEY)).status_code == 200
    assert http.get("/v1/status", auth=("anybody", KEY)).status_code == 200
    assert http.get("/", auth=("", "wrong")).status_code == 401
    for path in ("/v1/actions", "/act", "/reset"):
        assert http.post(path, auth=("", KEY)).status_code == 401


def test_keys_are_in_no_log_recording_metric_or_status(
    make_observation: MakeObservation, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    recorder = Recorder(tmp_path / "recording")
    guard = Protection(ApiKeys([KEY]))
    with BackgroundServer(NullPolicy, protection=guard, listeners=(recorder,)) as server:
        recorder.start(handshake(server.service.inference))
        caplog.clear()
        with PolicyClient(server.url, api_key=KEY) as client:
            client.infer(make_observation())
            greeting = pack(client.metadata)
        with httpx.Client(base_url=server.http_url, headers=WITH_KEY) as web:
            body = pack(make_observation().to_wire())
            assert web.post("/v1/actions", content=body, headers=MSGPACK).status_code == 200
            assert web.post("/v1/actions", content=b"{}").status_code == 422
            web.get("/v1/contract", headers={"Authorization": f"Bearer {KEY}x"})
            paths = ("/metrics", "/v1/status", "/v1/contract", "/config", "/openapi.json", "/")
            said = b"".join(web.get(path).content for path in paths)
    recorder.close()
    files = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert len(files) > 300_000 and b"reflexarc_" in said
    log = "\n".join(record.getMessage() for record in caplog.records)
    assert "without a valid API key" in log
    for text in (log.encode(), greeting, said, files, repr(guard).encode()):
        assert KEY.encode() not in text


def test_no_route_changes_the_configuration(http: httpx.Client, guarded: BackgroundServer) -> None:
    may_act = {
        ("POST", "/v1/actions"),
        ("POST", "/act"),
        ("POST", "/reset"),
        ("DELETE", "/v1/sessions/x"),
    }
    assert {pair for pair in HTTP if pair[0] not in ("GET", "HEAD")} == may_act
    assert [r for r in routes() if isinstance(r, APIRoute)], "the walk found no routes"
    state = vars(guarded.service).keys()
    before = http.get("/v1/contract", headers=WITH_KEY).json()
    settings = {"denoising_steps": 1, "api_keys": "", "replan_steps": 1, "device": "cuda"}
    for method, path in HTTP:
        for keywords in ({"params": settings}, {"json": settings}):
            http.request(method, path, headers=WITH_KEY, **keywords)  # type: ignore[arg-type]
    assert http.get("/v1/contract", headers=WITH_KEY).json() == before
    assert vars(guarded.service).keys() == state
    assert http.get("/config", headers=WITH_KEY, params=settings).status_code == 422
    assert http.get("/v1/contract").status_code == 401


def test_connections_above_the_cap_are_refused_and_let_in_later(
    make_observation: MakeObservation,
) -> None:
    guard = Protection(ApiKeys([KEY]), max_connections=2)
    with BackgroundServer(NullPolicy, protection=guard) as server:
        first = PolicyClient(server.url, api_key=KEY)
        second = PolicyClient(server.url, api_key=KEY)
        with pytest.raises(InvalidStatus) as refused:
            connect(f"{server.url}/v1/policy", additional_headers=WITH_KEY)
        assert refused.value.response.status_code == 503
        assert refused.value.response.headers["retry-after"] == "5"
        with httpx.Client(base_url=server.http_url, headers=WITH_KEY) as web:
            reply = web.post("/v1/actions", content=bytes(400_000))
            assert reply.status_code == 503 and reply.headers["retry-after"] == "5"
            assert reply.json()["error"]["code"] == "not_ready"
            assert web.get("/livez").status_code == 200, "probes must not end a full server"
            assert first.infer(make_observation()).seed == 7
            second.close()
            with PolicyClient(server.url, api_key=KEY, retry_for=10) as third:
                assert third.infer(make_observation(seed=9)).seed == 9
                assert web.get("/v1/contract").status_code == 503
        first.close()


class HeldPolicy(NullPolicy):
    """Answers once it is let go."""

    let_go = threading.Event()

    def infer(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        assert self.let_go.wait(60)
        return super().infer(observations)


def test_one_address_cannot_take_all_of_the_server(
    make_observation: MakeObservation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protection, "MAX_REQUESTS_OF_ADDRESS", 2)
    body = pack(make_observation().to_wire())

    def post() -> httpx.Response:
        return httpx.post(
            f"{server.http_url}/v1/actions", content=body, headers=MSGPACK, timeout=30
        )

    with BackgroundServer(HeldPolicy) as server, ThreadPoolExecutor(2) as pool:
        running = [pool.submit(post), pool.submit(post)]
        while server.service.waiting < 2:
            assert not running[0].done()
            time.sleep(0.01)
        refused = post()
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "too_many_requests"
        assert httpx.get(f"{server.http_url}/readyz").status_code == 200
        HeldPolicy.let_go.set()
        assert [request.result().status_code for request in running] == [200, 200]
        assert post().status_code == 200, "what was answered no longer counts"


def encoded(size: tuple[int, int], image_format: str, *, cut: bool = False) -> EncodedImage:
    """An image (width, height); ``cut`` leaves the header and half of the pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, image_format)
    data = buffer.getvalue()
    return EncodedImage(format=image_format, data=data[: len(data) // 2] if cut else data)


@pytest.mark.parametrize("image_format", ["jpeg", "png"])
def test_larger_images_are_refused_by_their_header(
    null_server: BackgroundServer, make_observation: MakeObservation, image_format: str
) -> None:
    images = dict(make_observation().images)
    expected = "larger than what the policy takes (224 and 224) and than what its camera"
    with PolicyClient(null_server.url) as client:
        for size in ((3000, 2000), (257, 10), (10, 257)):
            images["agentview"] = encoded(size, image_format, cut=size[0] > 300)
            with pytest.raises(CodecError) as refused:
                client.infer(replace(make_observation(), images=images))
            error = refused.value
            assert error.field == "images.agentview"
            assert expected in error.message and "(256 and 256)" in error.message
            assert f"{size[1]} high and {size[0]} wide" in error.message
        assert client.infer(make_observation()).seed == 7, "the connection lives on"


def test_dialects_take_the_cameras_own_size_and_no_larger() -> None:
    camera = NullPolicy().contract.cameras[0]
    assert upright_to_camera(camera, encoded((256, 256), "png"), "key").shape == (224, 224, 3)
    with pytest.raises(CodecError, match=r"^key: image is 512 high.*resize it"):
        upright_to_camera(camera, encoded((512, 512), "png"), "key")


def test_what_no_route_foresaw_is_an_error_id(caplog: pytest.LogCaptureFixture) -> None:
    app = create_app(PolicyService(NullPolicy))

    @app.get("/broken")
    async def broken() -> None:
        raise ZeroDivisionError("a secret of the server")

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.get("/broken")

    reply = asyncio.run(ask())
    assert reply.status_code == 500 and "secret" not in reply.text
    found = re.search(r"error id (\w{8})", reply.json()["error"]["message"])
    assert found and found[1] in caplog.text and "a secret of the server" in caplog.text


def test_a_foreign_page_with_a_key_is_still_foreign(guarded: BackgroundServer) -> None:
    headers = {**WITH_KEY, "Origin": "https://elsewhere.example"}
    with pytest.raises(InvalidStatus) as refused:
        connect(f"{guarded.url}/v1/policy", additional_headers=headers)
    assert refused.value.response.status_code == 403
    assert httpx.post(f"{guarded.http_url}/act", headers=headers).status_code == 403


def test_a_frame_above_the_cap_ends_only_its_connection(guarded: BackgroundServer) -> None:
    with connect(f"{guarded.url}/v1/policy", additional_headers=WITH_KEY) as client:
        client.recv()
        with pytest.raises(ConnectionClosed) as closed:
            client.send(bytes(64 * 1024 * 1024 + 1))
            client.recv()
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1009
    basic = base64.b64encode(f":{KEY}".encode()).decode()
    with pytest.raises(InvalidStatus):  # a browser's ambient credentials open no websocket
        headers = {"Authorization": f"Basic {basic}"}
        connect(f"{guarded.url}/v1/policy", additional_headers=headers)
