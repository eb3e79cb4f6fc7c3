"""The websockets: ``/v1/policy`` for our own clients, ``/`` and ``/vla-eval`` for others'.

A connection is strict request and reply. It lives on after an error; only a frame above the cap
(close code 1009), a refused policy (1008) or the server's end (1011, 1012) closes it.
"""

from __future__ import annotations

import logging
import secrets
import time
from typing import Any

from fastapi import APIRouter, WebSocket, WebSocketDisconnect

from reflexarc.contract import Observation, ReflexarcError, pack, unpack
from reflexarc.contract.errors import CodecError, NotReadyError
from reflexarc.server.dialect_websockets import openpi_or_starvla_session, vla_eval_session
from reflexarc.server.dialects import native
from reflexarc.server.inference import Inference, handshake
from reflexarc.server.origin import origin_is_foreign
from reflexarc.server.service import PolicyService
from reflexarc.server.websocket_frames import close, receive

logger = logging.getLogger(__name__)


def websocket_routes(service: PolicyService) -> APIRouter:
    router = APIRouter()

    @router.websocket("/v1/policy")
    async def policy(socket: WebSocket) -> None:
        await _session(socket, service, _native_session)

    @router.websocket("/")
    async def openpi_or_starvla(socket: WebSocket) -> None:
        await _session(socket, service, openpi_or_starvla_session)

    @router.websocket("/vla-eval")
    async def vla_eval(socket: WebSocket) -> None:
        await _session(socket, service, vla_eval_session)

    return router


async def _session(socket: WebSocket, service: PolicyService, converse: Any) -> None:
    server = socket.scope.get("server")
    if origin_is_foreign(socket.headers, server[0] if server else None):
        logger.warning("refused a websocket from the web page %s", socket.headers["origin"])
        await socket.close(1008)  # before accept: the upgrade is answered with 403
        return
    # Accepted at once, also while the policy loads: clients wait for the first frame for long,
    # but give up on a refused connection.
    await socket.accept()
    try:
        inference = await service.wait_until_loaded()
        await converse(socket, service, inference)
    except NotReadyError as error:
        await close(socket, 1011, error.message)
    except WebSocketDisconnect:
        pass


async def _native_session(socket: WebSocket, service: PolicyService, inference: Inference) -> None:
    # Names the session of observations that name none. No other client can guess it, and what
    # is kept under it ends with the connection.
    connection = f"connection-{secrets.token_hex(16)}"
    try:
        await _native_requests(socket, service, inference, connection)
    finally:
        service.end_connection(connection)


async def _native_requests(
    socket: WebSocket, service: PolicyService, inference: Inference, connection: str
) -> None:
    await socket.send_bytes(pack(handshake(inference)))
    while True:
        frame = await receive(socket)
        received = time.perf_counter()
        request_id, problem = None, None
        try:
            if frame is None:
                raise CodecError("a text frame came; send observations as binary msgpack frames")
            with service.ticket(
                "native", received=received, connection=connection, bytes_in=len(frame)
            ) as ticket:
                try:
                    message = unpack(frame)
                    request_id = native.request_id_of(message)
                    chunk = await service.answer(ticket, Observation.from_wire(message))
                    reply = pack(chunk.to_wire())
                except ReflexarcError as error:
                    problem = ticket.error = error
                    reply = pack(native.error_map(error, request_id))
                ticket.bytes_out = len(reply)
                await socket.send_bytes(reply)
        except ReflexarcError as refused:
            problem = refused
            await socket.send_bytes(pack(native.error_map(refused)))
        if problem is not None:
            logger.warning("%s: [%s] %s", socket.client, problem.code, problem.message)
