"""Every frame that is probed, and what is true at it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from reflexarc.contract.errors import DatasetError
from reflexarc.contract.policy_contract import LIBERO_STATE_EEF
from reflexarc.data.dataset import DatasetEpisode
from reflexarc.data.lerobot.episode import LeRobotEpisode
from reflexarc.data.libero_episode import Episode
from reflexarc.training.probe.ridge import Floats, Integers

Rows = npt.NDArray[np.bool_]

TOUCHED_AFTER, GRASPED_AFTER = 0.001, 0.01
"""Metres that an object must have moved from where the episode began to count as such.

Between the two a closing hand pushes it by millimetres, which is neither seeing where it lay nor
carrying it.
"""

END_EFFECTOR, GRIPPER = "end-effector", "gripper opening"


@dataclass(frozen=True)
class Frames:
    """Every rendered frame of a list of episodes, and what is true at it. F frames.

    Attributes:
        episode: ``int64 (F,)`` index into ``episodes``.
        task: ``int64 (F,)`` index into ``task_names``.
        step: ``int64 (F,)`` control step.
        progress: ``(F,)`` share of the episode's steps.
        general: ``(F, D)`` each: of LIBERO the end-effector's position and the opening between
            the fingers, in metres; of other data every part of the state.
        objects: name to ``(F, 3)`` metres, NaN in scenes without it.
        target: ``(F, 3)`` of the task's target object; NaN where the task moves none.
        target_names: task name to its target object, or None.
        touched, grasped: ``bool (F,)``, whether the target has moved by 1 mm, by 10 mm.
        remarks: for a person: what the demonstrations do not hold.
    """

    episodes: list[DatasetEpisode]
    task_names: tuple[str, ...]
    episode: Integers
    task: Integers
    step: Integers
    progress: Floats
    general: Mapping[str, Floats]
    objects: Mapping[str, Floats]
    target: Floats
    target_names: Mapping[str, str | None]
    touched: Rows
    grasped: Rows
    remarks: tuple[str, ...] = ()


def gather_frames(episodes: Sequence[DatasetEpisode]) -> Frames:
    """Read what is true at every rendered frame.

    DatasetError for LIBERO's files without object positions; of LeRobot folders that is remarked.
    """
    task_names = tuple(dict.fromkeys(episode.task_name for episode in episodes))
    positions = [_positions(episode) for episode in episodes]
    targets = {
        task: _target_of(
            [p for e, p in zip(episodes, positions, strict=True) if e.task_name == task]
        )
        for task in task_names
    }
    names = sorted({name for found in positions for name in found})
    columns: dict[str, list[npt.NDArray[Any]]] = {key: [] for key in _COLUMNS}
    objects: dict[str, list[Floats]] = {name: [] for name in names}
    for index, (episode, found) in enumerate(zip(episodes, positions, strict=True)):
        steps = np.asarray(episode.image_steps, dtype=np.int64)
        missing = np.full((len(steps), 3), np.nan)
        for name in names:
            objects[name].append(found[name][steps] if name in found else missing)
        target = targets[episode.task_name]
        path = found[target] if target is not None else None
        columns["episode"].append(np.full(len(steps), index))
        columns["task"].append(np.full(len(steps), task_names.index(episode.task_name)))
        columns["step"].append(steps)
        columns["progress"].append(steps / episode.length)
        columns["target"].append(missing if path is None else path[steps])
        for name, distance in (("touched", TOUCHED_AFTER), ("grasped", GRASPED_AFTER)):
            moved = episode.length if path is None else _first_moved(path, distance)
            columns[name].append(steps >= moved)
    return Frames(
        episodes=list(episodes),
        task_names=task_names,
        general=_general(episodes),
        objects={name: np.concatenate(rows) for name, rows in objects.items()},
        target_names=targets,
        remarks=_missing(episodes, positions),
        **{key: np.concatenate(rows) for key, rows in columns.items()},
    )


_COLUMNS = ("episode", "task", "step", "progress", "target", "touched", "grasped")


def _general(episodes: Sequence[DatasetEpisode]) -> dict[str, Floats]:
    """Rows at every frame by name; NaN in episodes that have no such rows."""
    found = [_parts(episode) for episode in episodes]
    widths = {name: rows.shape[1] for parts in found for name, rows in parts.items()}
    return {
        name: np.concatenate(
            [
                parts[name][e.image_steps] if name in parts else _nothing(e, width)
                for parts, e in zip(found, episodes, strict=True)
            ]
        )
        for name, width in widths.items()
    }


def _nothing(episode: DatasetEpisode, width: int) -> Floats:
    return np.full((len(episode.image_steps), width), np.nan)


def _parts(episode: DatasetEpisode) -> dict[str, Floats]:
    """What every demonstration of its kind says, each ``(T, D)``."""
    if isinstance(episode, LeRobotEpisode) and episode.libero is None:
        rows, start, parts = episode.states(episode.mapping.state_spec.layout), 0, {}
        for part in episode.mapping.state:
            parts[part.name] = rows[:, start : start + part.columns.width]
            start += part.columns.width
        return parts
    rows = episode.states(LIBERO_STATE_EEF.layout)
    return {END_EFFECTOR: rows[:, :3], GRIPPER: np.abs(rows[:, 6:7] - rows[:, 7:8])}


def _missing(
    episodes: Sequence[DatasetEpisode], positions: Sequence[Mapping[str, Floats]]
) -> tuple[str, ...]:
    remarks = []
    without = sum(not found for found in positions)
    if without:
        remarks.append(
            f"{without} of {len(episodes)} episodes hold no positions of objects, so nothing is "
            "said there of objects, of a task's target, of touching and grasping"
        )
    if any(isinstance(e, LeRobotEpisode) and e.libero is None for e in episodes):
        remarks.append(
            "the parts of the state stand in the place of end-effector and gripper; their std and "
            "RMSE are in thousandths of the data's own units"
        )
    return tuple(remarks)


def _positions(episode: DatasetEpisode) -> dict[str, Floats]:
    """Object name to ``(T, 3)``; empty for a LeRobot folder that has none."""
    if not isinstance(episode, Episode | LeRobotEpisode):
        return {}
    try:
        rows, names = episode.object_positions()
    except DatasetError:
        if isinstance(episode, LeRobotEpisode):
            return {}
        raise
    if not np.isfinite(rows).all():
        raise DatasetError(
            f"{episode.path}, {episode.demo}: object positions are not finite; collect it again",
            field="object_positions",
        )
    return {name: rows[:, i] for i, name in enumerate(names)}


def _target_of(episodes: Sequence[Mapping[str, Floats]]) -> str | None:
    """The object that a task's demonstrations carry farthest, None where they carry none."""
    carried: dict[str, list[float]] = {}
    for found in episodes:
        for name, rows in found.items():
            carried.setdefault(name, []).append(float(np.linalg.norm(rows[-1] - rows[0])))
    medians = {name: float(np.median(distances)) for name, distances in carried.items()}
    best = max(medians, key=lambda name: medians[name], default=None)
    return best if best is not None and medians[best] > GRASPED_AFTER else None


def _first_moved(path: Floats, distance: float) -> int:
    """The first step at which ``path (T, 3)`` is that far from its start; T when it never is."""
    moved = np.linalg.norm(path - path[0], axis=1) > distance
    return int(moved.argmax()) if moved.any() else len(path)
