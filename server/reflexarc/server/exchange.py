"""One finished request, as metrics, the status page and the recorder see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from reflexarc.contract import ActionChunk, Observation, ReflexarcError


@dataclass(frozen=True)
class Exchange:
    """What came, what was answered, and how long it took.

    Attributes:
        dialect: protocol of the request: native, http, openpi, starvla, vla_eval, openvla, groot.
        received_at: seconds since the epoch when the request arrived.
        observation: as checked, images decoded; None where the request could not be read.
        chunk: the answer; None where ``error`` says what was wrong.
        error: the named error that the client got.
        session: of the episode: the client's own id or the connection's; None without one.
        timing: milliseconds by name, and ``batch_size``.
        request_id: the client's own name of the request, also where the rest could not be read.
        bytes_in: size of the request.
        bytes_out: size of the reply.
    """

    dialect: str
    received_at: float
    observation: Observation | None = None
    chunk: ActionChunk | None = None
    error: ReflexarcError | None = None
    session: str | None = None
    timing: Mapping[str, float] = field(default_factory=dict)
    request_id: str | None = None
    bytes_in: int = 0
    bytes_out: int = 0


Listener = Callable[[Exchange], None]
