"""uvicorn with our limits, and an end that lets the inference in flight finish."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import uvicorn

from reflexarc.contract import ReflexarcError
from reflexarc.contract.codec import MAX_FRAME_BYTES
from reflexarc.contract.errors import ConfigError
from reflexarc.server.app import create_app
from reflexarc.server.protection import Protected, Protection
from reflexarc.server.service import PolicyService
from reflexarc.server.websocket_protocol import PolicyWebSocketProtocol

DRAIN_SECONDS = 30.0


class PolicyServer(uvicorn.Server):  # type: ignore[misc]
    """Serves one policy until SIGTERM or SIGINT.

    uvicorn itself closes websockets at once on a signal and drops what is being inferred. Here
    the first signal refuses new requests, waits up to ``drain_seconds`` for those in flight and
    then ends; the second ends at once.

    Args:
        service: the policy; its loading begins when the port is open.
        on_ready: called once, on the event loop, when the policy is loaded.
        page_hosts: who besides this machine sees the status page.
        protection: API keys, TLS, connections; without it no key is asked for.
    """

    def __init__(
        self,
        service: PolicyService,
        *,
        drain_seconds: float = DRAIN_SECONDS,
        on_ready: Callable[[], None] | None = None,
        page_hosts: Sequence[str] = (),
        protection: Protection | None = None,
    ) -> None:
        super().__init__(server_config(service, page_hosts, protection))
        self._service = service
        self._drain_seconds = drain_seconds
        self._on_ready = on_ready
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets=sockets)
        self._tasks.append(self._loop.create_task(self._announce()))

    async def _announce(self) -> None:
        try:
            await self._service.wait_until_loaded()
        except ReflexarcError:
            self.should_exit = True  # the caller reads service.load_error
            return
        if self._on_ready is not None:
            self._on_ready()

    def stop(self) -> None:
        """Begin to drain; a second call ends at once. Safe from signals and other threads."""
        if self._stopping or self._loop is None:
            self.force_exit = self.should_exit = True
            return
        self._stopping = True
        self._loop.call_soon_threadsafe(self._begin_drain)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came. Nothing is raised again afterwards, so the process exits with 0."""
        self.stop()

    def _begin_drain(self) -> None:
        self._tasks.append(asyncio.get_running_loop().create_task(self._drain()))

    async def _drain(self) -> None:
        await self._service.drain(self._drain_seconds)
        self.should_exit = True


def server_config(
    service: PolicyService,
    page_hosts: Sequence[str] = (),
    protection: Protection | None = None,
) -> uvicorn.Config:
    """Frame cap 64 MiB; no compression, because it costs 13 ms an image pair and saves little."""
    protection = protection or Protection()
    limits: dict[str, Any] = {
        **protection.options(),
        "ws": PolicyWebSocketProtocol,
        "ws_max_size": MAX_FRAME_BYTES,
        "ws_per_message_deflate": False,
        # Replies to pings never wait for an inference, so a silent minute is a dead client.
        "ws_ping_interval": 20.0,
        "ws_ping_timeout": 60.0,
        # uvloop, which Ray brings, keeps what was read of a lost connection for longer.
        "loop": "asyncio",
    }
    return uvicorn.Config(
        Protected(create_app(service, page_hosts=page_hosts), protection),
        log_level="warning",
        log_config=None,  # its loggers write as ours do
        access_log=False,
        timeout_graceful_shutdown=1,  # after the drain only what hangs is left
        **limits,
    )


def open_port(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises ConfigError naming what is in the way.

    Made with its protocol stated, unlike ``socket.create_server``'s: asyncio switches Nagle's
    algorithm off only then, and with it on every HTTP reply takes 40 ms longer.
    """
    listener: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
        )[0]
        listener = socket.socket(family, kind, protocol)
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
        return listener
    except (OSError, OverflowError) as error:
        if listener is not None:
            listener.close()
        raise ConfigError(
            f"port {port} on {host} cannot be opened: {error}; choose another --port (0 takes a "
            "free one) or --host",
            field="port",
        ) from error
