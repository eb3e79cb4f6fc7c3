"""The frames that are probed: which episodes fit the probe, which test it, and what is true."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from reflexarc.contract.errors import ConfigError, DatasetError
from reflexarc.data.libero_episode import Episode
from reflexarc.data.libero_hdf5 import LiberoDataset, open_libero
from reflexarc.training.probe.ridge import Floats, Integers
from reflexarc.training.samples import split_episodes

Rows = npt.NDArray[np.bool_]

TOUCHED_AFTER, GRASPED_AFTER = 0.001, 0.01
"""Metres that an object must have moved from where the episode began to count as such.

Between the two a closing hand pushes it by millimetres, which is neither seeing where it lay nor
carrying it.
"""

_EEF_LAYOUT = "eef3+axisangle3+fingers2"
_OWN_FRACTION = 0.2


@dataclass(frozen=True)
class Split:
    """Episodes to fit the probe on, and episodes to test it on, tasks in the files' order.

    Attributes:
        everything: the episodes that training saw or would see, in its order.
        fingerprint: of the demonstrations that they come from.
        held_out_in_training: whether the test episodes were held out in training as well.
        remarks: for a person: what the split rests on.
    """

    fit: list[Episode]
    test: list[Episode]
    everything: list[Episode]
    fingerprint: str
    held_out_in_training: bool
    remarks: tuple[str, ...]

    @property
    def episodes(self) -> list[Episode]:
        return self.fit + self.test


@dataclass(frozen=True)
class Frames:
    """Every rendered frame of a list of episodes, and what is true at it. F frames.

    Attributes:
        episode: ``int64 (F,)`` index into ``episodes``.
        task: ``int64 (F,)`` index into ``task_names``.
        step: ``int64 (F,)`` control step.
        progress: ``(F,)`` share of the episode's steps.
        eef: ``(F, 3)`` metres; ``gripper``: ``(F, 1)`` metres between the fingers.
        objects: name to ``(F, 3)`` metres, NaN in scenes without it.
        target: ``(F, 3)`` of the task's target object; NaN where the task moves none.
        target_names: task name to its target object, or None.
        touched, grasped: ``bool (F,)``, whether the target has moved by 1 mm, by 10 mm.
    """

    episodes: list[Episode]
    task_names: tuple[str, ...]
    episode: Integers
    task: Integers
    step: Integers
    progress: Floats
    eef: Floats
    gripper: Floats
    objects: Mapping[str, Floats]
    target: Floats
    target_names: Mapping[str, str | None]
    touched: Rows
    grasped: Rows


def open_split(paths: Sequence[Path], provenance: Mapping[str, Any], per_task: int | None) -> Split:
    """Split the demonstrations as training did, where the checkpoint says how.

    Args:
        paths: files or folders of demonstrations.
        provenance: of the checkpoint.
        per_task: fit on at most this many episodes of each task.

    Raises:
        DatasetError: the files cannot be read.
        ConfigError: no task of the checkpoint is among them, or too few episodes.
    """
    data = _of_recipe(provenance)
    dataset, remarks = known_tasks(paths, provenance)
    limit = data.get("episodes_per_task")
    episodes = _first_of_each_task(dataset.episodes, int(limit)) if limit else dataset.episodes
    names = [episode.task_name for episode in episodes]
    fraction = float(data.get("validation_fraction") or 0.0)
    fingerprint = dataset.fingerprint()
    held_out = fraction > 0
    if held_out:
        fit, test = split_episodes(names, fraction, int(data.get("split_seed", 0)))
        if (provenance.get("dataset") or {}).get("fingerprint") != fingerprint:
            held_out = False
            remarks.append(
                "these are not all and only the demonstrations that it was trained on; they are "
                "split as training split each task, which holds for the tasks that are unchanged"
            )
    else:
        fit, test = split_episodes(names, _OWN_FRACTION, 0)
        remarks.append(
            f"training held out no episodes, or does not say which: {_OWN_FRACTION:.0%} of each "
            "task are held out from the probe alone"
        )
    split = Split(
        fit=_first_of_each_task([episodes[i] for i in fit], per_task),
        test=[episodes[i] for i in test],
        everything=[episodes[i] for i in (*fit, *test)],
        fingerprint=fingerprint,
        held_out_in_training=held_out,
        remarks=tuple(remarks),
    )
    _check_sizes(split)
    return split


def gather_frames(episodes: Sequence[Episode]) -> Frames:
    """Read what is true at every rendered frame. DatasetError without object positions."""
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
        state = episode.states(_EEF_LAYOUT)[steps]
        missing = np.full((len(steps), 3), np.nan)
        for name in names:
            objects[name].append(found[name][steps] if name in found else missing)
        target = targets[episode.task_name]
        path = found[target] if target is not None else None
        columns["episode"].append(np.full(len(steps), index))
        columns["task"].append(np.full(len(steps), task_names.index(episode.task_name)))
        columns["step"].append(steps)
        columns["progress"].append(steps / episode.length)
        columns["eef"].append(state[:, :3])
        columns["gripper"].append(np.abs(state[:, 6:7] - state[:, 7:8]))
        columns["target"].append(missing if path is None else path[steps])
        for name, distance in (("touched", TOUCHED_AFTER), ("grasped", GRASPED_AFTER)):
            moved = episode.length if path is None else _first_moved(path, distance)
            columns[name].append(steps >= moved)
    return Frames(
        episodes=list(episodes),
        task_names=task_names,
        objects={name: np.concatenate(rows) for name, rows in objects.items()},
        target_names=targets,
        **{key: np.concatenate(rows) for key, rows in columns.items()},
    )


_COLUMNS = ("episode", "task", "step", "progress", "eef", "gripper", "target", "touched", "grasped")


def _positions(episode: Episode) -> dict[str, Floats]:
    """Object name to ``(T, 3)``."""
    rows, names = episode.object_positions()
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


def known_tasks(
    paths: Sequence[Path], provenance: Mapping[str, Any]
) -> tuple[LiberoDataset, list[str]]:
    """The demonstrations of tasks that the checkpoint was trained on, and remarks for a person.

    Raises ConfigError when there is none.
    """
    data = _of_recipe(provenance)
    alignment = data.get("alignment")
    dataset = open_libero(paths, alignment=alignment)
    trained: Sequence[str] = (
        (provenance.get("dataset") or {}).get("tasks") or data.get("tasks") or ()
    )
    here = sorted({episode.task_name for episode in dataset.episodes})
    known = {name for name in here if any(fnmatch.fnmatch(name, task) for task in trained)}
    if not trained or known == set(here):
        return dataset, []
    if not known:
        raise ConfigError(
            f"none of the tasks in {', '.join(map(str, paths))} ({', '.join(here)}) is one that "
            f"the checkpoint was trained on ({', '.join(trained)}); name other demonstrations",
            field="data",
        )
    files = sorted({e.path for e in dataset.episodes if e.task_name in known})
    left_out = ", ".join(name for name in here if name not in known)
    return open_libero(files, alignment=alignment), [f"not trained on, left out: {left_out}"]


def _first_of_each_task(episodes: Sequence[Episode], limit: int | None) -> list[Episode]:
    seen: dict[str, int] = {}
    kept = []
    for episode in episodes:
        seen[episode.task_name] = seen.get(episode.task_name, 0) + 1
        if limit is None or seen[episode.task_name] <= limit:
            kept.append(episode)
    return kept


def _of_recipe(provenance: Mapping[str, Any]) -> Mapping[str, Any]:
    """The recipe's ``data``; empty where the checkpoint does not say."""
    recipe = provenance.get("recipe")
    data: Mapping[str, Any] = (recipe.get("data") if isinstance(recipe, Mapping) else None) or {}
    return data


def _check_sizes(split: Split) -> None:
    tasks = {episode.task_name for episode in split.episodes}
    for task in sorted(tasks):
        fit, test = (sum(e.task_name == task for e in part) for part in (split.fit, split.test))
        if fit < 2 or test < 1:
            raise ConfigError(
                f"a probe needs two episodes of every task to fit and one to test; {task} has "
                f"{fit} and {test}: collect more demonstrations of it, or raise --episodes",
                field="data",
            )
