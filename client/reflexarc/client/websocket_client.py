"""Ask a policy over a websocket that stays open: the fastest way to a chunk."""

from __future__ import annotations

import logging
import uuid
from dataclasses import replace
from typing import Any, Literal

from websockets.exceptions import (
    ConnectionClosed,
    InvalidHandshake,
    InvalidStatus,
    InvalidURI,
    WebSocketException,
)
from websockets.sync.client import ClientConnection, connect

from reflexarc.client.addresses import is_loopback, websocket_url
from reflexarc.client.replies import (
    Deadline,
    check_same_contract,
    compressed,
    read_chunk,
    read_contract,
)
from reflexarc.contract import ActionChunk, Observation, PolicyContract, pack, unpack
from reflexarc.contract.codec import MAX_FRAME_BYTES
from reflexarc.contract.errors import (
    CodecError,
    ConfigError,
    FrameTooLargeError,
    NotReadyError,
    ServerUnavailableError,
)

logger = logging.getLogger(__name__)


class PolicyClient:
    """A connection to a served policy.

    An observation that violates the contract raises ContractViolationError and the connection
    lives on. When the server dies, the client connects again and sends the request again: a
    chunk depends on its request and its window alone, so nothing is executed twice. Where the
    policy sees history and the new server does not hold it, HistoryMissingError is raised;
    RecedingHorizonExecutor then sends the whole window.

    Args:
        url: ``ws://host:port``; ``http://`` and a bare ``host:port`` are understood too.
        retry_for: seconds to keep trying while no server answers, at the start and in between.
        timeout: seconds to wait for one reply, and for a server that is loading its policy.
        image_format: how images travel; ``jpeg`` (lossy) pays on networks below 1 Gbit/s.

    Raises:
        ServerUnavailableError: nothing answered within the stated time.
        CodecError: something answered that is no reflexarc server of this version.

    Attributes:
        contract: what the policy expects and returns.
        metadata: the server's whole first message.
    """

    contract: PolicyContract
    metadata: dict[str, Any]

    def __init__(
        self,
        url: str = "ws://127.0.0.1:8000",
        *,
        retry_for: float = 30.0,
        timeout: float = 60.0,
        image_format: Literal["raw", "jpeg", "png"] = "raw",
    ) -> None:
        self.url = websocket_url(url)
        self._retry_for = retry_for
        self._timeout = timeout
        self._image_format = image_format
        self._connection: ClientConnection | None = None
        self._connect(Deadline(retry_for))

    def infer(self, observation: Observation) -> ActionChunk:
        """The action chunk for one observation.

        Raises:
            ContractViolationError, CodecError, UnknownInstructionError: the request is wrong.
            HistoryMissingError: the server lacks rows that the request leaves out.
            InferenceError: the policy failed; the server's log says why.
            ServerUnavailableError: no reply within ``timeout``, or none again within
                ``retry_for`` after the connection was lost.
        """
        if observation.request_id is None:
            observation = replace(observation, request_id=uuid.uuid4().hex)
        frame = pack(compressed(observation, self._image_format).to_wire())
        if len(frame) > MAX_FRAME_BYTES:
            raise FrameTooLargeError(
                f"an observation of {len(frame)} bytes is above the cap of {MAX_FRAME_BYTES}"
            )
        deadline: Deadline | None = None
        while True:
            try:
                reply = self._exchange(frame, deadline)
                return read_chunk(self.contract, unpack(reply), observation.request_id)
            except (ConnectionClosed, OSError, NotReadyError) as error:
                self._drop()
                deadline = deadline or Deadline(self._retry_for)
                logger.warning(
                    "%s: %s; asking again for up to %.0f s", self.url, error, deadline.left
                )
                if not deadline.pause():
                    raise self._unavailable(deadline, error) from error

    def close(self) -> None:
        """Close the connection. The client can be used again: it then connects again."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _exchange(self, frame: bytes, deadline: Deadline | None) -> bytes:
        if self._connection is None:
            self._connect(deadline or Deadline(self._retry_for))
        assert self._connection is not None
        try:
            self._connection.send(frame)
            reply = self._connection.recv(timeout=self._timeout)
        except BaseException as error:
            # A reply that comes later, after Ctrl-C too, would be taken for the next request's.
            self._drop()
            if isinstance(error, TimeoutError):
                raise ServerUnavailableError(
                    f"no reply from {self.url} within {self._timeout:g} s"
                ) from error
            raise
        if isinstance(reply, str):
            raise CodecError(f"{self.url} sent text where a message was due: {reply[:200]}")
        return reply

    def _connect(self, deadline: Deadline) -> None:
        """Connect and read the first message, trying until the deadline."""
        waiting_said = False
        while True:
            try:
                connection, message = self._handshake(deadline)
                break
            except (ConnectionClosed, OSError, InvalidHandshake) as error:
                if not waiting_said:
                    logger.warning("no policy at %s yet (%s); trying for %.0f s",
                                   self.url, error, deadline.left)  # fmt: skip
                    waiting_said = True
                if not deadline.pause():
                    raise self._unavailable(deadline, error) from error
        try:
            contract, metadata = read_contract(self.url, message)
            if hasattr(self, "contract"):
                check_same_contract(self.url, self.contract, contract)
        except BaseException:
            _close_quietly(connection)
            raise
        self.contract, self.metadata, self._connection = contract, metadata, connection

    def _handshake(self, deadline: Deadline) -> tuple[ClientConnection, Any]:
        """One try. A server that is loading holds its first message back."""
        try:
            connection = connect(
                self.url,
                compression=None,
                proxy=None if is_loopback(self.url) else True,
                max_size=MAX_FRAME_BYTES,
                open_timeout=max(deadline.left, 1.0),
                close_timeout=2.0,
            )
        except InvalidURI as error:
            raise ConfigError(str(error), field="server") from error
        except InvalidStatus as error:
            status = error.response.status_code
            if status < 500:
                raise CodecError(
                    f"{self.url} answered HTTP {status}: it is no reflexarc server"
                ) from error
            raise
        try:
            frame = connection.recv(timeout=max(deadline.left, self._timeout))
            if isinstance(frame, str):
                raise CodecError(f"what answers at {self.url} is no reflexarc server")
            return connection, unpack(frame)
        except BaseException:
            _close_quietly(connection)
            raise

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            _close_quietly(connection)

    def _unavailable(self, deadline: Deadline, error: Exception) -> ServerUnavailableError:
        return ServerUnavailableError(
            f"no policy answered at {self.url} within {deadline.seconds:g} s "
            f"(last: {error or type(error).__name__}); start one with: serve-policy --ckpt DIR"
        )


def _close_quietly(connection: ClientConnection) -> None:
    try:
        connection.close()
    except (OSError, WebSocketException) as error:
        logger.debug("closing a lost connection: %s", error)
