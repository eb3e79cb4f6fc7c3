"""When those who were answered will ask again.

A robot that executes a chunk and a simulator that steps ask in a rhythm of their own: the time
between a reply and the next request varies little. Knowing it, the batcher can wait a moment for
the rest of the batch that it has just answered, instead of splitting it into two that alternate.
"""

from __future__ import annotations

from collections import OrderedDict

_WEIGHT = 0.3  # of the newest pause
_SAMPLES = 2  # pauses to have seen before one is predicted
_STEADY = 0.15  # deviation of a pause, as a share of it, up to which it is a rhythm
_GRACE_SECONDS = 0.002
_PEERS = 1024


class _Peer:
    """One closed loop."""

    __slots__ = ("deviation", "pause", "replied", "samples")

    def __init__(self) -> None:
        self.replied: float | None = None
        self.samples, self.pause, self.deviation = 0, 0.0, 0.0

    def due_by(self) -> float:
        """When its next request will most likely have come."""
        assert self.replied is not None
        return self.replied + self.pause + self.deviation + min(self.deviation, _GRACE_SECONDS)


class Arrivals:
    """Pauses of each peer between a reply and its next request."""

    def __init__(self) -> None:
        self._peers: OrderedDict[str, _Peer] = OrderedDict()

    def asked(self, name: str | None, now: float) -> None:
        """A request came."""
        peer = self._peers.get(name) if name is not None else None
        if peer is None or peer.replied is None:
            return
        pause, peer.replied = now - peer.replied, None
        if peer.samples == 0:
            peer.pause, peer.deviation = pause, pause / 2
        else:
            error = pause - peer.pause
            peer.pause += _WEIGHT * error
            peer.deviation += _WEIGHT * (abs(error) - peer.deviation)
        peer.samples += 1

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

    def expected(self, now: float, horizon: float, jitter: float) -> list[float]:
        """By when peers who owe a request will have sent it, earliest first.

        Args:
            now: the time.
            horizon: seconds from now within which a request is of interest.
            jitter: deviation of a pause, in seconds, that does not matter.
        """
        due = []
        for peer in self._peers.values():
            if peer.replied is None or peer.samples < _SAMPLES:
                continue
            if peer.deviation > max(_STEADY * peer.pause, jitter):
                continue
            when = peer.due_by()
            if now <= when <= now + horizon:
                due.append(when)
        return sorted(due)
