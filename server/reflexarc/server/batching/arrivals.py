"""When those who were answered will ask again.

A robot that executes a chunk and a simulator that steps ask in a rhythm of their own: the time
between a reply and the next request repeats. Knowing it, the batcher can wait a moment for the
rest of the batch that it has just answered, instead of splitting it into two that alternate.
"""

from __future__ import annotations

from collections import OrderedDict, deque

_PAUSES = 10  # remembered of each peer
_LONGER, _GRACE_SECONDS = 1.1, 0.0005  # a pause may be a little longer than any before
_NEEDED = 2  # pauses to have seen before the next is predicted
_PEERS = 1024


class _Peer:
    """One closed loop: when it was last answered, and how long its latest pauses were."""

    __slots__ = ("pauses", "replied")

    def __init__(self) -> None:
        self.replied: float | None = None
        self.pauses: deque[float] = deque(maxlen=_PAUSES)


class Arrivals:
    """Pauses of each peer between a reply and its next request."""

    def __init__(self) -> None:
        self._peers: OrderedDict[str, _Peer] = OrderedDict()

    def asked(self, name: str | None, now: float) -> None:
        """A request came."""
        peer = self._peers.get(name) if name is not None else None
        if peer is not None and peer.replied is not None:
            peer.pauses.append(now - peer.replied)
            peer.replied = None

    def replied(self, name: str | None, now: float) -> None:
        """A reply was handed to the socket."""
        if name is None:
            return
        peer = self._peers.get(name)
        if peer is None:
            peer = self._peers[name] = _Peer()
            if len(self._peers) > _PEERS:
                self._peers.popitem(last=False)
        peer.replied = now
        self._peers.move_to_end(name)

    def forget(self, name: str) -> None:
        """The connection was closed."""
        self._peers.pop(name, None)

    def expected(self, now: float, horizon: float) -> list[tuple[float, float]]:
        """What is to come within ``horizon`` seconds, as ``(when, requests)``, earliest first.

        The requests of one entry are a probability: of a peer's earlier pauses that were longer
        than the one until now, each is as likely as the others to be repeated. A peer that has
        paused for much longer than ever is not expected at all.
        """
        found: list[tuple[float, float]] = []
        for peer in self._peers.values():
            if peer.replied is None or len(peer.pauses) < _NEEDED:
                continue
            so_far = now - peer.replied
            longest = _LONGER * max(peer.pauses) + _GRACE_SECONDS
            longer = [pause for pause in (*peer.pauses, longest) if pause > so_far]
            if longer:
                share, until = 1 / len(longer), so_far + horizon
                found += [(peer.replied + pause, share) for pause in longer if pause <= until]
        found.sort()
        return found
