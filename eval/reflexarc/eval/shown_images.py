"""What an arm shows to the policy: the cameras' images, black ones, or another task's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from reflexarc.contract.errors import DatasetError
from reflexarc.contract.images import prepare_image
from reflexarc.contract.policy_contract import PolicyContract

if TYPE_CHECKING:
    from reflexarc.data.dataset import DatasetEpisode
    from reflexarc.eval.observer import Observer
    from reflexarc.eval.videos import Film
    from reflexarc.eval.worlds import Simulator

Images = dict[str, npt.NDArray[np.uint8]]


class ShownImages(Protocol):
    """Gives what the policy is shown at a step: camera name to ``uint8 (height, width, 3)``."""

    def __call__(self, step: int) -> Images: ...


class CameraImages:
    """What the simulator's cameras see; rendered when asked for, and filmed."""

    def __init__(self, observer: Observer[Any], simulator: Simulator, film: Film) -> None:
        self._observer, self._simulator, self._film = observer, simulator, film

    def __call__(self, step: int) -> Images:
        raw = self._simulator.observe()
        self._film.see(step, raw.images, self._simulator)
        return self._observer.images(raw)


class BlackImages:
    """Every pixel 0; nothing is rendered. The film keeps what was there."""

    def __init__(self, observer: Observer[Any], simulator: Simulator, film: Film) -> None:
        self._black = observer.black_images()
        self._simulator, self._film = simulator, film

    def __call__(self, step: int) -> Images:
        self._film.snap(step, self._simulator)
        return self._black


class RecordedImages:
    """The frames of a demonstration as if it went on here: the last one recorded by each step.

    After the demonstration's end its last frame stays. The film keeps what was there.
    """

    def __init__(
        self, episode: DatasetEpisode, contract: PolicyContract, simulator: Simulator, film: Film
    ) -> None:
        if not len(episode.image_steps):
            raise DatasetError(
                f"{episode.path}, {episode.demo} holds no images to show; collect it again"
            )
        self._steps = episode.image_steps
        frames = range(len(self._steps))
        self._cameras = contract.cameras
        self._raw = {
            camera.name: episode.images(camera.name, frames) for camera in contract.cameras
        }
        self._simulator, self._film = simulator, film

    def __call__(self, step: int) -> Images:
        self._film.snap(step, self._simulator)
        frame = max(0, int(np.searchsorted(self._steps, step, side="right")) - 1)
        return {
            camera.name: prepare_image(camera, self._raw[camera.name][frame])
            for camera in self._cameras
        }
