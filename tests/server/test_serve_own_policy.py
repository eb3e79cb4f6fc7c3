"""serve-policy --policy as a process, and examples/my_policy.py driven through it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from reflexarc.client import PolicyClient, RecedingHorizonExecutor
from reflexarc.contract import Observation

ROOT = Path(__file__).resolve().parents[2]
# A robot's bring-up computer has no torch: importing it raises here.
SERVE = (
    sys.executable,
    "-P" if sys.version_info >= (3, 11) else "-s",  # a console script has no "" in its path
    "-c",
    "import sys; sys.modules['torch'] = None\n"
    "from reflexarc.cli.main import serve_policy; serve_policy()",
)
EXAMPLE = ("--policy", "examples.my_policy:ReachPoint")


@contextmanager
def serving(*options: str | Path, folder: Path = ROOT) -> Iterator[list[str]]:
    """The lines that the command prints until it is ready."""
    process = subprocess.Popen(
        [*SERVE, *options, "--port", "0"], stdout=subprocess.PIPE, text=True, cwd=folder
    )
    assert process.stdout is not None
    try:
        lines = [process.stdout.readline()]
        while lines[-1] and not lines[-1].startswith("Ready"):
            lines.append(process.stdout.readline())
        assert lines[-1], f"serve-policy ended with {process.wait()}: {lines}"
        yield lines
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.stdout.close()


def url_of(lines: list[str]) -> str:
    return next(word for word in lines[0].split() if word.startswith("ws://"))


def reach(url: str) -> np.ndarray:  # type: ignore[type-arg]
    """Where an arm that does what it is told ends after 60 steps."""
    position = np.array([-0.15, 0.0, 0.26])
    with PolicyClient(url) as policy:
        camera = policy.contract.cameras[0]
        image = np.zeros((camera.height, camera.width, 3), np.uint8)

        def observe() -> Observation:
            return Observation({camera.name: image}, np.concatenate([position, np.zeros(5)]))

        executor = RecedingHorizonExecutor(policy, replan_steps=4)
        for _ in range(60):
            action = executor.next_action(observe)
            assert np.abs(action).max() <= 1 and action[6] == -1
            position += 0.05 * action[:3]
    return position


def test_example_reaches_its_point(tmp_path: Path) -> None:
    with serving(*EXAMPLE) as lines:
        assert "reach_point: agentview 128x128" in lines[1]
        np.testing.assert_allclose(reach(url_of(lines)), [0.05, 0.2, 0.35], atol=1e-3)
    config = tmp_path / "target.json"
    config.write_text('{"target": [0, 0, 0.4]}')
    with serving(*EXAMPLE, "--policy-config", config) as lines:
        np.testing.assert_allclose(reach(url_of(lines)), [0, 0, 0.4], atol=1e-3)


def test_contract_of_an_instance_is_printed_when_it_is_known(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        "from reflexarc.server import libero_contract\n"
        "class Mine:\n"
        "    def __init__(self): self.contract = libero_contract(horizon=2)\n"
        "    def infer(self, observation): return np.zeros((2, 7))\n"
    )
    with serving("--policy", "mine:Mine", folder=tmp_path) as lines:
        assert lines[-2].startswith("Contract: null: agentview 224x224")


@pytest.mark.parametrize("policy", ["random", "zero"])
def test_bring_up_policies_need_no_torch(policy: str) -> None:
    with serving("--policy", policy) as lines, PolicyClient(url_of(lines)) as client:
        assert client.contract.family == policy


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), "nothing to serve"),
        (("--policy", "nowhere:Mine"), "no module 'nowhere'"),
        (("--policy", "raises:Mine"), "ValueError: no camera"),
        (("--policy", "raises:NoContract"), "needs an attribute 'contract'"),
        (("--policy", "zero", "--device", "cpu"), "--device and --denoising-steps are for"),
        (("--ckpt", "x", "--policy-config", "c.json"), "does not go with --ckpt"),
    ],
)
def test_named_errors_end_the_command(
    tmp_path: Path, options: tuple[str, ...], expected: str
) -> None:
    (tmp_path / "raises.py").write_text(
        "class Mine:\n"
        "    def __init__(self): raise ValueError('no camera')\n"
        "    def infer(self, observation): ...\n"
        "class NoContract:\n"
        "    def infer(self, observation): ...\n"
    )
    finished = subprocess.run(
        [*SERVE, *options, "--port", "0"], cwd=tmp_path, capture_output=True, text=True,
        timeout=60, check=False, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    assert finished.returncode == 2, finished.stderr
    assert expected in finished.stderr
    assert "error [config]" in finished.stderr
