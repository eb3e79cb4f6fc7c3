"""One episode: reset to a benchmark state, execute an arm's actions, say how it ended."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from reflexarc.client import ChunkPolicy
from reflexarc.eval.arms import ARMS
from reflexarc.eval.baselines import (
    ActionSource,
    Demonstration,
    FilmedActions,
    PolicyActions,
    ReplayActions,
)
from reflexarc.eval.execution import evaluation_executor
from reflexarc.eval.goal_images import Goal
from reflexarc.eval.observer import Observer
from reflexarc.eval.results import EpisodeKey, EpisodeResult, Reason, RunIdentity
from reflexarc.eval.run_settings import RunSettings
from reflexarc.eval.shown_images import BlackImages, CameraImages, RecordedImages, ShownImages
from reflexarc.eval.videos import Film, write_video
from reflexarc.eval.worlds import Goal as TaskGoal
from reflexarc.eval.worlds import Simulator, Task, World

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True)
class TaskRun:
    """What all episodes of one task share.

    ``tasks``, ``demonstrations`` and ``goals`` are of all selected tasks, by index; ``policy`` is
    needed by the arms that ask one.
    """

    settings: RunSettings
    identity: RunIdentity
    tasks: Mapping[int, Task]
    demonstrations: Mapping[int, Demonstration]
    world: World
    simulator: Simulator
    observer: Observer[Any]
    policy: ChunkPolicy | None
    goals: Mapping[int, Goal] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How an episode ended; the goals as :class:`EpisodeResult` has them."""

    steps: int
    success: bool
    reason: Reason
    named_success: bool | None = None

    @property
    def first_goal(self) -> Literal["original", "named"] | None:
        # The episode ends with the named goal, so an original goal came before it.
        if self.success:
            return "original"
        return "named" if self.named_success else None


def run_episode(run: TaskRun, key: EpisodeKey) -> EpisodeResult:
    """Run one episode and write its video, if one is wanted.

    Raises what the client raises when the server does not answer.
    """
    began = time.perf_counter()
    identity = run.identity
    run.world.start(run.simulator, key.state, identity.seed, identity.wait_steps)
    film = Film(
        wanted=run.settings.videos != "none",
        every=identity.replan_steps,
        cameras=run.world.video_cameras,
    )
    source = _action_source(run, key, film)
    outcome = _roll_out(run.simulator, source, identity.max_steps, _named_goal(run, key))
    film.finish(outcome.steps, run.simulator)
    seconds = time.perf_counter() - began
    latencies = source.latencies_ms
    return EpisodeResult(
        **identity.model_dump(exclude={"demonstrations", "goals"}),
        **_names(run, key),
        task=key.task,
        state=key.state,
        arm=key.arm,
        success=outcome.success,
        reason=outcome.reason,
        steps=outcome.steps,
        seconds=round(seconds, 3),
        chunks=len(latencies),
        held_steps=source.held_steps,
        latency_median_ms=round(median(latencies), 3) if latencies else None,
        latency_max_ms=round(max(latencies), 3) if latencies else None,
        demonstration_sha256=key.demonstration(identity),
        goal_sha256=key.goal(identity),
        video=_write_video(run, key, film, outcome),
        **_goals(key, outcome),
    )


def _roll_out(
    simulator: Simulator, source: ActionSource, max_steps: int, named: TaskGoal | None
) -> Outcome:
    """Act until the task's goal holds, or the ``named`` one where there is one, or it is over."""
    reached = False
    for step in range(max_steps):
        reached = simulator.step(source.next_action(step)) or reached
        if named is None and reached:
            return Outcome(step + 1, True, "success")
        if named is not None and named.holds(simulator):
            return Outcome(step + 1, reached, "named_goal", named_success=True)
        if simulator.over:
            told = None if named is None else False
            return Outcome(step + 1, reached, "over", named_success=told)
    return Outcome(max_steps, reached, "timeout", named_success=None if named is None else False)


def _named_goal(run: TaskRun, key: EpisodeKey) -> TaskGoal | None:
    """The goal that the policy is told, where it is another task's and possible in this scene."""
    if not ARMS[key.arm].other_instruction:
        return None
    return run.world.goal_in_scene(run.simulator, _other_task(run, key))


def _other_task(run: TaskRun, key: EpisodeKey) -> Task:
    assert key.other_task is not None  # the plan gives one to every arm that involves one
    return run.tasks[key.other_task]


def _action_source(run: TaskRun, key: EpisodeKey, film: Film) -> ActionSource:
    arm, replan_steps = ARMS[key.arm], run.identity.replan_steps
    if not arm.asks_policy:
        demonstration = run.demonstrations[key.task]
        hold = run.world.rest(demonstration.actions[-1])
        return ReplayActions(
            demonstration, run.simulator, replan_steps=replan_steps, film=film, hold=hold
        )
    assert run.policy is not None
    identity = run.identity
    executor = evaluation_executor(
        identity.executor, run.policy, identity.replan_steps, identity.injected_latency_ms
    )
    # Frames that come at the film's own steps are kept as they are; others would leave gaps.
    regular = identity.executor == "receding_horizon" and identity.injected_latency_ms == 0
    seen = film if regular else Film(wanted=False)
    told = _other_task(run, key) if arm.other_instruction else run.simulator.task
    source = PolicyActions(
        executor,
        run.observer,
        run.simulator,
        images=_shown_images(run, key, seen),
        instruction=told.instruction,
        seeds=(identity.seed, key.task, key.state),
        goal=_goal_images(run, key),
    )
    return source if regular else FilmedActions(source, run.simulator, film)


def _goal_images(run: TaskRun, key: EpisodeKey) -> Mapping[str, npt.NDArray[np.uint8]] | None:
    if not run.observer.contract.needs_goal_image:
        return None
    shown = _other_task(run, key).index if ARMS[key.arm].other_goal else key.task
    return run.goals[shown].images


def _shown_images(run: TaskRun, key: EpisodeKey, film: Film) -> ShownImages:
    images = ARMS[key.arm].images
    if images == "own":
        return CameraImages(run.observer, run.simulator, film)
    if images == "black":
        return BlackImages(run.observer, run.simulator, film)
    episode = run.demonstrations[_other_task(run, key).index].episode
    return RecordedImages(episode, run.observer.contract, run.simulator, film)


def _write_video(run: TaskRun, key: EpisodeKey, film: Film, outcome: Outcome) -> str | None:
    ending = _ending(key, outcome)
    good = ending in ("success", "named")
    if not film.wanted or (run.settings.videos == "failures" and good):
        return None
    other = "" if key.other_task is None else f"_task{key.other_task:02d}"
    name = f"task{key.task:02d}_state{key.state:02d}_{key.arm}{other}_{ending}.mp4"
    task, arm = run.simulator.task, ARMS[key.arm]
    words = f'"{_other_task(run, key).instruction}"' if arm.other_instruction else task.instruction
    write_video(
        run.settings.output / "videos" / name,
        film.develop(run.simulator),
        f"task {key.task}, state {key.state}, {arm.title}: {words}",
        ending,
        good=good,
        replan_steps=run.identity.replan_steps,
        world=run.world,
    )
    return name


def _ending(key: EpisodeKey, outcome: Outcome) -> str:
    """``success`` or ``failure``; with another instruction which goals were reached."""
    if not ARMS[key.arm].other_instruction or outcome.named_success is None:
        return "success" if outcome.success else "failure"
    if outcome.named_success:
        return "both" if outcome.success else "named"
    return "original" if outcome.success else "neither"


def _names(run: TaskRun, key: EpisodeKey) -> dict[str, Any]:
    task = run.simulator.task
    told = _other_task(run, key).instruction if ARMS[key.arm].other_instruction else None
    return {
        "task_name": task.name,
        "instruction": task.instruction,
        "other_task": key.other_task,
        "told_instruction": told,
    }


def _goals(key: EpisodeKey, outcome: Outcome) -> dict[str, Any]:
    if not ARMS[key.arm].other_instruction:
        return {}
    return {
        "original_success": outcome.success,
        "named_success": outcome.named_success,
        "first_goal": outcome.first_goal,
    }
