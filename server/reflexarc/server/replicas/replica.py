"""One replica: a policy, its worker thread and its batches, in a process of Ray's."""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import time
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from reflexarc.contract import ActionChunk, Observation, ReflexarcError
from reflexarc.server.batching import Batcher, Pending
from reflexarc.server.batching.pending import Outcome
from reflexarc.server.inference import Inference, internal_error
from reflexarc.server.replicas.source import ReplicaSource
from reflexarc.server.worker import Worker

logger = logging.getLogger(__name__)
# A batch that takes so long will not end: Serve is told, and replaces the replica.
STUCK_SECONDS = 300.0


@dataclass(frozen=True)
class Forwarded:
    """A checked request on its way from the ingress to a replica.

    Attributes:
        observation: images decoded, with seed and session; ``deadline_ms`` is what is left of it.
        named_session: the session as the client named it.
        peer: whose rhythm the batcher learns.
        decode_ms: what decoding took.
        replied_s: seconds before this was sent when the peer's last reply was handed to the
            socket, which the replica does not see; None where there was none.
    """

    observation: Observation
    named_session: str | None
    peer: str | None
    decode_ms: float
    replied_s: float | None


class PolicyReplica:
    """Built by Ray Serve, once a replica. Loads and warms the policy before it is ready.

    Args:
        source: what to build.
        max_batch: rows of the largest batch; None leaves it to the policy.
        generation: another number makes Serve replace the replicas one after the other.
    """

    def __init__(self, source: ReplicaSource, max_batch: int | None, generation: int = 0) -> None:
        self._worker = Worker("inference")
        self._inference: Inference = self._in_worker(source.build)
        self._in_worker(self._inference.warm_up)
        self._max_batch = min(filter(None, (max_batch, getattr(self._inference, "max_batch", 1))))
        self._batcher: Batcher | None = None
        self._asked: dict[int, float] = {}
        self._number = 0

    def _in_worker(self, work: Any) -> Any:
        """Run in the thread that will infer: graphs and allocators belong to a thread."""
        outcome: Future[Any] = Future()

        def run() -> None:
            try:
                outcome.set_result(work())
            except BaseException as error:
                outcome.set_exception(error)

        self._worker.post(run)
        return outcome.result()

    async def describe(self) -> dict[str, Any]:
        """What the ingress has to know: contract, sampling, statistics, and where this is."""
        std = self._inference.action_std
        return {
            "contract": self._inference.contract.model_dump_json(),
            "sampling": dict(self._inference.sampling),
            "action_std": None if std is None else list(std),
            "max_batch": self._max_batch,
            "node": platform.node(),
            "pid": os.getpid(),
        }

    async def infer(self, request: Forwarded, *, may_move: bool) -> ActionChunk | dict[str, Any]:
        """The chunk, or the named error as it stands on the wire. ``may_move`` is the router's."""
        self._number += 1
        number = self._number
        self._asked[number] = time.monotonic()
        try:
            outcome = await self._answer(request)
        except Exception:
            outcome = internal_error("the replica failed on a request")
        finally:
            del self._asked[number]
        return outcome.to_wire() if isinstance(outcome, ReflexarcError) else outcome

    async def _answer(self, request: Forwarded) -> Outcome:
        if self._batcher is None:
            self._batcher = Batcher(self._inference, self._worker, max_batch=self._max_batch)
        received = time.perf_counter()
        if request.replied_s is not None:
            self._batcher.arrivals.replied(request.peer, received - request.replied_s)
        outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

        def deliver(result: Outcome) -> None:
            if not outcome.done():
                outcome.set_result(result)

        pending = Pending(
            request.observation,
            received,
            deliver,
            decode_ms=request.decode_ms,
            named_session=request.named_session,
            peer=request.peer,
        )
        self._batcher.submit(pending)
        return await outcome

    async def end_session(self, session: str, *, ends: bool) -> bool:
        """Forget what is kept of a session. ``ends`` is for the router."""
        if self._batcher is not None:
            self._batcher.arrivals.forget(session)
        return await self._worker.run(partial(self._inference.end_session, session))

    def check_health(self) -> None:
        """Asked by Serve every few seconds; raises where a batch hangs."""
        oldest = min(tuple(self._asked.values()), default=None)
        if oldest is not None and time.monotonic() - oldest > STUCK_SECONDS:
            raise RuntimeError(f"a request has been waiting for {STUCK_SECONDS:g} s")
