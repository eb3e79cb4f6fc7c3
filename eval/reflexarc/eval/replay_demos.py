"""Recorded actions of demonstrations in the simulator: do they still do what they did?

A demonstration that does not replay teaches something else than it shows. Beside success stands
how far the live hand strays from the recorded one, and two mistakes that a pipeline can make, on
purpose: actions one step off, and rotations read in another layout.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from reflexarc.contract.errors import ConfigError, DatasetError
from reflexarc.contract.policy_contract import FrozenModel
from reflexarc.eval.baselines import Demonstration, ReplayActions
from reflexarc.eval.intervals import wilson_interval
from reflexarc.eval.videos import Film

if TYPE_CHECKING:
    from reflexarc.data.libero_episode import Episode
    from reflexarc.eval.libero.simulator import LiberoSimulator, RawState
    from reflexarc.eval.libero.suites import LiberoTask

FloatRows = npt.NDArray[np.float64]
ActionRotation = Literal["as_recorded", "euler", "reversed"]
StateRotation = Literal["axis_angle", "euler"]
LAYOUT = "eef3+axisangle3+fingers2"
RADIANS_A_STEP = 0.5
"""What a rotation delta of 1 asks of LIBERO's controller."""
NEAR_METRES, NEAR_RADIANS = 0.005, 0.05
"""A hand that strays further has not done what was recorded, even where the task succeeded."""
_ROTATION = slice(3, 6)


class Mistakes(FrozenModel):
    """What is done wrong on purpose.

    Attributes:
        action_shift: 1 executes at step t the action of t + 1, as who takes observations that
            stand after their action for ones before it; -1 the one of t - 1.
        action_rotation: how rotation deltas are read: axis-angle as recorded, as Euler angles
            (xyz), or with their axes in the order zyx.
        state_rotation: how the live hand's orientation is written where axis-angle is expected.
    """

    action_shift: int = Field(default=0, ge=-20, le=20)
    action_rotation: ActionRotation = "as_recorded"
    state_rotation: StateRotation = "axis_angle"

    @property
    def in_words(self) -> str:
        found = [
            *([f"actions shifted by {self.action_shift}"] if self.action_shift else []),
            *(
                [f"rotation deltas read as {self.action_rotation}"]
                if self.action_rotation != "as_recorded"
                else []
            ),
            *(
                ["the hand's orientation written as Euler angles"]
                if self.state_rotation == "euler"
                else []
            ),
        ]
        return ", ".join(found) or "as recorded"


class ReplaySettings(FrozenModel):
    """One call of ``reflexarc eval replay-demos``.

    Attributes:
        data: HDF5 file of LIBERO demonstrations, or a folder of them.
        tasks: parts of tasks' names that fit one each; empty for all.
        episodes: positions among each task's demonstrations; None for all.
        settle_steps: steps that the arm holds still after the last action.
    """

    data: Path
    suite: str
    tasks: tuple[str, ...] = ()
    episodes: tuple[int, ...] | None = None
    settle_steps: int = Field(default=10, ge=0)
    mistakes: Mistakes = Mistakes()
    workers: int = Field(default=1, ge=1, le=16)


class Replayed(FrozenModel):
    """One demonstration.

    Attributes:
        success: whether the task's goal held at some step.
        steps: executed until then, or until the end.
        length: actions of the demonstration.
        position_error: largest distance of the live hand from the recorded one before an action,
            in metres.
        rotation_error: the same of its orientation, in radians.
    """

    task: str
    demonstration: str
    success: bool
    steps: int
    length: int
    position_error: float
    rotation_error: float

    @property
    def followed(self) -> bool:
        """Whether the hand went where it had gone."""
        return self.position_error <= NEAR_METRES and self.rotation_error <= NEAR_RADIANS


def altered_actions(actions: FloatRows, mistakes: Mistakes) -> FloatRows:
    """``float64 (T', 7)``: the actions as the mistakes make them, within LIBERO's limits."""
    from scipy.spatial.transform import Rotation

    changed = actions.copy()
    if mistakes.action_rotation == "reversed":
        changed[:, _ROTATION] = actions[:, _ROTATION][:, ::-1]
    elif mistakes.action_rotation == "euler":
        angles = actions[:, _ROTATION] * RADIANS_A_STEP
        changed[:, _ROTATION] = Rotation.from_euler("xyz", angles).as_rotvec() / RADIANS_A_STEP
    shift = mistakes.action_shift
    if shift > 0:
        changed = changed[shift:]
    elif shift < 0:
        changed = np.concatenate([np.repeat(changed[:1], -shift, axis=0), changed])
    if not len(changed):
        raise ConfigError(
            f"--shift {shift} leaves nothing of a demonstration of {len(actions)} actions",
            field="shift",
        )
    clipped: FloatRows = np.clip(changed, -1.0, 1.0)
    return clipped


def hand_errors(
    recorded: FloatRows, live: Sequence[RawState], written: StateRotation
) -> tuple[float, float]:
    """Largest distance (metres) and angle (radians) between ``recorded (T, 8)`` and ``live``."""
    from scipy.spatial.transform import Rotation

    rows = min(len(recorded), len(live))
    positions = np.stack([state.eef_position for state in live[:rows]])
    quaternions = np.stack([state.eef_quaternion for state in live[:rows]])
    turned = Rotation.from_quat(quaternions)
    if written == "euler":  # the three numbers are then taken for an axis-angle
        turned = Rotation.from_rotvec(turned.as_euler("xyz"))
    expected = Rotation.from_rotvec(recorded[:rows, _ROTATION])
    distance = np.linalg.norm(positions - recorded[:rows, :3], axis=1)
    return float(distance.max()), float((expected.inv() * turned).magnitude().max())


def replay_episode(
    simulator: LiberoSimulator, episode: Episode, settings: ReplaySettings
) -> Replayed:
    """Reset as the demonstration began, execute its actions, and compare."""
    mistakes = settings.mistakes
    actions = altered_actions(episode.actions(), mistakes)
    source = ReplayActions(
        Demonstration(actions, f"{episode.path.name}/{episode.demo}", episode),
        simulator,
        replan_steps=1,
        film=Film(wanted=False),
    )
    _begin(simulator, episode)
    live, success, steps = [], False, 0
    for step in range(len(actions) + settings.settle_steps):
        if step < episode.length:
            live.append(simulator.observe_state())
        success = simulator.step(source.next_action(step))
        steps = step + 1
        if success:
            break
    distance, angle = hand_errors(episode.states(LAYOUT), live, mistakes.state_rotation)
    return Replayed(
        task=episode.task_name,
        demonstration=f"{episode.path.name}/{episode.demo}",
        success=success,
        steps=steps,
        length=episode.length,
        position_error=distance,
        rotation_error=angle,
    )


def _begin(simulator: LiberoSimulator, episode: Episode) -> None:
    """From its seed, which gives fixtures and controller too; files without one from a state."""
    if episode.seed is not None:
        simulator.reset_seeded(episode.seed)
        return
    from reflexarc.data.libero_layout import open_hdf5, require_dataset

    with open_hdf5(episode.path) as file:
        states = require_dataset(file, episode.path, episode.demo, "states")
        first = np.asarray(states[0], dtype=np.float64)
        raw = np.asarray(file[f"data/{episode.demo}/actions"][0], dtype=np.float64)
    simulator.reset_to_state(first, wait_steps=0)
    if episode.alignment == "after_action":  # its first row was seen after this action
        simulator.step(raw)


def replay(
    settings: ReplaySettings, *, on_episode: Callable[[Replayed], object] = lambda one: None
) -> list[Replayed]:
    """Every chosen demonstration, task by task.

    Raises DatasetError for data that does not read or tasks that the suite has not.
    """
    jobs = plan_replay(settings)
    found: list[Replayed] = []
    for one in _results(settings, jobs):
        found.append(one)
        on_episode(one)
    return found


def plan_replay(settings: ReplaySettings) -> list[tuple[LiberoTask, list[Episode]]]:
    """Tasks with the demonstrations to replay; nothing is simulated."""
    from reflexarc.data.libero_hdf5 import open_libero
    from reflexarc.eval.libero.suites import load_tasks

    known = {task.name: task for task in load_tasks(settings.suite)}
    by_task: dict[str, list[Episode]] = {}
    for episode in open_libero([settings.data]).episodes:
        by_task.setdefault(episode.task_name, []).append(episode)
    wanted = [n for n in by_task if not settings.tasks or any(t in n for t in settings.tasks)]
    for text in settings.tasks:
        if not any(text in name for name in by_task):
            raise ConfigError(
                f"--tasks: {text!r} fits none of: {', '.join(by_task)}", field="tasks"
            )
    jobs = []
    for name in wanted:
        if name not in known:
            raise DatasetError(
                f"{settings.data} holds demonstrations of {name}, which is no task of "
                f"{settings.suite}; name its suite with --suite",
                field="suite",
            )
        members = by_task[name]
        positions = range(len(members)) if settings.episodes is None else settings.episodes
        chosen = [members[i] for i in positions if i < len(members)]
        if not chosen:
            raise ConfigError(
                f"--episodes: {name} has {len(members)} demonstrations: 0-{len(members) - 1}",
                field="episodes",
            )
        jobs.append((known[name], chosen))
    return jobs


def _results(
    settings: ReplaySettings, jobs: list[tuple[LiberoTask, list[Episode]]]
) -> Iterator[Replayed]:
    if settings.workers == 1:
        for task, episodes in jobs:
            yield from _replay_task(task, episodes, settings)
        return
    parts = [
        (task, episodes[first :: settings.workers])
        for task, episodes in jobs
        for first in range(min(settings.workers, len(episodes)))
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(settings.workers, mp_context=context) as pool:
        futures = [pool.submit(_replayed, task, part, settings) for task, part in parts]
        for future in futures:
            yield from future.result()


def _replayed(
    task: LiberoTask, episodes: list[Episode], settings: ReplaySettings
) -> list[Replayed]:
    return list(_replay_task(task, episodes, settings))


def _replay_task(
    task: LiberoTask, episodes: Sequence[Episode], settings: ReplaySettings
) -> Iterator[Replayed]:
    from reflexarc.eval.libero.simulator import LiberoSimulator

    with LiberoSimulator(task, render=False) as simulator:
        for episode in episodes:
            yield replay_episode(simulator, episode, settings)


class ReplayRow(FrozenModel):
    """One line of the report: a task, or all of them."""

    name: str
    episodes: int
    successes: int
    followed: int
    low: float
    high: float
    median_steps: float
    position_error_mm: float
    rotation_error: float


def summary_rows(results: Sequence[Replayed]) -> list[ReplayRow]:
    """A row a task, and last one of all; errors are the largest."""
    names = list(dict.fromkeys(one.task for one in results))
    groups = [(name, [one for one in results if one.task == name]) for name in names]
    rows = []
    for name, members in [*groups, ("all", list(results))]:
        successes = sum(one.success for one in members)
        interval = wilson_interval(successes, len(members))
        rows.append(
            ReplayRow(
                name=name,
                episodes=len(members),
                successes=successes,
                followed=sum(one.followed for one in members),
                low=interval.low,
                high=interval.high,
                median_steps=median(one.steps for one in members),
                position_error_mm=1000 * max(one.position_error for one in members),
                rotation_error=max(one.rotation_error for one in members),
            )
        )
    return rows


def markdown(settings: ReplaySettings, rows: Sequence[ReplayRow]) -> str:
    """The report: what was done, and a table."""
    lines = [
        f"# Replay of demonstrations: {settings.mistakes.in_words}",
        "",
        f"{settings.suite}, {rows[-1].episodes} demonstrations. *Followed*: the hand never strayed "
        f"more than {1000 * NEAR_METRES:g} mm and {NEAR_RADIANS:g} rad from the recorded one. "
        "Errors are the largest.",
        "",
        "| task | success | 95 % | followed | median steps | position (mm) | rotation (rad) |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row.name} | {row.successes} of {row.episodes} | {100 * row.low:.0f} to "
            f"{100 * row.high:.0f} | {row.followed} of {row.episodes} | {row.median_steps:g} | "
            f"{row.position_error_mm:.2f} | {row.rotation_error:.3f} |"
        )
    return "\n".join(lines) + "\n"


def write_replay(output: Path, settings: ReplaySettings, results: Sequence[Replayed]) -> None:
    """``replay.json`` with every demonstration, and ``replay.md``."""
    rows = summary_rows(results)
    values = {
        "settings": settings.model_dump(mode="json"),
        "rows": [row.model_dump() for row in rows],
        "demonstrations": [one.model_dump() for one in results],
    }
    output.mkdir(parents=True, exist_ok=True)
    texts = {"replay.json": json.dumps(values, indent=1), "replay.md": markdown(settings, rows)}
    for name, text in texts.items():
        temporary = output / f".{name}.{os.getpid()}.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(output / name)
