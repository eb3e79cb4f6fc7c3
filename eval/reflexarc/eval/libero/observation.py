"""From what the simulator renders and senses to the observation that a policy's contract asks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from reflexarc.contract import Observation, PolicyContract
from reflexarc.contract.errors import ContractViolationError
from reflexarc.contract.images import prepare_image
from reflexarc.contract.policy_contract import LIBERO_STATES, libero_action

if TYPE_CHECKING:
    from reflexarc.eval.libero.simulator import RawObservation, RawState

LIBERO_CAMERAS = ("agentview", "eye_in_hand")
MAX_RENDER_SIZE = 1024
"""Pixels a side: above, a frame takes longer to render than a robot has for a step."""


class LiberoObserver:
    """Builds observations for one contract.

    Raises ContractViolationError at construction, listing everything that the contract asks and
    LIBERO cannot supply. Histories need nothing of the observer: the executor calls it at every
    step that a later decision sees.
    """

    def __init__(self, contract: PolicyContract) -> None:
        check_libero_contract(contract)
        self.contract = contract

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

    def state(self, raw: RawState) -> npt.NDArray[np.float32]:
        """``float32 (S,)`` in the contract's layout."""
        return np.asarray(raw.vector(self.contract.state.layout), dtype=np.float32)

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


def check_libero_contract(contract: PolicyContract) -> None:
    """Raise ContractViolationError, a line for each thing that LIBERO cannot give or execute."""
    found = [
        *_camera_mismatches(contract),
        *_state_mismatches(contract),
        *_action_mismatches(contract),
    ]
    if found:
        lines = [f"  {name}: {what}" for name, what in found]
        raise ContractViolationError(
            "\n".join(["LIBERO cannot satisfy this policy's contract:", *lines]),
            field=found[0][0],
        )


def _camera_mismatches(contract: PolicyContract) -> list[tuple[str, str]]:
    found = []
    for camera in contract.cameras:
        key = f"cameras.{camera.name}"
        if camera.name not in LIBERO_CAMERAS:
            found.append((key, f"LIBERO has the cameras {', '.join(LIBERO_CAMERAS)}"))
        if camera.orientation == "upright":
            found.append((key, "LIBERO gives opengl or rotated_180, asked for upright"))
        if camera.source_height != camera.source_width:
            size = f"{camera.source_height}x{camera.source_width}"
            found.append((key, f"LIBERO renders square images, the contract's source is {size}"))
        if max(camera.source_height, camera.source_width) > MAX_RENDER_SIZE:
            size = f"{camera.source_height}x{camera.source_width}"
            found.append((key, f"renders at most {MAX_RENDER_SIZE} pixels a side, asked: {size}"))
    sizes = sorted({camera.source_height for camera in contract.cameras})
    if len(sizes) > 1:
        found.append(("cameras", f"one simulator renders at one size, asked for {sizes}"))
    return found


def _state_mismatches(contract: PolicyContract) -> list[tuple[str, str]]:
    state = contract.state
    if state.layout not in LIBERO_STATES:
        known = ", ".join(LIBERO_STATES)
        return [("state.layout", f"LIBERO gives {known}, asked for {state.layout!r}")]
    if state.names != LIBERO_STATES[state.layout].names:
        wanted = LIBERO_STATES[state.layout].names
        return [("state.names", f"the layout {state.layout} is {wanted}, asked for {state.names}")]
    return []


def _action_mismatches(contract: PolicyContract) -> list[tuple[str, str]]:
    action, libero = contract.action, libero_action(contract.action.horizon)
    return [
        (f"action.{name}", f"LIBERO executes {wanted}, the policy gives {given}")
        for name, wanted, given in (
            ("names", libero.names, action.names),
            ("kind", libero.kind, action.kind),
            ("control_hz", libero.control_hz, action.control_hz),
            ("low", libero.low, action.low),
            ("high", libero.high, action.high),
            ("gripper", libero.gripper, action.gripper),
        )
        if wanted != given
    ]
