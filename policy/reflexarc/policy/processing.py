"""The one path from observations to tensors and from normalised actions to robot actions.

Training and serving both pass through a :class:`Processor`: what was trained is what is served.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reflexarc.contract import NormalizationStatistics, PolicyContract
from reflexarc.contract.errors import ConfigError, ContractViolationError
from reflexarc.policy.interface import Tensors


class Processor:
    """Normalises by the statistics in the modes that the contract names.

    The gripper is never normalised: its column is -1 for the contract's open command and +1 for
    its closed one, and back. Arithmetic is fp64, results fp32.
    """

    def __init__(self, contract: PolicyContract, statistics: NormalizationStatistics):
        for name, spec, found in (
            ("state", contract.state.names, statistics.state.names),
            ("action", contract.action.names, statistics.action.names),
        ):
            if tuple(found) != tuple(spec):
                raise ConfigError(
                    f"the statistics describe the {name} {list(found)}, the contract "
                    f"{list(spec)}; compute them from data of the contract's layout",
                    field=name,
                )
        self.contract = contract
        self.statistics = statistics
        self._state = statistics.state.shift_and_scale(contract.state_normalization)
        self._action = statistics.action.shift_and_scale(contract.action_normalization)
        gripper = contract.action.gripper
        if gripper is not None:
            self._action[0][gripper.index] = (gripper.closed + gripper.open) / 2
            self._action[1][gripper.index] = (gripper.closed - gripper.open) / 2
        self._low, self._high = np.array(contract.action.low), np.array(contract.action.high)

    def frames(self, images: Mapping[str, npt.NDArray[np.uint8]]) -> Tensors:
        """Camera name to ``uint8 (N, H, W, 3)`` tensors, from arrays as the contract states."""
        frames: Tensors = {}
        for camera in self.contract.cameras:
            image = images.get(camera.name)
            expected = (camera.height, camera.width, 3)
            if image is None or image.dtype != np.uint8 or image.shape[1:] != expected:
                came = "nothing" if image is None else f"{image.dtype} {image.shape}"
                raise ContractViolationError(
                    f"camera {camera.name!r} needs uint8 (N, {expected}), got {came}",
                    field=f"images.{camera.name}",
                )
            # Received images are read-only views; torch wants memory that it may write.
            owned = image if image.flags.writeable and image.flags.c_contiguous else image.copy()
            frames[camera.name] = torch.from_numpy(owned)
        return frames

    def normalize_state(self, state: npt.NDArray[Any]) -> Tensor:
        """``(..., S)`` in SI units to normalised ``float32 (..., S)``."""
        shift, scale = self._state
        return _to_float32((np.asarray(state, dtype=np.float64) - shift) / scale)

    def normalize_actions(self, actions: npt.NDArray[Any]) -> Tensor:
        """``(..., D)`` robot actions to normalised ``float32 (..., D)``."""
        shift, scale = self._action
        return _to_float32((np.asarray(actions, dtype=np.float64) - shift) / scale)

    def actions_to_robot(self, actions: Tensor) -> npt.NDArray[np.float32]:
        """Normalised ``(..., D)`` to executable ``float32 (..., D)``, clipped to the limits."""
        shift, scale = self._action
        raw = actions.detach().cpu().numpy().astype(np.float64) * scale + shift
        return np.clip(raw, self._low, self._high).astype(np.float32)


def _to_float32(values: npt.NDArray[np.float64]) -> Tensor:
    """Converted by torch, into memory that torch aligns to 64 bytes.

    The last bit of a matrix product depends on its operands' alignment; numpy aligns to 16 only,
    so that equal states would give chunks that differ now and then.
    """
    return torch.from_numpy(values).to(torch.float32)
