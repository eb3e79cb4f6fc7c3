"""The last minutes of the server, second by second."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from reflexarc.server.exchange import Exchange
from reflexarc.server.metrics import STAGES, stage_ms, total_ms

KEPT_SECONDS = 300
_SAMPLES = 64


@dataclass
class Second:
    """The requests that ended within one second.

    Attributes:
        at: the second, since the epoch.
        answered: requests with a chunk.
        refused: requests with an error.
        totals: milliseconds of the first requests, at most 64.
        stage_sums: milliseconds by stage, of the answered requests.
        batch_sizes: answered requests by the size of their batch.
    """

    at: int
    answered: int = 0
    refused: int = 0
    totals: list[float] = field(default_factory=list)
    stage_sums: list[float] = field(default_factory=lambda: [0.0] * len(STAGES))
    batch_sizes: Counter[int] = field(default_factory=Counter)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers for the page; ``stages`` holds means in the order of ``STAGES``."""
        ordered = sorted(self.totals)
        return {
            "at": self.at,
            "answered": self.answered,
            "refused": self.refused,
            "p50": _quantile(ordered, 0.5),
            "p95": _quantile(ordered, 0.95),
            "stages": [round(total / max(self.answered, 1), 3) for total in self.stage_sums],
            "batch_sizes": {str(size): count for size, count in self.batch_sizes.items()},
        }


class Timeline:
    """A listener that sums up requests by the second in which they ended.

    Args:
        clock: seconds since the epoch.
    """

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._seconds: deque[Second] = deque(maxlen=KEPT_SECONDS)

    def __call__(self, exchange: Exchange) -> None:
        """Add one finished request."""
        second = self._current()
        if exchange.error is not None:
            second.refused += 1
            return
        if exchange.chunk is None:
            return  # a reset
        second.answered += 1
        if len(second.totals) < _SAMPLES:
            second.totals.append(total_ms(exchange))
        for index, stage in enumerate(STAGES):
            second.stage_sums[index] += stage_ms(exchange.timing, stage) or 0.0
        batch_size = exchange.timing.get("batch_size")
        if batch_size is not None:
            second.batch_sizes[int(batch_size)] += 1

    def _current(self) -> Second:
        now = int(self._clock())
        if not self._seconds or self._seconds[-1].at < now:
            self._seconds.append(Second(now))
        return self._seconds[-1]  # where the clock was set back, its last second goes on

    def since(self, second: int) -> list[dict[str, Any]]:
        """The seconds after ``second`` that are over and not too long ago, oldest first."""
        now = int(self._clock())
        first = max(second + 1, now - KEPT_SECONDS)
        return [past.to_json() for past in self._seconds if first <= past.at < now]


def _quantile(ordered: Sequence[float], share: float) -> float | None:
    if not ordered:
        return None
    return round(ordered[min(int(share * len(ordered)), len(ordered) - 1)], 3)
