"""Who may see the status page: images of somebody's laboratory are on it.

Three doors, because there are three ways to look through a robot's eyes uninvited: to ask from
another machine, to let a browser on this one ask for another site, and to give another site's
name this machine's address.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from fastapi import Request

from reflexarc.contract.errors import ConfigError
from reflexarc.server.origin import origin_is_foreign

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_OWN_PAGE = ("same-origin", "none")  # values of Sec-Fetch-Site


class PageAccess:
    """Lets this machine in, and whom the operator named.

    Args:
        hosts: addresses and networks of clients (``192.168.1.20``, ``10.0.0.0/8``), and names
            under which browsers reach this server (``robots.example.org``). The machine's own
            name is known.

    Raises ConfigError for an entry that is neither.
    """

    def __init__(self, hosts: Sequence[str] = ()) -> None:
        self._networks: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
        own = socket.gethostname().lower()
        self._names = {"localhost", own, f"{own}.local"}
        for host in hosts:
            try:
                self._networks.append(ipaddress.ip_network(host, strict=False))
            except ValueError:
                self._names.add(_checked_name(host))

    def refusal(self, request: Request, *, data: bool = True) -> str | None:
        """Why a request is refused, None where it is not.

        Args:
            data: whether other sites' pages may not even link to it.
        """
        server = request.scope.get("server")
        if origin_is_foreign(request.headers, server[0] if server else None):
            return "requests from other web pages are refused"
        if data and request.headers.get("sec-fetch-site", "none") not in _OWN_PAGE:
            return "requests from other web pages are refused"
        if not self._knows_client(request.client.host if request.client else ""):
            return (
                "the status page is for the machine that serves; start the server with "
                "--page-hosts and your address to see it from here"
            )
        if not self._knows_name(request.headers.get("host", "")):
            return (
                "this server does not know the name that you reach it by; ask by its address, "
                "or start it with --page-hosts and the name"
            )
        return None

    def _knows_client(self, client: str) -> bool:
        address = _address(client)
        if address is None:
            return False
        return address.is_loopback or any(address in network for network in self._networks)

    def _knows_name(self, host: str) -> bool:
        """An address is always ours; a name may be any site's that resolves to us."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self._names or _address(name) is not None


def _address(text: str) -> Address | None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _checked_name(host: str) -> str:
    name = host.lower().rstrip(".")
    letters = name.replace("-", "").replace(".", "").replace("_", "")
    if not (letters.isascii() and letters.isalnum()):
        raise ConfigError(
            f"--page-hosts {host!r} is no address (192.168.1.20), network (10.0.0.0/8) or name",
            field="page_hosts",
        )
    return name
