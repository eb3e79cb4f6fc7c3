"""examples/robot_loop.py runs as it stands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from reflexarc.server import BackgroundServer

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "robot_loop.py"


def test_example_runs(policy_server: BackgroundServer) -> None:
    finished = subprocess.run(
        [sys.executable, EXAMPLE, policy_server.url],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    lines = finished.stdout.splitlines()
    assert len(lines) == 41
    assert lines[-1].startswith("5 chunks")
