"""Our own messages on msgpack frames: the websocket ``/v1/policy`` and HTTP with msgpack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reflexarc.contract import ReflexarcError
from reflexarc.contract.errors import CodecError
from reflexarc.contract.messages import MAX_IDENTIFIER_CHARACTERS

NAME = "native"
_RESET_FIELDS = ("reset", "session_id", "request_id")


def request_id_of(message: object) -> str | None:
    """The id to echo, also when the rest of the message is wrong."""
    request_id = message.get("request_id") if isinstance(message, Mapping) else None
    if isinstance(request_id, str) and len(request_id) <= MAX_IDENTIFIER_CHARACTERS:
        return request_id
    return None


@dataclass(frozen=True)
class Reset:
    """A client begins an episode anew: what is kept of its session is dropped."""

    session_id: str | None
    request_id: str | None


def reset_of(message: object) -> Reset | None:
    """``{"reset": True, "session_id"?, "request_id"?}``; None for another message.

    Raises CodecError for a reset with other fields, which would be ignored.
    """
    if not isinstance(message, Mapping) or "reset" not in message:
        return None
    session = message.get("session_id")
    unknown = [str(key)[:64] for key in message if key not in _RESET_FIELDS]
    if message["reset"] is not True or unknown:
        raise CodecError(
            f"a reset is {{'reset': true}} with {', '.join(_RESET_FIELDS[1:])} at most"
            + (f"; got {unknown[0]!r} too" if unknown else ""),
            field="reset",
        )
    if session is not None and (
        not isinstance(session, str) or len(session) > MAX_IDENTIFIER_CHARACTERS
    ):
        raise CodecError(
            f"session_id must be text of at most {MAX_IDENTIFIER_CHARACTERS} characters",
            field="session_id",
        )
    return Reset(session, request_id_of(message))


def reset_map(reset: Reset, ended: bool) -> dict[str, Any]:
    """The reply to a reset; ``ended`` says whether there was anything to drop."""
    reply: dict[str, Any] = {"reset": True, "ended": ended}
    for name in ("session_id", "request_id"):
        if getattr(reset, name) is not None:
            reply[name] = getattr(reset, name)
    return reply


def error_map(error: ReflexarcError, request_id: str | None = None) -> dict[str, Any]:
    """``{"error": {"code", "message", "field"}, "request_id"}``."""
    return {"error": error.to_wire(), "request_id": request_id}
