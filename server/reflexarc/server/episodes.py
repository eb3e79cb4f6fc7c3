"""What the server itself remembers of each session: which episode it is in, and its seed."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

SEED_BITS = 53  # such a seed survives JSON readers that keep numbers as doubles
IDLE_SECONDS = 600.0
MAX_EPISODES = 1024
_NOTHING_YET = -1


@dataclass
class _Episode:
    number: int
    seed: int | None
    step: int
    seen: float
    decisions: int = 0


class Episodes:
    """The current episode of each session.

    An episode begins with a session's first request, with ``step_index`` 0 or one below the
    last, and with a reset. Its number tells replies that belong to an earlier one.

    Args:
        default_seed: of an episode whose first request has none; None leaves seeds to be drawn.
        idle_seconds: of silence, after which a session is forgotten.
        clock: in seconds.
    """

    def __init__(
        self,
        *,
        default_seed: int | None = None,
        idle_seconds: float = IDLE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._default_seed = default_seed
        self._idle_seconds, self._clock = idle_seconds, clock
        self._numbers = itertools.count()
        self._episodes: OrderedDict[str, _Episode] = OrderedDict()

    def __len__(self) -> int:
        return len(self._episodes)

    def admit(
        self, session: str | None, step: int | None, seed: int | None
    ) -> tuple[int, int | None]:
        """``(number of the episode, seed of this decision)`` of a request that was accepted.

        The seed is the request's own; or where the episode's first request had one, a function
        of that and of the step; or one of the default seed and of the step (where no step came,
        of the number of decisions before); or None where nothing determines it.
        """
        if session is None:
            return -1, self._defaulted(seed, step or 0)
        self._expire()
        episode = self._episodes.get(session)
        if episode is None or (step is not None and (step == 0 or step < episode.step)):
            episode = self._begin(session, seed)
            seed = self._defaulted(seed, step or 0)
        elif seed is None and episode.seed is not None and step is not None:
            seed = decision_seed(episode.seed, step)
        elif seed is None and episode.seed is None:
            seed = self._defaulted(None, episode.decisions if step is None else step)
        episode.decisions += 1
        episode.step = max(episode.step, step or 0)
        episode.seen = self._clock()
        self._episodes.move_to_end(session)
        return episode.number, seed

    def reset(self, session: str) -> bool:
        """End the session's episode; whether there was one. What is in flight becomes stale."""
        episode = self._episodes.get(session)
        if episode is None or episode.step == _NOTHING_YET:
            return False
        self._begin(session, None)
        return True

    def forget(self, session: str) -> None:
        """The connection that the session belonged to has ended."""
        self._episodes.pop(session, None)

    def is_over(self, session: str, number: int) -> bool:
        """Whether another episode began since ``admit`` gave this number."""
        episode = self._episodes.get(session)
        return episode is not None and episode.number != number

    def _defaulted(self, seed: int | None, step: int) -> int | None:
        if seed is not None or self._default_seed is None:
            return seed
        return decision_seed(self._default_seed, step)

    def _begin(self, session: str, seed: int | None) -> _Episode:
        episode = _Episode(next(self._numbers), seed, _NOTHING_YET, self._clock())
        self._episodes[session] = episode
        self._episodes.move_to_end(session)
        while len(self._episodes) > MAX_EPISODES:
            self._episodes.popitem(last=False)
        return episode

    def _expire(self) -> None:
        oldest = self._clock() - self._idle_seconds
        while self._episodes and next(iter(self._episodes.values())).seen < oldest:
            self._episodes.popitem(last=False)


def decision_seed(seed: int, step: int) -> int:
    """The seed of an episode's decision at ``step``: the same on every server and platform.

    The first decision has the episode's own.
    """
    if step == 0:
        return seed
    digest = hashlib.sha256(f"{seed}:{step}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - SEED_BITS)
