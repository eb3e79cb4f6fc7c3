"""One observation through a policy: decode images, check the contract, infer, check the chunk.

Everything here is synchronous. Inference runs in the worker thread, never on the event loop.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from reflexarc.contract import (
    PROTOCOL_VERSION,
    ActionChunk,
    Observation,
    PolicyContract,
    ReflexarcError,
    check_observation,
)
from reflexarc.contract.errors import ContractViolationError, InferenceError
from reflexarc.server.images import decode_images

logger = logging.getLogger(__name__)

# A seed that the server draws survives JSON readers that keep numbers as doubles.
_SEED_BITS = 53


class Inference(Protocol):
    """What the server needs of a policy."""

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
        """One chunk an observation. Observations were checked; each has its seed."""
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


@dataclass(frozen=True)
class Prepared:
    """An observation that may go to the policy.

    Attributes:
        observation: images decoded, checked, with a seed and the session that it belongs to.
        named_session: the session as the client named it.
        received: ``time.perf_counter()`` when the request arrived.
        decode_ms: of images.
    """

    observation: Observation
    named_session: str | None
    received: float
    decode_ms: float


def prepare(
    inference: Inference,
    observation: Observation,
    received: float,
    connection: str | None = None,
) -> Prepared:
    """Decode the images and check an observation before it may join a batch.

    Args:
        inference: the policy.
        observation: as it came.
        received: ``time.perf_counter()`` when the request arrived.
        connection: the session of an observation that names none; None where there is no
            connection to keep one for.

    Raises:
        CodecError: an image that cannot be decoded.
        ContractViolationError: the observation differs from the contract.
    """
    started = time.perf_counter()
    named = observation.session_id
    observation = replace(
        decode_images(inference.contract, observation),
        session_id=connection if named is None else named,
        seed=secrets.randbits(_SEED_BITS) if observation.seed is None else observation.seed,
    )
    check_observation(inference.contract, observation)
    if observation.action_prefix is not None and not inference.sampling.get("supports_prefix"):
        raise ContractViolationError(
            "action_prefix: this policy samples whole chunks and takes no prefix; leave it out",
            field="action_prefix",
        )
    return Prepared(observation, named, received, (time.perf_counter() - started) * 1000)


def infer_checked(inference: Inference, prepared: Prepared) -> ActionChunk:
    """The policy's chunk, safe to send, with what it took in its timing.

    Raises:
        HistoryMissingError: the session lacks rows that the observation leaves out.
        InferenceError: the policy raised, or its chunk is not executable; details are logged
            under the error id that the message names.
    """
    started = time.perf_counter()
    chunk = _guarded(inference, prepared.observation)
    finished = time.perf_counter()
    return replace(
        chunk,
        request_id=prepared.observation.request_id,
        session_id=prepared.named_session,
        timing={
            **chunk.timing,
            "queue_ms": (started - prepared.received) * 1000 - prepared.decode_ms,
            "decode_ms": prepared.decode_ms,
            "infer_ms": (finished - started) * 1000,
            "batch_size": 1.0,
        },
    )


def internal_error(what: str) -> InferenceError:
    """Log the exception being handled under a fresh id, and name that id to the client."""
    error_id = secrets.token_hex(4)
    logger.exception("%s [error id %s]", what, error_id)
    return InferenceError(f"{what}; the server's log has the details under error id {error_id}")


def _guarded(inference: Inference, observation: Observation) -> ActionChunk:
    try:
        (chunk,) = inference.infer([observation])
    except ReflexarcError:
        raise
    except Exception:
        raise internal_error("the policy failed on a valid observation") from None
    action = inference.contract.action
    expected = (action.horizon, action.dimension)
    if chunk.actions.shape != expected or not np.isfinite(chunk.actions).all():
        logger.error("refused chunk %s: %s", chunk.actions.shape, chunk.actions)
        raise InferenceError(
            f"the policy gave a chunk of shape {chunk.actions.shape} for {expected}, "
            "or one that is not finite; it was not sent"
        )
    return chunk
