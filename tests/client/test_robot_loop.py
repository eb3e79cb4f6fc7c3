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
    steps = [line for line in lines if not line.startswith("guard:")]
    assert [int(line.split()[0]) for line in steps] == list(range(40))
    actions = np.array([line.partition("[")[2].rstrip("]").split() for line in steps], float)
    assert actions.shape == (40, 7)
    moving = actions[np.abs(actions[:, :6]).max(1) > 0]
    assert len(moving) >= 20, "it hardly moved"
    assert len(np.unique(moving, axis=0)) == len(moving), "an action was executed twice"
    # Half of the speed; the gripper alone may use its whole range.
    assert np.abs(actions[:, :6]).max() == 0.5 and np.abs(actions[:, 6]).max() > 0.5
    said = [line for line in lines if line.startswith("guard:")]
    assert any("clamped at step" in line and "delta_" in line for line in said)
    assert "'clamped'" in said[-1] and "chunks" in said[-1]
