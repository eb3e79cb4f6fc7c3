"""Loading, a slow inference, draining: what the server does besides answering."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from reflexarc.contract import ActionChunk, Observation, pack, unpack
from reflexarc.contract.errors import CheckpointError, ConfigError
from reflexarc.server import BackgroundServer, NullPolicy, Phase
from reflexarc.server.lifecycle import open_port

MakeObservation = Callable[..., Observation]


def test_slow_inference_blocks_neither_health_nor_pings(
    make_observation: MakeObservation, make_slow_policy: Callable[[float], Any]
) -> None:
    policy = make_slow_policy(1.5)
    with (
        BackgroundServer(lambda: policy) as server,
        # Made before: on a busy machine it takes as long as the inference.
        httpx.Client(base_url=server.http_url) as http,
        connect(f"{server.url}/v1/policy", compression=None) as connection,
    ):
        connection.recv(timeout=10)
        connection.send(pack(make_observation().to_wire()))
        assert policy.started.wait(10)
        assert http.get("/livez").status_code == 200
        assert http.get("/readyz").json() == {"phase": "ready"}
        assert connection.ping().wait(10)
        assert policy.finished == 0, "health and ping were answered after the inference"
        ActionChunk.from_wire(unpack(connection.recv(timeout=10)))


def test_websocket_opens_while_loading_and_first_frame_waits(
    make_observation: MakeObservation,
) -> None:
    may_load = threading.Event()

    def load() -> NullPolicy:
        assert may_load.wait(20)
        return NullPolicy()

    with BackgroundServer(load, wait=False) as server:
        until_open(server)
        ready = httpx.get(f"{server.http_url}/readyz")
        assert (ready.status_code, ready.json()) == (503, {"phase": "loading"})
        assert httpx.get(f"{server.http_url}/livez").status_code == 200
        assert httpx.get(f"{server.http_url}/v1/contract").status_code == 503
        refused = httpx.post(f"{server.http_url}/v1/actions", content=b"{}")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready")
        connections = [
            connect(f"{server.url}{path}", compression=None) for path in ("/v1/policy", "/")
        ]
        for connection in connections:
            with pytest.raises(TimeoutError):
                connection.recv(timeout=0.2)
        may_load.set()
        for connection in connections:
            assert "contract" in unpack(connection.recv(timeout=10))
            connection.close()
        assert httpx.get(f"{server.http_url}/readyz").status_code == 200


def test_load_error_reaches_the_caller() -> None:
    def load() -> NullPolicy:
        raise CheckpointError("policy.json is gone")

    with pytest.raises(CheckpointError, match="gone"), BackgroundServer(load):
        pytest.fail("a server without a policy must not start")


def test_draining_finishes_the_inference_in_flight_and_refuses_new_ones(
    make_observation: MakeObservation, make_slow_policy: Callable[[float], Any]
) -> None:
    policy = make_slow_policy(1.0)
    server = BackgroundServer(lambda: policy)
    with server:
        busy = connect(f"{server.url}/v1/policy", compression=None)
        idle = connect(f"{server.url}/v1/policy", compression=None)
        for connection in (busy, idle):
            connection.recv(timeout=10)
        busy.send(pack(make_observation(seed=4).to_wire()))
        assert policy.started.wait(10)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        while server.service.phase is not Phase.DRAINING:
            time.sleep(0.01)
        idle.send(pack(make_observation().to_wire()))
        assert unpack(idle.recv(timeout=10))["error"]["code"] == "not_ready"
        assert ActionChunk.from_wire(unpack(busy.recv(timeout=10))).seed == 4
        with pytest.raises(ConnectionClosed):
            busy.recv(timeout=10)
        stopping.join(20)
        assert not stopping.is_alive()


def test_waiting_requests_are_bounded(
    make_observation: MakeObservation, make_slow_policy: Callable[[float], Any]
) -> None:
    policy = make_slow_policy(1.0)
    with BackgroundServer(lambda: policy) as server:
        server.service._admission.max_waiting = 1
        with connect(f"{server.url}/v1/policy", compression=None) as connection:
            connection.recv(timeout=10)
            connection.send(pack(make_observation().to_wire()))
            assert policy.started.wait(10)
            body, headers = (
                pack(make_observation().to_wire()),
                {"Content-Type": "application/msgpack"},
            )
            url = f"{server.http_url}/v1/actions"
            refused = httpx.post(url, content=body, headers=headers)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            ActionChunk.from_wire(unpack(connection.recv(timeout=10)))


def test_client_that_leaves_during_inference_harms_nobody(
    make_observation: MakeObservation, make_slow_policy: Callable[[float], Any]
) -> None:
    policy = make_slow_policy(0.3)
    with BackgroundServer(lambda: policy) as server:
        leaving = connect(f"{server.url}/v1/policy", compression=None)
        leaving.recv(timeout=10)
        leaving.send(pack(make_observation().to_wire()))
        assert policy.started.wait(10)
        leaving.socket.close()
        with connect(f"{server.url}/v1/policy", compression=None) as connection:
            connection.recv(timeout=10)
            connection.send(pack(make_observation(seed=9).to_wire()))
            assert ActionChunk.from_wire(unpack(connection.recv(timeout=10))).seed == 9


def test_sigterm_lets_the_inference_finish_and_exits_with_0(
    make_observation: MakeObservation,
) -> None:
    code = (
        "import time\n"
        "from reflexarc.server import NullPolicy, PolicyServer, PolicyService\n"
        "from reflexarc.server.lifecycle import open_port\n"
        "class Slow(NullPolicy):\n"
        "    def infer(self, observations):\n"
        "        print('inferring', flush=True)\n"
        "        time.sleep(1.0)\n"
        "        return super().infer(observations)\n"
        "port = open_port('127.0.0.1', 0)\n"
        "print(port.getsockname()[1], flush=True)\n"
        "PolicyServer(PolicyService(Slow)).run([port])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        port = int(process.stdout.readline())
        with connect(f"ws://127.0.0.1:{port}/v1/policy", compression=None) as connection:
            connection.recv(timeout=20)
            connection.send(pack(make_observation(seed=6).to_wire()))
            assert process.stdout.readline() == "inferring\n"
            process.send_signal(signal.SIGTERM)
            assert ActionChunk.from_wire(unpack(connection.recv(timeout=10))).seed == 6
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.stdout.close()


def test_inference_that_never_ends_does_not_keep_the_process(
    make_observation: MakeObservation,
) -> None:
    code = (
        "import time\n"
        "from reflexarc.server import NullPolicy, PolicyServer, PolicyService\n"
        "from reflexarc.server.lifecycle import open_port\n"
        "class Hangs(NullPolicy):\n"
        "    def infer(self, observations):\n"
        "        print('inferring', flush=True)\n"
        "        time.sleep(1000)\n"
        "port = open_port('127.0.0.1', 0)\n"
        "print(port.getsockname()[1], flush=True)\n"
        "PolicyServer(PolicyService(Hangs), drain_seconds=0.2).run([port])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        port = int(process.stdout.readline())
        with connect(f"ws://127.0.0.1:{port}/v1/policy", compression=None) as connection:
            connection.recv(timeout=20)
            connection.send(pack(make_observation().to_wire()))
            assert process.stdout.readline() == "inferring\n"
            process.send_signal(signal.SIGTERM)
            with pytest.raises(ConnectionClosed):
                connection.recv(timeout=20)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.stdout.close()


def test_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1"):
            open_port("127.0.0.1", port)


def test_port_lets_asyncio_switch_nagle_off() -> None:
    with open_port("localhost", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP


def until_open(server: BackgroundServer) -> None:
    for _ in range(200):
        try:
            httpx.get(f"{server.http_url}/livez")
            return
        except httpx.TransportError:
            time.sleep(0.05)
    pytest.fail("the port did not open")
