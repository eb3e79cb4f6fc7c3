"""A Ray cluster: joined by its address, or started here; with named errors in either case."""

from __future__ import annotations

import logging
from typing import Any

from reflexarc.contract.cluster_address import check_address, prepare_environment, unavailable

logger = logging.getLogger(__name__)
LOCAL = "local"
_STARTS = 3


def connect(
    address: str | None, *, namespace: str, cpus: int | None = None, object_store_mb: int = 256
) -> Any:
    """The module ``ray``, connected.

    Args:
        address: of a cluster, ``auto`` for the one on this machine; None starts one here, with
            ``cpus`` as Ray counts them and an object store of ``object_store_mb``.
        namespace: of named actors.

    Raises ClusterUnavailableError.
    """
    prepare_environment()
    if address is not None:
        check_address(address)
    import ray

    options: dict[str, Any] = {"namespace": namespace, "logging_level": logging.ERROR}
    if address is None:
        options |= {
            "num_cpus": cpus,
            "object_store_memory": object_store_mb * 2**20,
            "include_dashboard": False,
        }
    # Ray gives a node half a minute to start, which a busy machine may need more than once.
    tries = _STARTS if address is None else 1
    while True:
        tries -= 1
        try:
            ray.init(address=address or LOCAL, **options)
            return ray
        except Exception as error:  # of many kinds, a plain Exception among them
            if not tries:
                raise unavailable(address, error) from error
            logger.warning("Ray could not be started, trying again: %s", error)
            ray.shutdown()


def resources(ray: Any) -> tuple[float, float]:
    """``(CPUs, GPUs)`` of the whole cluster, as Ray counts them."""
    total = ray.cluster_resources()
    return float(total.get("CPU", 0.0)), float(total.get("GPU", 0.0))
