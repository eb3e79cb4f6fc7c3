"""Goal images for a policy that is shown one: what a named demonstration ends with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from reflexarc.contract import PolicyContract
from reflexarc.contract.images import prepare_image
from reflexarc.data.dataset import DatasetEpisode
from reflexarc.eval.baselines import load_demonstration

if TYPE_CHECKING:
    from reflexarc.eval.libero.suites import LiberoTask

Images = dict[str, npt.NDArray[np.uint8]]


@dataclass(frozen=True)
class Goal:
    """One task's goal image.

    Attributes:
        images: camera name to ``uint8 (H, W, 3)``, as the contract states.
        source: ``file/demo`` of the demonstration whose last image it is.
    """

    images: Images
    source: str

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for name in sorted(self.images):
            digest.update(name.encode() + np.ascontiguousarray(self.images[name]).tobytes())
        return digest.hexdigest()


def last_images(contract: PolicyContract, episode: DatasetEpisode) -> Images:
    """The last image that ``episode`` holds, of each camera, as the contract wants it."""
    last = [len(episode.image_steps) - 1]
    return {
        camera.name: prepare_image(camera, episode.images(camera.name, last)[0])
        for camera in contract.cameras
    }


def load_goals(
    contract: PolicyContract,
    path: Path,
    tasks: Sequence[LiberoTask],
    demonstration: str | None = None,
) -> Mapping[int, Goal]:
    """The goal of each task by index: of its demonstration with this name, or of its first.

    Raises DatasetError naming the task that has none.
    """
    found = {}
    for task in tasks:
        one = load_demonstration(path, task.name, demonstration)
        found[task.index] = Goal(last_images(contract, one.episode), one.source)
    return found
