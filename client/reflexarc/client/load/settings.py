"""What load to put on a server."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from reflexarc.contract.errors import ConfigError

MAX_CLIENTS = 4096


@dataclass(frozen=True)
class LoadSettings:
    """Of one run.

    Attributes:
        server: ``ws://host:port``.
        clients: connections; in a closed loop each has one request under way at all times.
        rate: requests a second that arrive at random (Poisson) whatever the server does, each
            taken by the client that was idle for longest; None is a closed loop.
        think_ms: pause of a closed loop between a reply and the next request.
        deadline_ms: sent with each request, and what goodput is counted by. A request that waited
            for an idle client until then is not sent.
        seconds: measured.
        warm_up_seconds: before that.
        processes: that generate the load; 0 takes half of the processors.
        instruction: sent where the policy needs one.
        seed: of pixels, states and arrivals.
        headers: of the websocket's upgrade, for example an API key.

    Raises ConfigError naming a value that is out of range.
    """

    server: str
    clients: int = 1
    rate: float | None = None
    think_ms: float = 0.0
    deadline_ms: float | None = None
    seconds: float = 10.0
    warm_up_seconds: float = 1.0
    processes: int = 0
    instruction: str = "pick up the alphabet soup and place it in the basket"
    seed: int = 0
    headers: dict[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name, right in (
            ("clients", 1 <= self.clients <= MAX_CLIENTS),
            ("rate", self.rate is None or self.rate > 0),
            ("think_ms", self.think_ms >= 0),
            ("deadline_ms", self.deadline_ms is None or self.deadline_ms > 0),
            ("seconds", self.seconds > 0),
            ("warm_up_seconds", self.warm_up_seconds >= 0),
            ("processes", self.processes >= 0),
        ):
            if not right:
                raise ConfigError(f"{name} is out of range: {getattr(self, name)}", field=name)
        if self.rate is not None and self.think_ms:
            raise ConfigError("think_ms is of a closed loop; leave out rate", field="think_ms")

    @property
    def worker_count(self) -> int:
        """Processes, never more than clients."""
        wanted = self.processes or max(1, (os.cpu_count() or 2) // 2)
        return min(wanted, self.clients)
