"""The mobile world: scenes, the driver that drives them, episodes as they are evaluated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from reflexarc.cli.main import app
from reflexarc.contract import Camera, PolicyContract
from reflexarc.contract.errors import ConfigError, ContractViolationError, SimulatorError
from reflexarc.contract.policy_contract import ActionSpec, StateSpec
from reflexarc.data.mobile.dataset import open_mobile
from reflexarc.eval.arms import ARMS
from reflexarc.eval.baselines import ReplayActions
from reflexarc.eval.episodes import _roll_out
from reflexarc.eval.mobile.collect import CollectionSettings, collect, drive_to_target
from reflexarc.eval.mobile.driver import Driver, is_obstructed
from reflexarc.eval.mobile.observation import MobileObserver, check_mobile_contract
from reflexarc.eval.mobile.scene import REACH, draw_scene
from reflexarc.eval.mobile.tasks import CONTROL_HZ, MAX_STEPS, TARGETS, load_tasks, select_tasks
from reflexarc.eval.mobile.world import MobileWorld
from reflexarc.eval.run_settings import RunSettings
from reflexarc.eval.videos import Film
from reflexarc.eval.worlds import world_of

pytest.importorskip("mujoco")
from reflexarc.eval.mobile.simulator import MobileSimulator

TASKS = load_tasks()
SIZE = 64


def contract(**fields: object) -> PolicyContract:
    camera = Camera(name="front", height=32, width=32, orientation="upright",
                    source_height=SIZE, source_width=SIZE)  # fmt: skip
    values = {
        "family": "test", "cameras": (camera,), "state": StateSpec(layout="none", names=()),
        "action": ActionSpec(names=("linear_x", "linear_y"), horizon=4, kind="velocity",
                             control_hz=CONTROL_HZ, low=(-0.5,) * 2, high=(0.5,) * 2),
        **fields,
    }  # fmt: skip
    return PolicyContract(**values)  # type: ignore[arg-type]


def test_scenes_are_drawn_once_and_the_splits_differ() -> None:
    one, again = (draw_scene("evaluated", 1, 5, 0) for _ in range(2))
    assert np.array_equal(one.targets, again.targets)
    collected = draw_scene("collected", 1, 5, 0)
    assert not np.allclose(one.targets, collected.targets)
    assert not np.allclose(one.targets, draw_scene("evaluated", 2, 5, 0).targets)


def test_obstacles_stand_in_half_of_the_ways_and_say_nothing_of_the_target() -> None:
    scenes = [draw_scene("evaluated", task, state, 0) for task in range(4) for state in range(24)]
    named = [task for task in range(4) for _ in range(24)]
    own = [is_obstructed(scene, task) for scene, task in zip(scenes, named, strict=True)]
    assert sum(own) >= len(scenes) / 2
    marked = [task in scene.obstructed for scene, task in zip(scenes, named, strict=True)]
    assert sum(marked) == len(scenes) / 2, "two of four targets are obstructed, one of them in half"
    for scene in scenes:
        assert len(scene.targets) == len(TARGETS) == 4
        bearings = np.arctan2(*(scene.targets - scene.start).T[::-1])
        assert np.abs(np.rad2deg(bearings)).max() < 40, "every target is in view at the start"


@pytest.mark.parametrize(("noise", "wanted"), [(0.0, 12), (0.15, 11)])
def test_the_driver_reaches_its_target_and_touches_no_other(noise: float, wanted: int) -> None:
    """Always without noise; with it a base may be pushed onto another target now and then."""
    reached = 0
    for task in TASKS:
        with MobileSimulator(task, image_size=SIZE) as simulator:
            for state in range(3):
                simulator.reset(draw_scene("collected", task.index, state, 3))
                random = np.random.default_rng(state)
                drive = drive_to_target(simulator, random, noise, render=False)
                reached += drive.success
                assert len(drive.executed) < MAX_STEPS
                if noise == 0:
                    assert np.array_equal(drive.executed, drive.meant)
    assert reached >= wanted


def test_the_way_leads_around_an_obstacle() -> None:
    task = TASKS[0]
    state = next(s for s in range(50) if is_obstructed(draw_scene("evaluated", 0, s, 0), 0))
    scene = draw_scene("evaluated", 0, state, 0)
    position, nearest = scene.start.copy(), np.inf
    driver = Driver(scene, task.index)
    for _ in range(MAX_STEPS):
        position = position + driver.velocity(position) / CONTROL_HZ
        nearest = min(nearest, float(np.linalg.norm(scene.obstacles - position, axis=1).min()))
        if np.linalg.norm(scene.targets[0] - position) <= REACH:
            break
    else:
        pytest.fail("the driver never arrived")
    assert nearest > 0.29, "the radii of base and obstacle together"


def test_the_base_stops_at_the_first_target_that_it_reaches() -> None:
    """Told one target and driven to another: over, and no success however long it goes on."""
    told, driven_to = TASKS[0], TASKS[2]
    with MobileSimulator(told, image_size=SIZE) as simulator:
        scene = draw_scene("evaluated", 0, 3, 0)
        simulator.reset(scene)
        driver = Driver(scene, driven_to.index)
        while not simulator.over:
            assert not simulator.step(driver.velocity(simulator.position))
        assert simulator.reached == driven_to.index
        before = simulator.position
        assert not simulator.step(np.array([0.5, 0.0]))
        assert np.array_equal(simulator.position, before)
        goal = MobileWorld().goal_in_scene(simulator, driven_to)
        assert goal.holds(simulator)


@pytest.mark.parametrize(
    ("arm_target", "named", "expected"),
    [(0, None, ("success", True, None)), (2, None, ("over", False, None)),
     (2, 2, ("named_goal", False, True)), (0, 2, ("over", True, False))],
)  # fmt: skip
def test_an_episode_ends_as_the_report_says(
    arm_target: int, named: int | None, expected: tuple[str, bool, bool | None]
) -> None:
    """Task 0 in its scene, driven to ``arm_target``; ``named`` is what the policy was told."""
    with MobileSimulator(TASKS[0], image_size=SIZE) as simulator:
        scene = draw_scene("evaluated", 0, 1, 0)
        simulator.reset(scene)

        class Driven:
            latencies_ms, held_steps = (), 0
            driver = Driver(scene, arm_target)

            def next_action(self, step: int) -> np.ndarray:
                return self.driver.velocity(simulator.position)

        goal = None if named is None else MobileWorld().goal_in_scene(simulator, TASKS[named])
        outcome = _roll_out(simulator, Driven(), MAX_STEPS, goal)
    assert (outcome.reason, outcome.success, outcome.named_success) == expected


def test_what_the_base_sees_and_what_a_film_shows() -> None:
    with MobileSimulator(TASKS[0], image_size=SIZE) as simulator:
        simulator.reset(draw_scene("evaluated", 0, 0, 0))
        observer = MobileObserver(contract())
        film = Film(wanted=True, cameras=MobileWorld.video_cameras)
        raw = simulator.observe()
        film.see(0, raw.images, simulator)
        seen = observer.observation(observer.images(raw), simulator.observe_state(), "go")
        assert seen.images["front"].shape == (32, 32, 3)
        assert seen.state.shape == (0,)
        # Upright: the sky is above the floor, and every target's colour is somewhere.
        image = raw.images["front"].astype(int)
        assert image[:8].mean() > image[-8:].mean()
        for target in TARGETS:
            strongest = int(np.argmax(target.rgb))
            others = [c for c in range(3) if target.rgb[c] < 0.5]
            more = image[..., strongest] - image[..., others].max(-1)
            assert (more > 60).any(), target.name
        simulator.step(np.array([0.5, 0.0]))
        ((_, shown),) = film.develop(simulator)
        assert shown.keys() == {"front", "above"}
        assert np.array_equal(shown["front"], raw.images["front"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cameras": ()}, "asked for none"),
        ({"state": StateSpec(layout="x", names=("x",))}, "no state to tell"),
        ({"action": ActionSpec(names=("a",), horizon=1, kind="position", control_hz=5,
                               low=(0,), high=(1,))}, "takes velocities"),
        ({"action": ActionSpec(names=("linear_x", "linear_y"), horizon=4, kind="velocity",
                               control_hz=10, low=(0, 0), high=(1, 1))}, r"a step takes 0\.2 s"),
    ],
)  # fmt: skip
def test_contracts_that_the_world_cannot_meet(fields: dict[str, object], message: str) -> None:
    check_mobile_contract(contract())
    with pytest.raises(ContractViolationError, match=message):
        check_mobile_contract(contract(**fields))


def test_collecting_writes_episodes_and_goes_on(tmp_path: Path) -> None:
    settings = CollectionSettings(image_size=32, seed=1)
    first = collect(settings, tmp_path, episodes=1, tasks=(0, 3))
    assert (first.episodes, len(list(tmp_path.glob("*.h5")))) == (2, 2)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.h5")}
    again = collect(settings, tmp_path, episodes=2, tasks=(0, 3))
    assert again.episodes == 4
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
    data = open_mobile([tmp_path])
    assert {e.instruction for e in data.episodes} == {TASKS[0].instruction, TASKS[3].instruction}
    assert all(not np.array_equal(e.actions(), e.labelled_actions("expert")) for e in data.episodes)
    with pytest.raises(ConfigError, match="another --output"):
        collect(CollectionSettings(image_size=48), tmp_path, episodes=1)
    demonstration = MobileWorld().demonstration(tmp_path, TASKS[3])
    with MobileSimulator(TASKS[3], image_size=32) as simulator:
        simulator.reset(draw_scene("collected", 3, 0, 1))
        replay = ReplayActions(demonstration, simulator, replan_steps=4, film=Film(wanted=False),
                               hold=np.zeros(2))  # fmt: skip
        outcome = _roll_out(simulator, replay, MAX_STEPS, None)
    assert outcome.success, "the recorded actions in the scene that they were recorded in"


def test_settings_and_names() -> None:
    assert world_of("mobile").command == "reflexarc eval mobile"
    assert world_of("libero_object").command == "reflexarc eval libero"
    settings = RunSettings(server="", suite="mobile", tasks=(0, 1), states=(120,), output=Path(),
                           baselines=("other_instruction",))  # fmt: skip
    assert settings.episode_steps == MAX_STEPS
    assert {key.other_task for key in settings.all_episodes() if key.arm in ARMS} == {None, 0, 1}
    with pytest.raises(SimulatorError, match="tasks 0 to 3"):
        select_tasks([7])
    with pytest.raises(ValueError, match="states 0 to 49"):
        RunSettings(server="", suite="libero_object", tasks=(0,), states=(50,), output=Path())


def test_the_command_line_names_what_is_out_of_range() -> None:
    result = CliRunner().invoke(app, ["data", "collect-mobile", "--image-size", "4"])
    assert isinstance(result.exception, ConfigError)
    assert "--image-size 4" in str(result.exception)
