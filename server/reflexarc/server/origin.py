"""Refuse requests that a browser makes on behalf of another site.

Browsers let any page open ``ws://localhost`` or post there, and name the page in ``Origin``.
Robots and simulators send no Origin, so nothing changes for them.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit


def origin_is_foreign(headers: Mapping[str, str], local_address: str | None) -> bool:
    """True when a browser page of another host asks.

    On a loopback address the page itself must be a loopback one too: a site whose name was made
    to resolve to 127.0.0.1 has an Origin equal to its Host.

    Args:
        headers: of the request, with lower-case names.
        local_address: the server's own address of this connection.
    """
    origin = headers.get("origin")
    if origin is None:
        return False
    try:
        page = urlsplit(origin)
        host = urlsplit(f"//{headers.get('host', '')}")
        same = page.hostname is not None and (page.hostname, _port(page.port, page.scheme)) == (
            host.hostname,
            _port(host.port, page.scheme),
        )
    except ValueError:
        return True
    return not same or (_is_loopback(local_address) and not _is_loopback(page.hostname))


def _port(port: int | None, scheme: str) -> int:
    return port if port is not None else {"https": 443, "wss": 443}.get(scheme, 80)


def _is_loopback(host: str | None) -> bool:
    if host is None or host == "localhost":
        return host == "localhost"
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
