"""The last request of each of a bounded number of sessions, kept by reference."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from reflexarc.contract import ActionChunk, Observation, ReflexarcError
from reflexarc.server.exchange import Exchange
from reflexarc.server.metrics import total_ms
from reflexarc.server.session_tags import session_tag

MAX_SESSIONS = 64
MAX_KEPT_BYTES = 64 * 2**20
ACTIVE_SECONDS = 60.0


@dataclass(frozen=True)
class Seen:
    """What is known of a session.

    Attributes:
        tag: short name of the session, not its id.
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
    dialect: str
    count: int
    refused: int
    at: float
    total_ms: float
    observation: Observation | None
    chunk: ActionChunk | None
    error: ReflexarcError | None
    kept_bytes: int


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
        self._sessions: OrderedDict[str, Seen] = OrderedDict()
        self._kept_bytes = 0

    def __call__(self, exchange: Exchange) -> None:
        """Remember one finished request."""
        # A tag is hexadecimal, so that no client can choose an id that is taken for a dialect.
        tag = exchange.dialect if exchange.session is None else session_tag(exchange.session)
        before = self._sessions.pop(tag, None)
        seen = self._after(tag, before, exchange)
        self._sessions[tag] = seen
        self._kept_bytes += seen.kept_bytes - (0 if before is None else before.kept_bytes)
        while len(self._sessions) > self._max_sessions:
            self._kept_bytes -= self._sessions.popitem(last=False)[1].kept_bytes
        if self._kept_bytes > self._max_bytes:
            self._free()

    def _after(self, tag: str, before: Seen | None, exchange: Exchange) -> Seen:
        observation, kept = exchange.observation, exchange.bytes_in
        if observation is not None:
            if observation.history or observation.goal_image is not None:
                observation = replace(observation, history=(), goal_image=None)
            # Views keep the whole frame that they lie in.
            images = observation.images.values()
            kept = max(kept, sum(getattr(image, "nbytes", 0) for image in images))
        elif before is not None:
            observation, kept = before.observation, before.kept_bytes
        else:
            kept = 0
        return Seen(
            tag=tag,
            dialect=exchange.dialect,
            count=(before.count if before else 0) + 1,
            refused=(before.refused if before else 0) + (exchange.error is not None),
            at=self._clock(),
            total_ms=total_ms(exchange),
            observation=observation,
            chunk=exchange.chunk or (before.chunk if before else None),
            error=exchange.error,
            kept_bytes=kept,
        )

    def _free(self) -> None:
        """Let go of the observations of the most silent sessions until the rest fits."""
        for tag, seen in list(self._sessions.items()):
            if self._kept_bytes <= self._max_bytes:
                return
            self._kept_bytes -= seen.kept_bytes
            self._sessions[tag] = replace(seen, observation=None, kept_bytes=0)

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Seen]:
        """The sessions, the one that spoke last first."""
        return iter(list(reversed(self._sessions.values())))

    def get(self, tag: str) -> Seen | None:
        """The session of a tag, None where it is unknown or was forgotten."""
        return self._sessions.get(tag)

    def active(self) -> int:
        """How many sessions asked within the last minute."""
        since = self._clock() - ACTIVE_SECONDS
        return sum(seen.at >= since for seen in self._sessions.values())
