"""One request that waits for its place in a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from reflexarc.contract import ActionChunk, Observation, ReflexarcError
from reflexarc.contract.errors import DeadlineExceededError, StaleReplyError
from reflexarc.server.batching.arrivals import Arrivals

Outcome: TypeAlias = ActionChunk | ReflexarcError
# Where a request names no deadline it is served as if it had this one, so that requests with
# deadlines cannot keep it waiting for ever.
_UNHURRIED_SECONDS = 1.0


def never() -> bool:
    """Of a request without session: no reset makes it stale."""
    return False


@dataclass(eq=False)
class Pending:
    """A checked observation on its way through a batch.

    Attributes:
        observation: checked, images decoded, with a seed and its session.
        received: when it arrived.
        deliver: called once, on the event loop, with the chunk or the named error.
        decode_ms: what decoding it took.
        named_session: the session as the client named it.
        peer: who asks, for the prediction of that peer's next request; None where unknown.
        is_stale: whether the episode that it belongs to was reset since it arrived.
        deadline: when an answer stops being of use; None for never.
        urgency: what waiting requests are ordered by.
    """

    observation: Observation
    received: float
    deliver: Callable[[Outcome], None]
    decode_ms: float = 0.0
    named_session: str | None = None
    peer: str | None = None
    is_stale: Callable[[], bool] = never
    deadline: float | None = field(init=False)
    urgency: float = field(init=False)

    def __post_init__(self) -> None:
        milliseconds = self.observation.deadline_ms
        self.deadline = None if milliseconds is None else self.received + milliseconds / 1000
        self.urgency = (
            self.received + _UNHURRIED_SECONDS if self.deadline is None else self.deadline
        )


class RequestQueue(Protocol):
    """What answers admitted requests: the batcher, or whatever hands them to other processes.

    Used on the event loop alone.
    """

    @property
    def arrivals(self) -> Arrivals:
        """Told of each reply, and of connections that were closed."""
        ...

    def submit(self, pending: Pending) -> None:
        """Answer a request when its turn comes; its ``deliver`` is called exactly once."""
        ...


def reset_meanwhile(pending: Pending) -> StaleReplyError:
    """Why a request of an earlier episode gets no answer."""
    return StaleReplyError(
        "the episode was reset while this request was in flight; its answer was withheld",
        field="step_index",
    )


def too_late(pending: Pending) -> DeadlineExceededError:
    """Why a request that cannot be answered in time gets no answer."""
    return DeadlineExceededError(
        f"no answer is possible within deadline_ms = {pending.observation.deadline_ms:g}; "
        "the server is busy, or the deadline is shorter than an inference",
        field="deadline_ms",
    )
