"""A LeRobot dataset that came from LIBERO's HDF5 files back to such files."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from reflexarc.contract.errors import DatasetError
from reflexarc.data.lerobot.dataset import LeRobotDataset, open_lerobot
from reflexarc.data.lerobot.episode import LeRobotEpisode
from reflexarc.data.lerobot.from_libero import PREFIX, LiberoFolder, extra_file
from reflexarc.data.lerobot.hdf5_values import decode_value, write_attributes
from reflexarc.data.lerobot.info import read_json
from reflexarc.data.lerobot.parquet import COLUMNS
from reflexarc.data.lerobot.writing import finish_folder, partial_folder
from reflexarc.data.libero_layout import CAMERA_DATASETS
from reflexarc.data.libero_writer import atomic_path

OnDemo = Callable[[str], None]
_FRAMES_AT_ONCE = 64


def convert_to_libero(
    root: Path, output: Path, *, on_demo: OnDemo = lambda name: None
) -> list[Path]:
    """Write the HDF5 files that ``root`` came from into the new folder ``output``.

    Every array comes back exactly, images as the codec left them. An interrupted conversion
    continues with the next file. Raises DatasetError for a dataset of another origin.
    """
    dataset = open_lerobot(root)
    libero = _require_libero(dataset)
    partial = partial_folder(output, {"dataset": str(root.resolve()), "is": dataset.fingerprint()})
    names = []
    for data_file, group in groupby(dataset.episodes, lambda e: e.record.data_file):
        episodes = list(group)
        name = str(libero.file_of(episodes[0].record)["name"])
        path = partial / name
        names.append(name)
        if path.is_file():  # whole, since it is renamed last
            for episode in episodes:
                on_demo(f"{name} {episode.demo}")
            continue
        with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
            _write_file(file, episodes, extra_file(root, data_file), on_demo, libero)
    finish_folder(partial, output)
    return [output / name for name in names]


def _require_libero(dataset: LeRobotDataset) -> LiberoFolder:
    if dataset.libero is None:
        raise DatasetError(
            f"{dataset.info.root} was not converted from LIBERO's HDF5 files: it has not their "
            "states and attributes, and cannot become one; train on it as it is",
            field="meta/libero.json",
        )
    return dataset.libero


def _write_file(
    file: Any, episodes: list[LeRobotEpisode], rest: Path, on_demo: OnDemo, libero: LiberoFolder
) -> None:
    stated = read_json(rest.with_suffix(".json"))
    moved = libero.file_of(episodes[0].record)["alignment"] == "after_action"
    write_attributes(file, stated["file_attributes"])
    data = file.create_group("data")
    write_attributes(data, stated["attributes"])
    if moved:
        data.attrs["alignment"] = "before_action"
    for episode, demo in zip(episodes, stated["demos"], strict=True):
        group = data.create_group(demo["name"])
        write_attributes(group, demo["attributes"])
        if moved and "num_samples" in group.attrs:
            group.attrs["num_samples"] = episode.length
        write_attributes(group.create_group("obs"), demo["observation_attributes"])
        for key in demo["keys"]:
            _write_array(group, key, episode, rest, demo)
        on_demo(f"{file.filename} {demo['name']}")


def _write_array(
    group: Any, key: str, episode: LeRobotEpisode, rest: Path, demo: dict[str, Any]
) -> None:
    cameras = {dataset: camera for camera, dataset in CAMERA_DATASETS.items()}
    if key in cameras:
        frames, (height, width) = len(episode.image_steps), episode.image_size(cameras[key])
        images = group.create_dataset(key, (frames, height, width, 3), dtype=np.uint8)
        for start in range(0, frames, _FRAMES_AT_ONCE):
            stop = min(start + _FRAMES_AT_ONCE, frames)
            images[start:stop] = episode.images(cameras[key], range(start, stop))
    elif key == "obs/image_steps":
        group[key] = episode.image_steps.astype(demo["image_steps"])
    elif key in demo["arrays"]:
        group[key] = decode_value(demo["arrays"][key])
    else:
        column = COLUMNS.get(rest, PREFIX + key.replace("/", "."))
        first = episode.record.first_row
        group[key] = column[first : first + episode.length]
