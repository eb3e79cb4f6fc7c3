"""What stands before every route: API keys, TLS, and bounds on connections and requests."""

from __future__ import annotations

import ipaddress
import json
import logging
import ssl
import time
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from reflexarc.contract.errors import (
    AuthenticationError,
    ConfigError,
    NotReadyError,
    ReflexarcError,
    TooManyRequestsError,
)
from reflexarc.server.api_keys import API_KEYS_VARIABLE, HOW_TO_MAKE_ONE, ApiKeys
from reflexarc.server.http_protocol import PolicyHttpProtocol

logger = logging.getLogger(__name__)
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Any, Receive, Send], Awaitable[None]]

# An orchestrator's probes hold no secret. They learn that a server is there, and its phase.
OPEN_PATHS = ("/livez", "/readyz", "/healthz")
MAX_CONNECTIONS = 256
# One robot asks for one thing at a time. The server lets 64 requests wait, so that half of the
# room is left to others whatever one machine does; websockets have bounds of their own.
MAX_REQUESTS_OF_ADDRESS = 32
_SAY_SECONDS = 10.0
_CHALLENGES = ('Api-Key realm="reflexarc"', 'Bearer realm="reflexarc"')
_BROWSER_CHALLENGE = 'Basic realm="reflexarc", charset="UTF-8"'


@dataclass(frozen=True)
class Protection:
    """How a server is protected.

    Attributes:
        keys: one of them opens every route but the health checks; none leaves all of them open.
        certificate: chain in PEM; with it the port speaks TLS only.
        private_key: in PEM; None where ``certificate`` holds it too.
        max_connections: at once, websockets and HTTP together.

    Raises ConfigError for a certificate or key that TLS cannot use.
    """

    keys: ApiKeys = field(default_factory=ApiKeys)
    certificate: Path | None = None
    private_key: Path | None = None
    max_connections: int = MAX_CONNECTIONS

    def __post_init__(self) -> None:
        if self.max_connections < 1:
            raise ConfigError(
                f"max_connections must be at least 1, got {self.max_connections}",
                field="max_connections",
            )
        if self.certificate is not None:
            _check_certificate(self.certificate, self.private_key)
        elif self.private_key is not None:
            raise ConfigError("--tls-key goes with --tls-certificate", field="tls_key")

    @property
    def is_encrypted(self) -> bool:
        return self.certificate is not None

    def options(self) -> dict[str, Any]:
        """Of uvicorn."""
        options: dict[str, Any] = {
            "http": partial(
                PolicyHttpProtocol, max_connections=self.max_connections, full=_server_is_full
            )
        }
        if self.certificate is not None:
            options["ssl_certfile"] = str(self.certificate)
            if self.private_key is not None:
                options["ssl_keyfile"] = str(self.private_key)
        return options

    def warning(self, host: str) -> str | None:
        """What to tell somebody who serves on an address; None where nothing is amiss."""
        if self.keys or _is_loopback(host):
            return None
        return (
            f"every machine that reaches {host} can use this policy and read what it says; set "
            f"{API_KEYS_VARIABLE} (or --api-keys-file) to a key, for example from {HOW_TO_MAKE_ONE}"
        )


class Protected:
    """An ASGI application behind its keys; neither a frame nor a body is read before they fit.

    Args:
        app: the application.
        protection: its keys.
    """

    def __init__(self, app: Application, protection: Protection) -> None:
        self._app, self._keys = app, protection.keys
        self._in_flight: Counter[str] = Counter()
        self._refused, self._said_at = 0, -_SAY_SECONDS

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind not in ("http", "websocket") or is_open(scope):
            await self._app(scope, receive, send)
        elif self._keys and not self._keys.accept(scope["headers"], browsed=_reads(scope)):
            self._say(scope)
            await _refuse_stranger(scope, send)
        elif kind == "websocket":
            await self._app(scope, receive, send)
        else:
            await self._bounded(scope, receive, send)

    async def _bounded(self, scope: Any, receive: Receive, send: Send) -> None:
        """An HTTP request, where its address has not too many under way already."""
        address = scope["client"][0] if scope.get("client") else ""
        if self._in_flight[address] >= MAX_REQUESTS_OF_ADDRESS:
            error = TooManyRequestsError(
                f"{MAX_REQUESTS_OF_ADDRESS} requests of this address are under way already; ask "
                "again when one is answered"
            )
            await _refuse(scope, send, 429, error, [("retry-after", "1")])
            return
        self._in_flight[address] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._in_flight[address] -= 1
            if not self._in_flight[address]:
                del self._in_flight[address]

    def _say(self, scope: Any) -> None:
        """Log who was refused: seldom, and never what they sent as key."""
        self._refused += 1
        if time.monotonic() - self._said_at < _SAY_SECONDS:
            return
        address = scope["client"][0] if scope.get("client") else "somebody"
        logger.warning(
            "%d requests refused without a valid API key, the last one of %s for %s",
            self._refused,
            address,
            scope["path"],
        )
        self._refused, self._said_at = 0, time.monotonic()


def is_open(scope: Any) -> bool:
    """Whether everyone may ask: health checks."""
    return _reads(scope) and scope["path"] in OPEN_PATHS


def _reads(scope: Any) -> bool:
    return scope["type"] == "http" and scope["method"] in ("GET", "HEAD")


async def _refuse_stranger(scope: Any, send: Send) -> None:
    sent = any(name == b"authorization" for name, _ in scope["headers"])
    what = "the API key is none of this server's" if sent else "this server asks for an API key"
    error = AuthenticationError(
        f"{what}; send it as 'Authorization: Api-Key KEY' or 'Bearer KEY' (reflexarc's clients "
        "read it from REFLEXARC_API_KEY)"
    )
    challenges = (*_CHALLENGES, *((_BROWSER_CHALLENGE,) if _reads(scope) else ()))
    await _refuse(scope, send, 401, error, [("www-authenticate", what) for what in challenges])


async def _server_is_full(app: Application, scope: Any, receive: Receive, send: Send) -> None:
    """In place of ``app`` where there are too many connections; health checks still pass."""
    if is_open(scope):
        await app(scope, receive, send)
        return
    error = NotReadyError("the server has as many connections as it takes; ask again later")
    await _refuse(scope, send, 503, error, [("retry-after", "5")])


async def _refuse(
    scope: Any, send: Send, status: int, error: ReflexarcError, headers: list[tuple[str, str]]
) -> None:
    body = json.dumps({"error": error.to_wire()}).encode()
    prefix = ""
    if scope["type"] == "websocket":
        if "websocket.http.response" not in scope.get("extensions", {}):
            await send({"type": "websocket.close", "code": 1008})  # a 403, before accept
            return
        prefix = "websocket."
    headers = [
        *headers,
        ("content-type", "application/json"),
        ("content-length", str(len(body))),
        ("cache-control", "no-store"),
    ]
    encoded = [(name.encode(), value.encode()) for name, value in headers]
    await send({"type": f"{prefix}http.response.start", "status": status, "headers": encoded})
    await send({"type": f"{prefix}http.response.body", "body": body})


def _check_certificate(certificate: Path, private_key: Path | None) -> None:
    for option, path in (("--tls-certificate", certificate), ("--tls-key", private_key)):
        if path is not None and not path.is_file():
            raise ConfigError(f"{option} {path}: no such file", field=option)
    try:
        # An encrypted key is refused: nobody is there to type its password.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            certificate, private_key, password=lambda: b""
        )
    except (OSError, ValueError) as error:
        key = "" if private_key is None else f" with --tls-key {private_key}"
        raise ConfigError(
            f"--tls-certificate {certificate}{key}: {error}; both are unencrypted PEM files that "
            "belong together",
            field="tls_certificate",
        ) from error


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
