"""The one policy behind all routes: its phase, its worker thread and the work that waits."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable
from enum import Enum
from typing import TypeVar

from reflexarc.contract import ReflexarcError
from reflexarc.contract.errors import NotReadyError
from reflexarc.server.inference import Inference, internal_error
from reflexarc.server.worker import Worker

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class Phase(str, Enum):
    """What ``/readyz`` says."""

    LOADING = "loading"
    WARMING = "warming"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class PolicyService:
    """Loads and warms a policy in its worker thread, then runs all that touches it there.

    One thread: a device runs one inference at a time, and a second would only slow the first.

    Args:
        load: builds the policy; called once, in the worker thread.
        max_waiting: requests that may wait or run at once before new ones are refused.

    Attributes:
        phase: what ``/readyz`` says.
        load_error: why the policy could not be loaded, or failed while it was warmed.
        contract_tag: start of the sha256 of the contract; another policy has another.
    """

    def __init__(self, load: Callable[[], Inference], *, max_waiting: int = 64) -> None:
        self._load = load
        self._max_waiting = max_waiting
        self._worker = Worker("inference")
        self._inference: Inference | None = None
        self._settled = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._in_flight = 0
        self._loading: asyncio.Task[None] | None = None
        self.phase = Phase.LOADING
        self.load_error: ReflexarcError | None = None
        self.contract_tag = ""

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
            raise NotReadyError(f"the server is {self.phase.value}; ask again when it is ready")
        return self._inference

    def request(self) -> InFlight:
        """A context that holds the shutdown back until the reply was handed to the socket.

        Raises NotReadyError when the server is not ready or has too much waiting.
        """
        if self.phase is not Phase.READY:
            raise NotReadyError(f"the server is {self.phase.value}; ask again when it is ready")
        if self._in_flight >= self._max_waiting:
            raise NotReadyError(f"{self._in_flight} requests are waiting already; ask again later")
        return InFlight(self)

    async def run(self, work: Callable[[], Result]) -> Result:
        """Run ``work`` in the worker thread, after what was asked before it."""
        return await self._worker.run(work)

    def submit(self, work: Callable[[], object]) -> None:
        """Let the worker thread do ``work`` after what was asked before; nobody waits for it."""
        self._worker.run(work).add_done_callback(_log_failure)

    async def drain(self, timeout: float) -> bool:
        """Refuse new requests, wait for those in flight; False when some did not end in time."""
        self.phase = Phase.DRAINING
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except asyncio.TimeoutError:
            logger.error("%d requests did not end within %g s", self._in_flight, timeout)
            return False
        return True

    def close(self) -> None:
        """Let the worker thread end after its current work."""
        self._worker.close()

    def _enter(self) -> None:
        self._in_flight += 1
        self._idle.clear()

    def _leave(self) -> None:
        self._in_flight -= 1
        if self._in_flight == 0:
            self._idle.set()


def _log_failure(future: asyncio.Future[object]) -> None:
    if not future.cancelled() and future.exception() is not None:
        logger.error("work in the background failed", exc_info=future.exception())


class InFlight:
    """Counts one request from its arrival until its reply was handed to the socket."""

    def __init__(self, service: PolicyService) -> None:
        self._service = service

    def __enter__(self) -> None:
        self._service._enter()

    def __exit__(self, *_: object) -> None:
        self._service._leave()
