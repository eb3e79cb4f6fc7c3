"""examples/robot_loop.py runs as it stands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from reflexarc.server import BackgroundServer

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "robot_loop.py"


def test_example_runs(policy_server: BackgroundServer) -> None:
    finished = subprocess.run(
        [sys.executable, EXAMPLE, policy_server.url],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    lines = finished.stdout.splitlines()
    assert [int(line.split()[0]) for line in lines] == list(range(40))
    actions = np.array([line.partition("[")[2].rstrip("]").split() for line in lines], float)
    assert actions.shape == (40, 7)
    assert len(np.unique(actions, axis=0)) == 40, "an action of the null policy's was repeated"
    assert np.abs(actions).max() <= 1
