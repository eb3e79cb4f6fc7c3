"""Every HTTP route and every websocket gets damaged requests: no 500, no traceback, no silence.

A few seconds under ``make test``; ``make fuzz`` sets FUZZ_EXAMPLES for an hour's worth.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from fastapi.routing import APIRoute, APIWebSocketRoute
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from reflexarc.contract import unpack
from reflexarc.server import BackgroundServer, NullPolicy, PolicyService, create_app
from reflexarc.server import libero_contract as contract_of

from .damaged_requests import (
    HTTP_BODIES,
    OWN,
    PNG,
    SIZE,
    SOCKET_MESSAGES,
    STATE,
    TEXT,
    arrays,
    broken_bytes,
    damaged,
    packed,
    plain,
)

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "150"))
LONG = "FUZZ_EXAMPLES" in os.environ
fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=not LONG,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def routes_of(kind: type) -> list[Any]:
    """Every route of the application of one kind, included routers' too."""

    def walk(routes: Any) -> Iterator[Any]:
        for route in routes:
            inner = getattr(route, "original_router", route)
            if hasattr(inner, "routes"):
                yield from walk(inner.routes)
            else:
                yield route

    found = walk(create_app(PolicyService(NullPolicy)).routes)
    return [route for route in found if isinstance(route, kind)]


HTTP_PATHS = sorted({route.path for route in routes_of(APIRoute)} | {"/docs", "/openapi.json"})


class Alarm(logging.Handler):
    """Collects what no request may cause: errors and tracebacks in the log."""

    def __init__(self) -> None:
        super().__init__()
        self.raised: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR or record.exc_info:
            self.raised.append(self.format(record))


@pytest.fixture(scope="module")
def server() -> Iterator[BackgroundServer]:
    with BackgroundServer(lambda: NullPolicy(contract_of(image_size=SIZE))) as server:
        yield server


@pytest.fixture
def alarm() -> Iterator[Alarm]:
    handler = Alarm()
    names = ("", "uvicorn.error", "asyncio")  # uvicorn's does not propagate
    for name in names:
        logging.getLogger(name).addHandler(handler)
    yield handler
    for name in names:
        logging.getLogger(name).removeHandler(handler)


def still_answers(server: BackgroundServer) -> None:
    with httpx.Client(base_url=server.http_url, trust_env=False) as http:
        body = {"images": {"agentview": PNG, "eye_in_hand": PNG}, "state": STATE.tolist()}
        assert http.post("/v1/actions", json={**body, "instruction": TEXT}).status_code == 200


def test_the_fuzzed_requests_are_valid_before_they_are_damaged(server: BackgroundServer) -> None:
    still_answers(server)
    assert set(SOCKET_MESSAGES) == {route.path for route in routes_of(APIWebSocketRoute)}
    assert {"/v1/actions", "/act", "/livez", "/metrics", "/"} <= set(HTTP_PATHS)


def test_http_routes(server: BackgroundServer, alarm: Alarm) -> None:
    header_text = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30)
    types = ["application/json", "application/msgpack", "text/plain", "multipart/form-data", None]

    @fuzzed
    @given(st.data())
    def run(data: Any) -> None:
        path = data.draw(st.sampled_from(HTTP_PATHS))
        parts = [
            quote(data.draw(st.text(max_size=12)), safe="/") if part.startswith("{") else part
            for part in path.split("/")
        ]
        likely = ["POST"] if path in ("/v1/actions", "/act") else ["GET", "POST"]
        method = data.draw(st.sampled_from([*likely * 3, "PUT", "DELETE", "HEAD", "OPTIONS", "X"]))
        message = data.draw(st.sampled_from(HTTP_BODIES).flatmap(lambda m: damaged(m, plain)))
        content_type = data.draw(st.sampled_from(types))
        if content_type == "application/msgpack":
            with_arrays = st.one_of(plain, arrays, st.binary(max_size=9))
            own = data.draw(damaged(OWN, with_arrays))
            body = packed(own)
        else:
            body = json.dumps(message).encode()
        headers = {} if content_type is None else {"Content-Type": content_type}
        name = data.draw(st.sampled_from(["Accept", "Authorization", "Origin", "Host", "Range"]))
        if data.draw(st.integers(0, 4)) == 0:
            headers[name] = data.draw(header_text).strip()
        query = quote(data.draw(st.text(max_size=8)))
        reply = http.request(
            method,
            "/".join(parts) + (f"?{query}" if query else ""),
            content=data.draw(broken_bytes(body)),
            headers=headers,
        )
        assert reply.status_code < 500, (method, path, reply.text)
        assert "Traceback" not in reply.text and not alarm.raised

    with httpx.Client(base_url=server.http_url, trust_env=False, timeout=20) as http:
        run()
    still_answers(server)


@pytest.mark.parametrize("path", sorted(SOCKET_MESSAGES))
def test_websockets(path: str, server: BackgroundServer, alarm: Alarm) -> None:
    connection = Reconnecting(f"{server.url}{path}", speaks_first=path != "/vla-eval")
    junk = st.one_of(plain, arrays, st.binary(max_size=9))

    @fuzzed
    @given(st.data())
    def run(data: Any) -> None:
        for _ in range(data.draw(st.integers(1, 3))):
            message = data.draw(st.sampled_from(SOCKET_MESSAGES[path]))
            frame: str | bytes = packed(data.draw(damaged(message, junk)))
            frame = data.draw(broken_bytes(frame))
            if data.draw(st.integers(0, 15)) == 0:
                frame = data.draw(st.text(max_size=30))
            reply = connection.ask(frame)
            if isinstance(reply, bytes):
                assert "Traceback" not in repr(unpack(reply))
            assert not isinstance(reply, str) or "Traceback" not in reply
            assert connection.close_code not in (1006, 1011, 1012), frame
            assert not alarm.raised

    try:
        run()
    finally:
        connection.drop()
    still_answers(server)


class Reconnecting:
    """One connection to a path, opened again when the server closes it.

    Attributes:
        close_code: of the last request's connection, None while it is open.
    """

    def __init__(self, url: str, *, speaks_first: bool) -> None:
        self._url, self._speaks_first = url, speaks_first
        self._socket: ClientConnection | None = None
        self.close_code: int | None = None

    def ask(self, frame: str | bytes) -> str | bytes | None:
        """The reply; None where the server closed, or where the message gets no answer."""
        self.close_code = None
        try:
            if self._socket is None:
                self._socket = connect(self._url, compression=None, proxy=None, max_size=None)
                if self._speaks_first:
                    self._socket.recv(timeout=20)
            self._socket.send(frame)
            if self._speaks_first:
                return self._socket.recv(timeout=20)
            try:  # vla-eval's clients get no answer to a start or an end
                return self._socket.recv(timeout=0.02)
            except TimeoutError:
                self._socket.ping().wait(20)
                return None
        except ConnectionClosed as closed:
            self.close_code = 1006 if closed.rcvd is None else closed.rcvd.code
            self.drop()
            return None
        except InvalidStatus as refused:
            assert refused.response.status_code < 500
            return None

    def drop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


REQUEST = (
    b"POST /v1/actions HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"
)
UPGRADE = (
    b"GET /v1/policy HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    b"\x82\x84\x00\x00\x00\x00abcd\x88\x80\x00\x00\x00\x00"
)


@pytest.mark.parametrize("whole", [REQUEST, UPGRADE], ids=["http", "upgrade"])
def test_bytes_that_are_no_http(whole: bytes, server: BackgroundServer, alarm: Alarm) -> None:
    @fuzzed
    @given(broken_bytes(whole))
    def run(sent: bytes) -> None:
        with socket.create_connection((server.host, server.port), timeout=10) as peer:
            peer.sendall(sent)
            peer.shutdown(socket.SHUT_WR)
            received = read_all(peer)
        assert b"HTTP/1.1 5" not in received and b"Traceback" not in received
        assert not alarm.raised

    run()
    still_answers(server)


def test_a_ping_after_a_refusal_is_left_without_answer(
    server: BackgroundServer, alarm: Alarm
) -> None:
    hello = packed({"type": "hello", "payload": {"protocol_version": 99}, "seq": 0})
    upgrade = UPGRADE.partition(b"\x82")[0].replace(b"/v1/policy", b"/vla-eval")
    with socket.create_connection((server.host, server.port), timeout=10) as peer:
        peer.sendall(upgrade)
        assert b"101" in peer.recv(4096)
        peer.sendall(bytes((0x82, 0x80 | len(hello))) + bytes(4) + hello)
        assert b"vla-eval" in peer.recv(4096)  # the close frame, with its reason
        peer.sendall(b"\x89\x80" + bytes(4))  # a ping
        peer.shutdown(socket.SHUT_WR)
        assert read_all(peer) == b""
    still_answers(server)
    assert not alarm.raised


def read_all(peer: socket.socket) -> bytes:
    received = b""
    try:
        while part := peer.recv(65536):
            received += part
    except ConnectionResetError:
        pass
    return received
