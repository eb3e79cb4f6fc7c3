"""What every websocket session does with frames."""

from __future__ import annotations

import logging

from fastapi import WebSocket, WebSocketDisconnect

logger = logging.getLogger(__name__)
CLOSE_REASON_BYTES = 123  # RFC 6455: a control frame holds 125 bytes, two of them the code


async def receive(socket: WebSocket) -> bytes | None:
    """The next binary frame; None for a text frame. Raises WebSocketDisconnect."""
    message = await socket.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", 1006))
    frame: bytes | None = message.get("bytes")
    return frame


async def close(socket: WebSocket, code: int, reason: str) -> None:
    """Close with as much of the reason as fits."""
    shortened = reason.encode()[:CLOSE_REASON_BYTES].decode(errors="ignore")
    try:
        await socket.close(code, shortened)
    except (WebSocketDisconnect, RuntimeError):
        logger.debug("the client was gone before the close frame")
