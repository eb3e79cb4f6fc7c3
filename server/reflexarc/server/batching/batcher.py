"""Collects what waits on the event loop and hands batches to the worker thread."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from functools import partial

from reflexarc.contract.errors import InferenceError
from reflexarc.server.batching.arrivals import Arrivals
from reflexarc.server.batching.cost import BatchCost
from reflexarc.server.batching.execution import run_batch
from reflexarc.server.batching.pending import Outcome, Pending, reset_meanwhile, too_late
from reflexarc.server.batching.schedule import choose, hold_until, hopeless
from reflexarc.server.batching.thrift import Thrift
from reflexarc.server.inference import Inference
from reflexarc.server.worker import Worker

logger = logging.getLogger(__name__)


class Batcher:
    """Every waiting request becomes part of one batch, in the order of urgency.

    To be used on the event loop alone.

    Args:
        inference: the policy.
        worker: the thread that runs it.
        max_batch: rows of the largest batch.

    Attributes:
        arrivals: when clients ask; told by the service of each reply.
        cost: what batches took.
    """

    def __init__(self, inference: Inference, worker: Worker, *, max_batch: int) -> None:
        self._inference, self._worker, self._max_batch = inference, worker, max_batch
        self._loop = asyncio.get_running_loop()
        self._waiting: list[Pending] = []
        self._ends_at: float | None = None  # of the batch that runs, as expected
        self._could_run_since: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._thrift = Thrift(bool(getattr(inference, "cheap", False)))
        self.arrivals = Arrivals()
        self.cost = BatchCost()

    @property
    def waiting(self) -> int:
        """Requests that wait for their batch."""
        return len(self._waiting)

    def submit(self, pending: Pending) -> None:
        """Answer a request when its turn comes; its ``deliver`` is called exactly once."""
        self.arrivals.asked(pending.peer, pending.received)
        if self._thrift.is_cheap and self._ends_at is None and not self._waiting:
            self._run_inline(pending)
            return
        self._waiting.append(pending)
        self.schedule()

    def schedule(self) -> None:
        """Refuse what is in vain; start a batch, or wait for a better one."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = time.perf_counter()
        self._refuse_in_vain(now if self._ends_at is None else max(now, self._ends_at))
        if not self._waiting:
            self._could_run_since = None
        if not self._waiting or self._ends_at is not None:
            return
        if self._could_run_since is None:
            self._could_run_since = now
        batch = choose(self._waiting, now, self._max_batch, self.cost)
        until = hold_until(
            batch, now, self._could_run_since, self._max_batch, self.cost, self.arrivals
        )
        if until is None:
            self._start(batch, now)
        else:
            self._timer = self._loop.call_later(until - now, self.schedule)

    def _refuse_in_vain(self, start: float) -> None:
        stale = [pending for pending in self._waiting if pending.is_stale()]
        late = hopeless(self._waiting, start, self.cost)
        if not stale and not late:
            return
        refused = {id(pending) for pending in (*stale, *late)}
        self._waiting = [pending for pending in self._waiting if id(pending) not in refused]
        for pending in stale:
            pending.deliver(reset_meanwhile(pending))
        for pending in late:
            if not pending.is_stale():
                pending.deliver(too_late(pending))

    def _start(self, batch: Sequence[Pending], now: float) -> None:
        chosen = {id(pending) for pending in batch}
        self._waiting = [pending for pending in self._waiting if id(pending) not in chosen]
        self._could_run_since = None
        self._ends_at = now + self.cost.expect(len(batch))
        self._worker.post(partial(self._work, tuple(batch), now))

    def _work(self, batch: Sequence[Pending], handed_over: float) -> None:
        """In the worker thread."""
        started = time.perf_counter()
        settled: set[int] = set()
        last: list[tuple[Pending, Outcome]] = []

        def emit(outcomes: Sequence[tuple[Pending, Outcome]]) -> None:
            settled.update(id(pending) for pending, _ in outcomes)
            if len(settled) == len(batch):
                last.extend(outcomes)  # the event loop need be woken only once for both
            else:
                self._loop.call_soon_threadsafe(self._deliver, outcomes)

        try:
            run_batch(self._inference, batch, emit)
        except BaseException:
            # SystemExit of a policy must end neither the thread nor the wait of its clients.
            logger.exception("the policy raised what is no ordinary exception")
            failure = InferenceError("the policy failed; the server's log has the details")
            emit([(pending, failure) for pending in batch if id(pending) not in settled])
        seconds = time.perf_counter() - started
        self._loop.call_soon_threadsafe(self._finished, len(batch), last, handed_over, seconds)

    def _deliver(self, outcomes: Sequence[tuple[Pending, Outcome]]) -> None:
        for pending, outcome in outcomes:
            pending.deliver(reset_meanwhile(pending) if pending.is_stale() else outcome)

    def _finished(
        self,
        rows: int,
        outcomes: Sequence[tuple[Pending, Outcome]],
        handed_over: float,
        seconds: float,
    ) -> None:
        self.cost.observe(rows, time.perf_counter() - handed_over)
        self._ends_at = None
        self._thrift.note(seconds)
        if len(self._waiting) >= self._max_batch:
            self.schedule()
            self._deliver(outcomes)
        else:
            self._deliver(outcomes)
            # First those replies that tasks of the loop are about to send: who was answered is
            # who may ask again soon.
            self._loop.call_soon(self.schedule)

    def _run_inline(self, pending: Pending) -> None:
        started = time.perf_counter()
        run_batch(self._inference, [pending], self._deliver)
        self._thrift.note(time.perf_counter() - started)
