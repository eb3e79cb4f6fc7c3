"""The last request of each of a bounded number of sessions, kept by reference."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from reflexarc.contract import ActionChunk, Observation, ReflexarcError
from reflexarc.contract.messages import MAX_IDENTIFIER_CHARACTERS
from reflexarc.server.exchange import Exchange
from reflexarc.server.metrics import total_ms
from reflexarc.server.session_tags import session_tag

MAX_SESSIONS = 64
MAX_KEPT_BYTES = 64 * 2**20
ACTIVE_SECONDS = 10.0


@dataclass
class Seen:
    """What is known of a session.

    Attributes:
        tag: short name of the session, not its id; the dialect of requests without a session.
        dialect: of its last request.
        count: its requests; also the version of what is kept.
        refused: how many of them were answered by an error.
        at: seconds since the epoch when its last request ended.
        total_ms: of its last request.
        observation: of its last request that could be read, without history; None where none
            could, or where the images of other sessions needed the memory.
        chunk: its last answer.
        error: what was wrong with its last request, where something was.
        kept_bytes: what the observation keeps in memory.
    """

    tag: str
    dialect: str = ""
    count: int = 0
    refused: int = 0
    at: float = 0.0
    total_ms: float = 0.0
    observation: Observation | None = None
    chunk: ActionChunk | None = None
    error: ReflexarcError | None = None
    kept_bytes: int = 0

    def add(self, exchange: Exchange, now: float) -> None:
        """The session after one more request."""
        self.dialect, self.error = exchange.dialect, exchange.error
        self.count += 1
        self.refused += exchange.error is not None
        self.at, self.total_ms = now, total_ms(exchange)
        self.chunk = self.chunk if exchange.chunk is None else exchange.chunk
        if exchange.observation is not None:
            self._keep(exchange.observation, exchange.bytes_in)

    def _keep(self, observation: Observation, bytes_in: int) -> None:
        if observation.history or observation.goal_image is not None:
            observation = replace(observation, history=(), goal_image=None)
        self.observation = observation
        # Views keep the whole frame that they lie in.
        images = observation.images.values()
        self.kept_bytes = max(bytes_in, sum(getattr(image, "nbytes", 0) for image in images))


class LastSeen:
    """A listener that remembers each session's last exchange, without copying anything.

    Requests without a session are one session a dialect. Sessions that were silent for longest
    leave first; the images of those that spoke last are kept, up to ``max_bytes`` in all.

    Args:
        max_sessions: sessions that are remembered.
        max_bytes: size of their observations in all.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        *,
        max_sessions: int = MAX_SESSIONS,
        max_bytes: int = MAX_KEPT_BYTES,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._max_sessions, self._max_bytes, self._clock = max_sessions, max_bytes, clock
        self._sessions: OrderedDict[str | tuple[str], Seen] = OrderedDict()
        self._kept_bytes = 0

    def __call__(self, exchange: Exchange) -> None:
        """Remember one finished request."""
        key = _key(exchange)
        seen = self._sessions.get(key)
        if seen is None:
            # A tag is hexadecimal, so that no client can choose an id that passes for a dialect.
            tag = exchange.dialect if exchange.session is None else session_tag(exchange.session)
            seen = self._sessions[key] = Seen(tag)
        self._sessions.move_to_end(key)
        self._kept_bytes -= seen.kept_bytes
        seen.add(exchange, self._clock())
        self._kept_bytes += seen.kept_bytes
        if len(self._sessions) > self._max_sessions:
            self._kept_bytes -= self._sessions.popitem(last=False)[1].kept_bytes
        if self._kept_bytes > self._max_bytes:
            self._free()

    def _free(self) -> None:
        """Let go of the observations of the most silent sessions until the rest fits."""
        for seen in self._sessions.values():
            if self._kept_bytes <= self._max_bytes:
                return
            self._kept_bytes -= seen.kept_bytes
            seen.observation, seen.kept_bytes = None, 0

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Seen]:
        """The sessions, the one that spoke last first."""
        return iter(list(reversed(self._sessions.values())))

    def get(self, tag: str) -> Seen | None:
        """The session of a tag, None where it is unknown or was forgotten."""
        return next((seen for seen in self._sessions.values() if seen.tag == tag), None)

    def active(self) -> int:
        """How many sessions asked within the last 10 seconds."""
        since = self._clock() - ACTIVE_SECONDS
        return sum(seen.at >= since for seen in self._sessions.values())


def _key(exchange: Exchange) -> str | tuple[str]:
    session = exchange.session
    if session is None:
        return (exchange.dialect,)
    # An id that is too long was refused, but its session is counted.
    return session if len(session) <= MAX_IDENTIFIER_CHARACTERS else session_tag(session)
