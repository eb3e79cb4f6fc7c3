"""In the ingress: hands each admitted request to its session's replica, in place of a batcher."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from reflexarc.contract import ActionChunk, ReflexarcError
from reflexarc.contract.errors import (
    DeadlineExceededError,
    HistoryMissingError,
    NotReadyError,
    ReplicaLostError,
    error_from_wire,
)
from reflexarc.server.batching.arrivals import Arrivals
from reflexarc.server.batching.pending import Outcome, Pending, reset_meanwhile, too_late
from reflexarc.server.inference import Inference, internal_error
from reflexarc.server.replicas.replica import Forwarded
from reflexarc.server.worker import Worker

logger = logging.getLogger(__name__)
_PEERS = 1024
# A second replica is asked for what the first died of; a third is not: the request may be why.
_TRIES = 2


class Forwarder:
    """Answers requests by asking replicas; see :class:`~reflexarc.server.batching.RequestQueue`.

    Args:
        inference: a :class:`~reflexarc.server.replicas.remote.RemotePolicy`.
        worker: of the service; nothing is computed there.
        max_batch: decided in the replicas.
    """

    def __init__(self, inference: Inference, worker: Worker, *, max_batch: int) -> None:
        self._handle: Any = inference.handle  # type: ignore[attr-defined]
        self._needs_session = inference.contract.needs_session
        self._tasks: set[asyncio.Task[None]] = set()
        self.arrivals: Replies = Replies()

    def submit(self, pending: Pending) -> None:
        """Answer a request when its replica has; its ``deliver`` is called exactly once."""
        task = asyncio.get_running_loop().create_task(self._answer(pending))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, pending: Pending) -> None:
        outcome: Outcome
        try:
            outcome = await self._ask(pending)
        except ReflexarcError as error:
            outcome = error
        except Exception:
            outcome = internal_error("the ingress failed on a request")
        if isinstance(outcome, DeadlineExceededError):
            outcome = too_late(pending)
        pending.deliver(reset_meanwhile(pending) if pending.is_stale() else outcome)

    async def _ask(self, pending: Pending) -> Outcome:
        """Raises ReplicaLostError, NotReadyError, DeadlineExceededError."""
        from ray.exceptions import RayActorError
        from ray.serve.exceptions import (
            BackPressureError,
            DeploymentUnavailableError,
            ReplicaUnavailableError,
        )

        lost: Exception | None = None
        for _ in range(_TRIES):
            try:
                outcome = await self._forward(pending)
            except (RayActorError, ReplicaUnavailableError) as error:
                logger.warning("a replica was lost with a request in flight: %s", _brief(error))
                lost = error
                continue
            except BackPressureError:
                return NotReadyError("the replicas have as many requests waiting as they take")
            except DeploymentUnavailableError:
                return NotReadyError("no replica can be started; the server's log says why")
            if lost is not None and isinstance(outcome, HistoryMissingError):
                return HistoryMissingError(
                    f"the replica that kept this session was lost, another one goes on: "
                    f"{outcome.message}",
                    field=outcome.field,
                )
            return outcome
        return ReplicaLostError(
            "the replica that computed the answer died, and so did a second one that was asked; "
            "ask again when others are up, unless this request is what they die of"
        )

    async def _forward(self, pending: Pending) -> Outcome:
        """Ask once. Ray's exceptions pass."""
        observation = pending.observation
        left = None
        if pending.deadline is not None:
            left = pending.deadline - time.perf_counter()
            if left <= 0:
                return too_late(pending)
            observation = replace(observation, deadline_ms=left * 1000)
        session = observation.session_id
        handle = self._handle if session is None else self._handle.options(session_id=session)
        request = Forwarded(
            observation,
            pending.named_session,
            pending.peer,
            pending.decode_ms,
            self.arrivals.since_reply(pending.peer, pending.received),
        )
        # A session without memory may go anywhere at any time; with one, where it begins anew.
        may_move = not self._needs_session or not observation.step_index
        asked = time.perf_counter()
        response = handle.infer.remote(request, may_move=may_move)
        try:
            result = await asyncio.wait_for(_result(response), left)
        except asyncio.TimeoutError:
            response.cancel()
            return too_late(pending)
        if not isinstance(result, ActionChunk):
            return error_from_wire(result)
        return _with_way(result, pending.received, asked)


async def _result(response: Any) -> ActionChunk | dict[str, Any]:
    answer: ActionChunk | dict[str, Any] = await response
    return answer


def _with_way(chunk: ActionChunk, received: float, asked: float) -> ActionChunk:
    """The chunk with ``forward_ms``: the way to the replica and back, and Serve's own queue."""
    timing: Mapping[str, float] = chunk.timing
    there = sum(timing.get(part, 0.0) for part in ("queue_ms", "infer_ms"))
    now = time.perf_counter()
    before = max(0.0, (asked - received) * 1000 - timing.get("decode_ms", 0.0))
    return replace(
        chunk,
        timing={
            **timing,
            "queue_ms": timing.get("queue_ms", 0.0) + before,
            "forward_ms": max(0.0, (now - asked) * 1000 - there),
        },
    )


def _brief(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]


class Replies(Arrivals):
    """When each peer's last reply was handed to the socket, which a replica cannot see."""

    def __init__(self) -> None:
        super().__init__()
        self._replied: OrderedDict[str, float] = OrderedDict()

    def replied(self, name: str | None, now: float) -> None:
        if name is None:
            return
        self._replied[name] = now
        self._replied.move_to_end(name)
        if len(self._replied) > _PEERS:
            self._replied.popitem(last=False)

    def forget(self, name: str) -> None:
        self._replied.pop(name, None)

    def since_reply(self, name: str | None, now: float) -> float | None:
        """Seconds between a peer's last reply and ``now``; None where it had none."""
        replied = None if name is None else self._replied.pop(name, None)
        return None if replied is None else max(0.0, now - replied)
