"""Which replica a session belongs to."""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

KEPT_SECONDS = 600.0  # as long as a replica keeps a silent session
ACTIVE_SECONDS = 30.0
RECOUNT_SECONDS = 1.0
MAX_SESSIONS = 65_536


@dataclass
class _Place:
    replica: str
    seen: float


class Placement:
    """Sessions on replicas: sticky, and spread so that no replica has more than its share.

    A new session goes to the replica with the fewest active ones. Then it stays, until its
    replica is gone, or until it may move and its replica holds more than its share (because
    others were added, or sessions elsewhere ended).

    Args:
        clock: in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._places: OrderedDict[str, _Place] = OrderedDict()
        self._counted: dict[str, int] = {}
        self._counted_at = 0.0

    def __len__(self) -> int:
        return len(self._places)

    def choose(self, session: str, replicas: Sequence[str], *, may_move: bool = False) -> str:
        """The replica of a session's request.

        Args:
            replicas: that can be asked now; at least one.
            may_move: whether nothing that a replica keeps of the session is needed any more.
        """
        now = self._clock()
        self._forget_silent(now)
        load = self._load(replicas, now)
        place = self._places.get(session)
        if place is None or place.replica not in load:
            replica = self._least(session, load)
        elif may_move and load[place.replica] > math.ceil(sum(load.values()) / len(load)):
            load[place.replica] -= 1
            replica = self._least(session, load)
        else:
            replica = place.replica
        self._places[session] = _Place(replica, now)
        self._places.move_to_end(session)
        if len(self._places) > MAX_SESSIONS:
            self._places.popitem(last=False)
        return replica

    def end(self, session: str) -> None:
        """The session needs no place any more."""
        place = self._places.pop(session, None)
        if place is not None and self._counted.get(place.replica):
            self._counted[place.replica] -= 1

    def _least(self, session: str, load: dict[str, int]) -> str:
        # Among equals by hash, so that several ingresses do not all begin with the same one.
        replica = min(load, key=lambda name: (load[name], _hash(session, name)))
        load[replica] += 1
        return replica

    def _load(self, replicas: Sequence[str], now: float) -> dict[str, int]:
        """Active sessions of each replica: counted now and then, kept up to date in between."""
        if self._counted.keys() != set(replicas) or now >= self._counted_at + RECOUNT_SECONDS:
            active = Counter(
                place.replica
                for place in self._places.values()
                if place.seen >= now - ACTIVE_SECONDS
            )
            self._counted = {replica: active[replica] for replica in replicas}
            self._counted_at = now
        return self._counted

    def _forget_silent(self, now: float) -> None:
        while self._places and next(iter(self._places.values())).seen < now - KEPT_SECONDS:
            self._places.popitem(last=False)


def _hash(session: str, replica: str) -> bytes:
    return hashlib.blake2b(f"{session}\0{replica}".encode(errors="surrogatepass")).digest()
