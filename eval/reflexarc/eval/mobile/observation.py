"""From what the base sees to the observation that a policy's contract asks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from reflexarc.contract import PolicyContract
from reflexarc.contract.errors import ContractViolationError
from reflexarc.eval.mobile.tasks import CONTROL_HZ
from reflexarc.eval.observer import Observer

CAMERA = "front"
_MAX_RENDER_SIZE = 1024
_ACTION = ("linear_x", "linear_y")


class MobileObserver(Observer[npt.NDArray[np.float64]]):
    """Of the base; see :class:`Observer`."""

    @staticmethod
    def check(contract: PolicyContract) -> None:
        check_mobile_contract(contract)

    def state(self, raw: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        """``float32 (0,)``: the base has none to tell."""
        return np.asarray(raw, dtype=np.float32)


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
