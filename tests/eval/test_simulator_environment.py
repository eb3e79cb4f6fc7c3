"""The simulator client against LIBERO's own environment: same pixels, same states, no torch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from reflexarc.contract.errors import SimulatorError
from reflexarc.eval.libero.package import quiet
from reflexarc.eval.libero.simulator import WAIT_ACTION, LiberoSimulator, RawState
from reflexarc.eval.libero.suites import load_init_states, load_tasks

pytestmark = pytest.mark.simulator
SIZE = 64


@pytest.fixture(scope="module")
def simulator() -> Iterator[LiberoSimulator]:
    with LiberoSimulator(load_tasks("libero_object")[0], image_size=SIZE) as made:
        made.reset_seeded(0, wait_steps=0)
        yield made


def some_actions(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [np.append(rng.uniform(-1, 1, 6), rng.choice([-1.0, 1.0])) for _ in range(count)]


def assert_same_state(state: RawState, observation: dict[str, np.ndarray]) -> None:
    np.testing.assert_array_equal(state.eef_position, observation["robot0_eef_pos"])
    np.testing.assert_array_equal(state.eef_quaternion, observation["robot0_eef_quat"])
    np.testing.assert_array_equal(state.finger_positions, observation["robot0_gripper_qpos"])
    np.testing.assert_array_equal(state.joint_positions, observation["robot0_joint_pos"])


def test_observations_equal_liberos_own(simulator: LiberoSimulator) -> None:
    with quiet():
        from libero.libero.envs.env_wrapper import OffScreenRenderEnv

        own = OffScreenRenderEnv(
            bddl_file_name=str(simulator.task.bddl_path), camera_heights=SIZE, camera_widths=SIZE
        )
        own.seed(11)
        own.reset()
    actions = some_actions(3)
    for action in [WAIT_ACTION, *actions]:
        expected, _, _, _ = own.step(action)

    simulator.reset_seeded(11, wait_steps=1)
    for action in actions:
        simulator.step(action)
    seen = simulator.observe()
    np.testing.assert_array_equal(seen.images["agentview"], expected["agentview_image"])
    np.testing.assert_array_equal(seen.images["eye_in_hand"], expected["robot0_eye_in_hand_image"])
    assert_same_state(seen.state, expected)
    np.testing.assert_array_equal(simulator.state(), own.get_sim_state())

    # From a benchmark state robosuite's observation is one physics substep old: force a new one.
    init_state = load_init_states(simulator.task)[42]
    with quiet():
        own.seed(0)
        own.reset()
    own.set_init_state(init_state)
    simulator.reset_to_state(init_state, wait_steps=0)
    for action in actions:
        own.step(action)
    for action in actions:
        simulator.step(action)
    expected = own.env._get_observations(force_update=True)
    seen = simulator.observe()
    np.testing.assert_array_equal(seen.images["agentview"], expected["agentview_image"])
    assert_same_state(seen.state, expected)
    np.testing.assert_array_equal(simulator.state(), own.get_sim_state())
    own.close()


def test_looking_changes_nothing_and_snapshots_show_the_same(simulator: LiberoSimulator) -> None:
    actions = some_actions(4)
    simulator.reset_seeded(5, wait_steps=0)
    for action in actions:
        simulator.step(action)
    unobserved = simulator.state()

    simulator.reset_seeded(5, wait_steps=0)
    seen, snapshots = [], []
    for action in actions:
        seen.append(simulator.observe().images)
        snapshots.append(simulator.snapshot())
        simulator.step(action)
    np.testing.assert_array_equal(simulator.state(), unobserved)
    for images, snapshot in zip(seen, snapshots, strict=True):
        later = simulator.render_snapshot(snapshot)
        for camera, image in images.items():
            np.testing.assert_array_equal(later[camera], image)
    assert (seen[0]["agentview"] != seen[-1]["agentview"]).any()


def test_misuse_is_named(simulator: LiberoSimulator) -> None:
    with pytest.raises(SimulatorError, match=r"state of shape \(5,\)"):
        simulator.reset_to_state(np.zeros(5))
    with pytest.raises(SimulatorError, match="7 finite numbers"):
        simulator.step(np.zeros(6))
    with pytest.raises(SimulatorError, match="7 finite numbers"):
        simulator.step(np.full(7, np.nan))
    with pytest.raises(SimulatorError, match="image size"):
        LiberoSimulator(simulator.task, image_size=0)


def test_state_layouts(simulator: LiberoSimulator) -> None:
    state = simulator.observe_state()
    eef = state.vector("eef3+axisangle3+fingers2")
    np.testing.assert_array_equal(eef[:3], state.eef_position)
    np.testing.assert_array_equal(eef[3:6], state.eef_axis_angle)
    np.testing.assert_array_equal(eef[6:], state.finger_positions)
    np.testing.assert_array_equal(state.vector("joint7+fingers2")[:7], state.joint_positions)
    assert len(eef) == 8
    # The quaternion is xyzw: the gripper points down, so its half-turn lies in x and y.
    angle = np.linalg.norm(state.eef_axis_angle)
    assert abs(np.cos(angle / 2) - state.eef_quaternion[3]) < 1e-9
    with pytest.raises(SimulatorError, match="joint6"):
        state.vector("joint6")


def test_an_episode_has_no_end_of_its_own(simulator: LiberoSimulator) -> None:
    simulator.reset_seeded(0, wait_steps=0)
    simulator.environment.horizon = 3
    for _ in range(6):
        assert simulator.step(WAIT_ACTION) is False
    assert simulator.success is False


def test_resets_do_not_depend_on_what_was_before() -> None:
    """A scene with a cabinet, whose drawers robosuite draws more often after every reset."""
    task = load_tasks("libero_goal")[0]
    with LiberoSimulator(task, render=False) as simulator:
        simulator.reset_seeded(7)
        state, fixtures = simulator.state(), simulator.model.body_pos.copy()
        simulator.reset_seeded(1)
        assert (simulator.state() != state).any()
        simulator.step(WAIT_ACTION)
        simulator.reset_to_state(load_init_states(task)[0], seed=3)
        simulator.reset_seeded(7)
        np.testing.assert_array_equal(simulator.state(), state)
        np.testing.assert_array_equal(simulator.model.body_pos, fixtures)
        with pytest.raises(SimulatorError, match="render=False"):
            simulator.observe()


def test_the_process_stays_quiet_and_free_of_torch() -> None:
    code = (
        "import sys\n"
        "from reflexarc.eval.libero.suites import load_tasks\n"
        "from reflexarc.eval.libero.simulator import LiberoSimulator\n"
        "import reflexarc.eval.libero.collect, reflexarc.eval.libero.expert\n"
        "with LiberoSimulator(load_tasks('libero_object')[0], image_size=32) as simulator:\n"
        "    simulator.reset_seeded(0, wait_steps=1)\n"
        "    assert simulator.observe().images['agentview'].std() > 1\n"
        "assert 'torch' not in sys.modules\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "LP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
