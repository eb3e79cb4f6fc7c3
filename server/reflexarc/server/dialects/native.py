"""Our own messages on msgpack frames: the websocket ``/v1/policy`` and HTTP with msgpack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reflexarc.contract import ReflexarcError
from reflexarc.contract.messages import MAX_IDENTIFIER_CHARACTERS


def request_id_of(message: object) -> str | None:
    """The id to echo, also when the rest of the message is wrong."""
    request_id = message.get("request_id") if isinstance(message, Mapping) else None
    if isinstance(request_id, str) and len(request_id) <= MAX_IDENTIFIER_CHARACTERS:
        return request_id
    return None


def error_map(error: ReflexarcError, request_id: str | None = None) -> dict[str, Any]:
    """``{"error": {"code", "message", "field"}, "request_id"}``."""
    return {"error": error.to_wire(), "request_id": request_id}
