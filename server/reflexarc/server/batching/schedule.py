"""What to run now, what to refuse, and whether a moment's wait makes a better batch.

Pure functions of the time, of what waits and of what is known about the policy and its clients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from reflexarc.server.batching.arrivals import Arrivals
from reflexarc.server.batching.cost import BatchCost
from reflexarc.server.batching.pending import Pending

# Of a pause, as a share of a batch, that is no matter: such a client counts as one with a rhythm.
_JITTER = 0.5

# What a wait has to save for each row that comes to be worth it, as a share of a batch's time.
_WORTHWHILE = 0.1


def hopeless(waiting: Sequence[Pending], start: float, cost: BatchCost) -> list[Pending]:
    """Requests whose deadline would pass before an answer, were they to run at ``start``."""
    alone = cost.cautious(1)
    return [
        pending
        for pending in waiting
        if pending.deadline is not None and start + alone > pending.deadline
    ]


def choose(
    waiting: Sequence[Pending], now: float, max_batch: int, cost: BatchCost
) -> list[Pending]:
    """The rows to run now: the most urgent, and no more than their deadlines allow.

    Where a batch would make its most urgent row late, that row runs in a smaller batch or waits,
    whichever answers more requests a second.
    """
    rows = _one_a_session(sorted(waiting, key=lambda pending: pending.urgency))
    best: list[Pending] = rows[:1]
    best_rate = 0.0
    for first in range(len(rows)):
        size = min(max_batch, len(rows) - first)
        deadline = rows[first].deadline
        if deadline is not None:
            while size > 1 and now + cost.expect(size) > deadline:
                size -= 1
        rate = size / max(cost.expect(size), 1e-9)
        if rate > best_rate:
            best, best_rate = rows[first : first + size], rate
        if deadline is None or size == max_batch or size == len(rows) - first:
            break  # leaving out more of the urgent ones cannot make the batch larger
    return best


def _one_a_session(rows: Sequence[Pending]) -> list[Pending]:
    """Each session's oldest row: the answer to its next one depends on it."""
    oldest: dict[str, Pending] = {}
    for pending in rows:
        name = pending.observation.session_id
        if name is not None and (name not in oldest or pending.received < oldest[name].received):
            oldest[name] = pending
    return [
        pending
        for pending in rows
        if pending.observation.session_id is None
        or oldest[pending.observation.session_id] is pending
    ]


def hold_until(
    batch: Sequence[Pending],
    now: float,
    idle_since: float,
    max_batch: int,
    cost: BatchCost,
    arrivals: Arrivals,
) -> float | None:
    """Until when to wait for rows that are expected; None to run the batch now.

    With n rows here and k due within w seconds, running now answers n after T(n), and the k after
    T(n) + T(k). Waiting answers all after w + T(n + k). The wait that makes the sum over the rows
    smallest is the best. None exceeds the time of one batch, or makes a row late.

    Args:
        batch: rows that could run now.
        now: the time.
        idle_since: since when the policy could have run them.
        max_batch: rows of the largest batch.
        cost: of batches.
        arrivals: of those who will ask again.
    """
    rows = len(batch)
    alone = cost.expect(rows)
    latest = idle_since + alone
    if rows >= max_batch or latest <= now:
        return None
    deadline = min((p.deadline for p in batch if p.deadline is not None), default=math.inf)
    room = max_batch - rows
    more, best, until = 0.0, 0.0, None
    for when, share in arrivals.expected(now, latest - now):
        more = min(more + share, room)
        whole = max(1, round(more))
        together = cost.expect(rows + whole)
        if when + 2 * together > deadline:
            break  # its slack is for what nobody foresees
        gain = rows * alone + more * ((1 - _WORTHWHILE) * alone + cost.expect(whole))
        gain -= (rows + more) * (when - now + together)
        if gain > best:
            best, until = gain, when
        if more >= room:
            break
    return until
