"""Read what a server sent: its first message, chunks and errors. Shared by both clients."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import ValidationError

from reflexarc.contract import (
    PROTOCOL_VERSION,
    ActionChunk,
    EncodedImage,
    Observation,
    PolicyContract,
)
from reflexarc.contract.errors import (
    CodecError,
    ContractViolationError,
    DeadlineExceededError,
    ServerUnavailableError,
    error_from_wire,
)
from reflexarc.contract.images import encode_image


def read_contract(url: str, message: object) -> tuple[PolicyContract, dict[str, Any]]:
    """``(contract, the whole first message)``. Raises CodecError when another server answered."""
    if not isinstance(message, Mapping) or message.get("protocol") != "reflexarc":
        raise CodecError(f"what answers at {url} is no reflexarc server")
    version = message.get("protocol_version")
    if version != PROTOCOL_VERSION:
        raise CodecError(
            f"the server at {url} speaks protocol version {version}, this client speaks "
            f"{PROTOCOL_VERSION}; install the same reflexarc on both sides",
            field="protocol_version",
        )
    try:
        contract = PolicyContract.model_validate_json(_as_json(message.get("contract")))
    except ValidationError as error:
        raise CodecError(
            f"the contract of {url} cannot be read: {error}", field="contract"
        ) from error
    return contract, dict(message)


def read_chunk(contract: PolicyContract, message: object, request_id: str | None) -> ActionChunk:
    """The chunk of a reply, safe to execute, or the server's error raised by its name."""
    if isinstance(message, Mapping) and isinstance(message.get("error"), Mapping):
        raise error_from_wire(message["error"])
    chunk = ActionChunk.from_wire(message)
    expected = (contract.action.horizon, contract.action.dimension)
    if chunk.actions.shape != expected:
        raise ContractViolationError(
            f"the server sent actions {chunk.actions.shape}, its contract says {expected}",
            field="actions",
        )
    if not np.isfinite(chunk.actions).all():
        raise ContractViolationError("the server sent actions that are not finite", field="actions")
    if chunk.request_id != request_id:
        raise CodecError(f"the reply is to request {chunk.request_id}, asked was {request_id}")
    return chunk


def check_same_contract(url: str, before: PolicyContract, now: PolicyContract) -> None:
    """A server that came back must serve the same policy, or the episode would mix two."""
    if before != now:
        changed = [
            name for name in type(now).model_fields if getattr(before, name) != getattr(now, name)
        ]
        raise ContractViolationError(
            f"the server at {url} came back with another policy; changed: {', '.join(changed)}",
            field=changed[0],
        )


def compressed(observation: Observation, image_format: str) -> Observation:
    """The observation with its images as JPEG or PNG; ``raw`` leaves them as they are.

    A goal image is sent once an episode and stays raw: what it loses would be lost throughout.
    """
    if image_format == "raw":
        return observation

    def encoded(images: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: image if isinstance(image, EncodedImage) else encode_image(image, image_format)
            for name, image in images.items()
        }

    history = tuple(
        row if row.images is None else replace(row, images=encoded(row.images))
        for row in observation.history
    )
    return replace(observation, images=encoded(observation.images), history=history)


class Deadline:
    """A stated time to keep trying, with a pause that grows from 50 ms to 1 s."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds
        self._pause = 0.05
        self.said = False  # whether the wait was announced, which once is enough

    @property
    def left(self) -> float:
        return max(0.0, self._end - time.monotonic())

    def pause(self) -> bool:
        """Sleep before the next try; False when the time is over."""
        if self.left == 0.0:
            return False
        time.sleep(min(self._pause, self.left))
        self._pause = min(2 * self._pause, 1.0)
        return True


class ReplyDue:
    """When the reply to one request must be there.

    That is the client's timeout, anew at every try, or, if it is sooner, the observation's
    ``deadline_ms``, counted once from here.
    """

    def __init__(self, url: str, timeout: float, observation: Observation | None = None) -> None:
        asked = None if observation is None else observation.deadline_ms
        # What is no deadline is for the server to refuse by name.
        seconds = asked / 1000 if asked is not None and asked > 0 else math.inf
        self._url, self._seconds = url, min(timeout, seconds)
        self.is_deadline = seconds <= timeout
        self._end = time.monotonic() + self._seconds

    @property
    def left(self) -> float:
        """Seconds that a try may take, not below 0."""
        return max(0.0, self._end - time.monotonic()) if self.is_deadline else self._seconds

    def retrying(self, retry_for: float) -> float:
        """Seconds to keep trying where no server answers: not past a deadline."""
        return min(retry_for, self.left) if self.is_deadline else retry_for

    def missed(self) -> DeadlineExceededError | ServerUnavailableError:
        """The error to raise when the time is over."""
        kind = DeadlineExceededError if self.is_deadline else ServerUnavailableError
        return kind(
            f"no reply from {self._url} within {self._seconds:g} s",
            field="deadline_ms" if self.is_deadline else None,
        )


def _as_json(value: object) -> bytes:
    import json

    try:
        return json.dumps(value).encode()
    except (TypeError, ValueError) as error:
        raise CodecError("the first message holds no contract", field="contract") from error
