"""Clients that flood or never read: refused by name, alone, and without memory that grows."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosedError
from websockets.sync.client import ClientConnection, connect

from reflexarc.client import PolicyClient
from reflexarc.contract import ActionChunk, Observation, pack, unpack
from reflexarc.server import BackgroundServer, NullPolicy, libero_contract, websocket_channel

MakeObservation = Callable[..., Observation]


def opened(server: BackgroundServer) -> ClientConnection:
    connection = connect(f"{server.url}/v1/policy", compression=None)
    connection.recv(timeout=10)
    return connection


def test_a_client_that_floods_is_refused_alone(
    make_observation: MakeObservation, make_slow_policy: Callable[[float], Any]
) -> None:
    policy = make_slow_policy(0.5)
    with (
        BackgroundServer(lambda: policy) as server,
        opened(server) as flood,
        PolicyClient(server.url) as other,
    ):
        frame = pack(make_observation().to_wire())
        with pytest.raises(ConnectionClosedError) as closed:
            for _ in range(20):
                flood.send(frame)
            while True:
                flood.recv(timeout=10)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1008
        assert "too_many_requests: at most 8" in closed.value.rcvd.reason
        assert other.infer(make_observation(seed=3)).seed == 3


class LongReplies(NullPolicy):
    """Chunks of 28 kB, which fill a socket soon."""

    def __init__(self) -> None:
        super().__init__(libero_contract(horizon=1024, image_size=16))


def test_a_client_that_never_reads_is_dropped_alone(
    make_observation: MakeObservation,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(websocket_channel, "SEND_SECONDS", 0.1)
    with (
        BackgroundServer(LongReplies) as server,
        PolicyClient(server.url) as other,
        handshaken(server) as mute,
    ):
        message = pack(make_observation(size=16).to_wire())
        frame = header(len(message)) + bytes(4) + message
        with pytest.raises(OSError, match=r"reset|pipe|timed out"):
            for _ in range(1000):
                mute.sendall(frame)
                time.sleep(0.02)
        assert other.infer(make_observation(size=16, seed=4)).seed == 4
    assert "left its replies unread" in caplog.text


def handshaken(server: BackgroundServer) -> socket.socket:
    """A websocket by hand, with little room for what it does not read."""
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.settimeout(20)
    raw.connect((server.host, server.port))
    raw.sendall(
        b"GET /v1/policy HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: YWFhYWFhYWFhYWFhYWFhYQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    assert raw.recv(64).startswith(b"HTTP/1.1 101")
    return raw


SIZES = (200, 60_000, 70_000, 300_000, 2_000_000)
PIECES = (7, 1_000, 65_536, 10_000_000)


@pytest.mark.parametrize(
    ("size", "piece"), [(s, p) for s in SIZES for p in PIECES if s // p < 20_000]
)
def test_frames_arrive_whole_however_they_are_cut(
    null_server: BackgroundServer, size: int, piece: int
) -> None:
    """Errors name what came, so an altered or shifted frame would show."""
    name = f"field-{size}"
    payload = pack({name: os.urandom(size), "request_id": f"{size}-{piece}"})
    mask = b"\x12\x34\x56\x78"
    scrambled = bytes(b ^ m for b, m in zip(payload, mask * (len(payload) // 4 + 1), strict=False))
    frame = header(len(payload)) + mask + scrambled
    with opened(null_server) as connection:
        stream = frame + frame  # the second begins wherever the first ends
        for start in range(0, len(stream), piece):
            connection.socket.sendall(stream[start : start + piece])
        for _ in range(2):
            reply = unpack(connection.recv(timeout=20))
            assert reply["request_id"] == f"{size}-{piece}"
            assert name in reply["error"]["message"]


def header(length: int) -> bytes:
    if length < 126:
        return bytes([0x82, 0x80 | length])
    if length < 65_536:
        return b"\x82\xfe" + struct.pack("!H", length)
    return b"\x82\xff" + struct.pack("!Q", length)


class Watched(NullPolicy):
    """Remembers whether two inferences ever ran at once."""

    def __init__(self) -> None:
        super().__init__(libero_contract())
        self.lock = threading.Lock()
        self.overlapped = False

    def infer(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        self.overlapped |= not self.lock.acquire(blocking=False)
        try:
            time.sleep(0.0001)
            return super().infer(observations)
        finally:
            self.lock.release()


def test_a_cheap_policy_is_never_asked_twice_at_once(make_observation: MakeObservation) -> None:
    """Also while it changes from the worker thread to the event loop."""
    policy = Watched()
    with BackgroundServer(lambda: policy) as server:

        def ask(number: int) -> None:
            with PolicyClient(server.url) as client:
                for step in range(40):
                    seed = 1000 * number + step
                    assert client.infer(make_observation(seed=seed)).seed == seed

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert not policy.overlapped
