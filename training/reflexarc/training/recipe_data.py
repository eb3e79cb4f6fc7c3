"""From a recipe to its dataset, and to the contract of what learns from it."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from reflexarc.contract import Camera, NormalizationStatistics, PolicyContract
from reflexarc.contract.errors import ConfigError, DatasetError
from reflexarc.contract.policy_contract import ActionSpec
from reflexarc.data.dataset import DatasetEpisode, EpisodeDataset
from reflexarc.data.lerobot.dataset import is_lerobot
from reflexarc.data.lerobot.mapping import UNLIMITED, ActionMeaning
from reflexarc.data.lerobot.recipe_names import RecipeNames
from reflexarc.data.libero_hdf5 import LiberoDataset, open_libero
from reflexarc.data.mixture import mix
from reflexarc.data.mobile.dataset import is_mobile, open_mobile
from reflexarc.data.presence import exists
from reflexarc.training.config import Recipe
from reflexarc.training.config_data import DataConfig, SourceConfig


def open_dataset(recipe: Recipe) -> EpisodeDataset:
    """The episodes of the recipe's tasks, and no others.

    A folder with ``meta/info.json`` is LeRobot's, one with ``*.h5`` or files of ``data.pattern`` a
    mobile robot's; everything else is LIBERO's HDF5.

    Raises:
        DatasetError: a path that is not there, data that does not read, or parts that differ.
        ConfigError: a task pattern that matches nothing, naming the tasks there are.
    """
    config = recipe.data
    parts, names = _open_parts(config, recipe.contract.cameras)
    dataset = mix(parts, names, recipe.contract.state_layout)
    if not config.tasks:
        return dataset
    known = sorted({episode.task_name for episode in dataset.episodes})
    for pattern in config.tasks:
        if not fnmatch.filter(known, pattern):
            raise ConfigError(
                f"data.tasks: {pattern!r} matches none of the tasks in "
                f"{', '.join(names)}: {', '.join(known)}",
                field="data.tasks",
            )
    wanted = {name for pattern in config.tasks for name in fnmatch.filter(known, pattern)}
    return dataset.subset([e for e in dataset.episodes if e.task_name in wanted])


def limit_episodes(
    episodes: Sequence[DatasetEpisode], per_task: int | None
) -> list[DatasetEpisode]:
    """The first ``per_task`` episodes of every task, in the order of the files."""
    if per_task is None:
        return list(episodes)
    seen: dict[str, int] = {}
    kept = []
    for episode in episodes:
        seen[episode.task_name] = seen.get(episode.task_name, 0) + 1
        if seen[episode.task_name] <= per_task:
            kept.append(episode)
    return kept


def make_contract(
    recipe: Recipe, dataset: EpisodeDataset, statistics: NormalizationStatistics
) -> PolicyContract:
    """The recipe's contract, with the image sizes that the data was recorded at.

    Actions without limits of their own are limited to the range that ``statistics`` saw.

    Raises DatasetError for a camera of two image sizes, and ConfigError when the recipe asks for
    cameras, an orientation or a size that the data has not.
    """
    parts = recipe.contract
    _check_cameras(recipe, dataset)
    cameras = []
    for name in parts.cameras:
        height, width = _recorded_size(dataset.episodes, name)
        if parts.source_size is not None and (height, width) != (parts.source_size,) * 2:
            raise ConfigError(
                f"contract.source_size is {parts.source_size}, but "
                f"{dataset.episodes[0].path.name} holds images of {height}x{width}",
                field="contract.source_size",
            )
        cameras.append(
            Camera(
                name=name,
                height=parts.image_size,
                width=parts.image_size,
                orientation=parts.orientation,
                source_height=height,
                source_width=width,
            )
        )
    return PolicyContract(
        family=recipe.family,
        cameras=tuple(cameras),
        state=dataset.state_spec(dataset.layout(parts.state_layout)),
        action=_limited(dataset.action_spec(parts.horizon), statistics),
        history=parts.history,
        needs_language=parts.needs_language,
        needs_goal_image=parts.needs_goal_image,
        state_normalization=parts.state_normalization,
        action_normalization=parts.action_normalization,
    )


def _open_parts(
    config: DataConfig, cameras: Sequence[str]
) -> tuple[list[EpisodeDataset], list[str]]:
    if config.paths and config.sources:
        raise ConfigError(
            "--data replaces data.paths, but this recipe names data.sources; clear them with "
            "--set data.sources=[]",
            field="data.sources",
        )
    sources = config.sources or tuple(
        SourceConfig(path=path) for path in config.paths or (Path("datasets") / config.suite,)
    )
    for source in sources:
        if not exists(source.path):
            made = {"generated": "generate", "mobile": "collect-mobile"}.get(
                config.suite, f"collect --suite {config.suite}"
            )
            raise DatasetError(
                f"there is no {source.path}: name the demonstrations with --data PATH, or make "
                f"them with: reflexarc data {made}",
                field="data.paths",
            )
    parts: list[EpisodeDataset] = []
    names: list[str] = []
    mobile = [source.path for source in sources if _is_mobile(source, config)]
    if mobile:
        parts.append(
            open_mobile(
                mobile,
                pattern=config.pattern,
                control_hz=config.control_hz,
                fallback_instruction=config.fallback_instruction,
            )
        )
        names.append(", ".join(map(str, mobile)))
    sources = tuple(source for source in sources if source.path not in mobile)
    files = [source for source in sources if not is_lerobot(source.path)]
    for weight in dict.fromkeys(source.weight for source in files):
        paths = [source.path for source in files if source.weight == weight]
        parts.append(_open_files(paths, config, weight))
        names.append(", ".join(map(str, paths)))
    folders = [source.path.resolve() for source in sources if is_lerobot(source.path)]
    for folder in folders:
        if folders.count(folder) > 1:
            raise DatasetError(
                f"{folder} is named twice; give it a weight in data.sources instead",
                field="data.paths",
            )
    for source in sources:
        if is_lerobot(source.path):
            parts.append(_open_folder(source, config, cameras))
            names.append(str(source.path))
    return parts, names


def _is_mobile(source: SourceConfig, config: DataConfig) -> bool:
    return not is_lerobot(source.path) and (
        config.pattern is not None or is_mobile(source.path, config.pattern)
    )


def _open_files(paths: Sequence[Path], config: DataConfig, weight: float) -> EpisodeDataset:
    dataset = open_libero(paths, alignment=config.alignment)
    if weight == 1:
        return dataset
    return LiberoDataset([replace(episode, weight=weight) for episode in dataset.episodes])


def _open_folder(
    source: SourceConfig, config: DataConfig, cameras: Sequence[str]
) -> EpisodeDataset:
    gripper = config.gripper
    meaning = ActionMeaning(
        kind=config.action_kind,
        gripper=None if gripper is None else gripper.name,
        gripper_open=0.0 if gripper is None else gripper.open,
        gripper_closed=1.0 if gripper is None else gripper.closed,
    )
    names = RecipeNames(
        state=source.state or config.state,
        action=source.action or config.action,
        cameras=source.cameras or config.cameras,
        meaning=meaning,
        tolerance=config.timestamp_tolerance,
    )
    dataset = names.open(
        source.path, cameras, frame_stride=config.frame_stride, weight=source.weight
    )
    found = len(dataset.episodes)
    if source.episodes is not None and found != source.episodes:
        raise DatasetError(
            f"{source.path} holds {found} episodes, the recipe says {source.episodes}: it is "
            "another dataset, or part of it is missing; copy it whole, or set what there is in "
            "data.sources",
            field="data.sources",
        )
    return dataset


def _check_cameras(recipe: Recipe, dataset: EpisodeDataset) -> None:
    parts = recipe.contract
    for name in parts.cameras:
        if name not in dataset.cameras:
            listed = ", ".join(dataset.cameras)
            raise ConfigError(
                f"contract.cameras: {name!r} is no camera of this data, which has: {listed}; "
                f"choose with --set contract.cameras=[{dataset.cameras[0]}], or map it with "
                "data.cameras",
                field="contract.cameras",
            )
    if parts.orientation not in dataset.orientations:
        fitting = dataset.orientations[0]
        raise ConfigError(
            f"contract.orientation is {parts.orientation}, but the images of this data are "
            f"{fitting}: --set contract.orientation={fitting}",
            field="contract.orientation",
        )


def _recorded_size(episodes: Sequence[DatasetEpisode], camera: str) -> tuple[int, int]:
    first = episodes[0]
    size = first.image_size(camera)
    for episode in episodes:
        if episode.image_size(camera) != size:
            one, two = ("x".join(map(str, e.image_size(camera))) for e in (episode, first))
            raise DatasetError(
                f"{episode.path.name}, {episode.demo} holds images of {one}, {first.path.name} "
                f"of {two}; train on files of one image size",
                field="data.paths",
            )
    return size


def _limited(spec: ActionSpec, statistics: NormalizationStatistics) -> ActionSpec:
    """A policy commands nothing beyond what was demonstrated, where the data says no limits."""
    if max(spec.high) < UNLIMITED:
        return spec
    low, high = list(statistics.action.min), list(statistics.action.max)
    if spec.gripper is not None:
        commands = (spec.gripper.open, spec.gripper.closed)
        low[spec.gripper.index], high[spec.gripper.index] = min(commands), max(commands)
    return spec.model_copy(update={"low": tuple(low), "high": tuple(high)})
