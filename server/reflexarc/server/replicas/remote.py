"""Replicas as one policy, in the eyes of the ingress' service."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from reflexarc.contract import ActionChunk, Observation, PolicyContract
from reflexarc.contract.errors import InferenceError

logger = logging.getLogger(__name__)
_END_SECONDS = 5.0


class RemotePolicy:
    """The :class:`~reflexarc.server.inference.Inference` protocol over a Serve handle.

    ``infer`` is never called: a :class:`~reflexarc.server.replicas.forwarder.Forwarder` asks.

    Args:
        handle: of the deployment.
        described: what a replica says of itself.

    Attributes:
        max_batch: rows of a replica's largest batch.
    """

    def __init__(self, handle: Any, described: Mapping[str, Any]) -> None:
        self.handle = handle
        self._contract = PolicyContract.model_validate_json(described["contract"])
        self._sampling = described["sampling"]
        self._action_std = described["action_std"]
        self.max_batch = int(described["max_batch"])

    @property
    def contract(self) -> PolicyContract:
        return self._contract

    @property
    def sampling(self) -> Mapping[str, Any]:
        sampling: Mapping[str, Any] = self._sampling
        return sampling

    @property
    def action_std(self) -> Sequence[float] | None:
        std: Sequence[float] | None = self._action_std
        return std

    def infer(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        raise InferenceError("replicas are asked by the forwarder")

    def end_session(self, session_id: str) -> bool:
        """Forget it in its replica, where that is still there; whether there was something."""
        handle = self.handle.options(session_id=session_id)
        try:
            response = handle.end_session.remote(session_id, ends=True)
            return bool(response.result(timeout_s=_END_SECONDS))
        except Exception as error:  # the replica is gone, and the session with it
            logger.debug("a session could not be ended: %s", error)
            return False

    def warm_up(self) -> None:
        """Replicas are warm before they are ready."""
