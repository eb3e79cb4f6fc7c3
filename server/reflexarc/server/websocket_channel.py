"""Requests of one websocket, answered one after the other with little between socket and policy.

ASGI hands every message through a queue to a task and back. Here a frame goes to its dialect in
the callback that read it, and a cheap policy's reply is written before that callback returns.
"""

from __future__ import annotations

import asyncio
import logging
import types
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from typing import TYPE_CHECKING, Any, Protocol

from fastapi import WebSocket, WebSocketDisconnect

from reflexarc.server.websocket_frames import receive

if TYPE_CHECKING:
    from reflexarc.server.websocket_protocol import PolicyWebSocketProtocol

logger = logging.getLogger(__name__)
PROTOCOL_EXTENSION = "reflexarc.protocol"  # of the ASGI scope: the connection itself
MAX_WAITING = 8  # frames of one connection behind the one that is being answered
MAX_WAITING_BYTES = 64 * 1024 * 1024
SEND_SECONDS = 10.0  # in which a client has to make room for its replies


class Peer(Protocol):
    """What a dialect sees of a connection: a channel, or starlette's WebSocket."""

    @property
    def client(self) -> Any:
        """Address of the other side, for logs."""
        ...

    async def send_bytes(self, data: bytes) -> None: ...

    async def send_text(self, data: str) -> None: ...

    async def close(self, code: int = 1000, reason: str | None = None) -> None: ...


Answer = Callable[[Any, "bytes | None"], Coroutine[Any, Any, None]]
"""Sends the reply to a frame (None: a text frame) to the peer. Raises nothing.

The frame may be a view of a buffer that is used again once the coroutine first waits.
"""


async def converse(socket: WebSocket, answer: Answer) -> None:
    """Answer every frame of an accepted websocket until it is closed.

    Raises WebSocketDisconnect.
    """
    protocol = socket.scope.get("extensions", {}).get(PROTOCOL_EXTENSION)
    if protocol is None:  # another ASGI server than ours
        while True:
            await answer(socket, await receive(socket))
    channel = Channel(protocol, answer)
    protocol.open_channel(channel)
    # From now on only the end of the connection comes this way.
    message = await socket.receive()
    raise WebSocketDisconnect(message.get("code", 1006))


class Channel:
    """Strict request and reply on one connection.

    Frames that come before the reply wait, up to a bound; a client that sends more of them is
    refused (close code 1008), and so is one that leaves its replies unread for 10 s.
    """

    def __init__(self, protocol: PolicyWebSocketProtocol, answer: Answer) -> None:
        self._protocol, self._answer = protocol, answer
        self._loop = protocol.loop
        self._waiting: deque[bytes | None] = deque()
        self._waiting_bytes = 0
        self._busy = self._refused = False
        self._task: asyncio.Task[None] | None = None
        self._unread: asyncio.TimerHandle | None = None

    @property
    def client(self) -> Any:
        return self._protocol.client

    async def send_bytes(self, data: bytes) -> None:
        self._protocol.write_message(data)

    async def send_text(self, data: str) -> None:
        self._protocol.write_message(data)

    async def close(self, code: int = 1000, reason: str | None = None) -> None:
        self._refuse(reason or "", code)

    def received(self, frame: bytes | None) -> None:
        """A frame came whole; None for a text frame."""
        if self._refused:
            return
        if not self._busy and self._unread is None:
            self._begin(frame)
            self._next()
            return
        size = 0 if frame is None else len(frame)
        if len(self._waiting) >= MAX_WAITING or self._waiting_bytes + size > MAX_WAITING_BYTES:
            self._refuse(f"too_many_requests: at most {MAX_WAITING} may wait on a connection")
            return
        self._waiting.append(None if frame is None else bytes(frame))
        self._waiting_bytes += size

    def paused(self) -> None:
        """The client leaves its replies unread; nothing of it is read either."""
        if self._unread is None:
            self._unread = self._loop.call_later(SEND_SECONDS, self._left_unread)
            self._protocol.transport.pause_reading()

    def resumed(self) -> None:
        """The client reads again."""
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
            if not self._protocol.transport.is_closing():
                self._protocol.transport.resume_reading()
                self._loop.call_soon(self._next)

    def closed(self) -> None:
        """The connection is gone; what still waits has nobody to be answered."""
        self._refused = True
        self._waiting.clear()
        if self._unread is not None:
            self._unread.cancel()

    def _next(self) -> None:
        while self._waiting and not self._busy and self._unread is None:
            frame = self._waiting.popleft()
            self._waiting_bytes -= 0 if frame is None else len(frame)
            self._begin(frame)

    def _begin(self, frame: bytes | None) -> None:
        self._busy = True
        try:
            self._task = start(self._answer(self, frame))
        except Exception:
            logger.exception("a connection failed")
            self._refuse("the server failed on a request", 1011)
            return
        if self._task is None:
            self._busy = False
        else:
            self._task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._busy, self._task = False, None
        if not task.cancelled() and task.exception() is not None:
            logger.error("a connection failed", exc_info=task.exception())
            self._refuse("the server failed on a request", 1011)
        self._next()

    def _refuse(self, reason: str, code: int = 1008) -> None:
        logger.warning("%s: closed: %s", self.client, reason)
        self._refused = True
        self._waiting.clear()
        self._protocol.refuse(code, reason)

    def _left_unread(self) -> None:
        logger.warning("%s: closed: it left its replies unread for %g s", self.client, SEND_SECONDS)
        self._protocol.transport.abort()


def start(work: Coroutine[Any, Any, None]) -> asyncio.Task[None] | None:
    """Run a coroutine until it first waits; a task for what is left of it, or None.

    What answers at once then costs neither a task nor a turn of the event loop. (Python 3.12
    has it as ``eager_start``.)
    """
    try:
        first = work.send(None)
    except StopIteration:
        return None
    return asyncio.get_running_loop().create_task(_rest(work, first))


async def _rest(work: Coroutine[Any, Any, None], first: Any) -> None:
    await _continued(work, first)


@types.coroutine
def _continued(work: Coroutine[Any, Any, None], waits_for: Any) -> Generator[Any, Any, None]:
    """Wait for what the coroutine waits for already, then go on with it."""
    while True:
        thrown: BaseException | None = None
        value: Any = None
        try:
            value = yield waits_for
        except BaseException as error:
            thrown = error
        try:
            waits_for = work.send(value) if thrown is None else work.throw(thrown)
        except StopIteration:
            return
