"""Both clients against a real server: results, named errors, servers that are absent or die."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

from reflexarc.client import HttpPolicyClient, PolicyClient
from reflexarc.client.addresses import http_url, websocket_url
from reflexarc.contract import Observation, ReflexarcError, pack, unpack
from reflexarc.contract.errors import (
    CodecError,
    ConfigError,
    ContractViolationError,
    DeadlineExceededError,
    FrameTooLargeError,
    ServerUnavailableError,
)
from reflexarc.server import BackgroundServer, NullPolicy, libero_contract

MakeObservation = Callable[..., Observation]
Client = type[PolicyClient] | type[HttpPolicyClient]
both_clients = pytest.mark.parametrize("client_class", [PolicyClient, HttpPolicyClient])


@both_clients
def test_chunk_and_contract(
    policy_server: BackgroundServer, observe: MakeObservation, client_class: Client
) -> None:
    with client_class(policy_server.url) as client:
        assert client.contract == libero_contract()
        assert client.metadata["sampling"]["denoising_steps"] == 1
        observation = observe(seed=5, request_id="mine")
        chunk = client.infer(observation)
        assert chunk.request_id == "mine"
        assert chunk.actions.dtype == np.float32
        np.testing.assert_array_equal(chunk.actions, NullPolicy().infer([observation])[0].actions)


@both_clients
@pytest.mark.parametrize("image_format", ["jpeg", "png"])
def test_compressed_images_are_accepted(
    policy_server: BackgroundServer,
    observe: MakeObservation,
    client_class: Client,
    image_format: Any,
) -> None:
    with client_class(policy_server.url, image_format=image_format) as client:
        assert client.infer(observe(seed=5)).seed == 5


@both_clients
def test_server_error_keeps_its_name_and_the_client_goes_on(
    policy_server: BackgroundServer, observe: MakeObservation, client_class: Client
) -> None:
    with client_class(policy_server.url) as client:
        for _ in range(2):
            with pytest.raises(ContractViolationError, match="layout eef3") as raised:
                client.infer(replace(observe(), state=np.zeros(9)))
            assert raised.value.field == "state"
        assert client.infer(observe(seed=8)).seed == 8


def test_observation_above_the_cap_is_not_sent(
    policy_server: BackgroundServer, observe: MakeObservation
) -> None:
    with PolicyClient(policy_server.url) as client:
        huge = {"agentview": np.zeros((5000, 5000, 3), np.uint8)}
        with pytest.raises(FrameTooLargeError):
            client.infer(replace(observe(), images=huge))
        assert client.infer(observe(seed=8)).seed == 8


@both_clients
def test_absent_server_is_said_with_url_and_seconds(free_port: int, client_class: Client) -> None:
    with pytest.raises(ServerUnavailableError) as raised:
        client_class(f"127.0.0.1:{free_port}", retry_for=0.3)
    assert f"127.0.0.1:{free_port}" in raised.value.message
    assert "0.3 s" in raised.value.message


@both_clients
def test_client_waits_for_a_server_that_starts_later(
    server_process: Any, observe: MakeObservation, client_class: Client
) -> None:
    starting = threading.Timer(0.5, lambda: server_process.start(wait=False))
    starting.start()
    with client_class(server_process.url, retry_for=30) as client:
        assert client.infer(observe(seed=8)).seed == 8
    starting.join()


def test_client_waits_for_a_server_that_loads(observe: MakeObservation) -> None:
    def load() -> NullPolicy:
        time.sleep(1.0)
        return NullPolicy()

    for client_class in (PolicyClient, HttpPolicyClient):
        with BackgroundServer(load, wait=False) as server, client_class(server.url) as client:
            assert client.infer(observe(seed=8)).seed == 8


@both_clients
def test_request_is_sent_again_when_the_server_dies_under_it(
    server_process: Any, observe: MakeObservation, client_class: Client
) -> None:
    server_process.start(seconds=2.0)

    def kill_and_restart() -> None:
        time.sleep(0.5)
        server_process.kill()
        server_process.start(wait=False)

    with client_class(server_process.url, retry_for=30) as client:
        restarting = threading.Thread(target=kill_and_restart)
        restarting.start()
        observation = observe(seed=8)
        chunk = client.infer(observation)
        restarting.join()
        np.testing.assert_array_equal(chunk.actions, NullPolicy().infer([observation])[0].actions)


@both_clients
def test_server_that_stays_dead_is_said(
    server_process: Any, observe: MakeObservation, client_class: Client
) -> None:
    server_process.start()
    with client_class(server_process.url, retry_for=0.5) as client:
        client.infer(observe())
        server_process.kill()
        with pytest.raises(ServerUnavailableError, match=r"within 0\.5 s"):
            client.infer(observe())
        server_process.start()
        assert client.infer(observe(seed=8)).seed == 8


@both_clients
def test_server_that_comes_back_with_another_policy_is_refused(
    server_process: Any, observe: MakeObservation, client_class: Client
) -> None:
    server_process.start(horizon=10)
    with client_class(server_process.url, retry_for=10) as client:
        client.infer(observe())
        server_process.kill()
        server_process.start(horizon=12)
        with pytest.raises(ContractViolationError, match="another policy"):
            client.infer(observe())


def test_reply_that_takes_too_long_is_not_taken_for_the_next(
    observe: MakeObservation,
) -> None:
    class SlowOnce(NullPolicy):
        def infer(self, observations: Any) -> Any:
            time.sleep(1.0 if observations[0].seed == 1 else 0.0)
            return super().infer(observations)

    with BackgroundServer(SlowOnce) as server:
        for client_class in (PolicyClient, HttpPolicyClient):
            with client_class(server.url, timeout=0.4) as client:
                with pytest.raises(ServerUnavailableError, match=r"no reply .* within 0\.4 s"):
                    client.infer(observe(seed=1))
                time.sleep(0.8)
                assert client.infer(observe(seed=2)).seed == 2


class SlowFor(NullPolicy):
    """Takes a second for seed 1."""

    def infer(self, observations: Any) -> Any:
        time.sleep(1.0 if observations[0].seed == 1 else 0.0)
        return super().infer(observations)


@both_clients
def test_a_deadline_ends_the_wait_and_the_late_reply_is_thrown_away(
    observe: MakeObservation, client_class: Client
) -> None:
    with BackgroundServer(SlowFor) as server, client_class(server.url) as client:
        client.infer(observe(seed=3, deadline_ms=20_000.0))
        for request_id in (None, "mine", "mine"):  # an id that is used again, too
            with pytest.raises(DeadlineExceededError) as raised:
                client.infer(observe(seed=1, deadline_ms=100.0, request_id=request_id))
            assert raised.value.field == "deadline_ms"
        chunk = client.infer(observe(seed=2, request_id="mine"))
        np.testing.assert_array_equal(
            chunk.actions, NullPolicy().infer([observe(seed=2)])[0].actions
        )


def served_by_hand(converse: Callable[[ServerConnection], None]) -> Any:
    """A server that says the contract and leaves the rest of a connection to ``converse``."""
    contract = libero_contract().model_dump(mode="json")
    first = {"protocol": "reflexarc", "protocol_version": 1, "contract": contract}

    def handler(connection: ServerConnection) -> None:
        connection.send(pack(first))
        with suppress(ConnectionClosed):
            converse(connection)

    server = serve(handler, "127.0.0.1", 0, compression=None)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def receive_request(connection: ServerConnection) -> dict[str, Any]:
    frame = connection.recv()
    assert isinstance(frame, bytes)
    message = unpack(frame)
    assert isinstance(message, dict)
    return message


def answer_request(connection: ServerConnection, message: dict[str, Any]) -> None:
    actions = np.full((10, 7), message["seed"] / 10, np.float32)
    reply = {"actions": actions, "request_id": message["request_id"], "seed": message["seed"]}
    connection.send(pack(reply))


def test_a_late_reply_on_the_same_connection_is_not_the_next_ones(
    observe: MakeObservation,
) -> None:
    def converse(connection: ServerConnection) -> None:
        late, next_one = receive_request(connection), receive_request(connection)
        answer_request(connection, late)
        answer_request(connection, next_one)
        answer_request(connection, receive_request(connection))

    with served_by_hand(converse) as server:
        port = server.socket.getsockname()[1]
        with PolicyClient(f"ws://127.0.0.1:{port}") as client:
            with pytest.raises(DeadlineExceededError):
                client.infer(observe(seed=1, deadline_ms=50.0))
            for seed in (2, 3):
                chunk = client.infer(observe(seed=seed))
                assert chunk.seed == seed and np.allclose(chunk.actions, seed / 10)


@pytest.mark.parametrize("same_id", [False, True])
def test_a_server_that_does_not_keep_up_is_asked_on_a_new_connection(
    observe: MakeObservation, same_id: bool
) -> None:
    connections = []

    def converse(connection: ServerConnection) -> None:
        connections.append(connection)
        while True:
            message = receive_request(connection)
            if len(connections) > 1:
                answer_request(connection, message)

    request_id = "mine" if same_id else None
    with served_by_hand(converse) as server:
        port = server.socket.getsockname()[1]
        with PolicyClient(f"ws://127.0.0.1:{port}") as client:
            for _ in range(1 if same_id else 4):
                with pytest.raises(DeadlineExceededError):
                    client.infer(observe(seed=1, deadline_ms=50.0, request_id=request_id))
            assert len(connections) == 1
            assert client.infer(observe(seed=2, request_id=request_id)).seed == 2
    assert len(connections) == 2


@both_clients
def test_a_deadline_bounds_the_search_for_a_server_that_died(
    server_process: Any, observe: MakeObservation, client_class: Client
) -> None:
    server_process.start()
    with client_class(server_process.url, retry_for=30) as client:
        client.infer(observe())
        server_process.kill()
        started = time.monotonic()
        with pytest.raises(ServerUnavailableError):
            client.infer(observe(deadline_ms=300.0))
        assert time.monotonic() - started < 15  # not the 30 s of retry_for


def test_threads_take_turns_on_one_connection(
    policy_server: BackgroundServer, observe: MakeObservation
) -> None:
    seeds = range(24)
    with PolicyClient(policy_server.url) as client, ThreadPoolExecutor(6) as pool:
        chunks = list(pool.map(lambda seed: client.infer(observe(seed=seed)), seeds))
    for seed, chunk in zip(seeds, chunks, strict=True):
        expected = NullPolicy().infer([observe(seed=seed)])[0].actions
        np.testing.assert_array_equal(chunk.actions, expected)


def test_reply_that_came_after_ctrl_c_is_not_taken_for_the_next(observe: MakeObservation) -> None:
    class SlowOnce(NullPolicy):
        def infer(self, observations: Any) -> Any:
            time.sleep(1.0 if observations[0].seed == 1 else 0.0)
            return super().infer(observations)

    with BackgroundServer(SlowOnce) as server, PolicyClient(server.url) as client:
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(KeyboardInterrupt):
                client.infer(observe(seed=1))
        finally:
            signal.signal(signal.SIGALRM, before)
        assert client.infer(observe(seed=2)).seed == 2


@both_clients
def test_a_server_on_this_machine_is_asked_without_a_proxy(
    observe: MakeObservation, client_class: Client, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with BackgroundServer(NullPolicy) as server, client_class(server.url, retry_for=1) as client:
        assert client.infer(observe(seed=3)).seed == 3


def fake_first_frame(frame: bytes | str) -> Any:
    def handler(connection: ServerConnection) -> None:
        connection.send(frame)
        connection.recv()

    return serve(handler, "127.0.0.1", 0, compression=None)


OTHER_SERVERS: dict[str, tuple[bytes | str, str]] = {
    "text": ("hello", "no reflexarc server"),
    "openpi": (pack({}), "no reflexarc server"),
    "garbage": (b"\xc1", "extension types|not a valid message"),
    "newer protocol": (
        pack({"protocol": "reflexarc", "protocol_version": 99, "contract": {}}),
        "protocol version 99",
    ),
    "no contract": (
        pack({"protocol": "reflexarc", "protocol_version": 1, "contract": {"family": "x"}}),
        "contract of",
    ),
}


@pytest.mark.parametrize("frame,message", OTHER_SERVERS.values(), ids=OTHER_SERVERS.keys())
def test_other_servers_are_named_at_once(frame: bytes | str, message: str) -> None:
    with fake_first_frame(frame) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.socket.getsockname()[1]
        with pytest.raises(CodecError, match=message):
            PolicyClient(f"ws://127.0.0.1:{port}", retry_for=5)


@pytest.mark.parametrize("actions", [np.zeros((10, 6)), np.full((10, 7), np.nan), np.zeros(7)])
def test_chunk_that_must_not_be_executed_is_refused(
    observe: MakeObservation, actions: np.ndarray[Any, Any]
) -> None:
    contract = libero_contract().model_dump(mode="json")
    first = {"protocol": "reflexarc", "protocol_version": 1, "contract": contract}

    def handler(connection: ServerConnection) -> None:
        connection.send(pack(first))
        connection.recv()
        connection.send(pack({"actions": actions, "request_id": "r", "seed": 1}))
        connection.recv()

    with serve(handler, "127.0.0.1", 0, compression=None) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.socket.getsockname()[1]
        with PolicyClient(f"ws://127.0.0.1:{port}") as client, pytest.raises(ReflexarcError):
            client.infer(observe(request_id="r"))


ADDRESSES = [
    "127.0.0.1:80",
    "ws://127.0.0.1:80",
    "http://127.0.0.1:80/",
    "ws://127.0.0.1:80/v1/policy",
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_addresses(address: str) -> None:
    assert websocket_url(address) == "ws://127.0.0.1:80/v1/policy"
    assert http_url(address) == "http://127.0.0.1:80"


@pytest.mark.parametrize("address", ["", "ftp://x", "ws://", "ws://x:99999", "ws://x:port"])
def test_wrong_address_is_named(address: str) -> None:
    for client_class in (PolicyClient, HttpPolicyClient):
        with pytest.raises(ConfigError, match="no server address"):
            client_class(address)
