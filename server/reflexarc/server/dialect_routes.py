"""HTTP of other projects' clients: ``/act`` of OpenVLA, OpenVLA-OFT and GR00T, and health."""

from __future__ import annotations

import time
from functools import partial
from typing import Any, Protocol

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from reflexarc.contract import ActionChunk, Observation, PolicyContract, ReflexarcError
from reflexarc.server.admission import Phase
from reflexarc.server.dialects import groot, openvla
from reflexarc.server.dialects.conversions import refused
from reflexarc.server.dialects.json_arrays import parse_json
from reflexarc.server.dialects.json_http import dump
from reflexarc.server.http_routes import (
    JSON_TYPE,
    is_foreign,
    read_body,
    refused_page,
    retry_header,
    status_of,
)
from reflexarc.server.inference import internal_error
from reflexarc.server.service import PolicyService
from reflexarc.server.ticket import Ticket


class HttpDialect(Protocol):
    """What a dialect's module has."""

    NAME: str

    def refusal(self, contract: PolicyContract) -> str | None: ...

    def observation_from_request(
        self, contract: PolicyContract, message: object
    ) -> Observation: ...

    def reply(self, contract: PolicyContract, chunk: ActionChunk, message: object) -> Any:
        """A JSON value."""
        ...

    def error_map(self, error: ReflexarcError) -> dict[str, Any]: ...


def dialect_routes(service: PolicyService) -> APIRouter:
    router = APIRouter()

    @router.post("/act")
    async def act(request: Request) -> Response:
        """Actions for OpenVLA's, OpenVLA-OFT's and GR00T's clients, told apart by their keys.

        The body is JSON under any Content-Type: real clients send none.
        """
        return await _act(request, service)

    @router.get("/act")
    async def act_ready() -> Response:
        """200 when ``POST /act`` is answered."""
        return _health(service)

    @router.get("/health")
    async def health() -> Response:
        """200 when observations are answered; asked by vla-eval and GR00T."""
        return _health(service)

    @router.post("/reset")
    async def reset(request: Request) -> Response:
        """GR00T's clients call it between episodes; ``/act`` keeps nothing between requests."""
        return refused_page(request) if is_foreign(request) else JSONResponse({"status": "reset"})

    @router.get("/config")
    async def config(request: Request) -> Response:
        """vla-eval's: it reads settings here and, from others' servers, writes them."""
        if request.query_params:
            return JSONResponse({"errors": ["settings cannot be changed over the network"]}, 422)
        return JSONResponse({"applied": {}, "config": {}})

    return router


def _health(service: PolicyService) -> Response:
    ready = service.phase is Phase.READY
    return JSONResponse({"status": "ok" if ready else service.phase.value}, 200 if ready else 503)


async def _act(request: Request, service: PolicyService) -> Response:
    received = time.perf_counter()
    dialect: HttpDialect = openvla
    ticket: Ticket | None = None
    try:
        if is_foreign(request):
            return refused_page(request)
        contract = service.inference.contract  # before the body is read: is the server ready?
        body = await read_body(request)
        with service.ticket(dialect.NAME, received=received, bytes_in=len(body)) as ticket:
            message, encoded = openvla.unwrapped(await service.parse(partial(parse_json, body)))
            dialect = groot if groot.speaks(message) else openvla
            ticket.dialect = dialect.NAME
            refusal = dialect.refusal(contract)
            if refusal is not None:
                raise refused(refusal)
            observation = await service.parse(
                partial(dialect.observation_from_request, contract, message)
            )
            chunk = await service.answer(ticket, observation)
            reply = dump(dialect.reply(contract, chunk, message))
            # OpenVLA's server encodes its reply twice as well, GR00T's does not.
            twice = encoded and dialect is openvla
            content = dump(reply.decode()) if twice else reply
            ticket.bytes_out = len(content)
            return Response(content, media_type=JSON_TYPE)
    except ReflexarcError as error:
        problem = error
    except Exception:
        problem = internal_error("the server failed on a request")
    if ticket is None:
        service.refused(dialect.NAME, problem, received=received)
    return _error_response(dialect, problem)


def _error_response(dialect: HttpDialect, error: ReflexarcError) -> Response:
    status = status_of(error)
    content = dump(dialect.error_map(error))  # ASCII: a key may hold half of a surrogate pair
    return Response(content, status, retry_header(error), media_type=JSON_TYPE)
