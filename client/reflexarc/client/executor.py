"""Execute chunks: ask, act for some steps, ask again."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from reflexarc.contract import ActionChunk, Observation, PolicyContract
from reflexarc.contract.errors import ConfigError


class ChunkPolicy(Protocol):
    """Anything that answers an observation with a chunk: a client, or a policy in process."""

    contract: PolicyContract

    def infer(self, observation: Observation) -> ActionChunk: ...


class RecedingHorizonExecutor:
    """Executes the first ``replan_steps`` actions of each chunk, then asks for a new one.

    Args:
        policy: who is asked.
        replan_steps: actions taken from a chunk, from 1 to the contract's horizon.

    Attributes:
        chunks: chunks asked for since the last reset.
        latencies_ms: milliseconds that each of them took, rendering not included.
    """

    def __init__(self, policy: ChunkPolicy, replan_steps: int) -> None:
        horizon = policy.contract.action.horizon
        if not 1 <= replan_steps <= horizon:
            raise ConfigError(
                f"replan_steps must be from 1 to the horizon {horizon}, got {replan_steps}",
                field="replan_steps",
            )
        self._policy = policy
        self._replan_steps = replan_steps
        self.reset()

    def reset(self) -> None:
        """Begin an episode: forget the chunk in hand and the counts."""
        self._actions: npt.NDArray[np.float32] | None = None
        self._next = 0
        self._step = 0
        self.latencies_ms: list[float] = []

    @property
    def chunks(self) -> int:
        return len(self.latencies_ms)

    def next_action(self, observe: Callable[[], Observation]) -> npt.NDArray[np.float32]:
        """The action ``float32 (D,)`` to execute now.

        Args:
            observe: called only when a chunk is due, so that a simulator renders on demand. An
                observation without ``step_index`` gets the number of actions executed so far.
        """
        if self._actions is None or self._next == self._replan_steps:
            self._actions = self._ask(observe())
            self._next = 0
        action: npt.NDArray[np.float32] = self._actions[self._next].copy()
        self._next += 1
        self._step += 1
        return action

    def _ask(self, observation: Observation) -> npt.NDArray[np.float32]:
        if observation.step_index is None:
            observation = replace(observation, step_index=self._step)
        started = time.perf_counter()
        chunk = self._policy.infer(observation)
        self.latencies_ms.append((time.perf_counter() - started) * 1000)
        return chunk.actions
