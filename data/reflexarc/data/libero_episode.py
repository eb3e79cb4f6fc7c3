"""One demonstration of a LIBERO file: actions, states and images, read when asked for.

Whatever the file holds, an :class:`Episode` gives aligned rows: row ``t`` of states and images
precedes action ``t``. An official demo of T samples therefore has length T - 1.

Files are opened for the length of one call and no handle is kept, so an episode can be pickled and
used in forked or spawned workers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from reflexarc.contract.errors import DatasetError
from reflexarc.data.dataset import FloatRows, FrameIndices, Labels
from reflexarc.data.finite import require_finite
from reflexarc.data.libero_layout import (
    ACTION_DIMENSION,
    CAMERA_DATASETS,
    STATE_PARTS,
    Alignment,
    open_hdf5,
    read_dataset,
    require_dataset,
)
from reflexarc.data.presence import changes_of

__all__ = ["Episode", "FloatRows", "Labels"]


@dataclass(frozen=True, eq=False)  # arrays inside: two episodes are equal when they are one
class Episode:
    """One demonstration; arrays are read when asked for.

    Attributes:
        path: the file.
        demo: name of its group in the file, such as ``demo_0``.
        task_name: the file's name without ``_demo.hdf5``.
        instruction: what the demonstration does, in words.
        length: T, the number of aligned actions.
        alignment: where the file itself stores observations: before or after their action.
        recognised_by: why ``alignment`` was taken to be so.
        render_stride: steps between two stored images.
        image_steps: ``int64 (F,)``, steps t at which an image precedes action t.
        image_shape: ``(H, W, 3)`` of the stored images.
        seed: of the simulator's reset, where the file says it.
        weight: how often an epoch of training sees each of its samples.
    """

    path: Path
    demo: str
    task_name: str
    instruction: str
    length: int
    alignment: Alignment
    recognised_by: str
    render_stride: int
    image_steps: npt.NDArray[np.int64] = field(repr=False)
    image_shape: tuple[int, int, int]
    seed: int | None = None
    weight: float = 1.0

    def actions(self) -> FloatRows:
        """``float64 (T, 7)`` as recorded: OSC deltas, gripper last. DatasetError if not finite."""
        first = 1 if self.alignment == "after_action" else 0
        return self._rows("actions", first, ACTION_DIMENSION)

    def expert_actions(self) -> FloatRows:
        """``float64 (T, 7)``: the executed actions' mean over the injected noise.

        Labels for imitation where noise was injected while collecting (after DART, arXiv
        1703.09327, but with the limits' effect on the noise).
        DatasetError in a file that does not hold them.
        """
        with open_hdf5(self.path) as file:
            if "expert_actions" not in file[f"data/{self.demo}"]:
                raise DatasetError(
                    f"{self.path}, {self.demo}: the expert's mean actions are not in this "
                    "file; collect it again with 'reflexarc data collect', or train on what was "
                    "executed, with data.labels: executed",
                    field="expert_actions",
                )
        first = 1 if self.alignment == "after_action" else 0
        return self._rows("expert_actions", first, ACTION_DIMENSION)

    def labelled_actions(self, labels: Labels) -> FloatRows:
        """``float64 (T, 7)``: :meth:`actions` or :meth:`expert_actions`."""
        return self.expert_actions() if labels == "expert" else self.actions()

    def object_positions(self) -> tuple[FloatRows, tuple[str, ...]]:
        """``float64 (T, O, 3)`` metres, world frame, and the O objects' names.

        Row t precedes action t. DatasetError in a file that does not hold them.
        """
        with open_hdf5(self.path) as file:
            names = file[f"data/{self.demo}"].attrs.get("object_names")
            if names is None:
                raise DatasetError(
                    f"{self.path}, {self.demo}: the positions of objects are not in this file; "
                    "collect it again with 'reflexarc data collect'",
                    field="object_positions",
                )
            key, objects = "object_positions", tuple(json.loads(names))
            shape = (None, len(objects), 3)
            dataset = require_dataset(file, self.path, self.demo, key, shape)
            raw = read_dataset(dataset, self.path, self.demo, key, slice(0, self.length))
        return np.asarray(raw, dtype=np.float64), objects

    def states(self, layout: str) -> FloatRows:
        """``float64 (T, S)`` in the contract's ``layout``; row t precedes action t."""
        if layout not in STATE_PARTS:
            raise DatasetError(
                f"state layout {layout!r} is unknown; known: {', '.join(STATE_PARTS)}",
                field="layout",
            )
        parts = [self._rows(f"obs/{key}", 0, width) for key, width in STATE_PARTS[layout]]
        return np.concatenate(parts, axis=1)

    def image_source(self, camera: str) -> list[Any]:
        """The file with size and time of its last change, and what says which rows are frames."""
        return [*changes_of(self.path), camera, self.alignment]

    def image_size(self, camera: str) -> tuple[int, int]:
        """Height and width of the stored images; DatasetError for an unknown camera."""
        _check_camera(camera)
        return self.image_shape[0], self.image_shape[1]

    def images(self, camera: str, frame_indices: FrameIndices) -> npt.NDArray[np.uint8]:
        """``uint8 (n, H, W, 3)`` in raw OpenGL orientation (upside-down).

        Args:
            camera: which of the two.
            frame_indices: indices into ``image_steps``, in any order, repeats allowed.
        """
        _check_camera(camera)
        indices = np.asarray(frame_indices, dtype=np.int64).reshape(-1)
        frames = len(self.image_steps)
        if indices.size and not (indices.min() >= 0 and indices.max() < frames):
            raise DatasetError(
                f"{self.path}, {self.demo}: frame indices {indices.min()}..{indices.max()} are "
                f"outside 0..{frames - 1}"
            )
        # h5py wants increasing unique indices; the inverse restores the caller's order.
        unique, inverse = np.unique(indices, return_inverse=True)
        key = CAMERA_DATASETS[camera]
        with open_hdf5(self.path) as file:
            dataset = require_dataset(file, self.path, self.demo, key)
            # Run by run: h5py's selection of scattered rows takes longer than reading them.
            runs = np.split(unique, np.flatnonzero(np.diff(unique) > 1) + 1)
            rows = [slice(int(r[0]), int(r[-1]) + 1) if len(r) else slice(0) for r in runs]
            parts = [read_dataset(dataset, self.path, self.demo, key, part) for part in rows]
        pixels = np.asarray(np.concatenate(parts) if len(parts) > 1 else parts[0], dtype=np.uint8)
        return pixels if np.array_equal(unique, indices) else pixels[inverse]

    def _rows(self, key: str, first: int, width: int) -> FloatRows:
        with open_hdf5(self.path) as file:
            dataset = require_dataset(file, self.path, self.demo, key)
            raw = read_dataset(dataset, self.path, self.demo, key, slice(first, None))
        rows = np.asarray(raw, dtype=np.float64)[: self.length]
        if rows.shape != (self.length, width):
            raise DatasetError(
                f"{self.path}, {self.demo}: {key} gives {rows.shape} rows where "
                f"{(self.length, width)} were stated on opening; was the file changed?"
            )
        return require_finite(rows, f"{self.path}, {self.demo}", key, first_row=first)

    def identity(self) -> list[Any]:
        """What a dataset's fingerprint says of this episode beside its actions."""
        return [
            self.path.name,
            self.demo,
            self.instruction,
            self.length,
            self.alignment,
            self.seed,
            list(self.image_shape),
            self.image_steps.tolist(),
        ]


def _check_camera(camera: str) -> None:
    if camera not in CAMERA_DATASETS:
        raise DatasetError(
            f"camera {camera!r} is unknown; known: {', '.join(CAMERA_DATASETS)}", field="camera"
        )
