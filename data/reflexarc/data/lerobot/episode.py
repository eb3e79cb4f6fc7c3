"""One episode of a LeRobot dataset: state, actions and images, read when asked for."""

from __future__ import annotations

import io
from collections.abc import Mapping as AnyMapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from reflexarc.contract.errors import DatasetError
from reflexarc.data.dataset import FloatRows, FrameIndices, Labels
from reflexarc.data.finite import require_finite
from reflexarc.data.lerobot.info import Slice
from reflexarc.data.lerobot.libero_objects import POSITIONS, object_names
from reflexarc.data.lerobot.mapping import Mapping
from reflexarc.data.lerobot.parquet import COLUMNS, read_cells
from reflexarc.data.lerobot.records import EpisodeRecord
from reflexarc.data.lerobot.video import DECODERS, TOLERANCE
from reflexarc.data.presence import changes_of

TIMESTAMP = "timestamp"
_RATE_TOLERANCE = 0.1


@dataclass(frozen=True)
class LiberoColumns:
    """What a dataset that came from LIBERO's HDF5 files holds beside LeRobot's own.

    Attributes:
        file: parquet with as many rows as the episode's data file.
        layouts: the contract's state layouts, each as columns of either file.
        expert: column of the expert's mean actions, None where there are none.
    """

    file: Path
    layouts: AnyMapping[str, tuple[Slice, ...]]
    expert: str | None


@dataclass(frozen=True, eq=False)  # arrays inside: two episodes are equal when they are one
class LeRobotEpisode:
    """See :class:`reflexarc.data.dataset.DatasetEpisode`.

    Attributes:
        path: the dataset's folder.
        image_sizes: declared height and width by the contract's camera.
        turned: whether images are stored turned by half a turn, as LIBERO's usually are; they are
            turned back.
        tolerance: seconds that a frame may lie from its row's timestamp.
    """

    path: Path
    record: EpisodeRecord
    mapping: Mapping
    instruction: str
    task_name: str
    image_steps: npt.NDArray[np.int64] = field(repr=False)
    render_stride: int
    image_sizes: AnyMapping[str, tuple[int, int]]
    has_timestamps: bool = True
    turned: bool = False
    libero: LiberoColumns | None = None
    tolerance: float = TOLERANCE
    weight: float = 1.0

    @property
    def demo(self) -> str:
        return self.record.name

    @property
    def length(self) -> int:
        return self.record.length

    def image_size(self, camera: str) -> tuple[int, int]:
        """Declared height and width; :meth:`images` refuses files of another size."""
        self._feature_of(camera)
        return self.image_sizes[camera]

    def image_source(self, camera: str) -> list[Any]:
        """The file with size and time of its last change, where in it the episode begins."""
        feature = self._feature_of(camera)
        span = self.record.videos.get(feature)
        begins = self.record.first_row if span is None else span.start
        path = self.record.data_file if span is None else span.path
        return [*changes_of(path), feature, begins, self.turned]

    def images(self, camera: str, frame_indices: FrameIndices) -> npt.NDArray[np.uint8]:
        """``uint8 (n, H, W, 3)`` RGB of some indices into ``image_steps``, in any order.

        The frame of row i is the one whose time in the video is the episode's start there plus
        the row's timestamp since the episode's first row.
        """
        feature = self._feature_of(camera)
        indices = np.asarray(frame_indices, dtype=np.int64).reshape(-1)
        frames = len(self.image_steps)
        if indices.size and not (indices.min() >= 0 and indices.max() < frames):
            raise DatasetError(
                f"{self.path}, {self.demo}: frame indices {indices.min()}..{indices.max()} are "
                f"outside 0..{frames - 1}"
            )
        height, width = self.image_sizes[camera]
        if not indices.size:
            return np.zeros((0, height, width, 3), dtype=np.uint8)
        steps = self.image_steps[indices]
        span = self.record.videos.get(feature)
        if span is None:
            pixels = self._embedded(feature, steps)
        else:
            times = (span.start + self._since_first[steps]).tolist()
            pixels = DECODERS.frames(span.path, times, self.tolerance)
        if pixels.shape[1:] != (height, width, 3):
            raise DatasetError(
                f"{self.path}, {self.demo}: images of {feature} are "
                f"{pixels.shape[1]}x{pixels.shape[2]}, info.json says {height}x{width}; correct it",
                field=feature,
            )
        return pixels[:, ::-1, ::-1] if self.turned else pixels

    def states(self, layout: str) -> FloatRows:
        """``float64 (T, S)``: the mapped parts of the state side by side."""
        if self.libero is not None and layout in self.libero.layouts:
            return self._joined(self.libero.layouts[layout])
        if layout != self.mapping.state_spec.layout:
            raise DatasetError(
                f"{self.path}: state layout {layout!r} is not {self.mapping.state_spec.layout!r}, "
                "which data.state gives",
                field="layout",
            )
        return self._joined(tuple(part.columns for part in self.mapping.state))

    def actions(self) -> FloatRows:
        """``float64 (T, D)``: the mapped parts of the action side by side."""
        return self._joined(tuple(part.columns for part in self.mapping.action))

    def labelled_actions(self, labels: Labels) -> FloatRows:
        """:meth:`actions`; an expert's mean where the dataset came from files that hold it."""
        if labels == "executed":
            return self.actions()
        if self.libero is None or self.libero.expert is None:
            raise DatasetError(
                f"{self.path}: the expert's mean actions are not in this dataset; train on what "
                "was executed, with data.labels: executed",
                field="expert_actions",
            )
        return self._rows(self.libero.expert)

    def object_positions(self) -> tuple[FloatRows, tuple[str, ...]]:
        """``float64 (T, O, 3)`` metres, world frame, and the O objects' names.

        DatasetError where the dataset did not come from files that hold them.
        """
        names: tuple[str, ...] = ()
        if self.libero is not None:
            first = int(COLUMNS.get(self.record.data_file, "episode_index")[0])
            names = object_names(self.libero.file, self.record.index - first)
        if self.libero is None or not names:
            raise DatasetError(
                f"{self.path}, {self.demo}: the positions of objects are not in this dataset",
                field="object_positions",
            )
        rows = COLUMNS.get(self.libero.file, POSITIONS)
        first_row = self.record.first_row
        return np.asarray(rows[first_row : first_row + self.length], dtype=np.float64), names

    @cached_property
    def _since_first(self) -> FloatRows:
        return self.times()  # asked for with every image

    def times(self) -> FloatRows:
        """``float64 (T,)`` seconds since the first row. DatasetError where they do not increase."""
        if not self.has_timestamps:
            return np.arange(self.length) / self.mapping.fps
        times = self._rows(TIMESTAMP)[:, 0]
        steps = np.diff(times)
        if (steps <= 0).any():
            row = int(np.argmax(steps <= 0))
            raise DatasetError(
                f"{self.record.data_file}, {self.demo}: timestamp does not increase after row "
                f"{row}: {times[row]:g}, {times[row + 1]:g}; correct it, or leave this episode "
                "out",
                field=TIMESTAMP,
            )
        self._check_rate(steps)
        since: FloatRows = times - times[0]
        return since

    def _check_rate(self, steps: FloatRows) -> None:
        """Actions are executed at the rate of ``info.json``; rows recorded at another mean others.

        Single frames may be missing, so the median of the steps counts.
        """
        if not len(steps):
            return
        step, expected = float(np.median(steps)), 1 / self.mapping.fps
        if not expected * (1 - _RATE_TOLERANCE) <= step <= expected * (1 + _RATE_TOLERANCE):
            raise DatasetError(
                f"{self.record.data_file}, {self.demo}: rows lie {step:.4g} s apart "
                f"({1 / step:.4g} a second), info.json says fps is {self.mapping.fps:g}; correct "
                "fps there, or the timestamps",
                field="fps",
            )

    def identity(self) -> list[Any]:
        """Names, length, instruction, what is mapped to what, and the sizes of the videos."""
        videos = [
            [name, self._feature_of(name), *self.image_sizes[name]] for name in self.mapping.cameras
        ]
        parts = [
            [part.name, part.columns.key, part.columns.start, part.columns.end]
            for part in (*self.mapping.state, *self.mapping.action)
        ]
        sizes = [span.path.stat().st_size for span in self.record.videos.values()]
        return [
            self.path.name,
            self.demo,
            self.instruction,
            self.length,
            self.mapping.fps,
            videos,
            parts,
            sizes,
            self.image_steps.tolist() if self.libero is not None else self.render_stride,
        ]

    def _feature_of(self, camera: str) -> str:
        if camera not in self.mapping.cameras:
            raise DatasetError(
                f"{self.path} has no camera {camera!r}; it has: "
                f"{', '.join(self.mapping.cameras) or 'none'}",
                field="camera",
            )
        return self.mapping.cameras[camera]

    def _embedded(self, feature: str, steps: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Images that stand compressed in the parquet file."""
        low, high = int(steps.min()), int(steps.max())
        first = self.record.first_row + low
        cells = read_cells(self.record.data_file, feature, first, high - low + 1)
        decoded = {step: self._decode(cells[step - low], feature, step) for step in set(steps)}
        return np.stack([decoded[step] for step in steps])

    def _decode(self, cell: Any, feature: str, step: int) -> npt.NDArray[np.uint8]:
        data = cell.get("bytes") if isinstance(cell, dict) else None
        try:
            if data is None and isinstance(cell, dict) and cell.get("path"):
                data = (self.path / str(cell["path"])).read_bytes()
            with Image.open(io.BytesIO(data or b"")) as image:
                return np.asarray(image.convert("RGB"))
        except (UnidentifiedImageError, OSError, ValueError) as error:
            raise DatasetError(
                f"{self.record.data_file}, {self.demo}: {feature} of row {step} is no image: "
                f"{error}",
                field=feature,
            ) from error

    def _joined(self, columns: tuple[Slice, ...]) -> FloatRows:
        rows = [self._rows(part.key)[:, part.start : part.end] for part in columns]
        return np.concatenate(rows, axis=1)

    def _rows(self, key: str) -> FloatRows:
        """``float64 (T, D)`` of one column, finite."""
        file, first = self.record.data_file, self.record.first_row
        if self.libero is not None and key.startswith("libero."):
            file = self.libero.file
        column = COLUMNS.get(file, key)
        try:
            rows = np.asarray(column[first : first + self.length], dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise DatasetError(
                f"{file}: {key} is not numeric ({error}); name another part of the data in its "
                "place, or record it as numbers",
                field=key,
            ) from error
        rows = rows.reshape(len(rows), -1)
        if len(rows) != self.length:
            raise DatasetError(
                f"{file}, {self.demo}: {key} has {len(rows)} rows, the episode's length is "
                f"{self.length}; copy the dataset again",
                field=key,
            )
        width = self.mapping.widths.get(key, rows.shape[1])
        if rows.shape[1] != width:
            raise DatasetError(
                f"{file}, {self.demo}: rows of {key} have {rows.shape[1]} values, info.json says "
                f"{width}; correct its shape there, or leave this episode out",
                field=key,
            )
        return require_finite(rows, f"{file}, {self.demo}", key)
