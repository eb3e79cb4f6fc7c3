"""Which episodes fit a probe and which test it, as training held them out."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reflexarc.contract.errors import ConfigError
from reflexarc.contract.policy_contract import LIBERO_STATE_EEF
from reflexarc.data.dataset import DatasetEpisode, EpisodeDataset
from reflexarc.data.lerobot.dataset import is_lerobot
from reflexarc.data.lerobot.recipe_names import names_in_recipe
from reflexarc.data.libero_hdf5 import open_libero
from reflexarc.data.mixture import mix
from reflexarc.training.samples import split_episodes

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

    fit: list[DatasetEpisode]
    test: list[DatasetEpisode]
    everything: list[DatasetEpisode]
    fingerprint: str
    held_out_in_training: bool
    remarks: tuple[str, ...]

    @property
    def episodes(self) -> list[DatasetEpisode]:
        return self.fit + self.test


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
    episodes = _first_of_each_task(dataset.episodes, int(limit) if limit else None)
    by_task = data.get("split_by") != "dataset"
    names = [episode.task_name if by_task else "" for episode in episodes]
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
        fit=_limited([episodes[i] for i in fit], per_task, by_task),
        test=[episodes[i] for i in test],
        everything=[episodes[i] for i in (*fit, *test)],
        fingerprint=fingerprint,
        held_out_in_training=held_out,
        remarks=tuple(remarks),
    )
    _check_sizes(split, by_task)
    return split


def known_tasks(
    paths: Sequence[Path], provenance: Mapping[str, Any]
) -> tuple[EpisodeDataset, list[str]]:
    """The demonstrations of tasks that the checkpoint was trained on, and remarks for a person.

    LeRobot folders are read by the names of the checkpoint's recipe.

    Raises ConfigError when there is none.
    """
    data = _of_recipe(provenance)
    dataset = _open(paths, provenance)
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
    kept = [episode for episode in dataset.episodes if episode.task_name in known]
    left_out = ", ".join(name for name in here if name not in known)
    return dataset.subset(kept), [f"not trained on, left out: {left_out}"]


def _open(paths: Sequence[Path], provenance: Mapping[str, Any]) -> EpisodeDataset:
    data, recipe = _of_recipe(provenance), provenance.get("recipe")
    contract = recipe.get("contract") if isinstance(recipe, Mapping) else None
    contract = contract if isinstance(contract, Mapping) else {}
    parts: list[EpisodeDataset] = []
    files = [path for path in paths if not is_lerobot(path)]
    if files:
        parts.append(open_libero(files, alignment=data.get("alignment")))
    for path in paths:
        if is_lerobot(path):
            cameras, stride = contract.get("cameras") or (), int(data.get("frame_stride") or 1)
            parts.append(names_in_recipe(data, path).open(path, cameras, frame_stride=stride))
    names = [", ".join(map(str, files))] * bool(files) + [str(p) for p in paths if p not in files]
    return mix(parts, names, str(contract.get("state_layout") or LIBERO_STATE_EEF.layout))


def _of_recipe(provenance: Mapping[str, Any]) -> Mapping[str, Any]:
    """The recipe's ``data``; empty where the checkpoint does not say."""
    recipe = provenance.get("recipe")
    data: Mapping[str, Any] = (recipe.get("data") if isinstance(recipe, Mapping) else None) or {}
    return data


def _limited(
    episodes: list[DatasetEpisode], limit: int | None, by_task: bool
) -> list[DatasetEpisode]:
    return _first_of_each_task(episodes, limit) if by_task else episodes[:limit]


def _first_of_each_task(
    episodes: Sequence[DatasetEpisode], limit: int | None
) -> list[DatasetEpisode]:
    seen: dict[str, int] = {}
    kept = []
    for episode in episodes:
        seen[episode.task_name] = seen.get(episode.task_name, 0) + 1
        if limit is None or seen[episode.task_name] <= limit:
            kept.append(episode)
    return kept


def _check_sizes(split: Split, by_task: bool) -> None:
    tasks = {episode.task_name for episode in split.episodes} if by_task else {"the data"}
    for task in sorted(tasks):
        fit, test = (
            sum(not by_task or e.task_name == task for e in part)
            for part in (split.fit, split.test)
        )
        if fit < 2 or test < 1:
            raise ConfigError(
                f"a probe needs two episodes of every task to fit and one to test; {task} has "
                f"{fit} and {test}: collect more demonstrations of it, or raise --episodes",
                field="data",
            )
