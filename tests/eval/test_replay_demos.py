"""Replay of demonstrations: what is done wrong on purpose, and how the report shows it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from typer.testing import CliRunner

from reflexarc.cli.main import app
from reflexarc.contract.errors import ConfigError, DatasetError
from reflexarc.eval.durable_log import ResultsError
from reflexarc.eval.libero.simulator import LiberoSimulator, RawState
from reflexarc.eval.replay_demos import ReplaySettings, plan_replay, replay
from reflexarc.eval.replay_episode import (
    Mistakes,
    Replayed,
    ReplayIdentity,
    altered_actions,
    hand_errors,
    replay_episode,
)
from reflexarc.eval.replay_report import markdown, summary_rows, write_replay

OBJECT = ReplayIdentity(suite="libero_object")
OFF_BY_ONE = ReplayIdentity(suite="libero_object", mistakes=Mistakes(action_shift=1))


@pytest.fixture
def actions() -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (9, 7))


def test_nothing_changes_without_a_mistake(actions: np.ndarray) -> None:
    np.testing.assert_array_equal(altered_actions(actions, Mistakes()), actions)


def test_actions_are_shifted_by_a_step(actions: np.ndarray) -> None:
    late = altered_actions(actions, Mistakes(action_shift=1))
    np.testing.assert_array_equal(late, actions[1:])
    early = altered_actions(actions, Mistakes(action_shift=-1))
    np.testing.assert_array_equal(early, np.concatenate([actions[:1], actions]))
    with pytest.raises(ConfigError, match="leaves nothing"):
        altered_actions(actions, Mistakes(action_shift=9))


def test_rotations_are_read_in_another_layout(actions: np.ndarray) -> None:
    turned = altered_actions(actions, Mistakes(action_rotation="reversed"))
    np.testing.assert_array_equal(turned[:, [5, 4, 3]], actions[:, 3:6])
    euler = altered_actions(actions, Mistakes(action_rotation="euler"))
    meant = Rotation.from_euler("xyz", actions[:, 3:6] * 0.5)
    executed = Rotation.from_rotvec(euler[:, 3:6] * 0.5)
    inside = np.abs(euler[:, 3:6]).max(axis=1) < 1
    assert inside.sum() > 4
    assert (meant.inv() * executed).magnitude()[inside].max() < 1e-6
    others = [0, 1, 2, 6]
    for changed in (turned, euler):
        np.testing.assert_array_equal(changed[:, others], actions[:, others])


def hand(position: np.ndarray, rotation: Rotation) -> RawState:
    zeros = np.zeros(7)
    return RawState(position, rotation.as_quat(), rotation.as_rotvec(), zeros[:2], zeros)


def test_errors_are_the_largest_distance_and_angle() -> None:
    turns = Rotation.from_rotvec([[np.pi - 0.01, 0, 0], [0.2, 2.9, 0.1]])
    live = [hand(np.full(3, 0.1), turns[0]), hand(np.full(3, 0.2), turns[1])]
    # The same orientation with the vector turned round: an axis-angle near π is not unique.
    opposite = -(2 * np.pi - (np.pi - 0.01)) * np.array([1.0, 0, 0])
    recorded = np.zeros((2, 8))
    recorded[0, :3], recorded[0, 3:6] = 0.1, opposite
    recorded[1, :3], recorded[1, 3:6] = [0.2, 0.2, 0.23], turns[1].as_rotvec()
    distance, angle = hand_errors(recorded, live, "axis_angle")
    assert distance == pytest.approx(0.03)
    assert angle == pytest.approx(0.0, abs=1e-6)
    assert hand_errors(recorded, live, "euler")[1] > 0.05


def replayed(success: bool, millimetres: float, task: str = "a") -> Replayed:
    return Replayed(run=OBJECT, task=task, demonstration="a/demo_0", actions_sha256="0" * 64,
                    success=success, steps=50, length=60, position_error=millimetres / 1000,
                    rotation_error=0.01)  # fmt: skip


def test_the_report_counts_success_and_what_was_followed(tmp_path: Path) -> None:
    results = [replayed(True, 0.0), replayed(True, 26.6), replayed(False, 0.1, "b")]
    rows = summary_rows(results)
    assert [row.name for row in rows] == ["a", "b", "all"]
    assert [(row.successes, row.followed, row.episodes) for row in rows] == [
        (2, 1, 2), (0, 1, 1), (2, 2, 3)
    ]  # fmt: skip
    text = markdown(OFF_BY_ONE, rows)
    assert "actions shifted by 1" in text
    assert "| a | 2 of 2 |" in text
    assert "26.60" in text
    write_replay(tmp_path / "out", ReplaySettings(data=tmp_path, run=OFF_BY_ONE), results)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "replay.json", "replay.md"
    ]  # fmt: skip


@pytest.mark.simulator
def test_files_of_one_name_in_two_folders_are_two(tmp_path: Path) -> None:
    from reflexarc.data.generated import GeneratedSettings, write_generated
    from reflexarc.eval.libero.suites import load_tasks

    name = load_tasks("libero_object")[0].name
    for folder in ("morning", "evening"):
        write_generated(tmp_path / folder, GeneratedSettings(tasks=1, episodes=1))
        (file,) = (tmp_path / folder).glob("*.hdf5")
        file.rename(file.with_name(f"{name}_demo.hdf5"))
    jobs = plan_replay(ReplaySettings(data=tmp_path, run=OBJECT))
    assert sorted(job.name for job in jobs) == [
        f"evening/{name}_demo.hdf5/demo_0", f"morning/{name}_demo.hdf5/demo_0"
    ]  # fmt: skip


@pytest.mark.simulator
def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    from reflexarc.data.generated import GeneratedSettings, write_generated

    write_generated(tmp_path, GeneratedSettings(tasks=1, episodes=1))
    arguments = ["eval", "replay-demos", "--data", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, DatasetError)
    assert "which is no task of libero_object" in str(result.exception)
    with pytest.raises(ConfigError, match="fits none of"):
        plan_replay(ReplaySettings(data=tmp_path, run=OBJECT, tasks=("soup",)))
    with pytest.raises(DatasetError, match="does not exist"):
        plan_replay(ReplaySettings(data=tmp_path / "absent", run=OBJECT))


@pytest.mark.simulator
@pytest.mark.slow
def test_a_collected_demonstration_replays_and_a_step_off_is_seen(tmp_path: Path) -> None:
    options = "--tasks 0 --demos 1 --image-size 64 --render-every 8 --output"
    arguments = ["data", "collect", "--suite", "libero_object", *options.split(), str(tmp_path)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    ((task, episode, name),) = plan_replay(ReplaySettings(data=tmp_path, run=OBJECT))
    with LiberoSimulator(task, render=False) as simulator:
        right = replay_episode(simulator, episode, name, OBJECT)
        wrong = replay_episode(simulator, episode, name, OFF_BY_ONE)
    assert right.success
    assert right.position_error < 1e-6
    assert not wrong.followed


@pytest.mark.simulator
@pytest.mark.slow
def test_a_stopped_replay_goes_on_where_it_stopped(tmp_path: Path) -> None:
    data, output = tmp_path / "data", tmp_path / "out"
    options = "--tasks 0 --demos 3 --image-size 64 --render-every 8 --output"
    arguments = ["data", "collect", "--suite", "libero_object", *options.split(), str(data)]
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    settings = ReplaySettings(data=data, run=OBJECT, workers=2)

    class KilledError(Exception):
        pass

    def kill_after_one(finished: int, total: int) -> None:
        assert total == 3
        if finished == 1:
            raise KilledError

    with pytest.raises(KilledError):
        replay(settings, output, on_progress=kill_after_one)
    kept = (output / "results.jsonl").read_bytes()
    assert kept.count(b"\n") == 1
    seen: list[int] = []
    results = replay(settings, output, on_progress=lambda finished, _: seen.append(finished))
    assert seen == [1, 2, 3]
    assert [one.demonstration.rpartition("/")[2] for one in results] == [
        "demo_0", "demo_1", "demo_2"
    ]  # fmt: skip
    assert all(one.success and one.followed for one in results)
    assert (output / "results.jsonl").read_bytes().startswith(kept)
    with pytest.raises(
        ResultsError,
        match=r"there 'as recorded', this run 'actions shifted by 1'.*options and the data",
    ):
        replay(settings.model_copy(update={"run": OFF_BY_ONE}), output)
