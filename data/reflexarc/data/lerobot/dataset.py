"""Open a LeRobot folder: names, lengths, files and cameras; arrays are read when asked for."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping as AnyMapping
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from reflexarc.contract.errors import DatasetError
from reflexarc.contract.policy_contract import ActionSpec, Orientation, StateSpec
from reflexarc.data.dataset import DatasetEpisode
from reflexarc.data.lerobot import metadata_v2, metadata_v3
from reflexarc.data.lerobot.episode import TIMESTAMP, LeRobotEpisode
from reflexarc.data.lerobot.from_libero import LiberoFolder, read_libero_folder
from reflexarc.data.lerobot.info import INFO_PATH, DatasetInfo, read_info
from reflexarc.data.lerobot.mapping import ActionMeaning, Mapping, make_mapping
from reflexarc.data.lerobot.parquet import COLUMNS, count_rows
from reflexarc.data.lerobot.records import EpisodeRecord, Listing
from reflexarc.data.lerobot.video import TOLERANCE, check_whole
from reflexarc.data.presence import is_file

_INDEX, _TASK = "episode_index", "task_index"
_MANY = 200  # files whose check takes long enough to be watched


@dataclass(frozen=True)
class LeRobotDataset:
    """Episodes of one folder as one contract sees them.

    Attributes:
        absent_cameras: features that ``info.json`` declares and of which no file is there.
        libero: what says that the data came from LIBERO's files, None otherwise.
    """

    info: DatasetInfo
    episodes: list[LeRobotEpisode]
    mapping: Mapping
    absent_cameras: tuple[str, ...] = ()
    libero: LiberoFolder | None = None

    @property
    def orientations(self) -> tuple[Orientation, ...]:
        return ("upright",) if self.libero is None else ("rotated_180", "opengl")

    @property
    def cameras(self) -> tuple[str, ...]:
        return tuple(self.mapping.cameras)

    def layout(self, wanted: str) -> str:
        """Of data that came from LIBERO the one that is wanted, else the mapped one."""
        return wanted if self.libero is not None else self.mapping.state_spec.layout

    def subset(self, episodes: Sequence[DatasetEpisode]) -> LeRobotDataset:
        """These of its episodes alone."""
        chosen = {id(episode) for episode in episodes}
        return replace(self, episodes=[e for e in self.episodes if id(e) in chosen])

    def with_cameras(self, cameras: AnyMapping[str, str]) -> LeRobotDataset:
        """The same episodes with these cameras alone, name to feature."""
        mapping = replace(self.mapping, cameras=dict(cameras))
        episodes = [replace(episode, mapping=mapping) for episode in self.episodes]
        return replace(self, mapping=mapping, episodes=episodes)

    def state_spec(self, layout: str) -> StateSpec:
        """The mapped state; of data that came from LIBERO, one of its layouts."""
        if self.libero is not None:
            return self.libero.state_spec(layout)
        spec = self.mapping.state_spec
        if layout != spec.layout:
            raise DatasetError(
                f"{self.info.root}: state layout {layout!r} is not {spec.layout!r}, which "
                "data.state gives",
                field="layout",
            )
        return spec

    def action_spec(self, horizon: int) -> ActionSpec:
        """The mapped action; of data that came from LIBERO, LIBERO's."""
        if self.libero is not None:
            return self.libero.action_spec(horizon)
        return self.mapping.action_spec(horizon)

    def fingerprint(self) -> str:
        """See :class:`reflexarc.data.dataset.EpisodeDataset`."""
        digest = hashlib.sha256(b"reflexarc-lerobot-1\n")
        for episode in self.episodes:
            digest.update(json.dumps(episode.identity()).encode() + b"\n")
            digest.update(np.ascontiguousarray(episode.actions(), dtype="<f8").tobytes())
        return digest.hexdigest()

    def check_images(self) -> None:
        """Read headers and last packets of every video of the mapped cameras."""
        until: dict[Path, float] = {}
        for episode in self.episodes:
            last = float(episode.times()[-1])
            for feature in episode.mapping.cameras.values():
                span = episode.record.videos.get(feature)
                if span is not None:
                    until[span.path] = max(until.get(span.path, 0.0), span.start + last)
        tolerance = max(episode.tolerance for episode in self.episodes)
        with tqdm(until.items(), "checking videos", disable=len(until) < _MANY) as files:
            for path, seconds in files:
                check_whole(path, seconds, tolerance)


def is_lerobot(path: Path) -> bool:
    """Whether ``path`` is a LeRobot dataset's folder."""
    return is_file(path / INFO_PATH)


def open_lerobot(
    root: Path,
    *,
    state: AnyMapping[str, str] | Sequence[str] | None = None,
    action: AnyMapping[str, str] | Sequence[str] | None = None,
    cameras: AnyMapping[str, str] | Sequence[str] | None = None,
    meaning: ActionMeaning | None = None,
    frame_stride: int = 1,
    tolerance: float = TOLERANCE,
    weight: float = 1.0,
) -> LeRobotDataset:
    """Open a folder; see :func:`reflexarc.data.lerobot.mapping.make_mapping` for the names.

    Args:
        root: the folder that holds ``meta``.
        frame_stride: use every so-many-th frame.
        tolerance: seconds that a frame may lie from its row's timestamp.
        weight: how often an epoch of training sees each sample.

    Raises:
        DatasetError: naming file, episode and key, for anything that does not read as it should.
    """
    info = read_info(root)
    listing = read_listing(info)
    libero = read_libero_folder(info)
    if libero is not None:
        state, action, meaning = None, None, None
    mapping = make_mapping(
        info, listing.absent_cameras, state=state, action=action, cameras=cameras, meaning=meaning
    )
    make = _EpisodeMaker(info, listing, mapping, libero, frame_stride, tolerance, weight)
    episodes = [make.episode(record) for record in listing.records]
    return LeRobotDataset(info, episodes, mapping, listing.absent_cameras, libero)


def read_listing(info: DatasetInfo) -> Listing:
    """The episodes by the version's own files."""
    if info.version == "v3.0":
        return metadata_v3.list_episodes(info)
    listing = metadata_v2.list_episodes(info)
    for record in listing.records:
        _check_rows(record)
    return listing


def _check_rows(record: EpisodeRecord) -> None:
    rows = count_rows(record.data_file)
    if rows != record.length:
        raise DatasetError(
            f"{record.data_file} has {rows} rows, episodes.jsonl says {record.length}; copy the "
            "dataset again",
            field="length",
        )


class _EpisodeMaker:
    def __init__(
        self,
        info: DatasetInfo,
        listing: Listing,
        mapping: Mapping,
        libero: LiberoFolder | None,
        stride: int,
        tolerance: float,
        weight: float,
    ) -> None:
        self._info, self._listing, self._mapping = info, listing, mapping
        self._libero, self._stride = libero, stride
        self._tolerance, self._weight = tolerance, weight
        self._sizes = {
            name: info.features[feature].image_size for name, feature in mapping.cameras.items()
        }

    def episode(self, record: EpisodeRecord) -> LeRobotEpisode:
        self._check_index(record)
        instruction = self._instruction(record)
        libero = self._libero
        steps = np.arange(0, record.length, self._stride, dtype=np.int64)
        if libero is not None:
            steps = libero.image_steps(record)
        return LeRobotEpisode(
            path=self._info.root,
            record=record,
            mapping=self._mapping,
            instruction=instruction,
            task_name=libero.task_name(record) if libero else _slug(instruction),
            image_steps=steps,
            render_stride=libero.render_stride(record) if libero else self._stride,
            image_sizes=self._sizes,
            has_timestamps=TIMESTAMP in self._info.features,
            turned=libero is not None,
            libero=libero.columns(record) if libero else None,
            tolerance=self._tolerance,
            weight=self._weight,
        )

    def _check_index(self, record: EpisodeRecord) -> None:
        """The rows must be those of this episode and no other's."""
        if _INDEX not in self._info.features:
            return
        rows = self._ints(record, _INDEX)
        if (rows != record.index).any():
            raise DatasetError(
                f"{record.data_file}: rows {record.first_row} to "
                f"{record.first_row + record.length - 1} should be of episode {record.index}, "
                f"episode_index there is {sorted(set(rows.tolist()))[:5]}",
                field=_INDEX,
            )

    def _instruction(self, record: EpisodeRecord) -> str:
        """Of the first row; where rows do not say, the first that the episode's metadata lists."""
        tasks = self._listing.tasks
        if len(record.tasks) == 1 or (record.tasks and _TASK not in self._info.features):
            return record.tasks[0]
        if _TASK not in self._info.features:
            return ""
        index = int(self._ints(record, _TASK)[0])
        if index not in tasks:
            raise DatasetError(
                f"{record.data_file}, {record.name}: task_index {index} is none of the "
                f"{len(tasks)} tasks in meta",
                field=_TASK,
            )
        return tasks[index]

    def _ints(self, record: EpisodeRecord, key: str) -> npt.NDArray[np.int64]:
        column = COLUMNS.get(record.data_file, key)
        rows = column[record.first_row : record.first_row + record.length]
        return np.asarray(rows).reshape(-1).astype(np.int64)


def _slug(instruction: str) -> str:
    return re.sub(r"\W+", "_", instruction.lower()).strip("_") or "unnamed"
