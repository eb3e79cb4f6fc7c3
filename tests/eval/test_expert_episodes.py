"""The scripted expert in the simulator."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from reflexarc.eval.libero.expert import run_expert
from reflexarc.eval.libero.expert_goals import UnsupportedGoalError, place_for, placement_goals
from reflexarc.eval.libero.expert_grasp import plan_grasp
from reflexarc.eval.libero.geometry import Scene
from reflexarc.eval.libero.simulator import LiberoSimulator
from reflexarc.eval.libero.suites import load_init_states, load_tasks

pytestmark = pytest.mark.simulator


@pytest.fixture(scope="module")
def carton() -> Iterator[LiberoSimulator]:
    """libero_object task 9: the orange juice."""
    with LiberoSimulator(load_tasks("libero_object")[9], render=False) as simulator:
        yield simulator


@pytest.mark.parametrize("start", [0, 1])
def test_a_carton_is_let_go(carton: LiberoSimulator, start: int) -> None:
    """From these starts a finger once hooked under the carton's gable and carried it off."""
    carton.reset_to_state(load_init_states(carton.task)[start])
    actions: list[np.ndarray] = []
    intended: list[np.ndarray] = []

    def keep(action: np.ndarray, meant: np.ndarray) -> None:
        actions.append(action)
        intended.append(meant)

    result = run_expert(carton, seed=start, noise=0.1, before_step=keep)
    assert result.success, result.reason
    assert result.steps == len(actions) < 280
    assert carton.success
    assert np.abs(actions).max() <= 1.0
    assert {action[6] for action in actions} == {-1.0, 1.0}
    # Noise only on moving actions; what is kept beside them is their mean, free of it.
    difference = np.abs(np.stack(actions) - np.stack(intended))
    assert 0.02 < difference[:, :3].mean() < 0.1
    assert (difference[:, 6] == 0).all()


def test_noise_is_seeded(carton: LiberoSimulator) -> None:
    def first_actions(seed: int) -> np.ndarray:
        carton.reset_seeded(1)
        actions: list[np.ndarray] = []
        result = run_expert(
            carton,
            seed=seed,
            noise=0.1,
            max_steps=10,
            before_step=lambda action, _: actions.append(action),
        )
        assert (result.success, result.reason) == (False, "out of steps")
        return np.stack(actions)

    np.testing.assert_array_equal(first_actions(1), first_actions(1))
    assert (first_actions(1) != first_actions(2)).any()


def test_a_basket_is_entered_below_its_rim(carton: LiberoSimulator) -> None:
    carton.reset_seeded(0)
    scene = Scene(carton)
    (goal,) = placement_goals(carton.task)
    assert (goal.predicate, goal.object_name) == ("in", "orange_juice_1")
    xy, height = place_for(scene, goal.target)
    basket = scene.visible_points("basket_1")
    assert basket[:, 2].min() < height < basket[:, 2].max()
    assert (basket[:, :2].min(0) < xy).all() and (xy < basket[:, :2].max(0)).all()


def test_a_bowl_is_taken_by_its_rim_and_a_box_is_pinched() -> None:
    with LiberoSimulator(load_tasks("libero_goal")[8], render=False) as simulator:
        simulator.reset_seeded(0)
        scene = Scene(simulator)
        bowl = plan_grasp(scene, "akita_black_bowl_1")
        box = plan_grasp(scene, "cream_cheese_1")
        assert (bowl.kind, box.kind) == ("rim", "pinch")
        offset = np.linalg.norm(bowl.center[:2] - scene.position("akita_black_bowl_1")[:2])
        assert 0.03 < offset < 0.08
        # The box is gripped across, not above or below itself.
        points = scene.visible_points("cream_cheese_1")
        assert (points.min(0) < box.center).all() and (box.center < points.max(0)).all()


def test_goals_beyond_placing_are_refused_before_moving() -> None:
    with LiberoSimulator(load_tasks("libero_goal")[0], render=False) as simulator:
        simulator.reset_seeded(0)
        before = simulator.state()
        with pytest.raises(UnsupportedGoalError, match="open the middle drawer"):
            run_expert(simulator)
        np.testing.assert_array_equal(simulator.state(), before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suite", "index"),
    [
        *(("libero_object", index) for index in range(10)),
        *(("libero_spatial", index) for index in range(10)),
        *(("libero_goal", index) for index in (1, 2, 4, 6, 8, 9)),
    ],
)
def test_every_pick_and_place_task_is_solved(suite: str, index: int) -> None:
    task = load_tasks(suite)[index]
    with LiberoSimulator(task, render=False) as simulator:
        results = []
        for state in load_init_states(task)[:3]:
            simulator.reset_to_state(state)
            results.append(run_expert(simulator))
    assert sum(result.success for result in results) >= 2, results
