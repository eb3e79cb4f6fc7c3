"""One process of the load generator: many websockets on one event loop."""

from __future__ import annotations

import asyncio
import gc
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from reflexarc.client.addresses import is_loopback, websocket_url
from reflexarc.client.credentials import quiet_logger, refused
from reflexarc.client.load.requests import RequestStream
from reflexarc.client.load.settings import LoadSettings
from reflexarc.client.replies import read_contract
from reflexarc.contract import PolicyContract, ReflexarcError, unpack
from reflexarc.contract.codec import MAX_FRAME_BYTES
from reflexarc.contract.errors import ServerUnavailableError

OPEN_SECONDS = 120.0
REPLY_SECONDS = 60.0
_RECONNECT_SECONDS = 0.1
ANSWERED = "answered"


@dataclass
class Samples:
    """What one process measured. Times are seconds after the start, warm-up included.

    Attributes:
        clients, arrivals, ends: of every request.
        codes: ``answered``, the error's code, ``connection_lost``, ``wrong_reply``,
            ``no_reply`` or ``expired_before_sent``.
        timing: milliseconds by name that the server stated with its answers.
        busy: share of the time that this process computed.
    """

    clients: list[int] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    codes: list[str] = field(default_factory=list)
    timing: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    busy: float = 0.0


class LoadWorker:
    """The clients of one process.

    Args:
        settings: of the whole run.
        first: index of the first client.
        clients: how many.
        check: whether replies are decoded and belong to a request; without it the other side may
            answer anything, which measures the generator alone.
    """

    def __init__(
        self, settings: LoadSettings, first: int, clients: int, *, check: bool = True
    ) -> None:
        self._settings, self._first, self._check = settings, first, check
        self._url = websocket_url(settings.server)
        self._sockets: list[ClientConnection | None] = [None] * clients
        self._streams: list[RequestStream] = []
        self._gave_up = False
        self.samples = Samples()

    async def connect(self) -> PolicyContract:
        """Open every connection; returns the server's contract.

        Raises ServerUnavailableError, AuthenticationError.
        """
        contract: PolicyContract | None = None
        for index in range(len(self._sockets)):
            try:
                message = await self._open(index)
            except (OSError, InvalidHandshake, ConnectionClosed, asyncio.TimeoutError) as error:
                if isinstance(error, InvalidStatus) and error.response.status_code == 401:
                    raise refused(self._url, self._settings.headers) from error
                raise ServerUnavailableError(
                    f"client {self._first + index} cannot connect to {self._url}: "
                    f"{error or type(error).__name__}"
                ) from error
            if contract is None:
                contract, _ = read_contract(self._url, unpack(message))
            deadline = self._settings.deadline_ms is not None
            self._streams.append(
                RequestStream(
                    contract,
                    self._first + index,
                    instruction=self._settings.instruction,
                    deadline=deadline,
                    seed=self._settings.seed,
                )
            )
        assert contract is not None
        return contract

    async def _open(self, index: int) -> bytes:
        self._sockets[index] = socket = await connect(
            self._url,
            compression=None,
            proxy=None if is_loopback(self._url) else True,
            max_size=MAX_FRAME_BYTES,
            open_timeout=OPEN_SECONDS,
            ping_interval=None,
            additional_headers=self._settings.headers,
            logger=quiet_logger,
        )
        message = await asyncio.wait_for(socket.recv(), OPEN_SECONDS)
        return message if isinstance(message, bytes) else message.encode()

    async def run(self, start: float) -> None:
        """Load from ``start`` (of ``time.monotonic()``) until the end of the measurement."""
        self._start = start
        self._end = start + self._settings.warm_up_seconds + self._settings.seconds
        gc.collect()
        gc.freeze()
        await asyncio.sleep(max(0.0, start - time.monotonic()))
        computed = time.process_time()
        overdue = self._end - time.monotonic() + REPLY_SECONDS
        asyncio.get_running_loop().call_later(overdue, self._give_up)
        if self._settings.rate is None:
            await asyncio.gather(*(self._closed_loop(i) for i in range(len(self._sockets))))
        else:
            await self._poisson(self._settings.rate)
        elapsed = time.monotonic() - start
        self.samples.busy = (time.process_time() - computed) / elapsed

    async def close(self) -> None:
        await asyncio.gather(
            *(socket.close() for socket in self._sockets if socket is not None),
            return_exceptions=True,
        )

    async def _closed_loop(self, index: int) -> None:
        think = self._settings.think_ms / 1000
        while (now := time.monotonic()) < self._end:
            await self._ask(index, now)
            if think:
                await asyncio.sleep(think)

    async def _poisson(self, rate: float) -> None:
        share = rate * len(self._sockets) / self._settings.clients
        rng = np.random.default_rng((self._settings.seed, self._first))
        waiting: asyncio.Queue[float | None] = asyncio.Queue()

        async def take_arrivals(index: int) -> None:
            while (arrival := await waiting.get()) is not None:
                await self._ask(index, arrival)

        clients = [asyncio.create_task(take_arrivals(i)) for i in range(len(self._sockets))]
        arrival = self._start
        while (arrival := arrival + rng.exponential(1 / share)) < self._end:
            pause = arrival - time.monotonic()
            if pause > 0:
                await asyncio.sleep(pause)
            waiting.put_nowait(arrival)
        for _ in clients:
            waiting.put_nowait(None)
        await asyncio.gather(*clients)

    async def _ask(self, index: int, arrival: float) -> None:
        """One request and its reply, recorded."""
        left = self._settings.deadline_ms
        if left is not None:
            left -= (time.monotonic() - arrival) * 1000
            if left <= 0:
                self._note(index, arrival, "expired_before_sent")
                return
        try:
            socket = self._sockets[index]
            if socket is None:
                await self._open(index)
                self._streams[index].restart()
                socket = self._sockets[index]
                assert socket is not None
            request_id, frame = self._streams[index].next(left)
            await socket.send(frame)
            reply = await socket.recv()
        except (OSError, InvalidHandshake, ConnectionClosed, asyncio.TimeoutError):
            self._sockets[index] = None
            self._note(index, arrival, "no_reply" if self._gave_up else "connection_lost")
            await asyncio.sleep(_RECONNECT_SECONDS)
        else:
            ended = time.monotonic()
            code = self._code_of(reply, request_id) if self._check else ANSWERED
            self._note(index, arrival, code, ended)
            if code != ANSWERED:
                self._streams[index].restart()  # the server may lack what it refused

    def _give_up(self) -> None:
        """Nobody waits longer for what is still unanswered so long after the end."""
        self._gave_up = True
        for socket in self._sockets:
            if socket is not None:
                socket.transport.abort()

    def _code_of(self, reply: str | bytes, request_id: str) -> str:
        try:
            message = unpack(reply) if isinstance(reply, bytes) else None
        except ReflexarcError:
            return "wrong_reply"
        if not isinstance(message, Mapping) or message.get("request_id") != request_id:
            return "wrong_reply"
        error: Any = message.get("error")
        if error is not None:
            return str(error.get("code")) if isinstance(error, Mapping) else "wrong_reply"
        for name, value in (message.get("timing") or {}).items():
            self.samples.timing[name].append(float(value))
        return ANSWERED

    def _note(self, index: int, arrival: float, code: str, ended: float | None = None) -> None:
        samples = self.samples
        samples.clients.append(self._first + index)
        samples.arrivals.append(arrival - self._start)
        samples.ends.append((time.monotonic() if ended is None else ended) - self._start)
        samples.codes.append(code)


def count_codes(codes: list[str]) -> dict[str, int]:
    """Errors by code, without what was answered."""
    return {code: n for code, n in sorted(Counter(codes).items()) if code != ANSWERED}
