"""A scripted expert that solves LIBERO's pick-and-place tasks from privileged geometry.

It knows no object by name: it reads shapes and poses from MuJoCo, plans a grasp that fits the
shape, keeps clear of everything else, and tries again when something slipped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from reflexarc.eval.libero.expert_goals import PlacementGoal, place_for, placement_goals
from reflexarc.eval.libero.expert_grasp import Grasp, plan_grasp
from reflexarc.eval.libero.expert_motion import CLOSE, OPEN, Arm, ExpertFailure
from reflexarc.eval.libero.geometry import FINGER_TIP_BELOW_GRIP, Scene, bounding_center
from reflexarc.eval.libero.simulator import LiberoSimulator

FloatArray = npt.NDArray[np.float64]

MAX_STEPS = 400
_GRASP_ATTEMPTS = 3
_PLACE_ATTEMPTS = 2


@dataclass(frozen=True)
class ExpertResult:
    """How an episode ended; ``reason`` is empty on success."""

    success: bool
    steps: int
    reason: str


def run_expert(
    simulator: LiberoSimulator,
    *,
    seed: int = 0,
    noise: float = 0.0,
    max_steps: int = MAX_STEPS,
    before_step: Callable[[FloatArray, FloatArray], None] | None = None,
) -> ExpertResult:
    """Solve the task from the simulator's present state.

    Args:
        seed: of the action noise.
        noise: standard deviation of the noise, in units of the action.
        before_step: called with every action ``(7,)`` just before it is executed, and with its
            mean over the noise.

    Raises:
        UnsupportedGoalError: the task needs more than picking and placing.
    """
    arm = Arm(
        simulator,
        rng=np.random.default_rng(seed),
        noise=noise,
        max_steps=max_steps,
        before_step=before_step,
    )
    goals = placement_goals(simulator.task)
    expert = _PickAndPlace(simulator, arm)
    reason = "the goal does not hold at the end"
    try:
        for goal in goals:
            expert.achieve(goal)
    except ExpertFailure as failure:
        reason = str(failure)
    success = simulator.success
    return ExpertResult(success, arm.steps, "" if success else reason)


class _PickAndPlace:
    """The skills of one episode."""

    def __init__(self, simulator: LiberoSimulator, arm: Arm) -> None:
        self._simulator, self._arm = simulator, arm
        self._scene = Scene(simulator)

    def achieve(self, goal: PlacementGoal) -> None:
        for _ in range(_PLACE_ATTEMPTS):
            grasp = self._pick(goal.object_name)
            xy, height = place_for(self._scene, goal.target)
            self._place(goal.object_name, grasp, xy, height)
            if self._arm.success or goal.holds(self._simulator):
                return

    def _pick(self, name: str) -> Grasp:
        """Grip the object and lift it by 5 cm; ExpertFailure after three attempts."""
        for attempt in range(_GRASP_ATTEMPTS):
            grasp = self._approach(name, first=attempt == 0)
            if self._grip_and_lift(name, grasp):
                return grasp
            self._arm.hold(5, OPEN)
            self._raise_by(0.06, steps=30)
        raise ExpertFailure(f"{name} could not be grasped")

    def _approach(self, name: str, *, first: bool) -> Grasp:
        """Open the fingers above the object, in the planned direction."""
        arm, scene = self._arm, self._scene
        grasp = plan_grasp(scene, name)
        planned_position, planned_tilt = scene.position(name), scene.tilt_step(name)
        way_clear = scene.highest_between(arm.position, grasp.center) + 0.03 + FINGER_TIP_BELOW_GRIP
        height = max(way_clear, grasp.center[2] + 0.06)
        height = min(height, max(arm.position[2], grasp.center[2] + 0.10))
        arm.gripper = OPEN
        self._raise_to(height)
        arm.go_to(_at(grasp.center, height), grasp.yaw, tolerance=0.012, turn_tolerance=0.08)
        moved = np.linalg.norm(scene.position(name) - planned_position) > 0.004
        if moved or (first and scene.tilt_step(name) != planned_tilt):
            # It was still falling or sliding when the grasp was planned: look again.
            grasp = plan_grasp(scene, name)
            above = _at(grasp.center, max(arm.position[2], grasp.center[2] + 0.05))
            arm.go_to(above, grasp.yaw, tolerance=0.012, turn_tolerance=0.08)
        return grasp

    def _grip_and_lift(self, name: str, grasp: Grasp) -> bool:
        """Go down, close, lift by 5 cm; whether the object came along."""
        arm = self._arm
        arm.go_to(_at(grasp.center, grasp.center[2] + 0.02), grasp.yaw, gain=1.8)
        arm.go_to(
            grasp.center, grasp.yaw, tolerance=0.004, turn_tolerance=0.06, fastest=0.6, gain=2.0
        )
        openings: list[float] = []

        def settled() -> bool:
            openings.append(arm.opening)
            return len(openings) > 4 and abs(openings[-1] - openings[-4]) < 0.0006

        arm.hold(14, CLOSE, settled)
        before = self._scene.position(name)[2]
        raised = _at(arm.position, arm.position[2] + 0.05)
        arm.go_to(raised, grasp.yaw, tolerance=0.012, steps=25)
        return bool(self._scene.position(name)[2] - before > 0.02 and arm.opening > 0.0015)

    def _place(self, name: str, grasp: Grasp, xy: FloatArray, height: float) -> None:
        """Carry the object over ``xy``, lower it to just above ``height``, let go, retreat."""
        arm = self._arm
        target, hanging = self._release_pose(name, grasp, xy, height)
        carry = self._scene.highest_between(arm.position, target, exclude=(name,))
        carry = max(carry + 0.025 + hanging, target[2])
        self._raise_to(carry, grasp.yaw)
        arm.go_to(_at(target, carry), grasp.yaw, tolerance=0.012)
        for _ in range(2):  # the object may have swung in the grip on the way
            target, _ = self._release_pose(name, grasp, xy, height)
            above = _at(target, max(arm.position[2], target[2]))
            arm.go_to(above, grasp.yaw, steps=20)
        if self._scene.position(name)[2] < arm.position[2] - 0.3:
            raise ExpertFailure(f"{name} was dropped")
        arm.go_to(target, grasp.yaw, tolerance=0.008, fastest=0.7, steps=50)

        def succeeded() -> bool:
            return arm.success

        arm.hold(8, OPEN, succeeded)
        if not arm.success:
            self._raise_by(0.08, steps=20, stop=succeeded)
        if not arm.success:
            arm.hold(15, OPEN, succeeded)

    def _release_pose(
        self, name: str, grasp: Grasp, xy: FloatArray, height: float
    ) -> tuple[FloatArray, float]:
        """Grip position ``(3,)`` for letting go, and how far the object hangs below the grip."""
        points = self._scene.visible_points(name)
        grip = self._arm.position
        hanging = float(grip[2] - points[:, 2].min())
        # An object held by its rim hangs tilted, so its base is aimed instead of its middle.
        middle = self._scene.position(name) if grasp.kind == "rim" else bounding_center(points)
        offset = middle[:2] - grip[:2]
        return np.append(xy - offset, height + hanging + 0.012), hanging

    def _raise_to(self, height: float, yaw: float | None = None) -> None:
        if self._arm.position[2] < height - 0.01:
            self._arm.go_to(_at(self._arm.position, height), yaw, tolerance=0.02)

    def _raise_by(
        self, distance: float, *, steps: int, stop: Callable[[], bool] | None = None
    ) -> None:
        raised = _at(self._arm.position, self._arm.position[2] + distance)
        self._arm.go_to(raised, tolerance=0.02, steps=steps, stop=stop)


def _at(position: FloatArray, height: float) -> FloatArray:
    """The point at ``height`` over or under ``position``."""
    return np.append(position[:2], height)
