"""A server's address as a websocket URL and as an HTTP URL."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit, urlunsplit

from reflexarc.contract.errors import ConfigError

_WEBSOCKET = {"ws": "ws", "wss": "wss", "http": "ws", "https": "wss"}
_HTTP = {"ws": "http", "wss": "https", "http": "http", "https": "https"}


def websocket_url(address: str) -> str:
    """``host:port``, ``ws://host:port`` or ``http://host:port`` to ``ws://host:port/v1/policy``."""
    scheme, host, path = _split(address)
    return urlunsplit((_WEBSOCKET[scheme], host, path or "/v1/policy", "", ""))


def http_url(address: str) -> str:
    """The same address for HTTP, without a path at its end."""
    scheme, host, path = _split(address)
    return urlunsplit((_HTTP[scheme], host, path.removesuffix("/v1/policy"), "", ""))


def is_loopback(url: str) -> bool:
    """Whether the server is on this machine, where no proxy of the environment should be asked."""
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _split(address: str) -> tuple[str, str, str]:
    try:
        parts = urlsplit(address if "://" in address else f"ws://{address}")
        port_is_valid = parts.port is None or parts.port > 0
    except ValueError:
        parts, port_is_valid = urlsplit(""), False
    if parts.scheme not in _WEBSOCKET or not parts.hostname or not port_is_valid:
        raise ConfigError(
            f"{address!r} is no server address; write for example ws://127.0.0.1:8000",
            field="server",
        )
    return parts.scheme, parts.netloc, parts.path.rstrip("/")
