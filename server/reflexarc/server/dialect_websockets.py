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
from reflexarc.server.websocket_frames import close

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
        ticket: Ticket | None = None
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
            if ticket is None:
                self._service.refused(
                    openpi.NAME, error, received=received, connection=self._connection
                )
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
    try:
        replan_steps = vla_eval.replan_steps(contract, socket.query_params.get("replan_steps"))
    except ReflexarcError as error:
        await close(socket, 1008, f"vla-eval: {error.message}")
        return
    conversation = _VlaEval(service, vla_eval.Session(contract, replan_steps))
    try:
        await converse(socket, conversation.answer)
    finally:
        service.end_connection(conversation.connection)


class _VlaEval:
    """The messages of one connection to ``/vla-eval``."""

    def __init__(self, service: PolicyService, session: vla_eval.Session) -> None:
        self._service, self._session = service, session
        self.connection = f"connection-{secrets.token_hex(16)}"

    async def answer(self, socket: Peer, frame: bytes | None) -> None:
        received = time.perf_counter()
        seq = 0
        ticket: Ticket | None = None
        try:
            if frame is None:
                raise CodecError("a text frame came; send binary msgpack frames")
            raw = unpack(frame)
            seq = vla_eval.seq_of(raw)
            message = vla_eval.message_from_map(raw)
            if message.kind == "hello":
                await self._hello(socket, message)
            elif message.kind == "episode_start":
                self._session.begin_episode()
            elif message.kind == "observation" and self._session.is_due:
                with self._service.ticket(
                    vla_eval.NAME,
                    received=received,
                    connection=self.connection,
                    bytes_in=len(frame),
                ) as ticket:
                    await self._decide(ticket, message)
                    ticket.bytes_out = await self._send_action(socket, seq)
            elif message.kind == "observation":
                if self._session.sees_this_step_later:
                    with _unexpected_is_named():
                        await self._service.parse(partial(self._session.keep_row, message.payload))
                await self._send_action(socket, seq)
        except ReflexarcError as error:
            if ticket is None:
                self._service.refused(
                    vla_eval.NAME, error, received=received, connection=self.connection
                )
            await socket.send_bytes(pack(vla_eval.error_reply(error, seq)))

    async def _hello(self, socket: Peer, message: vla_eval.Message) -> None:
        contract = self._session.contract
        refusal = vla_eval.refusal(contract, message.payload)
        if refusal is None:
            await socket.send_bytes(pack(vla_eval.hello_reply(contract, message.seq)))
        else:
            # Its client shows the reason of a close frame, but no error in place of hello.
            await socket.close(1008, refusal)

    async def _decide(self, ticket: Ticket, message: vla_eval.Message) -> None:
        refusal = vla_eval.refusal(self._session.contract)
        if refusal is not None:  # a client that said no hello
            raise refused(refusal)
        with _unexpected_is_named():
            read = partial(self._session.observation, message.payload)
            observation = await self._service.parse(read)
            self._session.accept(await self._service.answer(ticket, observation))

    async def _send_action(self, socket: Peer, seq: int) -> int:
        """Bytes that were sent."""
        reply = pack(vla_eval.action_reply(self._session.next_action(), seq))
        await socket.send_bytes(reply)
        return len(reply)
