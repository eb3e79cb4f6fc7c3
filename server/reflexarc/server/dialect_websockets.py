"""Websockets of other projects' clients: ``/`` for openpi's and starVLA's, ``/vla-eval``."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from fastapi import WebSocket

from reflexarc.contract import ActionChunk, Observation, ReflexarcError, pack, unpack
from reflexarc.contract.errors import CodecError
from reflexarc.server.dialects import openpi, starvla, vla_eval
from reflexarc.server.dialects.conversions import refused
from reflexarc.server.inference import Inference, handshake, internal_error
from reflexarc.server.service import PolicyService
from reflexarc.server.ticket import Ticket
from reflexarc.server.websocket_channel import Peer, converse
from reflexarc.server.websocket_frames import close, receive

logger = logging.getLogger(__name__)


async def openpi_or_starvla_session(
    socket: WebSocket, service: PolicyService, inference: Inference
) -> None:
    """Both read a first frame and then ask; a message's keys tell which of the two asks."""
    contract = inference.contract
    refusal = openpi.refusal(contract)
    if refusal is not None and starvla.refusal(contract) is not None:
        logger.warning("refused a client: %s", refusal)
        await close(socket, 1008, refusal)
        return
    await socket.send_bytes(pack({**handshake(inference), **starvla.metadata(contract)}))
    conversation = _OpenpiOrStarvla(service, inference)
    try:
        await converse(socket, conversation.answer)
    finally:
        conversation.end()


class _OpenpiOrStarvla:
    """The requests of one connection to ``/``."""

    def __init__(self, service: PolicyService, inference: Inference) -> None:
        self._service, self._contract = service, inference.contract
        self._connection = f"connection-{secrets.token_hex(16)}"
        self._others: set[str] = set()
        self._prev_total_ms: float | None = None

    async def answer(self, socket: Peer, frame: bytes | None) -> None:
        received = time.perf_counter()
        message: object = None
        try:
            if frame is None:
                raise CodecError("a text frame came; send requests as binary msgpack frames")
            with self._service.ticket(
                openpi.NAME,
                received=received,
                connection=self._connection,
                bytes_in=len(frame),
            ) as ticket:
                message = unpack(frame)
                ask = self._starvla if starvla.speaks(message) else self._openpi
                with _unexpected_is_named():
                    reply = await ask(ticket, message)
                ticket.bytes_out = len(reply)
                await socket.send_bytes(reply)
        except ReflexarcError as error:
            logger.warning("%s: [%s] %s", socket.client, error.code, error.message)
            if isinstance(message, Mapping) and starvla.speaks(message):
                reply = pack(starvla.error_reply(error, starvla.request_id_of(message)))
                await socket.send_bytes(reply)
            else:
                await socket.send_text(openpi.error_text(error))
        self._prev_total_ms = (time.perf_counter() - received) * 1000

    async def _openpi(self, ticket: Ticket, message: Any) -> bytes:
        observation = openpi.observation_from_request(self._contract, message)
        chunk = await self._service.answer(ticket, observation)
        infer_ms = (time.perf_counter() - ticket.received) * 1000
        return openpi.reply(self._contract, chunk, infer_ms, self._prev_total_ms)

    async def _starvla(self, ticket: Ticket, message: Any) -> bytes:
        ticket.dialect = starvla.NAME
        request = starvla.request_from_message(message)
        if request.kind == "ping":
            return pack(starvla.pong(request))
        if request.kind != "infer":
            return pack(starvla.unknown_type(request))
        first, *others = await self._service.parse(
            partial(starvla.observations_from_payload, self._contract, request.payload)
        )
        chunks = await asyncio.gather(
            self._service.answer(ticket, first),
            *(self._another(ticket, place, other) for place, other in enumerate(others, 1)),
        )
        return pack(starvla.reply(self._contract, request, chunks))

    async def _another(self, ticket: Ticket, place: int, observation: Observation) -> ActionChunk:
        """A message's further example: another environment, so a request and session of its own."""
        session = f"{self._connection}-{place}"
        self._others.add(session)
        return await self._service.infer(
            observation, dialect=starvla.NAME, received=ticket.received, connection=session
        )

    def end(self) -> None:
        """The connection was closed."""
        for session in (self._connection, *self._others):
            self._service.end_connection(session)


@contextmanager
def _unexpected_is_named() -> Iterator[None]:
    """What nobody foresaw reaches the client as an error id, and ends no connection."""
    try:
        yield
    except ReflexarcError:
        raise
    except Exception:
        raise internal_error("the server failed on a request") from None


async def vla_eval_session(socket: WebSocket, service: PolicyService, inference: Inference) -> None:
    """The client speaks first. ``?replan_steps=N`` in the URL executes N actions of a chunk."""
    contract = inference.contract
    connection = f"connection-{secrets.token_hex(16)}"
    try:
        session = vla_eval.Session(
            contract, vla_eval.replan_steps(contract, socket.query_params.get("replan_steps"))
        )
    except ReflexarcError as error:
        await close(socket, 1008, f"vla-eval: {error.message}")
        return
    try:
        await _vla_eval_messages(socket, service, session, connection)
    finally:
        service.end_connection(connection)


async def _vla_eval_messages(
    socket: WebSocket, service: PolicyService, session: vla_eval.Session, connection: str
) -> None:
    while True:
        frame = await receive(socket)
        received = time.perf_counter()
        seq = 0
        try:
            if frame is None:
                raise CodecError("a text frame came; send binary msgpack frames")
            raw = unpack(frame)
            seq = vla_eval.seq_of(raw)
            message = vla_eval.message_from_map(raw)
            if message.kind == "hello":
                refusal = vla_eval.refusal(session.contract, message.payload)
                if refusal is not None:
                    # Its client shows the reason of a close frame, but no error in place of hello.
                    logger.warning("refused a client: %s", refusal)
                    await close(socket, 1008, refusal)
                    return
                await socket.send_bytes(pack(vla_eval.hello_reply(session.contract, seq)))
            elif message.kind == "episode_start":
                session.begin_episode()
            elif message.kind == "observation" and session.is_due:
                with service.ticket(
                    vla_eval.NAME, received=received, connection=connection, bytes_in=len(frame)
                ) as ticket:
                    await _decide(service, session, ticket, message)
                    await _send_action(socket, session, seq, ticket)
            elif message.kind == "observation":
                if session.sees_this_step_later:
                    with _unexpected_is_named():
                        await service.parse(partial(session.keep_row, message.payload))
                await _send_action(socket, session, seq)
        except ReflexarcError as error:
            logger.warning("%s: [%s] %s", socket.client, error.code, error.message)
            await socket.send_bytes(pack(vla_eval.error_reply(error, seq)))


async def _decide(
    service: PolicyService, session: vla_eval.Session, ticket: Ticket, message: vla_eval.Message
) -> None:
    refusal = vla_eval.refusal(session.contract)
    if refusal is not None:  # a client that said no hello
        raise refused(refusal)
    with _unexpected_is_named():
        observation = await service.parse(partial(session.observation, message.payload))
        session.accept(await service.answer(ticket, observation))


async def _send_action(
    socket: WebSocket, session: vla_eval.Session, seq: int, ticket: Ticket | None = None
) -> None:
    reply = pack(vla_eval.action_reply(session.next_action(), seq))
    if ticket is not None:
        ticket.bytes_out = len(reply)
    await socket.send_bytes(reply)
