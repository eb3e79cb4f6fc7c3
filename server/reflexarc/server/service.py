"""The one policy behind all routes: its phase, its worker thread and the work that waits."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TypeVar

from reflexarc.contract import ActionChunk, Observation, PolicyContract, ReflexarcError
from reflexarc.contract.errors import NotReadyError
from reflexarc.server.admission import Admission, Phase
from reflexarc.server.batching import Batcher, Pending, RequestQueue
from reflexarc.server.batching.pending import Outcome, never
from reflexarc.server.episodes import SEED_BITS, Episodes
from reflexarc.server.exchange import Listener
from reflexarc.server.images import has_encoded_images
from reflexarc.server.inference import Inference, Prepared, internal_error, prepare
from reflexarc.server.ticket import Listeners, Ticket
from reflexarc.server.worker import Worker

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
# Two raw images of 224 px take 0.1 ms to decode; a hand-over to a thread and back takes as long.
DECODED_INLINE_BYTES = 1024 * 1024


class PolicyService:
    """Loads and warms a policy in its worker thread, then runs all that touches it there.

    One thread: a device runs one inference at a time, and a second would only slow the first.

    Args:
        load: builds the policy; called once, in the worker thread.
        max_waiting: requests that may wait or run at once before new ones are refused.
        listeners: called with every finished request, on the event loop, after its reply was
            handed to the socket; to be quick. One that raises is logged and dropped.
        max_batch: rows of the largest batch; None leaves it to the policy.
        default_seed: of an episode's first decision where no request names one; later ones
            have seeds that follow from it and from the step. None draws every seed.
        make_queue: of ``(inference, worker, max_batch=)``: what answers admitted requests.

    Attributes:
        load_error: why the policy could not be loaded, or failed while it was warmed.
        contract_tag: start of the sha256 of the contract; another policy has another.
    """

    def __init__(
        self,
        load: Callable[[], Inference],
        *,
        max_waiting: int = 64,
        listeners: Sequence[Listener] = (),
        default_seed: int | None = None,
        max_batch: int | None = None,
        make_queue: Callable[..., RequestQueue] = Batcher,
    ) -> None:
        self._load = load
        self._max_batch, self._make_queue = max_batch, make_queue
        self._batcher: RequestQueue | None = None
        self._episodes = Episodes(default_seed=default_seed)
        self._listeners = Listeners(listeners)
        self._parsers = ThreadPoolExecutor(2, thread_name_prefix="parse")
        self._admission = Admission(max_waiting)
        self._worker = Worker("inference")
        self._inference: Inference | None = None
        self._settled = asyncio.Event()
        self._loading: asyncio.Task[None] | None = None
        self.load_error: ReflexarcError | None = None
        self.contract_tag = ""

    @property
    def phase(self) -> Phase:
        """What ``/readyz`` says."""
        return self._admission.phase

    @phase.setter
    def phase(self, phase: Phase) -> None:
        self._admission.phase = phase

    def start(self) -> None:
        """Begin to load; call once, on the event loop."""
        self._loading = asyncio.get_running_loop().create_task(self._load_in_worker())

    async def _load_in_worker(self) -> None:
        try:
            inference = await self._worker.run(self._load)
            contract = inference.contract.model_dump_json().encode()
            self.contract_tag = hashlib.sha256(contract).hexdigest()[:16]
            if self.phase is Phase.LOADING:  # a server that drains already needs no warmth
                self.phase = Phase.WARMING
                await self._worker.run(inference.warm_up)
            largest = min(filter(None, (self._max_batch, getattr(inference, "max_batch", 1))))
            self._batcher = self._make_queue(inference, self._worker, max_batch=largest)
            self._inference = inference
        except ReflexarcError as error:
            self.load_error = error
        except Exception:
            what = "loaded" if self.phase is Phase.LOADING else "warmed up"
            self.load_error = internal_error(f"the policy could not be {what}")
        if self.phase is not Phase.DRAINING:
            self.phase = Phase.FAILED if self._inference is None else Phase.READY
        self._settled.set()

    async def wait_until_loaded(self) -> Inference:
        """The policy, once warm. Raises NotReadyError when loading or warming failed."""
        await self._settled.wait()
        if self._inference is None:
            reason = self.load_error.message if self.load_error else "loading was interrupted"
            raise NotReadyError(f"the policy could not be loaded: {reason}")
        return self._inference

    @property
    def inference(self) -> Inference:
        """The policy. Raises NotReadyError unless the phase is ready."""
        if self.phase is not Phase.READY or self._inference is None:
            raise self._admission.not_ready()
        return self._inference

    def ticket(
        self, dialect: str, *, received: float, connection: str | None = None, bytes_in: int = 0
    ) -> Ticket:
        """Admit a request; a context that ends when its reply was handed to the socket.

        For routes that know when that is, and how large the reply was. It holds the shutdown
        back, and its end tells the listeners.

        Raises NotReadyError when the server is not ready or has too much waiting.
        """
        ticket = Ticket(dialect, received, connection, bytes_in, self._closed)
        ticket.error = self._admission.enter()
        if ticket.error is not None:
            raise ticket.error
        return ticket

    def _closed(self, ticket: Ticket) -> None:
        if self._batcher is not None:
            self._batcher.arrivals.replied(ticket.peer, time.perf_counter())
        self._admission.leave()
        if self._listeners:
            self._listeners(ticket.exchange())

    def refused(
        self,
        dialect: str,
        error: ReflexarcError,
        *,
        received: float,
        connection: str | None = None,
        bytes_in: int = 0,
    ) -> None:
        """Tell the listeners of a request that was refused before it had a ticket."""
        ticket = Ticket(dialect, received, connection, bytes_in, self._closed)
        ticket.error = error
        self._listeners(ticket.exchange())

    def listen(self, listener: Listener) -> None:
        """Tell a listener of every request that finishes from now on."""
        self._listeners.add(listener)

    @property
    def waiting(self) -> int:
        """Requests that wait or run."""
        return self._admission.in_flight

    @property
    def contract(self) -> PolicyContract | None:
        """Of the policy, once it is loaded and warm."""
        return None if self._inference is None else self._inference.contract

    async def infer(
        self,
        observation: Observation,
        *,
        dialect: str,
        received: float,
        connection: str | None = None,
        bytes_in: int = 0,
    ) -> ActionChunk:
        """The chunk for one observation, with milliseconds by name in its timing.

        For routes that hand the reply to the socket before they wait for anything else.

        Args:
            observation: as it came; compressed images are decoded here, off the event loop.
            dialect: protocol of the request, for metrics and logs.
            received: ``time.perf_counter()`` when the request arrived.
            connection: the session of an observation that names none; None where there is no
                connection to keep one for.
            bytes_in: size of the request.

        Raises:
            NotReadyError: not ready, or too much waiting.
            CodecError: an image that cannot be decoded.
            ContractViolationError: the observation differs from the contract.
            HistoryMissingError: the session lacks rows that the observation leaves out.
            DeadlineExceededError: it cannot be answered within its ``deadline_ms``.
            InferenceError: the policy failed on this observation.
        """
        ticket = self.ticket(dialect, received=received, connection=connection, bytes_in=bytes_in)
        try:
            return await self.answer(ticket, observation)
        except ReflexarcError as error:
            ticket.error = error
            raise
        finally:
            # Runs after the caller went on with the chunk, so when the reply is on its way.
            asyncio.get_running_loop().call_soon(ticket.close)

    async def answer(self, ticket: Ticket, observation: Observation) -> ActionChunk:
        """The chunk for a ticket's observation; raises what :meth:`infer` raises."""
        outcome: asyncio.Future[ActionChunk] = asyncio.get_running_loop().create_future()

        def deliver(result: Outcome) -> None:
            if outcome.cancelled():
                return
            if isinstance(result, ReflexarcError):
                outcome.set_exception(result)
            else:
                outcome.set_result(result)

        self.enqueue(ticket, observation, deliver)
        ticket.chunk = await outcome
        ticket.decided = time.perf_counter()
        return ticket.chunk

    def enqueue(
        self, ticket: Ticket, observation: Observation, deliver: Callable[[Outcome], None]
    ) -> None:
        """Answer a ticket's observation by calling ``deliver``, once and on the event loop.

        What is wrong is delivered too; it may be delivered before this returns.
        """
        assert self._inference is not None
        ticket.session_id, ticket.request_id = observation.session_id, observation.request_id
        work = partial(prepare, self._inference, observation)
        if not has_encoded_images(observation):
            self._join_batch(ticket, deliver, work)
            return
        decoding = asyncio.get_running_loop().run_in_executor(self._parsers, work)
        decoding.add_done_callback(
            lambda done: (
                None if done.cancelled() else self._join_batch(ticket, deliver, done.result)
            )
        )

    def _join_batch(
        self, ticket: Ticket, deliver: Callable[[Outcome], None], prepared: Callable[[], Prepared]
    ) -> None:
        """The request becomes part of its session's episode, and waits for its batch."""
        assert self._batcher is not None
        try:
            observation, decode_ms = prepared()
        except ReflexarcError as error:
            deliver(error)
            return
        except Exception:
            deliver(internal_error("the server failed on a request"))
            return
        named = observation.session_id
        session = ticket.connection if named is None else named
        episode, seed = self._episodes.admit(session, observation.step_index, observation.seed)
        observation = replace(
            observation,
            session_id=session,
            seed=secrets.randbits(SEED_BITS) if seed is None else seed,
        )
        ticket.observation = observation
        ticket.peer = ticket.connection or session
        self._batcher.submit(
            Pending(
                observation,
                ticket.received,
                deliver,
                decode_ms=decode_ms,
                named_session=named,
                peer=ticket.peer,
                is_stale=partial(self._episodes.is_over, session, episode) if session else never,
            )
        )

    async def end_session(self, session: str) -> bool:
        """Forget an episode; whether there was one. What is in flight of it becomes stale."""
        inference = self.inference
        known = self._episodes.reset(session)
        return await self.run(partial(inference.end_session, session)) or known

    def end_connection(self, connection: str) -> None:
        """Forget what is kept under the name of a connection that was closed."""
        self._episodes.forget(connection)
        if self._batcher is not None:
            self._batcher.arrivals.forget(connection)
        if self._inference is not None and self._inference.contract.needs_session:
            self.submit(partial(self._inference.end_session, connection))

    async def parse(self, work: Callable[[], Result]) -> Result:
        """Run a pure function that takes long (JSON, base64, PNG) in one of a few threads."""
        return await asyncio.get_running_loop().run_in_executor(self._parsers, work)

    async def run(self, work: Callable[[], Result]) -> Result:
        """Run ``work`` in the worker thread, after what was asked before it."""
        return await self._worker.run(work)

    def submit(self, work: Callable[[], object]) -> None:
        """Let the worker thread do ``work`` after what was asked before; nobody waits for it."""
        self._worker.run(work).add_done_callback(_log_failure)

    async def drain(self, timeout: float) -> bool:
        """Refuse new requests, wait for those in flight; False when some did not end in time."""
        return await self._admission.drain(timeout)

    def close(self) -> None:
        """Let the worker thread end after its current work."""
        self._worker.close()
        self._parsers.shutdown(wait=False)


def _log_failure(future: asyncio.Future[object]) -> None:
    if not future.cancelled() and future.exception() is not None:
        logger.error("work in the background failed", exc_info=future.exception())
