"""Ask, wait, execute the first actions of the chunk, ask again."""

from __future__ import annotations

from dataclasses import replace

from reflexarc.client.executors.asking import ChunkPolicy
from reflexarc.client.executors.base import ChunkExecutor, check_replan_steps
from reflexarc.client.executors.chunks import HeldChunk
from reflexarc.client.executors.guard import RobotGuard
from reflexarc.client.executors.latency import LatencyInjected


class RecedingHorizonExecutor(ChunkExecutor):
    """Executes the first ``replan_steps`` actions of each chunk, then asks for a new one.

    While it asks the robot stands still. ``next_action`` waits for the answer; with a guard it
    waits at most ``max_wait_ms``, then gives the safe action at every step until the chunk comes.

    Args:
        policy: who is asked.
        replan_steps: actions taken from a chunk, from 1 to the contract's horizon.
        guard: see :class:`ChunkExecutor`.
    """

    def __init__(
        self, policy: ChunkPolicy, replan_steps: int, guard: RobotGuard | None = None
    ) -> None:
        check_replan_steps(replan_steps, policy.contract.action.horizon)
        self._replan_steps = replan_steps
        patient = guard is None or guard.max_wait_ms is None
        self._delayed = isinstance(policy, LatencyInjected) and policy.in_steps
        self._blocks = patient or self._delayed
        super().__init__(policy, guard, in_background=not patient)

    def _request_period(self) -> int:
        # An answer that may come later than its request's step moves the next request too.
        return 1 if self._delayed or not self._blocks else self._replan_steps

    def _patience_ms(self) -> float | None:
        return None if self._blocks else self.guard.max_wait_ms

    def _is_due(self) -> bool:
        return not self._chunks

    def _take(self, chunk: HeldChunk) -> None:
        self._chunks = [replace(chunk, actions=chunk.actions[: self._replan_steps])]
