"""The ASGI application: every protocol on one port."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from reflexarc.server.dialect_routes import dialect_routes
from reflexarc.server.http_routes import http_routes
from reflexarc.server.inference import internal_error
from reflexarc.server.seeing import Seeing
from reflexarc.server.service import PolicyService
from reflexarc.server.websocket_routes import websocket_routes


def create_app(service: PolicyService, *, page_hosts: Sequence[str] = ()) -> FastAPI:
    """An application that starts to load the policy when the server starts.

    Args:
        service: the policy.
        page_hosts: who besides this machine sees the status page: see :class:`PageAccess`.
    """
    seeing = Seeing(service, page_hosts)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.close()
        seeing.close()

    app = FastAPI(title="Reflexarc policy server", version=version("reflexarc"), lifespan=lifespan)
    app.add_exception_handler(Exception, _unforeseen)
    app.include_router(http_routes(service))
    app.include_router(dialect_routes(service))
    app.include_router(websocket_routes(service))
    app.include_router(seeing.routes())
    return app


async def _unforeseen(_: Request, error: Exception) -> Response:
    """What no route foresaw: an error id for the client, the traceback for the log."""
    problem = internal_error("the server failed on a request", error)
    return JSONResponse({"error": problem.to_wire()}, 500)
