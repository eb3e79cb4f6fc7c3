"""Ask while moving: the next chunk is under way before the one in hand is used up."""

from __future__ import annotations

from reflexarc.client.executors.asking import ChunkPolicy
from reflexarc.client.executors.base import ChunkExecutor, check_replan_steps
from reflexarc.client.executors.chunks import HeldChunk
from reflexarc.client.executors.guard import RobotGuard
from reflexarc.contract.errors import ConfigError

_DELAYS_REMEMBERED = 10


class AsynchronousExecutor(ChunkExecutor):
    """Sends a request when ``ask_when_left`` actions are left, and goes on executing them.

    A chunk that comes replaces the one in hand at once. It is aligned by the actions executed
    since its observation: so many of its own are left out. Where the chunk in hand ends first,
    the robot holds, and holding leaves no action out.

    Args:
        policy: who is asked.
        replan_steps: actions executed of a chunk when answers come at once.
        guard: see :class:`ChunkExecutor`.
        ask_when_left: actions in hand at which a request is sent; None takes the most control
            steps that one of the last ten answers took, and no less than ``replan_steps`` leave
            over.
    """

    def __init__(
        self,
        policy: ChunkPolicy,
        replan_steps: int,
        guard: RobotGuard | None = None,
        *,
        ask_when_left: int | None = None,
    ) -> None:
        horizon = policy.contract.action.horizon
        check_replan_steps(replan_steps, horizon)
        if ask_when_left is not None and not 0 <= ask_when_left < horizon:
            raise ConfigError(
                f"ask_when_left must be from 0 to {horizon - 1}, got {ask_when_left}",
                field="ask_when_left",
            )
        self._ask_when_left, self._replan_steps, self._horizon = (
            ask_when_left,
            replan_steps,
            horizon,
        )
        super().__init__(policy, guard)

    @property
    def expected_delay(self) -> int:
        """Control steps that an answer takes: the most of the last ten, 0 before the first."""
        return max(self.delays[-_DELAYS_REMEMBERED:], default=0)

    def _is_due(self) -> bool:
        left = self._chunks[-1].left(self._executed) if self._chunks else 0
        if self._ask_when_left is not None:
            return left <= self._ask_when_left
        # With the whole chunk still in hand a new one would bring nothing but another try.
        wanted = max(self._horizon - self._replan_steps, self.expected_delay)
        return left <= min(wanted, self._horizon - 1)

    def _take(self, chunk: HeldChunk) -> None:
        if chunk.left(self._executed):
            self._chunks = [chunk]
        else:
            self.guard.note("late_chunk", self._step, "all of its actions' steps are over")
