"""uvicorn's websocket protocol, with cheaper reading and a refusal that arrives."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.protocol import OPEN

from reflexarc.server.websocket_channel import PROTOCOL_EXTENSION, SEND_SECONDS

if TYPE_CHECKING:
    from reflexarc.server.websocket_channel import Channel

_RECEIVE_BYTES = 512 * 1024
_LINGER_SECONDS = 5.0
_WHOLE_BINARY_FRAME = 0x82
_MASKED = 0x80
_SMALL_FRAME = 4096  # below, websockets' own parser is as quick
_KEPT_BYTES = 1024 * 1024  # a larger frame gets a buffer of its own, which goes with it
_CLOSE_REASON_BYTES = 123  # RFC 6455: a control frame holds 125 bytes, two of them the code


class _Buffers(threading.local):
    """One buffer a thread for what is read: an event loop parses it before it reads again."""

    def __init__(self) -> None:
        self.received = memoryview(bytearray(_RECEIVE_BYTES))


_buffers = _Buffers()


class PolicyWebSocketProtocol(WebSocketsSansIOProtocol, asyncio.BufferedProtocol):  # type: ignore[misc]
    """Reads large frames in place, and lingers when it refuses one.

    asyncio otherwise allocates 256 KiB for every read, and touching those fresh pages costs more
    than copying out of them. Where a channel is open, the payload of a large frame is received
    straight into one buffer and unmasked there; the parser would copy it four times. Everything
    else (handshake, control frames, fragments, small frames) is websockets' business.

    A refused frame (above the cap: close code 1009) is still on its way when the close frame is
    sent. uvicorn closes the connection at once, and the reset that follows makes the peer lose
    the close frame. Here the rest is read and dropped until the peer ends, or for 5 s.
    """

    close_sent: bool
    read_paused: bool
    frames: list[bytes]

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._channel: Channel | None = None
        self._kept = np.empty(0, np.uint8)
        self._body: memoryview | None = None  # of the large frame that is being received
        self._payload = np.empty(0, np.uint8)  # the same bytes
        self._mask = b""
        self._filled = 0

    def open_channel(self, channel: Channel) -> None:
        """Hand every message to ``channel`` from now on, those that wait first."""
        self._channel = channel
        while not self.queue.empty():
            message = self.queue.get_nowait()
            if message["type"] != "websocket.receive":
                self.queue.put_nowait(message)  # the end of the connection, and the last
                return
            channel.received(message.get("bytes"))
        if self.read_paused:
            self.read_paused = False
            self.transport.resume_reading()

    def write_message(self, message: bytes | str) -> None:
        """Hand a binary or a text message to the socket; one that is gone loses it."""
        if self.conn.state is not OPEN or self.transport.is_closing():
            return
        if isinstance(message, str):
            self.conn.send_text(message.encode())
        else:
            self.conn.send_binary(message)
        self.transport.write(b"".join(self.conn.data_to_send()))

    def refuse(self, code: int, reason: str) -> None:
        """Close with a reason that arrives, also where the client goes on to send."""
        if not self.close_sent and self.conn.state is OPEN:
            short = reason.encode()[:_CLOSE_REASON_BYTES].decode(errors="ignore")
            self.conn.send_close(code, short)
            self.handle_parser_exception()

    async def run_asgi(self) -> None:
        self.scope["extensions"][PROTOCOL_EXTENSION] = self
        await super().run_asgi()

    async def send(self, message: Any) -> None:
        """A client that leaves its replies unread is dropped."""
        if not self.writable.is_set():
            try:
                await asyncio.wait_for(self.writable.wait(), SEND_SECONDS)
            except asyncio.TimeoutError:
                self.transport.abort()
                raise ClientDisconnected from None
        await super().send(message)
        if message["type"] == "websocket.http.response.body" and not message.get("more_body"):
            self.handshake_complete = True  # a refusal completes it; uvicorn logs an error instead

    def get_buffer(self, sizehint: int) -> memoryview:
        return _buffers.received if self._body is None else self._body[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        if self._body is not None:
            self._filled += nbytes
            if self._filled == len(self._body):
                self._finish_body()
            return
        data = _buffers.received[:nbytes]
        while len(data) and self._begin_body(data):
            data = data[self._take(data) :]
        if len(data):
            self.data_received(data)

    def _begin_body(self, data: memoryview) -> bool:
        """Whether a large frame begins here, which is then received in place."""
        if (
            self._channel is None
            or len(data) < 14
            or data[0] != _WHOLE_BINARY_FRAME
            or data[1] < _MASKED + 126
            or self.conn.state is not OPEN
            or self.conn.expect_continuation_frame
            or len(self.conn.reader.buffer)
        ):
            return False
        header = 4 if data[1] == _MASKED + 126 else 10
        length = int.from_bytes(data[2:header], "big")
        if not _SMALL_FRAME <= length <= self.config.ws_max_size:
            return False
        if length > _KEPT_BYTES:
            self._payload = np.empty(length, np.uint8)
        else:
            if len(self._kept) < length:
                self._kept = np.empty(-(-length // 4096) * 4096, np.uint8)
            self._payload = self._kept[:length]
        self._mask = bytes(data[header : header + 4])
        self._body, self._filled = self._payload.data, -(header + 4)
        return True

    def _take(self, data: memoryview) -> int:
        """Copy the first bytes of the frame that begins in ``data``; how many were consumed."""
        assert self._body is not None
        header = -self._filled
        count = min(len(data) - header, len(self._body))
        self._body[:count] = data[header : header + count]
        self._filled = count
        if count == len(self._body):
            self._finish_body()
        return header + count

    def _finish_body(self) -> None:
        body, payload = self._body, self._payload
        self._body, self._payload = None, np.empty(0, np.uint8)
        assert body is not None and self._channel is not None
        _unmask(payload, self._mask)
        self._channel.received(body)  # type: ignore[arg-type]

    def send_receive_event_to_app(self) -> None:
        if self._channel is None:
            super().send_receive_event_to_app()
            return
        data = self.frames[0] if len(self.frames) == 1 else b"".join(self.frames)
        self.frames = []
        if not self.close_sent:
            self._channel.received(None if self.curr_msg_data_type == "text" else data)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._channel is not None:
            self._channel.paused()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._channel is not None:
            self._channel.resumed()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        # The suspended parser and its connection refer to each other. Left so, they keep the last
        # frame until the garbage collector's next full run, which comes seldom.
        self.conn.parser.close()
        if self._channel is not None:
            self._channel.closed()
            self._channel = None

    def handle_ping(self) -> None:
        if self.close_sent:
            self.conn.data_to_send()  # the way out is closed: no pong goes there any more
        else:
            super().handle_ping()

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


def _unmask(payload: np.ndarray[Any, np.dtype[np.uint8]], mask: bytes) -> None:
    """XOR with the mask, in place."""
    whole = len(payload) // 8 * 8
    words = payload[:whole].view(np.uint64)
    np.bitwise_xor(words, np.frombuffer(mask * 2, np.uint64), out=words)
    for index in range(whole, len(payload)):
        payload[index] ^= mask[index % 4]
