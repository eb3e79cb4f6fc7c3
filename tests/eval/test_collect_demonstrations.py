"""Collected demonstrations show what a live client sees; a killed collection continues."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reflexarc.contract.errors import ConfigError, SimulatorError
from reflexarc.data.libero_episode import Episode
from reflexarc.data.libero_hdf5 import open_libero
from reflexarc.data.libero_writer import TaskFileWriter
from reflexarc.eval.libero.collect import CollectionSettings, collect
from reflexarc.eval.libero.collect_worker import attempt_seed
from reflexarc.eval.libero.expert_goals import UnsupportedGoalError
from reflexarc.eval.libero.simulator import LiberoSimulator
from reflexarc.eval.libero.suites import load_tasks, select_tasks

pytestmark = pytest.mark.simulator
SETTINGS = CollectionSettings(suite="libero_object", image_size=32, render_every=16)


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("libero_object")
    collect(SETTINGS, folder, demos=1, tasks=[0], progress=False)
    return folder


def test_rows_are_what_a_live_client_sees_before_each_action(collection: Path) -> None:
    (episode,) = open_libero([collection]).episodes
    task = load_tasks("libero_object")[0]
    assert episode.instruction == task.instruction
    assert episode.seed == attempt_seed(0, task.name, 0)
    stored_states = _states(episode)
    eef, joints = (episode.states(x) for x in ("eef3+axisangle3+fingers2", "joint7+fingers2"))
    agentview = episode.images("agentview", range(len(episode.image_steps)))
    hand = episode.images("eye_in_hand", range(len(episode.image_steps)))
    with LiberoSimulator(task, image_size=SETTINGS.image_size) as simulator:
        simulator.reset_seeded(episode.seed)
        frame = 0
        for step, action in enumerate(episode.actions()):
            np.testing.assert_array_equal(simulator.state(), stored_states[step])
            state = simulator.observe_state()
            np.testing.assert_array_equal(state.vector("eef3+axisangle3+fingers2"), eef[step])
            np.testing.assert_array_equal(state.vector("joint7+fingers2"), joints[step])
            if step == episode.image_steps[frame]:
                images = simulator.observe().images
                np.testing.assert_array_equal(images["agentview"], agentview[frame])
                np.testing.assert_array_equal(images["eye_in_hand"], hand[frame])
                frame = min(frame + 1, len(agentview) - 1)
            success = simulator.step(action)
        assert success
        assert step >= episode.image_steps[-1] == (len(agentview) - 1) * SETTINGS.render_every


def _states(episode: Episode) -> np.ndarray:
    import h5py

    with h5py.File(episode.path) as file:
        return np.asarray(file[f"data/{episode.demo}/states"])


def test_summary_and_contact_sheet(collection: Path) -> None:
    summary = json.loads((collection / "summary.json").read_text())
    (row,) = summary["tasks"]
    assert (row["index"], row["demos"]) == (0, 1)
    assert summary["settings"] == SETTINGS.model_dump()
    with Image.open(collection / "contact_sheet.png") as sheet:
        pixels = np.asarray(sheet)
    assert pixels.std() > 10
    assert not any(".tmp" in path.name for path in collection.rglob("*"))


def test_other_settings_are_not_mixed_in(collection: Path) -> None:
    other = SETTINGS.model_copy(update={"action_noise": 0.2})
    with pytest.raises(ConfigError, match=r"action_noise.*0\.1"):
        collect(other, collection, demos=1, tasks=[0], progress=False)


def test_an_unsupported_task_is_an_error_before_anything_is_written(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"suite": "libero_goal"})
    with pytest.raises(UnsupportedGoalError, match="open the middle drawer"):
        collect(settings, tmp_path / "new", demos=1, tasks=[1, 0], progress=False)
    assert not (tmp_path / "new").exists()


def test_a_task_that_keeps_failing_is_named(
    tmp_path: Path,
) -> None:
    (task,) = select_tasks("libero_object", [3])
    writer = TaskFileWriter(tmp_path, task.name)
    for attempt in range(12):
        writer.add_failure(attempt, "slipped")
    with pytest.raises(SimulatorError, match=r"task 3 .* 12 of 12 attempts failed"):
        collect(SETTINGS, tmp_path, demos=1, tasks=[3], progress=False)


def test_seeds_differ_by_task_attempt_and_base() -> None:
    seeds = {
        attempt_seed(base, task, number)
        for base in (0, 1)
        for task in ("a", "b")
        for number in range(100)
    }
    assert len(seeds) == 400
    assert attempt_seed(0, "a", 0) == attempt_seed(0, "a", 0)


@pytest.mark.slow
def test_a_killed_collection_continues_to_the_same_result(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from reflexarc.eval.libero.collect import CollectionSettings, collect\n"
        "if __name__ == '__main__':\n"
        "    settings = CollectionSettings(\n"
        "        suite='libero_object', image_size=32, render_every=16)\n"
        "    collect(settings, Path(sys.argv[1]), demos=4, tasks=[0], workers=2, progress=False)\n"
    )
    script = tmp_path / "run.py"
    script.write_text(code)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, str(script)]

    process = subprocess.Popen([*command, str(killed)], start_new_session=True)
    parts = killed / ".parts"
    deadline = time.monotonic() + 300
    while len(list(parts.rglob("*.hdf5"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _wait_until_group_is_gone(process.pid)
    assert not list(killed.glob("*.hdf5"))
    kept = {path.name: path.stat().st_mtime_ns for path in parts.rglob("*.hdf5")}

    subprocess.run([*command, str(killed)], check=True, timeout=600)
    subprocess.run([*command, str(whole)], check=True, timeout=600)
    assert len(kept) >= 2
    assert not list(killed.rglob("*.tmp")) and not parts.exists()
    interrupted, uninterrupted = (open_libero([folder]) for folder in (killed, whole))
    assert len(interrupted.episodes) == len({e.seed for e in interrupted.episodes}) == 4
    assert interrupted.fingerprint() == uninterrupted.fingerprint()


def _wait_until_group_is_gone(group: int) -> None:
    """Workers leave by themselves when their parent was killed."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.2)
    os.killpg(group, signal.SIGKILL)
    pytest.fail("workers outlived their parent")
