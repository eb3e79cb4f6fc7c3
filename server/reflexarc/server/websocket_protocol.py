"""uvicorn's websocket protocol, with cheaper reading and a refusal that arrives."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

_RECEIVE_BYTES = 512 * 1024  # an observation with two raw 224 px images is 301 kB
_LINGER_SECONDS = 5.0


class PolicyWebSocketProtocol(WebSocketsSansIOProtocol, asyncio.BufferedProtocol):  # type: ignore[misc]
    """Reads into one buffer a connection, and lingers when it refuses a frame.

    asyncio otherwise allocates 256 KiB for every read, and touching those fresh pages costs more
    than copying out of them.

    A refused frame (above the cap: close code 1009) is still on its way when the close frame is
    sent. uvicorn closes the connection at once, and the reset that follows makes the peer lose
    the close frame. Here the rest is read and dropped until the peer ends, or for 5 s.
    """

    close_sent: bool

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._received = memoryview(bytearray(_RECEIVE_BYTES))

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._received

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(self._received[:nbytes])

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        # The suspended parser and its connection refer to each other. Left so, they keep the last
        # frame until the garbage collector's next full run, which comes seldom.
        self.conn.parser.close()

    def handle_parser_exception(self) -> None:
        if self.close_sent:
            return  # what still comes is dropped
        self.close_sent = True
        close = self.conn.close_sent
        self.queue.put_nowait(
            {
                "type": "websocket.disconnect",
                "code": close.code if close is not None else 1006,
                "reason": close.reason if close is not None else "",
            }
        )
        self.transport.write(b"".join(self.conn.data_to_send()))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.close_timer = self.loop.call_later(_LINGER_SECONDS, self.transport.close)
