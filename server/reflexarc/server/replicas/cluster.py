"""The deployment of replicas in a Ray cluster: started, described, replaced, ended."""

from __future__ import annotations

import logging
import re
from typing import Any

from reflexarc.contract import errors
from reflexarc.contract.errors import (
    ClusterUnavailableError,
    ConfigError,
    DoesNotFitError,
    InferenceError,
    ReflexarcError,
)
from reflexarc.server.inference import Inference
from reflexarc.server.replicas.connection import connect, resources
from reflexarc.server.replicas.remote import RemotePolicy
from reflexarc.server.replicas.replica import PolicyReplica
from reflexarc.server.replicas.settings import ReplicaSettings
from reflexarc.server.replicas.source import ReplicaSource

logger = logging.getLogger(__name__)
NAMESPACE = "reflexarc"
DEPLOYMENT = "policy"
# Of one replica: it batches what it has, so it should have a batch that runs and one that waits.
_ONGOING_BATCHES = 2
_LARGEST_BATCH_CPU, _LARGEST_BATCH_GPU = 4, 32
WAITING_OF_REPLICA = 64
QUIET = {"enable_access_log": False, "log_level": "WARNING"}
DRAIN_SECONDS = 30.0
_DESCRIBE_SECONDS = 60.0


class ReplicaCluster:
    """Replicas of one policy. Methods block: call them from a worker thread.

    Args:
        source: what each replica builds.
        settings: how many, and where.
    """

    def __init__(self, source: ReplicaSource, settings: ReplicaSettings) -> None:
        self._source, self._settings = source, settings
        self._ray: Any = None
        self._generation = 0
        self._fingerprint, self._deployed = "", False

    @property
    def max_waiting(self) -> int:
        """Requests that the ingress lets wait at once."""
        return WAITING_OF_REPLICA * self._settings.count.most

    def join(self) -> None:
        """Join or start the cluster. In the main thread, before signals get their handlers: Ray
        installs its own for SIGTERM, which would end the process without draining.

        Raises ClusterUnavailableError, DoesNotFitError.
        """
        settings = self._settings
        cpus = settings.cpus * (settings.count.most + 1)  # one more while one is replaced
        self._ray = connect(
            settings.address,
            namespace=NAMESPACE,
            cpus=cpus,
            object_store_mb=settings.object_store_mb,
        )
        try:
            self._check_resources()
        except ReflexarcError:
            self.close()
            raise

    def load(self) -> Inference:
        """Deploy, and wait until the least number of replicas is warm.

        Raises ConfigError, ClusterUnavailableError, InferenceError.
        """
        settings = self._settings
        from ray import serve

        # Our own ingress speaks to clients: Serve's proxies would only open more ports.
        serve.start(proxy_location="Disabled", logging_config=QUIET)
        if settings.name in serve.status().applications:
            raise ConfigError(
                f"--app-name {settings.name}: the cluster runs an application of that name; end "
                "the server that started it, or give this one another name",
                field="app_name",
            )
        remote = RemotePolicy(handle := self._deploy(), self._describe(handle))
        self._fingerprint = remote.contract.checkpoint_fingerprint
        return remote

    def replace(self) -> None:
        """Replace the replicas one after the other, each new one warm before an old one drains.

        Raises ConfigError where another checkpoint stands in the folder now: clients know the old
        one's contract.
        """
        contract = self._source.check()
        if contract is not None and contract.checkpoint_fingerprint != self._fingerprint:
            raise ConfigError(
                f"{self._source.checkpoint} is another checkpoint than the one that is served; "
                "start a second server for it, and let clients change over",
                field="ckpt",
            )
        self._generation += 1
        self._deploy()

    def close(self) -> None:
        """End the replicas, and the cluster where it was started here. May be called twice."""
        ray, self._ray = self._ray, None
        if ray is None:
            return
        try:
            from ray import serve

            if self._settings.address is None:
                serve.shutdown()
            elif self._deployed:
                serve.delete(self._settings.name)
        except Exception as error:  # the cluster is gone already
            logger.warning("the replicas could not be ended: %s", error)
        ray.shutdown()

    def _check_resources(self) -> None:
        settings = self._settings
        have_cpus, have_gpus = resources(self._ray)
        least = settings.count.least
        for kind, each, have in (
            ("GPU", settings.gpus, have_gpus),
            ("CPU", float(settings.cpus), have_cpus),
        ):
            if each * least > have:
                raise DoesNotFitError(
                    f"{least} replicas of {each:g} {kind} need {each * least:g}, the cluster has "
                    f"{have:g}; start fewer, give each less, or add machines",
                    field="replicas",
                )

    def _deploy(self) -> Any:
        from ray import serve

        self._deployed = True
        try:
            return serve.run(self._application(), name=self._settings.name, route_prefix=None)
        except RuntimeError as error:
            raise _named(self._why_not(serve) or str(error)) from error

    def _application(self) -> Any:
        from ray import serve

        from reflexarc.server.replicas.router import SessionRouter

        settings, count = self._settings, self._settings.count
        batch = self._source.max_batch or (
            _LARGEST_BATCH_GPU if settings.gpus else _LARGEST_BATCH_CPU
        )
        ongoing = _ONGOING_BATCHES * batch
        size: dict[str, Any] = {"num_replicas": count.least}
        if not count.is_fixed:
            size = {
                "autoscaling_config": {
                    "min_replicas": count.least,
                    "max_replicas": count.most,
                    # Requests that run or wait at a replica, on average: half a batch.
                    "target_ongoing_requests": max(1.0, batch / 2),
                    "upscale_delay_s": 5.0,
                    "downscale_delay_s": 120.0,
                }
            }
        deployment = serve.deployment(
            PolicyReplica,
            name=DEPLOYMENT,
            **size,
            max_ongoing_requests=ongoing,
            max_queued_requests=self.max_waiting,
            ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
            graceful_shutdown_wait_loop_s=0.2,
            graceful_shutdown_timeout_s=DRAIN_SECONDS,
            health_check_period_s=2.0,
            health_check_timeout_s=30.0,
            max_constructor_retry_count=2,
            # A new replica is warm before an old one goes.
            max_surge_percent=min(100, -(-100 // count.least)),
            rolling_update_percentage=min(1.0, 1.0 / count.least),
            request_router_config={"request_router_class": SessionRouter},
            logging_config=QUIET,
        )
        return deployment.bind(self._source, self._source.max_batch, self._generation)

    def _why_not(self, serve: Any) -> str:
        """The last line of what Serve says of a deployment that failed: the replica's error."""
        application = serve.status().applications.get(self._settings.name)
        deployment = None if application is None else application.deployments.get(DEPLOYMENT)
        lines = [] if deployment is None else deployment.message.strip().splitlines()
        told = [line.strip() for line in lines if "Error:" in line]
        return told[-1] if told else (lines[-1] if lines else "")

    def _describe(self, handle: Any) -> dict[str, Any]:
        try:
            described: dict[str, Any] = handle.describe.remote().result(timeout_s=_DESCRIBE_SECONDS)
        except TimeoutError as error:
            raise ClusterUnavailableError(
                f"the replicas are up but do not answer within {_DESCRIBE_SECONDS:g} s; look at "
                "'ray status' and at the machines' ports"
            ) from error
        return described


def _named(said: str) -> ReflexarcError:
    """What a replica said when it could not be built, as the error that it was."""
    found = re.search(r"reflexarc\.contract\.errors\.(\w+): (.*)", said)
    kind = getattr(errors, found[1], None) if found else None
    message = f"no replica could be started: {found[2] if found and kind else said}"
    if kind is None or kind is errors.MissingExtraError or not issubclass(kind, ReflexarcError):
        return InferenceError(message)
    error: ReflexarcError = kind(message)
    return error
