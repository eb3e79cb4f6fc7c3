"""Another task's goal, judged in the scene at hand."""

from __future__ import annotations

from dataclasses import dataclass

from reflexarc.eval.libero.package import quiet
from reflexarc.eval.libero.simulator import LiberoSimulator
from reflexarc.eval.libero.suites import LiberoTask


@dataclass(frozen=True)
class TaskGoal:
    """The goal of a task: predicates of its scene description that must all hold.

    Each predicate is its name and the names of its objects, such as ``("on", "bowl_1",
    "plate_1")``.
    """

    predicates: tuple[tuple[str, ...], ...]

    def holds(self, simulator: LiberoSimulator) -> bool:
        """Whether the goal holds now, in whichever task's scene the simulator has."""
        environment = simulator.environment
        return all(bool(environment._eval_predicate(list(p))) for p in self.predicates)

    def objects(self) -> frozenset[str]:
        """Names of the objects, fixtures and regions that the goal speaks of."""
        return frozenset(name for predicate in self.predicates for name in predicate[1:])


def read_goal(task: LiberoTask) -> TaskGoal:
    """The goal in a task's scene description."""
    with quiet():
        from libero.libero.envs.bddl_utils import robosuite_parse_problem

        problem = robosuite_parse_problem(str(task.bddl_path))
    return TaskGoal(tuple(tuple(predicate) for predicate in problem["goal_state"]))


def goal_in_scene(simulator: LiberoSimulator, task: LiberoTask) -> TaskGoal | None:
    """``task``'s goal, or None where the simulator's scene lacks an object that it speaks of.

    None too where the goal holds already: reaching it would say nothing.
    """
    goal = read_goal(task)
    if not goal.objects() <= set(simulator.environment.object_states_dict):
        return None
    return None if goal.holds(simulator) else goal
