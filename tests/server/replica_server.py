"""serve-policy --replicas as a process, for tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reflexarc.contract import Observation

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-c", "from reflexarc.cli.main import serve_policy; serve_policy()")
INSTRUCTION = "pick up the alphabet soup"


def environment() -> dict[str, str]:
    """Ray's files beside those of others; sockets' paths are short, so in /tmp itself."""
    return {
        **os.environ,
        "COLUMNS": "200",
        "OMP_NUM_THREADS": "1",
        "RAY_TMPDIR": tempfile.gettempdir(),
        "RAY_AUTH_MODE": "disabled",
    }


@dataclass
class ReplicaServer:
    """A server that is ready: its address, its process, where its log goes."""

    url: str
    process: subprocess.Popen[str]
    log: Path

    def said(self) -> str:
        return self.log.read_text()

    def wait_for(self, text: str, seconds: float = 120.0) -> None:
        end = time.monotonic() + seconds
        while text not in self.said():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < end, (
                f"{text!r} was not said within {seconds} s: {self.said()}"
            )
            time.sleep(0.1)


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[ReplicaServer]:
    """``serve-policy`` with these options, from its readiness to its orderly end."""
    log = folder / "serve.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*COMMAND, *options, "--port", "0"],
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=environment(),
        )
        try:
            server = ReplicaServer("", process, log)
            server.wait_for("Ready.", 600)
            server.url = next(word for word in server.said().split() if word.startswith("ws://"))
            yield server
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, server.said()
        finally:
            process.kill()
            process.wait()


def run(*options: str) -> subprocess.CompletedProcess[str]:
    """``serve-policy`` with options that it refuses."""
    return subprocess.run(
        [*COMMAND, *options],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
        env=environment(),
        check=False,
    )


def observe(step: int, **fields: object) -> Observation:
    """An observation of the policies in ``replica_policies``; its state says the step."""
    images = {name: np.zeros((32, 32, 3), np.uint8) for name in ("agentview", "eye_in_hand")}
    state = np.zeros(8)
    state[0] = step
    values = {"instruction": INSTRUCTION, "step_index": step, **fields}
    return Observation(images, state, **values)  # type: ignore[arg-type]
