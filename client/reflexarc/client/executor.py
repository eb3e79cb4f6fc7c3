"""Execute chunks: ask, act for some steps, ask again; look in between where history is needed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from reflexarc.client.history import HistoryRecorder
from reflexarc.contract import ActionChunk, Observation, PolicyContract
from reflexarc.contract.errors import ConfigError, HistoryMissingError


class ChunkPolicy(Protocol):
    """Anything that answers an observation with a chunk: a client, or a policy in process."""

    contract: PolicyContract

    def infer(self, observation: Observation) -> ActionChunk: ...


class RecedingHorizonExecutor:
    """Executes the first ``replan_steps`` actions of each chunk, then asks for a new one.

    A policy that sees past frames or states gets them with the next request: this looks at
    exactly the steps that later requests need, sends what was seen since the last one, and the
    whole window again where the server has lost it (it restarted, or another replica answers).

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
        """Begin an episode: forget the chunk in hand, what was seen, and the counts."""
        self._actions: npt.NDArray[np.float32] | None = None
        self._next = 0
        self._step = 0
        self._asked_at = 0  # step_index of the latest request
        self._recorder = HistoryRecorder(self._policy.contract, self._replan_steps)
        self.latencies_ms: list[float] = []

    @property
    def chunks(self) -> int:
        return len(self.latencies_ms)

    def next_action(
        self,
        observe: Callable[[], Observation],
        observe_state: Callable[[], npt.NDArray[Any]] | None = None,
    ) -> npt.NDArray[np.float32]:
        """The action ``float32 (D,)`` to execute now.

        Args:
            observe: called only when a chunk is due, or when a later request sees this step's
                frame, so that a simulator renders on demand. An observation without
                ``step_index`` gets the number of actions executed so far.
            observe_state: called in place of ``observe`` where a later request sees this step's
                state ``(S,)`` but not its frame. Without it ``observe`` is called there too.
        """
        if self._actions is None or self._next == self._replan_steps:
            self._actions = self._ask(observe())
            self._next = 0
        elif self._recorder.needs_images(self._next):
            seen = observe()
            self._recorder.record(self._asked_at + self._next, seen.state, seen.images)
        elif self._recorder.needs_state(self._next):
            state = observe().state if observe_state is None else observe_state()
            self._recorder.record(self._asked_at + self._next, state, None)
        action: npt.NDArray[np.float32] = self._actions[self._next].copy()
        self._next += 1
        self._step += 1
        return action

    def _ask(self, observation: Observation) -> npt.NDArray[np.float32]:
        if observation.step_index is None:
            observation = replace(observation, step_index=self._step)
        started = time.perf_counter()
        chunk = self._infer(observation)
        self.latencies_ms.append((time.perf_counter() - started) * 1000)
        self._asked_at = observation.step_index or 0
        return chunk.actions

    def _infer(self, observation: Observation) -> ActionChunk:
        if not self._policy.contract.needs_session or observation.history:
            return self._policy.infer(observation)
        try:
            chunk = self._policy.infer(self._recorder.request(observation))
        except HistoryMissingError:
            # A chunk depends on its window alone: nothing of the failed request was executed.
            chunk = self._policy.infer(self._recorder.whole(observation))
        self._recorder.answered(observation)
        return chunk
