"""A contract that LIBERO can meet, and a policy server as a process that can be killed."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from reflexarc.contract.policy_contract import (
    LIBERO_STATE_EEF,
    PolicyContract,
    libero_action,
    libero_cameras,
)

SERVER_PROGRAM = Path(__file__).parent / "null_policy_server.py"


@pytest.fixture
def null_contract() -> PolicyContract:
    return PolicyContract(
        family="null",
        cameras=libero_cameras(64, 128),
        state=LIBERO_STATE_EEF,
        action=libero_action(10),
        checkpoint_fingerprint="null-1",
    )


class NullServer:
    """Starts and kills ``null_policy_server.py`` on one port, as often as a test likes."""

    def __init__(self, contract: PolicyContract, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = int(probe.getsockname()[1])
        self.url = f"ws://127.0.0.1:{self.port}"
        self.log = folder / "requests.jsonl"
        self._contract_file = folder / "contract.json"
        self.serve(contract)
        self._process: subprocess.Popen[bytes] | None = None

    def serve(self, contract: PolicyContract) -> None:
        """What the next start serves."""
        self._contract_file.write_text(contract.model_dump_json())

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, SERVER_PROGRAM, str(self.port), self._contract_file, self.log]
        )
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                time.sleep(0.05)
        raise TimeoutError("the null server did not open its port")

    def kill(self) -> None:
        """SIGKILL: no goodbye on the sockets."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@pytest.fixture
def null_server(null_contract: PolicyContract, tmp_path: Path) -> Iterator[NullServer]:
    folder = tmp_path / "server"
    folder.mkdir()
    server = NullServer(null_contract, folder)
    yield server
    server.kill()
