"""A websocket server that only counts bytes and answers: the generator's own ceiling."""

from __future__ import annotations

import asyncio
import base64
import hashlib

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, section 1.3


class EchoServer:
    """Answers every frame with the same bytes, without unmasking or reading what came.

    Args:
        greeting: sent when a client connects.
        reply: sent for each frame.
    """

    def __init__(self, greeting: bytes, reply: bytes) -> None:
        self._greeting, self._reply = _frame(greeting), _frame(reply)

    async def start(self) -> int:
        """Listen on a free port of 127.0.0.1 and return it."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20)
        return int(server.sockets[0].getsockname()[1])

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = await reader.readuntil(b"\r\n\r\n")
            key = next(
                line.partition(b":")[2].strip()
                for line in request.split(b"\r\n")
                if line.lower().startswith(b"sec-websocket-key:")
            )
            accept = base64.b64encode(hashlib.sha1(key + _GUID).digest())
            writer.write(
                b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
                b"Connection: Upgrade\r\nSec-WebSocket-Accept: " + accept + b"\r\n\r\n"
            )
            writer.write(self._greeting)
            while await self._skip_frame(reader):
                writer.write(self._reply)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _skip_frame(self, reader: asyncio.StreamReader) -> bool:
        """Read past one frame; False for a close frame."""
        first, second = await reader.readexactly(2)
        length = second & 0x7F
        if length >= 126:
            length = int.from_bytes(await reader.readexactly(2 if length == 126 else 8), "big")
        left = length + 4  # the mask
        while left:
            left -= len(await reader.readexactly(min(left, 1 << 19)))
        return first & 0x0F != 8


def _frame(payload: bytes) -> bytes:
    if len(payload) < 126:
        return bytes((0x82, len(payload))) + payload
    if len(payload) < 1 << 16:
        return b"\x82\x7e" + len(payload).to_bytes(2, "big") + payload
    return b"\x82\x7f" + len(payload).to_bytes(8, "big") + payload
