"""All that watches a service: metrics, the log of requests, the status page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fastapi import APIRouter, Response

from reflexarc.server.exchange import Listener
from reflexarc.server.logs import RequestLog
from reflexarc.server.metrics import CONTENT_TYPE, ServerMetrics
from reflexarc.server.page.access import PageAccess
from reflexarc.server.page.last_seen import LastSeen
from reflexarc.server.page.routes import page_routes
from reflexarc.server.page.status import WatchedService
from reflexarc.server.page.timeline import Timeline


class ListenedService(WatchedService, Protocol):
    """A service that tells of finished requests."""

    def listen(self, listener: Listener) -> None: ...


class Seeing:
    """Listens to one service from now on, and has the routes that show what it heard.

    Args:
        service: whose requests to watch.
        page_hosts: who besides this machine sees the status page: see :class:`PageAccess`.
    """

    def __init__(self, service: ListenedService, page_hosts: Sequence[str] = ()) -> None:
        self._service = service
        self._access = PageAccess(page_hosts)
        self._seen, self._timeline, self._log = LastSeen(), Timeline(), RequestLog()
        self._metrics = ServerMetrics(
            phase=lambda: str(service.phase.value),
            waiting=lambda: service.waiting,
            sessions=self._seen.active,
        )
        for listener in (self._metrics, self._timeline, self._seen, self._log):
            service.listen(listener)

    def routes(self) -> APIRouter:
        """``GET /metrics`` for everyone, the status page for whom it is meant."""
        router = APIRouter()
        router.include_router(page_routes(self._service, self._seen, self._timeline, self._access))

        @router.get("/metrics")
        async def metrics() -> Response:
            """What Prometheus scrapes."""
            return Response(self._metrics.exposition(), media_type=CONTENT_TYPE)

        return router

    def close(self) -> None:
        """Write what is not yet in the log."""
        self._log.summarise()
