"""SIGTERM while many ask: every request that was accepted is answered; the second one ends all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from reflexarc.contract import Observation, pack, unpack
from reflexarc.server import BackgroundServer, NullPolicy, Phase

MakeObservation = Callable[..., Observation]
SERVER = """
import sys, time
from reflexarc.server import NullPolicy, PolicyServer, PolicyService
from reflexarc.server.lifecycle import open_port

class Slow(NullPolicy):
    cheap = False
    def infer(self, observations):
        time.sleep(float(sys.argv[1]))
        return super().infer(observations)

listener = open_port("127.0.0.1", 0)
print(listener.getsockname()[1], flush=True)
PolicyServer(PolicyService(Slow), on_ready=lambda: print("ready", flush=True)).run([listener])
"""


@contextmanager
def serving(seconds: float) -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(seconds)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        assert process.stdout.readline() == "ready\n"
        yield process, f"ws://127.0.0.1:{port}/v1/policy"
    finally:
        process.kill()
        process.wait()


class Client(threading.Thread):
    """Asks until the server ends; knows what became of each request."""

    def __init__(self, url: str, frame: bytes) -> None:
        super().__init__(daemon=True)
        self.url, self.frame = url, frame
        self.answered, self.refused, self.unanswered = 0, 0, 0
        self.refused_at: float | None = None

    def run(self) -> None:
        with connect(self.url, compression=None) as connection:
            connection.recv(timeout=20)
            while True:
                try:
                    connection.send(self.frame)
                except ConnectionClosed:
                    return
                try:
                    reply = unpack(connection.recv(timeout=20))
                except ConnectionClosed:
                    self.unanswered += 1
                    return
                if "actions" in reply:
                    self.answered += 1
                else:
                    assert reply["error"]["code"] == "not_ready"
                    self.refused += 1
                    time.sleep(0.05)


def test_sigterm_under_load_loses_no_request(make_observation: MakeObservation) -> None:
    frame = pack(make_observation().to_wire())
    with serving(0.15) as (process, url):
        clients = [Client(url, frame) for _ in range(8)]
        for client in clients:
            client.start()
        while sum(client.answered for client in clients) < 24:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        for client in clients:
            client.join(20)
    # A request that is sent after the last refusal may meet the closed socket, but none before.
    for client in clients:
        assert client.refused >= client.unanswered, "it was lost without a word"
        assert client.answered >= 1


def test_second_signal_ends_an_inference_that_takes_long(
    make_observation: MakeObservation,
) -> None:
    with serving(30.0) as (process, url), connect(url, compression=None) as connection:
        connection.recv(timeout=20)
        connection.send(pack(make_observation().to_wire()))
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.send_signal(signal.SIGTERM)
        process.wait(10)


class CompilesLong(NullPolicy):
    """Keeps the interpreter busy while it is warmed, as a compiler does."""

    def __init__(self) -> None:
        super().__init__()
        self.compiling, self.may_end = threading.Event(), threading.Event()

    def warm_up(self) -> None:
        self.compiling.set()
        while not self.may_end.is_set():
            sum(range(1000))


def test_pings_are_answered_while_the_policy_compiles(make_observation: MakeObservation) -> None:
    policy = CompilesLong()
    with BackgroundServer(lambda: policy, wait=False) as server:
        assert policy.compiling.wait(20)
        with connect(f"{server.url}/v1/policy", compression=None) as connection:
            assert connection.ping().wait(10)
            connection.send(pack(make_observation(seed=3).to_wire()))  # before it is ready
            assert connection.ping().wait(10), "also behind a request that waits"
            assert server.service.phase is Phase.WARMING
            policy.may_end.set()
            assert "contract" in unpack(connection.recv(timeout=10))
            reply: Any = unpack(connection.recv(timeout=10))
            assert reply["seed"] == 3, "what came early is answered once the policy is ready"
