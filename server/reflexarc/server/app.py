"""The ASGI application: every protocol on one port."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI

from reflexarc.server.dialect_routes import dialect_routes
from reflexarc.server.http_routes import http_routes
from reflexarc.server.service import PolicyService
from reflexarc.server.websocket_routes import websocket_routes


def create_app(service: PolicyService) -> FastAPI:
    """An application that starts to load the policy when the server starts."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.close()

    app = FastAPI(title="Reflexarc policy server", version=version("reflexarc"), lifespan=lifespan)
    app.include_router(http_routes(service))
    app.include_router(dialect_routes(service))
    app.include_router(websocket_routes(service))
    return app
