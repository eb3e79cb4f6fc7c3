"""Policies without weights, for bringing up a robot's side, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from reflexarc.contract import ActionChunk, Observation, PolicyContract
from reflexarc.contract.errors import ConfigError
from reflexarc.contract.policy_contract import (
    LIBERO_STATE_EEF,
    ActionSpec,
    libero_action,
    libero_cameras,
)


def libero_contract(
    *, horizon: int = 10, image_size: int = 224, needs_language: bool = True
) -> PolicyContract:
    """A contract that LIBERO's and openpi's clients can meet."""
    return PolicyContract(
        family="null",
        cameras=libero_cameras(image_size),
        state=LIBERO_STATE_EEF,
        action=libero_action(horizon),
        needs_language=needs_language,
    )


class NullPolicy:
    """Answers with uniform noise inside the contract's limits, drawn from the request's seed.

    Not the zero action, so that a test sees that a reply belongs to its request.
    """

    max_batch = 64
    cheap = True

    def __init__(self, contract: PolicyContract | None = None) -> None:
        """Raises ConfigError for limits between which nothing can be drawn."""
        self._contract = contract if contract is not None else libero_contract()
        _check_limits(self._contract.action)

    @property
    def contract(self) -> PolicyContract:
        return self._contract

    @property
    def sampling(self) -> Mapping[str, Any]:
        action = self._contract.action
        return {"noise_shape": [action.horizon, action.dimension], "denoising_steps": 1}

    @property
    def action_std(self) -> None:
        """There was no training data."""

    def infer(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        return [
            ActionChunk(actions=self._actions(observation.seed or 0), seed=observation.seed or 0)
            for observation in observations
        ]

    def end_session(self, session_id: str) -> bool:
        """Nothing is kept between requests."""
        return False

    def warm_up(self) -> None:
        """Nothing to warm: its first chunk costs what every other costs."""

    def _actions(self, seed: int) -> npt.NDArray[np.float32]:
        action = self._contract.action
        noise = np.random.default_rng(seed).random((action.horizon, action.dimension))
        low, high = np.array(action.low), np.array(action.high)
        actions: npt.NDArray[np.float32] = (low + (high - low) * noise).astype(np.float32)
        return actions


class ZeroPolicy(NullPolicy):
    """Answers with standing still: zero deltas or velocities, and the gripper open.

    Raises ConfigError where the contract's limits leave out zero, or its actions are positions.
    """

    def __init__(self, contract: PolicyContract | None = None) -> None:
        super().__init__(contract)
        action = self._contract.action
        if action.kind == "position":
            raise ConfigError(
                "actions of this contract are position targets; zeros would move the robot there "
                "instead of standing still",
                field="contract",
            )
        row = np.zeros(action.dimension, dtype=np.float32)
        if action.gripper is not None:
            row[action.gripper.index] = action.gripper.open
        for name, value, low, high in zip(action.names, row, action.low, action.high, strict=True):
            if not low <= value <= high:
                raise ConfigError(
                    f"the contract's limits of {name}, {low:g} to {high:g}, leave out {value:g}: "
                    "standing still is no action of this robot; mend the limits",
                    field="contract",
                )
        self._chunk = np.tile(row, (action.horizon, 1))

    @property
    def sampling(self) -> Mapping[str, Any]:
        return {"noise_shape": None, "denoising_steps": 1}

    def _actions(self, seed: int) -> npt.NDArray[np.float32]:
        chunk: npt.NDArray[np.float32] = self._chunk.copy()
        return chunk


BRING_UP_POLICIES: dict[str, Callable[[PolicyContract | None], NullPolicy]] = {
    "random": NullPolicy,
    "zero": ZeroPolicy,
}
"""What ``serve-policy --policy NAME`` serves without weights."""


def bring_up_contract(name: str, contract: PolicyContract | None) -> PolicyContract:
    """The contract under a name of its own: no client should take noise for the checkpoint."""
    return (contract or libero_contract()).model_copy(
        update={"family": name, "checkpoint_fingerprint": "", "statistics_sha256": ""}
    )


def _check_limits(action: ActionSpec) -> None:
    for name, low, high in zip(action.names, action.low, action.high, strict=True):
        if not (np.isfinite((low, high)).all() and low <= high):
            raise ConfigError(
                f"the contract's limits of {name}, {low:g} to {high:g}, are no range",
                field="contract",
            )
