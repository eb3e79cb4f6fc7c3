"""A policy without weights, for bringing up a robot's side, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from reflexarc.contract import ActionChunk, Observation, PolicyContract
from reflexarc.contract.policy_contract import LIBERO_STATE_EEF, libero_action, libero_cameras


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

    def __init__(self, contract: PolicyContract | None = None) -> None:
        self._contract = contract if contract is not None else libero_contract()

    @property
    def contract(self) -> PolicyContract:
        return self._contract

    @property
    def sampling(self) -> Mapping[str, Any]:
        action = self._contract.action
        return {"noise_shape": [action.horizon, action.dimension], "denoising_steps": 1}

    def infer(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        return [self._chunk(observation) for observation in observations]

    def warm_up(self) -> None:
        """Nothing to warm: its first chunk costs what every other costs."""

    def _chunk(self, observation: Observation) -> ActionChunk:
        action = self._contract.action
        seed = observation.seed or 0
        noise = np.random.default_rng(seed).random((action.horizon, action.dimension))
        low, high = np.array(action.low), np.array(action.high)
        return ActionChunk(actions=(low + (high - low) * noise).astype(np.float32), seed=seed)
