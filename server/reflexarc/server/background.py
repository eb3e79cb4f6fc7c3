"""A server in a thread of this process, for notebooks, tests and benchmarks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import TracebackType

from reflexarc.contract.errors import ServerUnavailableError
from reflexarc.server.exchange import Listener
from reflexarc.server.inference import Inference
from reflexarc.server.lifecycle import PolicyServer, open_port
from reflexarc.server.protection import Protection
from reflexarc.server.service import PolicyService


class BackgroundServer:
    """Serves while the ``with`` block runs.

    Args:
        load: builds the policy, in the worker thread.
        host: address to listen on.
        port: 0 takes a free one; ``url`` then names it.
        wait: whether entering the block waits for the policy to be loaded.
        listeners: of finished requests, see :class:`PolicyService`.
        default_seed: of an episode's noise where its requests name none.
        max_batch: rows of the largest batch; None leaves it to the policy.
        protection: API keys, TLS, connections.

    Attributes:
        url: ``ws://host:port``, ``wss://`` with a certificate.
        service: the policy and its phase.
    """

    def __init__(
        self,
        load: Callable[[], Inference],
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        wait: bool = True,
        listeners: Sequence[Listener] = (),
        default_seed: int | None = None,
        max_batch: int | None = None,
        protection: Protection | None = None,
    ) -> None:
        self._socket = open_port(host, port)
        self.host, self.port = host, int(self._socket.getsockname()[1])
        encrypted = "s" if protection is not None and protection.is_encrypted else ""
        self.url = f"ws{encrypted}://{host}:{self.port}"
        self.http_url = f"http{encrypted}://{host}:{self.port}"
        self.service = PolicyService(
            load, listeners=listeners, default_seed=default_seed, max_batch=max_batch
        )
        self._loaded = threading.Event()
        self._server = PolicyServer(self.service, on_ready=self._loaded.set, protection=protection)
        self._thread = threading.Thread(target=self._run, name="policy-server", daemon=True)
        self._wait = wait

    def _run(self) -> None:
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self._loaded.set()

    def __enter__(self) -> BackgroundServer:
        self._thread.start()
        if self._wait:
            self._loaded.wait()
            if self.service.load_error is not None:
                raise self.service.load_error
            if not self._thread.is_alive():
                raise ServerUnavailableError(f"the server at {self.url} ended while it started")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Drain, end, and wait for the end."""
        if self._thread.is_alive():
            self._server.stop()
        self._thread.join()
