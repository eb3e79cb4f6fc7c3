"""Addresses of Ray clusters: refused by name where nobody answers. Imports no Ray."""

from __future__ import annotations

import os
import socket
import sys
from importlib.metadata import version

from reflexarc.contract.errors import ClusterUnavailableError

CONNECT_SECONDS = 5.0
DEFAULT_PORT = 6379


def prepare_environment() -> None:
    """What Ray reads when it is first imported; whatever is set already stays."""
    # Nothing is told to anybody outside.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Workers take this process' environment as it is; no other one is built for them.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")


def check_address(address: str) -> None:
    """Raise ClusterUnavailableError at once where nothing listens; Ray itself tries for minutes.

    Args:
        address: ``host:port``; ``auto`` for this machine's cluster, which only Ray can find.
    """
    if address in ("auto", "local") or "://" in address:
        return
    host, _, port = address.rpartition(":") if ":" in address else (address, "", str(DEFAULT_PORT))
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise ClusterUnavailableError(
            f"--ray {address}: no Ray cluster answers there ({error}); start one with 'ray start "
            f"--head --port {DEFAULT_PORT}' and name its host:port, or leave --ray out",
            field="ray",
        ) from error


def unavailable(address: str | None, error: BaseException) -> ClusterUnavailableError:
    """What to raise for what Ray raised while it was joined, or started here (None)."""
    where = "no Ray could be started here" if address is None else f"--ray {address}"
    python = ".".join(map(str, sys.version_info[:3]))
    return ClusterUnavailableError(
        f"{where}: {' '.join(str(error).split())[:300]} (here: Python {python}, Ray "
        f"{version('ray')}; a cluster has the same of both on every machine)",
        field="ray",
    )
