"""uvicorn's HTTP protocol, with bounds on connections and on the time a request takes to come."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0  # from a connection's first byte, or from its beginning, to the headers' end
BODY_SECONDS = 60.0  # from there to the body's
# Connections beyond the cap get their refusal; beyond these they are closed without a word.
REFUSED_AT_ONCE = 64


class PolicyHttpProtocol(H11Protocol):  # type: ignore[misc]
    """Refuses connections above a cap, and drops clients that take forever to ask.

    A connection counts from its first request to its end, as a websocket too. One above the cap
    may ask again on the same connection, and is admitted when another has ended.

    Args:
        max_connections: that are admitted at once.
        full: answers in place of the application (its first argument) above the cap.
    """

    app: Any

    def __init__(
        self,
        *args: Any,
        max_connections: int,
        full: Callable[..., Awaitable[None]],
        **keywords: Any,
    ) -> None:
        super().__init__(*args, **keywords)
        self._application, self._full = self.app, partial(full, self.app)
        self._max_connections = max_connections
        self._stage: Any = None
        self._timer: asyncio.TimerHandle | None = None
        self._upgraded = False
        self.admitted = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self._max_connections + REFUSED_AT_ONCE:
            transport.abort()
            return
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_timer()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        # h11 goes on to wait for a body, which does not come: the connection is another's now.
        self._upgraded = True
        self._stop_timer()
        super().handle_websocket_upgrade(event)

    def _should_upgrade(self) -> bool:
        # Called once a request, when its headers are there and before anybody answers it.
        if not self.admitted:
            others = sum(getattr(other, "admitted", True) for other in self.connections)
            self.admitted = others < self._max_connections
        self.app = self._application if self.admitted else self._full
        return bool(self.admitted and super()._should_upgrade())

    def _watch(self) -> None:
        """Give the part of a request that is due now its time, once."""
        stage = self.conn.their_state
        if stage is self._stage or self._upgraded:
            return
        self._stop_timer()
        self._stage = stage
        seconds = {h11.IDLE: HEAD_SECONDS, h11.SEND_BODY: BODY_SECONDS}.get(stage)
        if seconds is not None and not self.transport.is_closing():
            self._timer = self.loop.call_later(seconds, self._took_too_long)

    def _took_too_long(self) -> None:
        self._timer = None
        self.transport.abort()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
