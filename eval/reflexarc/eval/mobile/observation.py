"""From what the base sees to the observation that a policy's contract asks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from reflexarc.contract import Observation, PolicyContract
from reflexarc.contract.errors import ContractViolationError
from reflexarc.contract.images import prepare_image
from reflexarc.eval.mobile.tasks import CONTROL_HZ

if TYPE_CHECKING:
    from reflexarc.eval.mobile.simulator import RawObservation

CAMERA = "front"
_MAX_RENDER_SIZE = 1024
_ACTION = ("linear_x", "linear_y")


class MobileObserver:
    """Builds observations for one contract, which it has checked."""

    def __init__(self, contract: PolicyContract) -> None:
        check_mobile_contract(contract)
        self.contract = contract

    @property
    def image_size(self) -> int:
        """Side in pixels at which the simulator must render."""
        return self.contract.cameras[0].source_height

    def images(self, raw: RawObservation) -> dict[str, npt.NDArray[np.uint8]]:
        return {
            camera.name: prepare_image(camera, raw.images[camera.name])
            for camera in self.contract.cameras
        }

    def black_images(self) -> dict[str, npt.NDArray[np.uint8]]:
        return {
            camera.name: np.zeros((camera.height, camera.width, 3), dtype=np.uint8)
            for camera in self.contract.cameras
        }

    def state(self, raw: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        """``float32 (0,)``."""
        return np.asarray(raw, dtype=np.float32)

    def observation(
        self,
        images: dict[str, npt.NDArray[np.uint8]],
        raw_state: npt.NDArray[np.float64],
        instruction: str,
        **identifiers: Any,
    ) -> Observation:
        return Observation(
            images=images,
            state=self.state(raw_state),
            instruction=instruction if self.contract.needs_language else None,
            **identifiers,
        )


def check_mobile_contract(contract: PolicyContract) -> None:
    """Raise ContractViolationError, a line for each thing that the base cannot give or execute."""
    found: list[tuple[str, str]] = []
    if contract.camera_names != (CAMERA,):
        listed = ", ".join(contract.camera_names) or "none"
        found.append(("cameras", f"the base has one camera, {CAMERA}; asked for {listed}"))
    for camera in contract.cameras:
        key, size = f"cameras.{camera.name}", f"{camera.source_height}x{camera.source_width}"
        if camera.orientation != "upright":
            found.append((key, f"its images are upright, asked for {camera.orientation}"))
        if camera.source_height != camera.source_width or camera.source_height > _MAX_RENDER_SIZE:
            found.append(
                (key, f"it renders squares of at most {_MAX_RENDER_SIZE} pixels, asked for {size}")
            )
    if contract.state.dimension:
        found.append(("state", f"the base has no state to tell, asked for {contract.state.layout}"))
    action = contract.action
    if action.names != _ACTION or action.kind != "velocity":
        found.append(
            ("action", f"the base takes velocities {', '.join(_ACTION)}, the policy gives "
             f"{action.kind} {', '.join(action.names)}")
        )  # fmt: skip
    if action.control_hz != CONTROL_HZ:
        found.append(
            ("action.control_hz", f"a step takes {1 / CONTROL_HZ:g} s ({CONTROL_HZ:g} Hz), the "
             f"policy's chunks are of {action.control_hz:g} Hz")
        )  # fmt: skip
    if found:
        lines = [f"  {name}: {what}" for name, what in found]
        raise ContractViolationError(
            "\n".join(["the mobile world cannot satisfy this policy's contract:", *lines]),
            field=found[0][0],
        )
