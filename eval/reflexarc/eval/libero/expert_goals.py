"""What a task wants: pairs of an object and the place where it shall be let go."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from reflexarc.contract.errors import SimulatorError
from reflexarc.eval.libero.geometry import Scene, bounding_center
from reflexarc.eval.libero.package import quiet
from reflexarc.eval.libero.simulator import LiberoSimulator
from reflexarc.eval.libero.suites import LiberoTask

FloatArray = npt.NDArray[np.float64]

_DEEP = 0.04  # an object at least this high is a vessel; below it, a surface such as a plate


class UnsupportedGoalError(SimulatorError):
    """A goal that the scripted expert has no skill for: opening, turning, pushing."""

    code = "unsupported_goal"


@dataclass(frozen=True)
class PlacementGoal:
    """``predicate(object, target)`` of the scene description: ``on`` or ``in``."""

    predicate: str
    object_name: str
    target: str

    def holds(self, simulator: LiberoSimulator) -> bool:
        """Whether this goal alone holds now."""
        state = [self.predicate, self.object_name, self.target]
        return bool(simulator.environment._eval_predicate(state))


def placement_goals(task: LiberoTask) -> list[PlacementGoal]:
    """The task's goals; UnsupportedGoalError unless all of them place an object."""
    with quiet():
        from libero.libero.envs.bddl_utils import robosuite_parse_problem

        problem = robosuite_parse_problem(str(task.bddl_path))
    goals = []
    for goal in problem["goal_state"]:
        if goal[0].lower() not in ("in", "on") or len(goal) != 3:
            raise UnsupportedGoalError(
                f"the scripted expert cannot do {' '.join(goal)} of {task.suite} task "
                f"{task.index} ({task.instruction}); it picks and places"
            )
        goals.append(PlacementGoal(*goal))
    return goals


def place_for(scene: Scene, target: str) -> tuple[FloatArray, float]:
    """``(xy (2,), height)`` at which an object's lowest point is brought over the target.

    A target is an object (plate, bowl) or a region of an object (basket) or fixture (stove).
    """
    if target in scene.bodies:
        points = scene.visible_points(target)
        low, high = points[:, 2].min(), points[:, 2].max()
        height = high - 0.02 if high - low > _DEEP else low + 0.008
        return scene.position(target)[:2], float(height)
    owner = scene.region_owner(target)
    if (
        owner is not None and owner in scene.movable
    ):  # the inside of a vessel: let go just below its rim
        points = scene.visible_points(owner)
        return bounding_center(points)[:2], float(points[:, 2].max() - 0.07)
    position = scene.region_position(target)
    return position[:2], float(position[2])
