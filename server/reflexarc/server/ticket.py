"""One request from its arrival until its reply was handed to the socket."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

from reflexarc.contract import ActionChunk, Observation, ReflexarcError
from reflexarc.contract.errors import InferenceError
from reflexarc.server.exchange import Exchange, Listener

logger = logging.getLogger(__name__)


class Listeners:
    """Calls every listener with every exchange; one that raises is logged and dropped."""

    def __init__(self, listeners: Sequence[Listener] = ()) -> None:
        self._listeners = list(listeners)

    def add(self, listener: Listener) -> None:
        self._listeners.append(listener)

    def __bool__(self) -> bool:
        return bool(self._listeners)

    def __call__(self, exchange: Exchange) -> None:
        for listener in tuple(self._listeners):
            try:
                listener(exchange)
            except Exception:
                logger.exception("a listener raised, and hears no further requests: %r", listener)
                self._listeners.remove(listener)


class Ticket:
    """What is known of one request, and the hold that it has on the server's shutdown.

    A context: leaving it says that the reply was handed to the socket (or that there will be
    none), tells the listeners, and lets the server drain.

    Attributes:
        dialect: protocol of the request.
        received: ``time.perf_counter()`` at its arrival.
        connection: the session of an observation that names none.
        peer: whose rhythm the batcher learns, once the request is queued.
        observation: as checked, once it is.
        chunk: the answer, once there is one.
        error: what the client was told was wrong.
        session_id: as the client named it, also where the rest of the request is wrong.
        request_id: likewise.
        bytes_in: size of the request.
        decided: ``time.perf_counter()`` when the chunk was there.
        bytes_out: size of the reply; set by the route as soon as it is encoded.
    """

    __slots__ = (
        "_bytes_out",
        "_close",
        "_encode_ms",
        "bytes_in",
        "chunk",
        "connection",
        "decided",
        "dialect",
        "error",
        "observation",
        "peer",
        "received",
        "received_at",
        "request_id",
        "session_id",
    )

    def __init__(
        self,
        dialect: str,
        received: float,
        connection: str | None,
        bytes_in: int,
        close: Callable[[Ticket], None],
    ) -> None:
        self.dialect = dialect
        self.received = received
        self.received_at = time.time() - (time.perf_counter() - received)
        self.connection = connection
        self.bytes_in = bytes_in
        self.decided: float | None = None
        self._bytes_out = 0
        self._encode_ms: float | None = None
        self.session_id: str | None = None
        self.request_id: str | None = None
        self.peer: str | None = None
        self.observation: Observation | None = None
        self.chunk: ActionChunk | None = None
        self.error: ReflexarcError | None = None
        self._close: Callable[[Ticket], None] | None = close

    @property
    def bytes_out(self) -> int:
        return self._bytes_out

    @bytes_out.setter
    def bytes_out(self, size: int) -> None:
        self._bytes_out = size
        if self.decided is not None:
            self._encode_ms = (time.perf_counter() - self.decided) * 1000

    def close(self) -> None:
        """The reply was handed to the socket. A second call does nothing."""
        close, self._close = self._close, None
        if close is not None:
            close(self)

    def exchange(self) -> Exchange:
        return Exchange(
            dialect=self.dialect,
            received_at=self.received_at,
            observation=self.observation,
            chunk=self.chunk,
            error=self.error,
            session=self.connection if self.session_id is None else self.session_id,
            request_id=self.request_id,
            timing=self._timing(),
            bytes_in=self.bytes_in,
            bytes_out=self.bytes_out,
        )

    def _timing(self) -> Mapping[str, float]:
        timing = {} if self.chunk is None else self.chunk.timing
        return timing if self._encode_ms is None else {**timing, "encode_ms": self._encode_ms}

    def __enter__(self) -> Ticket:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and self.error is None:
            self.error = (
                error
                if isinstance(error, ReflexarcError)
                else InferenceError("the request ended without a reply")
            )
        self.close()
