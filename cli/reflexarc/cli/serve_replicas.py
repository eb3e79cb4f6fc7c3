"""``serve-policy --replicas``: the policy in several processes, on Ray Serve."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from reflexarc.cli.extras import require
from reflexarc.contract.errors import ConfigError, ReflexarcError

if TYPE_CHECKING:
    from reflexarc.server.replicas.cluster import ReplicaCluster
    from reflexarc.server.replicas.source import ReplicaSource
    from reflexarc.server.sources import PolicySource

logger = logging.getLogger(__name__)


def replicated(
    source: ReplicaSource, replicas: str | None, address: str | None, gpus: float | None, name: str
) -> tuple[ReplicaCluster, PolicySource]:
    """The replicas that the options ask for, and what the ingress serves through them.

    Raises CheckpointError, ConfigError, MissingExtraError: before a port opens.
    """
    require("serve-policy --replicas", "ray", "ray")
    from reflexarc.contract.cluster_address import check_address
    from reflexarc.server.replicas.cluster import ReplicaCluster
    from reflexarc.server.replicas.settings import ReplicaSettings, parse_replicas
    from reflexarc.server.sources import PolicySource

    count = parse_replicas(replicas or "1")
    if source.checkpoint is None and source.policy is None:
        raise ConfigError(
            "nothing to serve: give --ckpt DIR, or --policy random, zero or module:Class",
            field="ckpt",
        )
    if gpus is None:
        gpus = 1.0 if source.device == "cuda" else 0.0
    if source.device == "cuda" and not gpus:
        raise ConfigError(
            "--device cuda with --gpus-per-replica 0: a replica sees the GPUs that Ray gives it",
            field="gpus_per_replica",
        )
    settings = ReplicaSettings(
        count, address, gpus, cpus=source.threads or _threads_each(count.most, address), name=name
    )
    contract = source.check()
    if address is not None:
        check_address(address)
    cluster = ReplicaCluster(source, settings)
    title = str(source.checkpoint or source.policy)
    where = "here" if address is None else f"in the Ray cluster {address}"
    each = f"{gpus:g} GPU each" if gpus else f"{settings.cpus} CPU each"
    number = str(count.least) if count.is_fixed else f"{count.least} to {count.most}"
    return cluster, PolicySource(
        title, contract, cluster.load, f"{number} replicas {where}, {each}"
    )


def _threads_each(replicas: int, address: str | None) -> int:
    """This machine's cores among replicas; in a cluster, whose machines are others, one each."""
    if address is not None:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // replicas)


def absolute(path: Path | None) -> Path | None:
    """Replicas have a working directory of their own."""
    return None if path is None else path.resolve()


@contextmanager
def replaced_on_hangup(cluster: ReplicaCluster | None) -> Iterator[None]:
    """While it lasts, SIGHUP replaces the replicas one after the other."""
    if cluster is None or not hasattr(signal, "SIGHUP"):
        yield
        return
    busy = threading.Lock()

    def replace() -> None:
        if not busy.acquire(blocking=False):
            logger.warning("the replicas are being replaced already")
            return
        try:
            logger.info("replacing the replicas, one after the other")
            cluster.replace()
            logger.info("the replicas are replaced")
        except ReflexarcError as error:
            logger.error("the replicas were not replaced [%s]: %s", error.code, error.message)
        except Exception:
            logger.exception("the replicas were not replaced")
        finally:
            busy.release()

    def on_hangup(*_: object) -> None:
        threading.Thread(target=replace, name="replace-replicas", daemon=True).start()

    before = signal.signal(signal.SIGHUP, on_hangup)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)
        cluster.close()
