"""How many replicas, on what."""

from __future__ import annotations

from dataclasses import dataclass

from reflexarc.contract.errors import ConfigError

MAX_REPLICAS = 1024


@dataclass(frozen=True)
class ReplicaCount:
    """``4``, or ``1-8`` where Serve adds and removes them by the queue."""

    least: int
    most: int

    @property
    def is_fixed(self) -> bool:
        return self.least == self.most


def parse_replicas(text: str) -> ReplicaCount:
    """``"4"`` or ``"1-8"``. Raises ConfigError."""
    first, dash, last = text.partition("-")
    digits = first.isdecimal() and (not dash or last.isdecimal())
    least, most = (int(first), int(last) if dash else int(first)) if digits else (0, 0)
    if not 1 <= least <= most <= MAX_REPLICAS:
        raise ConfigError(
            f"--replicas {text!r}: write a number such as 4, or a range such as 1-8 that grows "
            f"with the queue; at most {MAX_REPLICAS}",
            field="replicas",
        )
    return ReplicaCount(least, most)


@dataclass(frozen=True)
class ReplicaSettings:
    """Where and how replicas run.

    Attributes:
        count: how many.
        address: of a Ray cluster, ``auto`` for the one on this machine; None starts one here
            that ends with this process.
        gpus: of each replica; a fraction shares one, 0 runs on the CPU.
        cpus: of each replica, as Ray counts them; also its torch threads on a CPU.
        name: of the application in the cluster; two servers need two names.
        object_store_mb: of a cluster that is started here.
    """

    count: ReplicaCount
    address: str | None = None
    gpus: float = 0.0
    cpus: int = 1
    name: str = "reflexarc"
    object_store_mb: int = 256

    def __post_init__(self) -> None:
        if self.gpus < 0 or (self.gpus > 1 and self.gpus != int(self.gpus)):
            raise ConfigError(
                f"--gpus-per-replica {self.gpus:g}: a replica takes a fraction of one GPU, such as "
                "0.5, or a whole number",
                field="gpus_per_replica",
            )
