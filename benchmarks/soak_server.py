"""The server process of ``soak.py``: its policy proves whose request a reply belongs to."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import subprocess
import time
import zlib
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import httpx

from reflexarc.contract import ActionChunk, Observation
from reflexarc.server import NullPolicy, PolicyServer, PolicyService
from reflexarc.server.lifecycle import open_port


class OwnActions(NullPolicy):
    """Each observation has actions of its own, drawn from a hash of images, state and seed.

    Args:
        seconds: that a batch takes.

    Attributes:
        inferred: ids of the requests that it was given, in order, where a batch takes time.
    """

    max_batch = 8

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__()
        self._seconds = seconds
        self.inferred: list[str | None] = []

    def infer(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        if self._seconds:
            self.inferred += [observation.request_id for observation in observations]
            time.sleep(self._seconds)
        return [self._own(observation) for observation in observations]

    def _own(self, observation: Observation) -> ActionChunk:
        assert observation.seed is not None
        checksum = zlib.crc32(observation.state.tobytes(), observation.seed)
        for name in self.contract.camera_names:
            checksum = zlib.crc32(observation.images[name].tobytes(), checksum)
        (chunk,) = super().infer([replace(observation, seed=checksum)])
        return replace(chunk, seed=observation.seed)


def serve(port: Connection, log: Path, seconds: float, inferred: Path) -> None:
    """Serve until SIGTERM, the log in one file and the ids of what was inferred in another."""
    logging.basicConfig(filename=log, level=logging.WARNING)
    listener = open_port("127.0.0.1", 0)
    port.send(listener.getsockname()[1])
    policy = OwnActions(seconds)
    PolicyServer(PolicyService(lambda: policy)).run([listener])
    inferred.write_text(json.dumps(policy.inferred))


class ServerProcess:
    """The server while the ``with`` block runs.

    Args:
        folder: for its log.
        seconds: that a batch takes.

    Attributes:
        failures: after the block, what went wrong in the server.
    """

    def __init__(self, folder: Path, seconds: float = 0.0) -> None:
        self._log, self._inferred, self._seconds = folder / "log", folder / "inferred", seconds
        self._terminated = False
        self.failures: list[str] = []

    def __enter__(self) -> ServerProcess:
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        arguments = (there, self._log, self._seconds, self._inferred)
        self._process = context.Process(target=serve, args=arguments, daemon=True)
        self._process.start()
        there.close()  # so that a server that dies is an EOFError below
        self.address = f"127.0.0.1:{here.recv()}"
        while self.alive() and not self._ready():
            time.sleep(0.05)
        return self

    def _ready(self) -> bool:
        return httpx.get(f"http://{self.address}/readyz", trust_env=False).status_code == 200

    def alive(self) -> bool:
        return self._process.is_alive()

    def terminate(self) -> None:
        """Send SIGTERM, once: a second one would end the server at once."""
        if not self._terminated:
            self._terminated = True
            self._process.terminate()

    def inferred(self) -> list[str]:
        """After the block: ids of the requests that reached the policy."""
        found: list[str] = json.loads(self._inferred.read_text())
        return found

    def memory(self) -> float:
        """Resident MB."""
        assert self._process.pid is not None
        status = Path(f"/proc/{self._process.pid}/statm")
        if status.is_file():
            return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
        asked = ["ps", "-o", "rss=", "-p", str(self._process.pid)]
        kilobytes = subprocess.run(asked, capture_output=True, check=False).stdout
        return int(kilobytes or 0) * 1024 / 1e6

    def __exit__(self, *_: object) -> None:
        if not self._terminated and not self.alive():
            self.failures.append(f"the server ended with {self._process.exitcode} by itself")
        self.terminate()
        self._process.join(60)
        if self._process.exitcode != 0:
            self.failures.append(f"the server's exit code is {self._process.exitcode}, 0 was due")
            self._process.kill()
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        self.failures += [line for line in lines if line.startswith("ERROR")]
