"""What the client's tests share: observations, and a server process that can be killed."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from reflexarc.contract import Observation
from reflexarc.server import BackgroundServer, NullPolicy

MakeObservation = Callable[..., Observation]

_SERVER = """
import sys, time
from reflexarc.server import NullPolicy, PolicyServer, PolicyService, libero_contract
from reflexarc.server.lifecycle import open_port

class Slow(NullPolicy):
    def infer(self, observations):
        time.sleep(float(sys.argv[2]))
        return super().infer(observations)

load = lambda: Slow(libero_contract(horizon=int(sys.argv[3])))
PolicyServer(PolicyService(load)).run([open_port("127.0.0.1", int(sys.argv[1]))])
"""


class ServerProcess:
    """A null policy in a process of its own, on a port that stays the same over restarts."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"ws://127.0.0.1:{port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, seconds: float = 0.0, horizon: int = 10, *, wait: bool = True) -> None:
        arguments = [str(self.port), str(seconds), str(horizon)]
        self.process = subprocess.Popen([sys.executable, "-c", _SERVER, *arguments])
        if wait:
            self.wait_until_ready()

    def wait_until_ready(self) -> None:
        for _ in range(400):
            try:
                if httpx.get(f"http://127.0.0.1:{self.port}/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        pytest.fail("the server process did not become ready")

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def server_process(free_port: int) -> Iterator[ServerProcess]:
    server = ServerProcess(free_port)
    yield server
    server.kill()


@pytest.fixture
def free_port() -> int:
    with BackgroundServer(NullPolicy) as probe:
        return probe.port


@pytest.fixture(scope="session")
def policy_server() -> Iterator[BackgroundServer]:
    with BackgroundServer(NullPolicy) as server:
        yield server


@pytest.fixture
def observe() -> MakeObservation:
    def make(**fields: Any) -> Observation:
        rng = np.random.default_rng(0)
        images = {
            name: rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)
            for name in ("agentview", "eye_in_hand")
        }
        values = {"instruction": "put the bowl on the plate", "seed": 7, **fields}
        return Observation(images=images, state=rng.normal(size=8), **values)

    return make
