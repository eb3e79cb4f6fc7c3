"""Routes of the status page: its three files, and what it asks for."""

from __future__ import annotations

import asyncio
import json
import logging
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Request, Response

from reflexarc.server.page.access import PageAccess
from reflexarc.server.page.last_seen import LastSeen
from reflexarc.server.page.status import (
    WatchedService,
    server_status,
    session_status,
    shown_image,
)
from reflexarc.server.page.timeline import Timeline

logger = logging.getLogger(__name__)

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_LIVE = {**HEADERS, "Cache-Control": "no-store"}
_STATIC = {**HEADERS, "Cache-Control": "no-cache"}
_TYPES = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "charts.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}


def page_routes(
    service: WatchedService, seen: LastSeen, timeline: Timeline, access: PageAccess
) -> APIRouter:
    """The page for whom ``access`` lets in; work is done only when it is asked for."""
    router = APIRouter(include_in_schema=False)
    folder = files("reflexarc.server.page") / "static"
    content = {name: (folder / name).read_bytes() for name in _TYPES}
    encoding = asyncio.Lock()  # one image at a time: a viewer never takes a second core

    @router.get("/")
    async def page(request: Request) -> Response:
        refusal = access.refusal(request, data=False)
        return _refused(refusal) if refusal else _file(content, "index.html")

    @router.get("/page/{name}")
    async def part(name: str, request: Request) -> Response:
        refusal = access.refusal(request)
        if refusal:
            return _refused(refusal)
        return _file(content, name) if name in content else _missing("no such file")

    @router.get("/v1/status")
    async def status(request: Request) -> Response:
        refusal = access.refusal(request)
        if refusal:
            return _refused(refusal)
        query = request.query_params
        since = query.get("since", "")
        return _json(
            server_status(
                service,
                seen,
                timeline,
                since=int(since) if since.isdecimal() and len(since) < 16 else 0,
                contract_tag=query.get("contract", ""),
            )
        )

    @router.get("/v1/sessions/{tag}")
    async def session(tag: str, request: Request) -> Response:
        refusal = access.refusal(request)
        if refusal:
            return _refused(refusal)
        found = seen.get(tag)
        if found is None:
            return _missing("no such session; it may have been forgotten")
        return _json(session_status(service.contract, found))

    @router.get("/v1/sessions/{tag}/images/{camera}")
    async def image(tag: str, camera: str, request: Request) -> Response:
        refusal = access.refusal(request)
        if refusal:
            return _refused(refusal)
        found = seen.get(tag)
        observation = None if found is None else found.observation
        pixels = None if observation is None else observation.images.get(camera)
        async with encoding:
            jpeg = None if pixels is None else await asyncio.to_thread(shown_image, pixels)
        if jpeg is None:
            return _missing("no image of that camera; it may have been forgotten")
        return Response(jpeg, headers=_LIVE, media_type="image/jpeg")

    return router


def _file(content: dict[str, bytes], name: str) -> Response:
    return Response(content[name], headers=_STATIC, media_type=_TYPES[name])


def _json(content: dict[str, Any], status: int = 200) -> Response:
    # Escapes what is not ASCII: half a surrogate pair from a client has no bytes.
    text = json.dumps(content, allow_nan=False)
    return Response(text, status, headers=_LIVE, media_type="application/json")


def _missing(message: str) -> Response:
    return _json({"error": {"code": "not_found", "message": message, "field": None}}, 404)


def _refused(reason: str) -> Response:
    logger.debug("refused the status page: %s", reason)
    return Response(f"{reason}\n", 403, headers=_LIVE, media_type="text/plain")
