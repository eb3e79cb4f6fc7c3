"""Our own messages on msgpack frames: the websocket ``/v1/policy`` and HTTP with msgpack."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from reflexarc.contract import Observation, ReflexarcError, pack, unpack
from reflexarc.contract.messages import MAX_IDENTIFIER_CHARACTERS
from reflexarc.server.inference import Inference, infer_one, internal_error


def answer(
    inference: Inference, frame: bytes, received: float, connection: str | None = None
) -> tuple[bytes, ReflexarcError | None]:
    """The reply to one frame, and the error that it reports, if it reports one.

    Args:
        inference: the policy.
        frame: an Observation's wire map, packed.
        received: ``time.perf_counter()`` when the frame arrived, for ``queue_ms``.
        connection: the session of an observation that names none.
    """
    queue_ms = (time.perf_counter() - received) * 1000
    request_id: str | None = None
    try:
        message = unpack(frame)
        request_id = request_id_of(message)
        chunk = infer_one(inference, Observation.from_wire(message), connection)
        return pack(replace(chunk, timing={"queue_ms": queue_ms, **chunk.timing}).to_wire()), None
    except ReflexarcError as error:
        return pack(error_map(error, request_id)), error
    except Exception:
        failure = internal_error("the server failed on a request")
        return pack(error_map(failure, request_id)), failure


def request_id_of(message: object) -> str | None:
    """The id to echo, also when the rest of the message is wrong."""
    request_id = message.get("request_id") if isinstance(message, Mapping) else None
    if isinstance(request_id, str) and len(request_id) <= MAX_IDENTIFIER_CHARACTERS:
        return request_id
    return None


def error_map(error: ReflexarcError, request_id: str | None = None) -> dict[str, Any]:
    """``{"error": {"code", "message", "field"}, "request_id"}``."""
    return {"error": error.to_wire(), "request_id": request_id}
