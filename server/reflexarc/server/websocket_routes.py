"""The websockets: ``/v1/policy`` for our own clients, ``/`` and ``/vla-eval`` for others'.

A connection is strict request and reply. It lives on after an error; only a frame above the cap
(close code 1009), a refused policy (1008) or the server's end (1011, 1012) closes it.
"""

from __future__ import annotations

import logging
import secrets
import time
from functools import partial
from typing import Any

from fastapi import APIRouter, WebSocket, WebSocketDisconnect

from reflexarc.contract import Observation, ReflexarcError, pack, unpack
from reflexarc.contract.errors import CodecError, NotReadyError
from reflexarc.server.dialect_websockets import openpi_or_starvla_session, vla_eval_session
from reflexarc.server.dialects import native
from reflexarc.server.inference import Inference, handshake, internal_error
from reflexarc.server.origin import origin_is_foreign
from reflexarc.server.service import DECODED_INLINE_BYTES, PolicyService
from reflexarc.server.ticket import Ticket
from reflexarc.server.websocket_channel import Peer, converse
from reflexarc.server.websocket_frames import close

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
    conversation = NativeConversation(service)
    try:
        await socket.send_bytes(pack(handshake(inference)))
        await converse(socket, conversation.answer)
    finally:
        conversation.end()


class NativeConversation:
    """The requests of one connection to ``/v1/policy``."""

    def __init__(self, service: PolicyService) -> None:
        self._service = service
        # Names the session of observations that name none. No other client can guess it, and
        # what is kept under it ends with the connection.
        self._connection = f"connection-{secrets.token_hex(16)}"

    async def answer(self, peer: Peer, frame: bytes | None) -> None:
        received = time.perf_counter()
        request_id: str | None = None
        ticket: Ticket | None = None
        try:
            if frame is None:
                raise CodecError("a text frame came; send observations as binary msgpack frames")
            with self._service.ticket(
                native.NAME, received=received, connection=self._connection, bytes_in=len(frame)
            ) as ticket:
                message = await unpacked(self._service, frame)
                request_id = ticket.request_id = native.request_id_of(message)
                reply = await self._reply(ticket, message)
                ticket.bytes_out = len(reply)
                await peer.send_bytes(reply)
            return
        except ReflexarcError as error:
            problem = error
        except Exception:
            problem = internal_error("the server failed on a request")
        if ticket is None:
            self._service.refused(
                native.NAME, problem, received=received, connection=self._connection
            )
        await peer.send_bytes(pack(native.error_map(problem, request_id)))

    async def _reply(self, ticket: Ticket, message: object) -> bytes:
        reset = native.reset_of(message)
        if reset is None:
            return pack(
                (await self._service.answer(ticket, Observation.from_wire(message))).to_wire()
            )
        ended = await self._service.end_session(reset.session_id or self._connection)
        return pack(native.reset_map(reset, ended))

    def end(self) -> None:
        """The connection was closed."""
        self._service.end_connection(self._connection)


async def unpacked(service: PolicyService, frame: bytes) -> Any:
    """A frame's message; one that takes long is decoded off the event loop."""
    if len(frame) <= DECODED_INLINE_BYTES:
        return unpack(frame)
    return await service.parse(partial(unpack, frame))
