"""From what a simulator renders and senses to the observation that a policy's contract asks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from reflexarc.contract import Observation, PolicyContract
from reflexarc.contract.images import prepare_image

if TYPE_CHECKING:
    from reflexarc.eval.worlds import RawObservation

RawState = TypeVar("RawState")


class Observer(ABC, Generic[RawState]):
    """Builds observations for one contract, which its world can meet.

    Histories need nothing of it: the executor calls it at every step that a later decision sees.

    Raises ContractViolationError at construction, listing everything that the contract asks and
    the world cannot supply.
    """

    def __init__(self, contract: PolicyContract) -> None:
        self.check(contract)
        self.contract = contract

    @staticmethod
    @abstractmethod
    def check(contract: PolicyContract) -> None:
        """Raise ContractViolationError for what this world cannot give or execute."""

    @abstractmethod
    def state(self, raw: RawState) -> npt.NDArray[np.float32]:
        """``float32 (S,)`` in the contract's layout."""

    @property
    def image_size(self) -> int:
        """Side in pixels at which the simulator must render."""
        return self.contract.cameras[0].source_height if self.contract.cameras else 256

    def images(self, raw: RawObservation) -> dict[str, npt.NDArray[np.uint8]]:
        """Camera name to ``uint8 (height, width, 3)`` RGB, after the contract's image steps."""
        return {
            camera.name: prepare_image(camera, raw.images[camera.name])
            for camera in self.contract.cameras
        }

    def black_images(self) -> dict[str, npt.NDArray[np.uint8]]:
        """The contract's images with every pixel 0."""
        return {
            camera.name: np.zeros((camera.height, camera.width, 3), dtype=np.uint8)
            for camera in self.contract.cameras
        }

    def observation(
        self,
        images: dict[str, npt.NDArray[np.uint8]],
        raw_state: RawState,
        instruction: str,
        **identifiers: Any,
    ) -> Observation:
        """Observation with the state ``(S,)`` float32; ``identifiers`` are its optional fields."""
        return Observation(
            images=images,
            state=self.state(raw_state),
            instruction=instruction if self.contract.needs_language else None,
            **identifiers,
        )
