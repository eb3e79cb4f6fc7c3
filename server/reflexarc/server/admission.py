"""Which requests are let in: the server's phase, and how many may wait at once."""

from __future__ import annotations

import asyncio
import logging
from enum import Enum

from reflexarc.contract.errors import NotReadyError

logger = logging.getLogger(__name__)


class Phase(str, Enum):
    """What ``/readyz`` says."""

    LOADING = "loading"
    WARMING = "warming"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class Admission:
    """Counts the requests that wait or run. Used on the event loop alone.

    Attributes:
        phase: only a ready server lets requests in.
        max_waiting: requests that may wait or run at once before new ones are refused.
        in_flight: requests that wait or run.
    """

    def __init__(self, max_waiting: int) -> None:
        self.phase = Phase.LOADING
        self.max_waiting = max_waiting
        self.in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def enter(self) -> NotReadyError | None:
        """Count one more request, or say why it is not let in."""
        if self.phase is not Phase.READY:
            return self.not_ready()
        if self.in_flight >= self.max_waiting:
            return NotReadyError(f"{self.in_flight} requests are waiting already; ask again later")
        self.in_flight += 1
        self._idle.clear()
        return None

    def leave(self) -> None:
        """One that entered is finished."""
        self.in_flight -= 1
        if self.in_flight == 0:
            self._idle.set()

    def not_ready(self) -> NotReadyError:
        """The error for a server that is not ready."""
        return NotReadyError(f"the server is {self.phase.value}; ask again when it is ready")

    async def drain(self, timeout: float) -> bool:
        """Let nobody in, wait for those in flight; False when some did not end in time."""
        self.phase = Phase.DRAINING
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except asyncio.TimeoutError:
            logger.error("%d requests did not end within %g s", self.in_flight, timeout)
            return False
        return True
