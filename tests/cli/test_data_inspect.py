"""``reflexarc data inspect`` as a person runs it: table, JSON, exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest


@pytest.fixture
def demonstrations(tmp_path: Path) -> Path:
    """Two small demos in LIBERO's layout, as OpenVLA regenerates it."""
    path = tmp_path / "put_the_bowl_on_the_stove_demo.hdf5"
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for demo in ("data/demo_0", "data/demo_2"):
            for key, width in (
                ("ee_pos", 3), ("ee_ori", 3), ("gripper_states", 2), ("joint_states", 7)
            ):  # fmt: skip
                file[f"{demo}/obs/{key}"] = rng.normal(size=(6, width))
            for camera in ("agentview_rgb", "eye_in_hand_rgb"):
                file[f"{demo}/obs/{camera}"] = rng.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
            actions = rng.uniform(-1, 1, (6, 7))
            actions[:, 6] = -1
            file[f"{demo}/actions"] = actions
    return path


def inspect(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from reflexarc.cli.main import main; main()"]
    return subprocess.run(
        [*command, "data", "inspect", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={"COLUMNS": "120", "PATH": ""},
    )


def test_a_sound_folder(demonstrations: Path, tmp_path: Path) -> None:
    report = tmp_path / "reports" / "report.json"
    result = inspect(demonstrations.parent, "--json", report)
    assert result.returncode == 0, result.stderr
    for words in (
        "put the bowl on the stove",
        "2, 6 to 6 steps",
        "12 a camera, 8x8 px",
        "before their action (regenerated: neither env_args nor num_samples)",
        "constant action: gripper",
    ):
        assert words in result.stdout
    (file,) = json.loads(report.read_text())["files"]
    assert file["steps"] == 12 and file["problems"] == []


def test_bad_demos_end_with_status_2(demonstrations: Path, tmp_path: Path) -> None:
    with h5py.File(demonstrations, "r+") as file:
        file["data/demo_2/actions"][3, 0] = np.nan
    report = tmp_path / "report.json"
    result = inspect(demonstrations, "--json", report)
    assert result.returncode == 2
    where = "actions is nan at row 3, dimension 0"
    for words in ("error [dataset]", demonstrations.name, "demo_2", where):
        assert words in result.stderr
    assert "1, 6 to 6 steps" in result.stdout  # the sound demo is still reported
    (problem,) = json.loads(report.read_text())["files"][0]["problems"]
    assert (problem["demo"], problem["key"]) == ("demo_2", "actions")


def test_wrong_arguments(demonstrations: Path) -> None:
    result = inspect(demonstrations, "--alignment", "middle")
    assert result.returncode == 2 and "before_action, after_action" in result.stderr
    result = inspect(demonstrations.parent / "nowhere")
    assert result.returncode == 2 and "nowhere does not exist" in result.stderr
