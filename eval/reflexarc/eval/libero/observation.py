"""From what the simulator renders and senses to the observation that a policy's contract asks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from reflexarc.contract import PolicyContract
from reflexarc.contract.errors import ContractViolationError
from reflexarc.contract.policy_contract import LIBERO_STATES, libero_action
from reflexarc.eval.observer import Observer

if TYPE_CHECKING:
    from reflexarc.eval.libero.simulator import RawState

LIBERO_CAMERAS = ("agentview", "eye_in_hand")
MAX_RENDER_SIZE = 1024
"""Pixels a side: above, a frame takes longer to render than a robot has for a step."""


class LiberoObserver(Observer["RawState"]):
    """Of LIBERO's arm; see :class:`Observer`."""

    @staticmethod
    def check(contract: PolicyContract) -> None:
        check_libero_contract(contract)

    def state(self, raw: RawState) -> npt.NDArray[np.float32]:
        """``float32 (S,)`` in the contract's layout."""
        return np.asarray(raw.vector(self.contract.state.layout), dtype=np.float32)


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
