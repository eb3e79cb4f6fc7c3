"""One episode of a mobile robot: images, velocities and an instruction, read when asked for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from reflexarc.contract.errors import DatasetError
from reflexarc.data.dataset import FloatRows, FrameIndices, Labels
from reflexarc.data.finite import require_finite
from reflexarc.data.libero_layout import open_hdf5
from reflexarc.data.mobile import layout
from reflexarc.data.presence import changes_of


@dataclass(frozen=True, eq=False)
class MobileEpisode:
    """One file. Implements :class:`reflexarc.data.dataset.DatasetEpisode`.

    Attributes:
        path: the file.
        instruction: of the episode, or the recipe's fallback.
        length: T.
        image_shape: ``(H, W, 3)``.
        control_hz: of the file; None where it does not say.
        has_expert: whether it holds the labels under injected noise.
        weight: how often an epoch of training sees each of its samples.
    """

    path: Path
    instruction: str
    length: int
    image_shape: tuple[int, int, int]
    control_hz: float | None
    has_expert: bool
    weight: float = 1.0

    render_stride = 1

    @property
    def demo(self) -> str:
        return self.path.stem

    @property
    def task_name(self) -> str:
        """The instruction as a name: what splits count by."""
        return re.sub(r"[^a-z0-9]+", "_", self.instruction.lower()).strip("_")

    @cached_property
    def image_steps(self) -> npt.NDArray[np.int64]:
        """Every step."""
        return np.arange(self.length, dtype=np.int64)

    def image_size(self, camera: str) -> tuple[int, int]:
        _check_camera(camera)
        return self.image_shape[0], self.image_shape[1]

    def image_source(self, camera: str) -> list[Any]:
        return [*changes_of(self.path), camera]

    def images(self, camera: str, frame_indices: FrameIndices) -> npt.NDArray[np.uint8]:
        _check_camera(camera)
        indices = np.asarray(frame_indices, dtype=np.int64).reshape(-1)
        if indices.size and not (indices.min() >= 0 and indices.max() < self.length):
            raise DatasetError(
                f"{self.path}: frames {indices.min()}..{indices.max()} are outside "
                f"0..{self.length - 1}"
            )
        unique, inverse = np.unique(indices, return_inverse=True)
        with open_hdf5(self.path) as file:
            dataset = layout.images_of(file, self.path)
            # Run by run: h5py's selection of scattered rows takes longer than reading them.
            runs = np.split(unique, np.flatnonzero(np.diff(unique) > 1) + 1)
            parts = [
                layout.read(dataset, self.path, layout.IMAGES, slice(run[0], run[-1] + 1))
                for run in runs
                if len(run)
            ]
        if not parts:
            return np.empty((0, *self.image_shape), dtype=np.uint8)
        return np.asarray(np.concatenate(parts)[inverse], dtype=np.uint8)

    def states(self, layout: str) -> FloatRows:
        """``float64 (T, 0)``: this robot senses with its camera alone."""
        return np.zeros((self.length, 0))

    def actions(self) -> FloatRows:
        """``float64 (T, 2)`` metres a second, as executed. DatasetError if not finite."""
        return self._rows(layout.ACTIONS)

    def labelled_actions(self, labels: Labels) -> FloatRows:
        """As executed, or what the driver meant before noise was injected."""
        if labels == "executed":
            return self.actions()
        if not self.has_expert:
            raise DatasetError(
                f"{self.path} holds no {layout.EXPERT}; train on what was executed, with "
                "data.labels: executed",
                field=layout.EXPERT,
            )
        return self._rows(layout.EXPERT)

    def identity(self) -> list[Any]:
        return [self.path.name, self.instruction, self.length, list(self.image_shape)]

    def _rows(self, key: str) -> FloatRows:
        with open_hdf5(self.path) as file:
            raw = layout.read(layout.rows_of(file, self.path, key), self.path, key, slice(None))
        rows = np.asarray(raw, dtype=np.float64)[:, : len(layout.VELOCITIES)]
        if len(rows) != self.length:
            raise DatasetError(
                f"{self.path}: {key} has {len(rows)} rows, {self.length} were there on opening; "
                "was the file changed?",
                field=key,
            )
        return require_finite(rows, str(self.path), key)


def read_episode(path: Path, fallback_instruction: str | None = None) -> MobileEpisode:
    """Open one file, and check that what it holds fits together.

    Raises DatasetError naming file and key; for an episode without instruction, unless
    ``fallback_instruction`` stands in for it.
    """
    with open_hdf5(path) as file:
        images = layout.images_of(file, path)
        actions = layout.rows_of(file, path, layout.ACTIONS)
        if len(images) != len(actions) or not len(actions):
            raise DatasetError(
                f"{path}: {len(images)} images and {len(actions)} actions; every action needs the "
                "image before it: record this episode again, or leave it out with data.pattern",
                field=layout.ACTIONS,
            )
        has_expert = layout.EXPERT in file
        if has_expert and len(layout.rows_of(file, path, layout.EXPERT)) != len(actions):
            raise DatasetError(
                f"{path}: {layout.EXPERT} and {layout.ACTIONS} differ in length; collect it again",
                field=layout.EXPERT,
            )
        instruction = layout.instruction_of(file, path) or fallback_instruction
        hz = file.attrs.get(layout.CONTROL_HZ)
        height, width = (int(side) for side in images.shape[1:3])
        length = len(actions)
    if instruction is None:
        raise DatasetError(
            f"{path} has no {layout.INSTRUCTION}: a policy that is told nothing cannot learn to "
            "listen. Write one into every episode, or give all that lack one the same with "
            'data.fallback_instruction: "..."',
            field=layout.INSTRUCTION,
        )
    return MobileEpisode(
        path=path,
        instruction=instruction,
        length=length,
        image_shape=(height, width, 3),
        control_hz=None if hz is None else float(hz),
        has_expert=has_expert,
    )


def _check_camera(camera: str) -> None:
    if camera != layout.CAMERA:
        raise DatasetError(
            f"camera {camera!r} is unknown; a mobile robot's episode has {layout.CAMERA}",
            field="camera",
        )
