"""One observation through a policy: decode images, check the contract, infer, check the chunk.

Everything here is synchronous. Inference runs in the worker thread, never on the event loop.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from reflexarc.contract import (
    PROTOCOL_VERSION,
    ActionChunk,
    Observation,
    PolicyContract,
    check_observation,
)
from reflexarc.contract.errors import InferenceError
from reflexarc.contract.observation_check import refuse_unsupported
from reflexarc.server.images import decode_images

logger = logging.getLogger(__name__)


class Inference(Protocol):
    """What the server needs of a policy.

    Optional attributes: ``max_batch`` (int, 1 without it), rows that one ``infer`` takes at most;
    ``cheap`` (bool), whether ``infer`` may run on the event loop once it was measured to take
    less than a hand-over to a thread; ``infer_in_parts(observations)``, which yields lists of
    ``(index, chunk or ReflexarcError)`` as they become known, in place of ``infer``.
    """

    @property
    def contract(self) -> PolicyContract: ...

    @property
    def sampling(self) -> Mapping[str, Any]:
        """How actions are sampled, for the first frame: plain numbers, lists and strings."""
        ...

    @property
    def action_std(self) -> Sequence[float] | None:
        """Standard deviation of each action dimension in the training data, where it is known."""
        ...

    def infer(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        """One chunk an observation. Observations were checked; each has its seed.

        Where it raises for a batch, each observation is tried alone.
        """
        ...

    def end_session(self, session_id: str) -> bool:
        """Forget what is kept of a session; whether there was something."""
        ...

    def warm_up(self) -> None:
        """Do once whatever makes a first inference slow; called before the server is ready."""
        ...


def handshake(inference: Inference) -> dict[str, Any]:
    """The map that a client of our own protocol reads first."""
    return {
        "protocol": "reflexarc",
        "protocol_version": PROTOCOL_VERSION,
        "contract": inference.contract.model_dump(mode="json"),
        "sampling": dict(inference.sampling),
        "action_std": None if inference.action_std is None else list(inference.action_std),
    }


class Prepared(NamedTuple):
    """An observation that may join a batch: images decoded, checked; what that took."""

    observation: Observation
    decode_ms: float


def prepare(inference: Inference, observation: Observation) -> Prepared:
    """Decode the images and check an observation.

    Raises:
        CodecError: an image that cannot be decoded.
        ContractViolationError: the observation differs from the contract.
    """
    started = time.perf_counter()
    observation = decode_images(inference.contract, observation)
    check_observation(inference.contract, observation)
    sampling = inference.sampling
    refuse_unsupported(
        observation,
        prefix=bool(sampling.get("supports_prefix")),
        guide=bool(sampling.get("supports_guide")),
    )
    return Prepared(observation, (time.perf_counter() - started) * 1000)


def internal_error(what: str, error: BaseException | None = None) -> InferenceError:
    """Log an exception, or the one being handled, and name the id of its log to the client."""
    error_id = secrets.token_hex(4)
    logger.error("%s [error id %s]", what, error_id, exc_info=error or True)
    return InferenceError(f"{what}; the server's log has the details under error id {error_id}")
