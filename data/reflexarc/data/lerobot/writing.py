"""Write LeRobot v3.0: a data file, and a video file a camera, for every group of episodes.

A group is finished when its line in ``meta/parts`` is there, the last thing that is written of it;
:meth:`LeRobotWriter.finish` makes the metadata of all groups and renames the folder. A writer that
is opened on an unfinished folder goes on after the last finished group.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from reflexarc.contract.errors import DatasetError
from reflexarc.data.lerobot.encoding import Codec, VideoWriter, video_writer
from reflexarc.data.lerobot.image_statistics import ImageSums
from reflexarc.data.lerobot.info import read_json
from reflexarc.data.lerobot.metadata_writing import (
    DATA_PATH,
    VIDEO_PATH,
    Described,
    file_indices,
    write_metadata,
)
from reflexarc.data.libero_writer import atomic_path

_PARTS, _SOURCE = "meta/parts", "source.json"


@dataclass(frozen=True)
class Layout:
    """What a dataset holds.

    Attributes:
        vectors: feature to its dtype (numpy's name) and the names of its dimensions.
        cameras: feature to height and width.
        robot: type of robot.
        fps: rows a second.
    """

    vectors: Mapping[str, Described]
    cameras: Mapping[str, tuple[int, int]]
    robot: str
    fps: float


@dataclass
class WrittenEpisode:
    """One episode of a finished group."""

    length: int
    task: str
    video_starts: dict[str, float] = field(default_factory=dict)


@dataclass
class Group:
    """A finished group: its episodes, and sums over the pixels of each camera."""

    episodes: list[WrittenEpisode] = field(default_factory=list)
    pixels: dict[str, ImageSums] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


class GroupWriter:
    """Takes a group's episodes one after another. ``notes`` are kept with the group."""

    def __init__(
        self, layout: Layout, videos: Mapping[str, VideoWriter], rows: int, episodes: int
    ) -> None:
        self._layout, self._videos = layout, videos
        self._first_row, self._first_episode = rows, episodes
        self._tables: list[dict[str, npt.NDArray[Any]]] = []
        self.group = Group(pixels={key: ImageSums() for key in layout.cameras})

    def add_episode(
        self,
        task: str,
        vectors: Mapping[str, npt.NDArray[Any]],
        images: Mapping[str, Iterator[npt.NDArray[np.uint8]]],
    ) -> None:
        """One episode of T rows: ``(T, D)`` a vector, T images ``(H, W, 3)`` a camera."""
        length = len(next(iter(vectors.values())))
        episode = WrittenEpisode(length, task)
        for key, frames in images.items():
            video = self._videos[key]
            episode.video_starts[key] = video.seconds
            before = video.count
            for image in frames:
                self.group.pixels[key].add_sampled(image, video.count - before)
                video.add(image)
            if video.count - before != length:
                raise DatasetError(
                    f"episode {self._first_episode + len(self._tables)}: {video.count - before} "
                    f"images of {key} for {length} rows",
                    field=key,
                )
        self._tables.append(dict(vectors))
        self.group.episodes.append(episode)

    def table(self, task_indices: Mapping[str, int]) -> Any:
        """The group's rows as a ``pyarrow.Table``."""
        lengths = [episode.length for episode in self.group.episodes]
        rows = sum(lengths)
        columns: dict[str, Any] = {
            key: _column(np.concatenate([t[key] for t in self._tables]).astype(described.dtype))
            for key, described in self._layout.vectors.items()
        }
        frame = np.concatenate([np.arange(length) for length in lengths])
        columns["timestamp"] = pa.array((frame / self._layout.fps).astype(np.float32))
        columns["frame_index"] = pa.array(frame.astype(np.int64))
        numbers = self._first_episode + np.arange(len(lengths))
        columns["episode_index"] = pa.array(np.repeat(numbers, lengths).astype(np.int64))
        columns["index"] = pa.array(np.arange(self._first_row, self._first_row + rows))
        tasks = np.array([task_indices[e.task] for e in self.group.episodes], dtype=np.int64)
        columns["task_index"] = pa.array(np.repeat(tasks, lengths))
        return pa.table(columns)


class LeRobotWriter:
    """Writes ``folder``, under a name with ``.partial`` until it is whole.

    Args:
        source: what the data is made from, JSON; an unfinished folder of another source is refused.
    """

    def __init__(
        self, folder: Path, layout: Layout, codec: Codec, source: Mapping[str, Any]
    ) -> None:
        self.folder, self.layout, self.codec = folder, layout, codec
        self.partial = partial_folder(folder, source)
        self.groups = self._finished()

    @property
    def tasks(self) -> dict[str, int]:
        """Instruction to ``task_index``, in order of appearance."""
        texts = [episode.task for group in self.groups for episode in group.episodes]
        return {text: index for index, text in enumerate(dict.fromkeys(texts))}

    def data_file(self, number: int) -> Path:
        """The parquet file of a group, in the unfinished folder."""
        return self.partial / DATA_PATH.format(**file_indices(number))

    def video_file(self, number: int, camera: str) -> Path:
        """The video of a camera and a group, in the unfinished folder."""
        return self.partial / VIDEO_PATH.format(video_key=camera, **file_indices(number))

    @contextmanager
    def write_group(self) -> Iterator[GroupWriter]:
        """The next group: its videos are whole after the block, and its rows are written."""
        number = len(self.groups)
        episodes = [episode for group in self.groups for episode in group.episodes]
        with ExitStack() as stack:
            videos = {
                key: stack.enter_context(
                    video_writer(self.video_file(number, key), self.codec, self.layout.fps, size)
                )
                for key, size in self.layout.cameras.items()
            }
            rows = sum(episode.length for episode in episodes)
            writer = GroupWriter(self.layout, videos, rows, len(episodes))
            yield writer
        tasks = self.tasks
        for episode in writer.group.episodes:
            tasks.setdefault(episode.task, len(tasks))
        path = self.data_file(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            pq.write_table(writer.table(tasks), temporary)
        self.groups.append(writer.group)

    def seal_group(self) -> None:
        """Say that the last group is finished, with whatever was added to its notes."""
        number = len(self.groups) - 1
        path = self.partial / _PARTS / f"{number:06d}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(asdict(self.groups[number])))

    def finish(self) -> Path:
        """Write the metadata and give the folder its name."""
        write_metadata(self.partial, self.layout, self.codec, self.groups, self.tasks)
        finish_folder(self.partial, self.folder)
        return self.folder

    def _finished(self) -> list[Group]:
        groups: list[Group] = []
        for path in sorted((self.partial / _PARTS).glob("*.json")):
            if path.stem != f"{len(groups):06d}":
                break
            values = read_json(path)
            groups.append(
                Group(
                    [WrittenEpisode(**episode) for episode in values["episodes"]],
                    {key: ImageSums(**sums) for key, sums in values["pixels"].items()},
                    values["notes"],
                )
            )
        return groups


def partial_folder(folder: Path, source: Mapping[str, Any]) -> Path:
    """Make or find the unfinished folder beside ``folder``.

    Raises DatasetError where ``folder`` is there already, or an unfinished one of another source.
    """
    if folder.exists():
        raise DatasetError(f"{folder} exists; remove it, or write to another folder")
    partial = folder.with_name(f"{folder.name}.partial")
    path = partial / _SOURCE
    written = json.loads(json.dumps(source))
    if path.is_file() and read_json(path) != written:
        raise DatasetError(
            f"{partial} is an unfinished conversion of other data or with other options; remove "
            "it, or write to another folder"
        )
    partial.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(written))
    return partial


def finish_folder(partial: Path, folder: Path) -> None:
    """Give an unfinished folder its name, then remove what only an unfinished one needs."""
    partial.replace(folder)
    shutil.rmtree(folder / _PARTS, ignore_errors=True)
    (folder / _SOURCE).unlink()


def _column(values: npt.NDArray[Any]) -> Any:
    """A scalar a row where a row has one value, else a list."""
    flat = values.reshape(len(values), -1)
    if flat.shape[1] == 1:
        return pa.array(flat[:, 0])
    return pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), flat.shape[1]).cast(
        pa.list_(pa.from_numpy_dtype(values.dtype))
    )


def list_column(rows: Sequence[npt.NDArray[Any]] | npt.NDArray[Any]) -> Any:
    """``(T, ...)`` as nested lists of its shape, exactly."""
    values = np.asarray(rows)
    column = pa.array(values.reshape(-1))
    for size in reversed(values.shape[1:]):
        column = pa.FixedSizeListArray.from_arrays(column, size)
    return column
