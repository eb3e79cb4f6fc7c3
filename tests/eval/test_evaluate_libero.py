"""Smoke: the real simulator, real sockets and the real command, a few steps an episode.

What is served is a random policy, so nothing here says how well any policy does.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import h5py
import numpy as np
import pytest
from typer.testing import CliRunner

from reflexarc.cli.main import app
from reflexarc.contract.errors import ReflexarcError
from reflexarc.contract.policy_contract import PolicyContract, StateSpec
from reflexarc.eval.baselines import request_seed
from reflexarc.eval.libero.suites import load_tasks

from .conftest import NullServer

# The command itself, and at its end whether torch was imported on the way.
COMMAND = (
    "import sys\n"
    "from reflexarc.cli.main import main\n"
    "try:\n"
    "    main()\n"
    "finally:\n"
    "    print('TORCH IMPORTED' if 'torch' in sys.modules else 'no torch')\n"
)


HANGS_AFTER = 1800.0
"""Seconds. A busy machine needs minutes for what takes 20 s alone, and only a hang must end."""


def start(server: NullServer, output: Path, *options: str) -> subprocess.Popen[str]:
    """``reflexarc eval libero`` with short episodes, as a process of its own."""
    arguments = ["eval", "libero", "--server", server.url, "--output", str(output)]
    arguments += ["--max-steps", "24", "--replan-steps", "8", *options]
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    try:
        printed, _ = process.communicate(timeout=HANGS_AFTER)
    except subprocess.TimeoutExpired:
        process.kill()  # a simulator holds 2 GB
        raise
    assert process.returncode == status, printed
    assert "no torch" in printed and "Traceback" not in printed, printed
    return printed


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_requests(server: NullServer, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + HANGS_AFTER
    while len(read_lines(server.log)) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def demonstrations(tmp_path: Path) -> Path:
    """One demonstration of task 0, ten steps long, that closes the gripper."""
    folder = tmp_path / "demonstrations"
    folder.mkdir()
    task = load_tasks("libero_object")[0]
    actions = np.zeros((10, 7))
    actions[:, 6] = 1.0
    with h5py.File(folder / f"{task.name}_demo.hdf5", "w") as file:
        data = file.create_group("data")
        data.attrs["alignment"] = "before_action"
        data.attrs["render_stride"] = 4
        data.attrs["problem_info"] = json.dumps({"language_instruction": task.instruction})
        demo = data.create_group("demo_0")
        demo.attrs["num_samples"] = len(actions)
        demo["actions"] = actions
        for name, width in (("ee_pos", 3), ("ee_ori", 3), ("gripper_states", 2)):
            demo[f"obs/{name}"] = np.zeros((len(actions), width))
        demo["obs/joint_states"] = np.zeros((len(actions), 7))
        demo["obs/image_steps"] = np.array([0, 4, 8])
        for camera in ("agentview_rgb", "eye_in_hand_rgb"):
            demo[f"obs/{camera}"] = np.zeros((3, 8, 8, 3), np.uint8)
    return folder


def keys(lines: Sequence[dict[str, Any]]) -> list[tuple[int, int, str]]:
    return [(line["task"], line["state"], line["arm"]) for line in lines]


@pytest.mark.simulator
def test_smoke_of_all_arms(null_server: NullServer, tmp_path: Path, demonstrations: Path) -> None:
    null_server.start()
    output = tmp_path / "output"
    options = ["--tasks", "0", "--states", "40", "--videos", "all"]
    options += ["--baselines", "replay,blank", "--demonstrations", str(demonstrations)]
    printed = finish(start(null_server, output, *options))
    assert "libero_object, init states 40" in printed and "[0, 79]" in printed

    lines = read_lines(output / "results.jsonl")
    assert keys(lines) == [(0, 40, "policy"), (0, 40, "replay"), (0, 40, "blank")]
    assert [line["chunks"] for line in lines] == [3, 0, 3]
    for line in lines:
        assert (line["steps"], line["success"], line["reason"]) == (24, False, "timeout")
        assert line["checkpoint_fingerprint"] == "null-1"
    assert lines[0]["latency_median_ms"] > 0 and lines[1]["latency_median_ms"] is None

    requests = read_lines(null_server.log)
    policy, blank = requests[:3], requests[3:]
    assert [request["step_index"] for request in policy] == [0, 8, 16]
    seeds = [request_seed(0, 0, 40, chunk) for chunk in range(3)]
    assert [r["seed"] for r in policy] == [r["seed"] for r in blank] == seeds
    assert policy[0]["state"] == blank[0]["state"]  # the same beginning, to the last bit
    assert policy[0]["session_id"] != blank[0]["session_id"]
    assert all(mean > 20 for r in policy for mean in r["image_means"].values())
    assert all(mean == 0 for r in blank for mean in r["image_means"].values())

    for line in lines:
        with av.open(str(output / "videos" / line["video"])) as container:
            pictures = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        assert len(pictures) == 3 + 5
        assert pictures[0].shape == (128 + 40, 256, 3)
        assert pictures[0][40:].mean() > 20  # the blank arm's film shows what was there
    summary = json.loads((output / "summary.json").read_text())
    assert summary["complete"] and summary["total"]["differences"]["replay"]["pairs"] == 1
    assert "blank images" in (output / "summary.md").read_text()

    again = finish(start(null_server, output, *options))
    assert "3 of 3 episodes are finished" in again
    assert read_lines(null_server.log) == requests  # nobody was asked again
    refused = finish(start(null_server, output, *options, "--seed", "1"), status=2)
    assert "seed: there 0, this run 1" in refused


@pytest.mark.simulator
def test_a_killed_server_costs_no_finished_episode(
    null_server: NullServer, null_contract: PolicyContract, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    options = ["--tasks", "0", "--states", "40,41", "--baselines", "none", "--videos", "none"]

    # In the second episode the server dies and stays away.
    null_server.start()
    process = start(null_server, output, *options, "--retry-for", "1")
    wait_for_requests(null_server, 4, process)
    null_server.kill()
    printed = finish(process, status=3)
    assert "run the same command: it resumes" in printed
    first = (output / "results.jsonl").read_bytes()
    assert keys(read_lines(output / "results.jsonl")) == [(0, 40, "policy")]
    assert not json.loads((output / "summary.json").read_text())["complete"]

    # Another checkpoint may not go on with this table.
    null_server.serve(null_contract.model_copy(update={"checkpoint_fingerprint": "null-2"}))
    null_server.start()
    refused = finish(start(null_server, output, *options), status=2)
    assert "checkpoint_fingerprint: there 'null-1', this run 'null-2'" in refused
    null_server.kill()

    # The run resumes; the server dies in the middle of an episode again, and comes back.
    null_server.serve(null_contract)
    null_server.start()
    null_server.log.unlink()
    process = start(null_server, output, *options, "--retry-for", "60")
    wait_for_requests(null_server, 2, process)
    null_server.kill()
    time.sleep(1.0)
    null_server.start()
    printed = finish(process)
    assert "1 of 2 episodes are finished" in printed
    assert (output / "results.jsonl").read_bytes().startswith(first)
    lines = read_lines(output / "results.jsonl")
    assert keys(lines) == [(0, state, "policy") for state in (40, 41)]
    assert [line["chunks"] for line in lines] == [3, 3]
    assert json.loads((output / "summary.json").read_text())["complete"]


def test_an_absent_server_is_said_with_status_3(null_server: NullServer, tmp_path: Path) -> None:
    options = ["--tasks", "0", "--trials", "1", "--baselines", "none", "--retry-for", "0.5"]
    printed = finish(start(null_server, tmp_path / "output", *options), status=3)
    assert "server_unavailable" in printed and null_server.url in printed


def test_a_contract_that_libero_cannot_meet_is_refused_before_the_simulator(
    null_server: NullServer, null_contract: PolicyContract, tmp_path: Path
) -> None:
    state = StateSpec(layout="joint6", names=tuple("abcdef"))
    null_server.serve(null_contract.model_copy(update={"state": state}))
    null_server.start()
    options = ["--tasks", "0", "--trials", "1", "--baselines", "none"]
    printed = finish(start(null_server, tmp_path / "output", *options), status=2)
    assert "contract_violation" in printed
    assert "asked for 'joint6'" in printed
    assert not (tmp_path / "output").exists()


def test_wrong_options_are_named(
    null_server: NullServer, tmp_path: Path, demonstrations: Path
) -> None:
    null_server.start()
    for options, said in (
        (["--tasks", "10", "--baselines", "none"], "tasks 0 to 9, not 10"),
        (["--tasks", "0", "--baselines", "replay"], "give --demonstrations"),
        (["--states", "50", "--baselines", "none"], "--states"),
        (["--suite", "libero_x", "--baselines", "none"], "unknown suite 'libero_x'"),
        (["--demonstrations", str(demonstrations), "--tasks", "1"], "no demonstration of"),
        (["--tasks", "0", "--baselines", "none", "--replan-steps", "11"], "chunk of 10 actions"),
    ):
        arguments = ["eval", "libero", "--server", null_server.url, "--output", str(tmp_path / "o")]
        with pytest.raises(ReflexarcError, match=re.escape(said)):
            CliRunner().invoke(app, [*arguments, *options], catch_exceptions=False)
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
@pytest.mark.simulator
def test_two_workers_give_what_one_gives(null_server: NullServer, tmp_path: Path) -> None:
    null_server.start()
    options = ["--tasks", "0,9", "--states", "40", "--baselines", "blank", "--videos", "none"]

    def run(name: str, workers: str) -> tuple[Counter[str], list[tuple[int, int, str]]]:
        finish(start(null_server, tmp_path / name, *options, "--workers", workers))
        asked = Counter(
            json.dumps([r["seed"], r["state"], r["image_means"]])
            for r in read_lines(null_server.log)
        )
        null_server.log.unlink()
        return asked, sorted(keys(read_lines(tmp_path / name / "results.jsonl")))

    one, two = run("one", "1"), run("two", "2")
    assert len(one[0]) == 12
    assert one == two
