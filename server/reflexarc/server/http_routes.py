"""HTTP: actions for robots without websockets, the contract, and what an orchestrator asks."""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.requests import ClientDisconnect

from reflexarc.contract import Observation, ReflexarcError, pack, unpack
from reflexarc.contract.codec import MAX_FRAME_BYTES
from reflexarc.contract.errors import (
    CodecError,
    ContractViolationError,
    DeadlineExceededError,
    FrameTooLargeError,
    HistoryMissingError,
    NotReadyError,
    ReplicaLostError,
    StaleReplyError,
    TooManyRequestsError,
    UnknownInstructionError,
    UnknownSessionError,
)
from reflexarc.server.admission import Phase
from reflexarc.server.dialects import json_http, native
from reflexarc.server.dialects.json_arrays import parse_json
from reflexarc.server.inference import handshake, internal_error
from reflexarc.server.origin import origin_is_foreign
from reflexarc.server.service import DECODED_INLINE_BYTES, PolicyService
from reflexarc.server.ticket import Ticket

logger = logging.getLogger(__name__)
POLICY_HEADER = "Reflexarc-Policy"
JSON_TYPE = "application/json"
MSGPACK_TYPES = ("application/msgpack", "application/x-msgpack", "application/vnd.msgpack")
# What is sent beyond the cap is read and dropped up to here, so that the sender reads the 413
# instead of a reset connection.
_DISCARD_BYTES = 4 * MAX_FRAME_BYTES

_ACTIONS = {"type": "array", "items": {"type": "array", "items": {"type": "number"}}}
_ACTIONS_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["images", "state"],
                    "properties": {
                        "images": {"type": "object", "additionalProperties": {"type": "object"}},
                        "state": {"type": "array", "items": {"type": "number"}},
                        "instruction": {"type": "string"},
                        "seed": {"type": "integer"},
                        "request_id": {"type": "string"},
                        "session_id": {"type": "string"},
                        "step_index": {"type": "integer"},
                        "denoising_steps": {"type": "integer"},
                        "deadline_ms": {"type": "number"},
                        "history": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "required": ["step_index", "state"],
                                "properties": {
                                    "step_index": {"type": "integer"},
                                    "state": {"type": "array", "items": {"type": "number"}},
                                    "images": {"type": "object"},
                                },
                            },
                        },
                        "goal_image": {"type": "object"},
                        "action_prefix": _ACTIONS,
                        "action_guide": _ACTIONS,
                    },
                },
            },
            MSGPACK_TYPES[0]: {"schema": {"type": "string", "format": "binary"}},
        },
    }
}


def http_routes(service: PolicyService) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/actions", openapi_extra=_ACTIONS_BODY)
    async def actions(request: Request) -> Response:
        """An action chunk for an observation; the reply has the request's form.

        Images in JSON: {"format": "jpeg" | "png", "data": base64} or json-numpy's
        {"__numpy__": base64, "dtype", "shape"}.
        """
        return await _actions(request, service)

    @router.delete("/v1/sessions/{session_id}")
    async def end_session(session_id: str, request: Request) -> Response:
        """Forget what is kept of an episode's stream; 404 where nothing is."""
        try:
            if is_foreign(request):
                return refused_page(request)
            if not await service.end_session(session_id):
                raise UnknownSessionError(
                    "nothing is kept under this session's name; it was ended, was idle for too "
                    "long, or never asked",
                    field="session_id",
                )
            return JSONResponse({"ended": True})
        except ReflexarcError as error:
            return _error_response(error, as_msgpack=False)

    @router.get("/v1/contract")
    async def contract() -> Response:
        """What the policy expects and returns, and how it samples."""
        try:
            return JSONResponse(handshake(service.inference), headers=_policy_header(service))
        except ReflexarcError as error:
            return _error_response(error, as_msgpack=False)

    @router.get("/livez")
    async def livez() -> Response:
        """200 while the process answers."""
        return JSONResponse({"status": "alive"})

    @router.get("/readyz")
    async def readyz() -> Response:
        """200 when observations are answered, 503 before and after."""
        ready = service.phase is Phase.READY
        return JSONResponse({"phase": service.phase.value}, status_code=200 if ready else 503)

    @router.get("/healthz")
    async def healthz() -> Response:
        """The health check of openpi's server."""
        return PlainTextResponse("OK\n")

    return router


def status_of(error: ReflexarcError) -> int:
    if isinstance(error, FrameTooLargeError):
        return 413
    if isinstance(error, UnknownSessionError):
        return 404
    if isinstance(error, HistoryMissingError | StaleReplyError):
        return 409
    if isinstance(error, DeadlineExceededError):
        return 504
    if isinstance(error, TooManyRequestsError):
        return 429
    if isinstance(error, CodecError | ContractViolationError | UnknownInstructionError):
        return 422
    return 503 if isinstance(error, NotReadyError | ReplicaLostError) else 500


def retry_header(error: ReflexarcError) -> dict[str, str] | None:
    """When a client may ask again, where asking again may help."""
    may_help = isinstance(error, NotReadyError | ReplicaLostError | TooManyRequestsError)
    return {"Retry-After": "1"} if may_help else None


async def _actions(request: Request, service: PolicyService) -> Response:
    received = time.perf_counter()
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    as_msgpack = content_type in MSGPACK_TYPES
    request_id = None
    ticket: Ticket | None = None
    try:
        if is_foreign(request):
            return refused_page(request)
        _ = service.inference  # before the body is read: is the server ready?
        body = await read_body(request)
        with service.ticket("http", received=received, bytes_in=len(body)) as ticket:
            read = partial(_read, body, as_msgpack)
            inline = as_msgpack and len(body) <= DECODED_INLINE_BYTES
            request_id, observation = read() if inline else await service.parse(read)
            ticket.request_id = request_id
            if isinstance(observation, ReflexarcError):
                raise observation
            chunk = await service.answer(ticket, observation)
            if as_msgpack:
                reply, media_type = pack(chunk.to_wire()), MSGPACK_TYPES[0]
            else:
                reply, media_type = json_http.dump(json_http.chunk_to_json(chunk)), JSON_TYPE
            ticket.bytes_out = len(reply)
            return Response(reply, headers=_policy_header(service), media_type=media_type)
    except ReflexarcError as error:
        problem = error
    except Exception:
        problem = internal_error("the server failed on a request")
    if ticket is None:
        service.refused("http", problem, received=received)
    return _error_response(problem, as_msgpack=as_msgpack, request_id=request_id)


def _read(body: bytes, as_msgpack: bool) -> tuple[str | None, Observation | ReflexarcError]:
    """The request's id and its observation, or what is wrong with it."""
    request_id = None
    try:
        value = unpack(body) if as_msgpack else parse_json(body)
        request_id = native.request_id_of(value)
        if as_msgpack:
            return request_id, Observation.from_wire(value)
        return request_id, json_http.observation_from_json(value)
    except ReflexarcError as error:
        return request_id, error


def is_foreign(request: Request) -> bool:
    """Whether a browser page of another host asks."""
    server = request.scope.get("server")
    return origin_is_foreign(request.headers, server[0] if server else None)


def refused_page(request: Request) -> Response:
    logger.warning("refused a request from the web page %s", request.headers["origin"])
    return PlainTextResponse("requests from other web pages are refused\n", 403)


def _policy_header(service: PolicyService) -> dict[str, str]:
    """Tells a client, which HTTP leaves without a session, that the policy is still the same."""
    return {POLICY_HEADER: service.contract_tag}


async def read_body(request: Request) -> bytes:
    """The whole body; raises FrameTooLargeError above the cap, without storing a long one.

    Raises CodecError where the client leaves before its end: nobody will read it.
    """
    try:
        return await _read_whole_body(request)
    except ClientDisconnect as error:
        raise CodecError("the client left in the middle of its body") from error


async def _read_whole_body(request: Request) -> bytes:
    declared = request.headers.get("content-length", "")
    keep = not (declared.isdigit() and int(declared) > MAX_FRAME_BYTES)
    chunks, total = [], 0
    async for chunk in request.stream():
        total += len(chunk)
        keep = keep and total <= MAX_FRAME_BYTES
        if keep:
            chunks.append(chunk)
        else:
            chunks.clear()
        if total > _DISCARD_BYTES:
            break
    if total > MAX_FRAME_BYTES:
        raise FrameTooLargeError(f"the body is above the cap of {MAX_FRAME_BYTES} bytes")
    return b"".join(chunks)


def _error_response(
    error: ReflexarcError, *, as_msgpack: bool, request_id: str | None = None
) -> Response:
    content = native.error_map(error, request_id)
    headers = retry_header(error)
    if as_msgpack:
        return Response(pack(content), status_of(error), headers, media_type=MSGPACK_TYPES[0])
    return Response(json_http.dump(content), status_of(error), headers, media_type=JSON_TYPE)
