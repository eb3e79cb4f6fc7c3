"""What training, evaluation and reports ask of demonstrations, whatever their files look like.

Implemented by LIBERO's HDF5 files (:mod:`reflexarc.data.libero_hdf5`), by LeRobot folders
(:mod:`reflexarc.data.lerobot`) and by mixtures of both (:mod:`reflexarc.data.mixture`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from reflexarc.contract.policy_contract import ActionSpec, Orientation, StateSpec

FloatRows = npt.NDArray[np.float64]
Labels = Literal["executed", "expert"]
FrameIndices = Sequence[int] | npt.NDArray[np.integer]


class DatasetEpisode(Protocol):
    """One demonstration of T steps; arrays are read when asked for.

    Row ``t`` of states and images precedes action ``t``. An episode can be pickled and used in
    forked or spawned workers.
    """

    @property
    def path(self) -> Path:
        """The file or folder it lies in."""

    @property
    def demo(self) -> str:
        """Its name there, such as ``demo_0``."""

    @property
    def task_name(self) -> str:
        """What splits and limits count by."""

    @property
    def instruction(self) -> str:
        """What it does, in words."""

    @property
    def length(self) -> int:
        """T, the number of actions."""

    @property
    def image_steps(self) -> npt.NDArray[np.int64]:
        """``int64 (F,)``, increasing: an image precedes action ``image_steps[i]``."""

    @property
    def render_stride(self) -> int:
        """Steps between two images."""

    @property
    def weight(self) -> float:
        """How often an epoch of training sees each of its samples."""

    def image_size(self, camera: str) -> tuple[int, int]:
        """Height and width of a camera's images. DatasetError for a camera that is not there."""

    def image_source(self, camera: str) -> list[Any]:
        """What decides a camera's images, without reading them: a file, its size and the time of
        its last change, and how it is read. JSON values."""

    def images(self, camera: str, frame_indices: FrameIndices) -> npt.NDArray[np.uint8]:
        """``uint8 (n, H, W, 3)`` RGB of some indices into ``image_steps``, in their order."""

    def states(self, layout: str) -> FloatRows:
        """``float64 (T, S)`` in the contract's ``layout``. DatasetError if not finite."""

    def actions(self) -> FloatRows:
        """``float64 (T, D)`` as executed. DatasetError if not finite."""

    def labelled_actions(self, labels: Labels) -> FloatRows:
        """``float64 (T, D)`` as executed, or their mean over noise injected while collecting."""

    def identity(self) -> list[Any]:
        """What a fingerprint says of it beside its actions; JSON values."""


class EpisodeDataset(Protocol):
    """Episodes that one policy can learn from."""

    @property
    def episodes(self) -> Sequence[DatasetEpisode]: ...

    @property
    def orientations(self) -> tuple[Orientation, ...]:
        """The orientations that a contract may name for its images; the first is usual."""

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names of the cameras that every episode has."""

    def layout(self, wanted: str) -> str:
        """The layout of its state: ``wanted`` of LIBERO's, or its only one."""

    def subset(self, episodes: Sequence[DatasetEpisode]) -> EpisodeDataset:
        """The same data with these of its episodes alone."""

    def state_spec(self, layout: str) -> StateSpec:
        """The state in ``layout``. DatasetError for a layout that this data does not give."""

    def action_spec(self, horizon: int) -> ActionSpec:
        """Chunks of ``horizon`` of its actions."""

    def fingerprint(self) -> str:
        """sha256 over the episodes' identities and actions; neither pixels nor states."""

    def check_images(self) -> None:
        """DatasetError where a file of images is missing or cut short; decodes nothing."""
