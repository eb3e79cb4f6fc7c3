"""Ask a policy over a websocket that stays open: the fastest way to a chunk."""

from __future__ import annotations

import logging
import ssl
import threading
import uuid
from collections.abc import Mapping
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
from reflexarc.client.credentials import authorization, quiet_logger, refused, untrusted
from reflexarc.client.replies import (
    Deadline,
    ReplyDue,
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
    DeadlineExceededError,
    FrameTooLargeError,
    NotReadyError,
    ServerUnavailableError,
)

logger = logging.getLogger(__name__)
_MAX_OWED = 4


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
        api_key: of the server; None takes that of the environment's ``REFLEXARC_API_KEY``.

    Raises:
        AuthenticationError: the server asks for another API key; it is not asked again.
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
        api_key: str | None = None,
    ) -> None:
        self.url = websocket_url(url)
        self._authorization = authorization(api_key)
        self._retry_for = retry_for
        self._timeout = timeout
        self._image_format = image_format
        self._connection: ClientConnection | None = None
        self._owed: set[str | None] = set()  # ids whose replies are late and still to come
        self._one_at_a_time = threading.Lock()
        self._connect(Deadline(retry_for))

    def infer(self, observation: Observation) -> ActionChunk:
        """The action chunk for one observation. Threads take turns.

        Raises:
            DeadlineExceededError: no reply within the observation's ``deadline_ms``, by the
                server's word or by this client's clock. A reply that comes later is thrown away.
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
        with self._one_at_a_time:
            return self._infer(observation, frame)

    def _infer(self, observation: Observation, frame: bytes) -> ActionChunk:
        due = ReplyDue(self.url, self._timeout, observation)
        deadline: Deadline | None = None
        while True:
            try:
                message = self._exchange(frame, observation.request_id, due, deadline)
                return read_chunk(self.contract, message, observation.request_id)
            except (ConnectionClosed, OSError, NotReadyError) as error:
                self._drop()
                deadline = deadline or Deadline(due.retrying(self._retry_for))
                logger.warning(
                    "%s: %s; asking again for up to %.0f s", self.url, error, deadline.left
                )
                if not deadline.pause():
                    raise self._unavailable(deadline, error) from error

    def close(self) -> None:
        """Close the connection. The client can be used again: it then connects again."""
        connection, self._connection = self._connection, None
        self._owed.clear()
        if connection is not None:
            connection.close()

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _exchange(
        self, frame: bytes, request_id: str | None, due: ReplyDue, deadline: Deadline | None
    ) -> object:
        if request_id in self._owed or len(self._owed) >= _MAX_OWED:
            self._drop()  # the late reply would carry this id; or the server does not keep up
        if self._connection is None:
            self._connect(deadline or Deadline(due.retrying(self._retry_for)))
        assert self._connection is not None
        try:
            self._connection.send(frame)
            return self._reply(self._connection, request_id, due)
        except DeadlineExceededError:
            self._owed.add(request_id)  # the connection lives on, its session too
            raise
        except BaseException:
            # A reply that comes later, after Ctrl-C too, would be taken for the next request's.
            self._drop()
            raise

    def _reply(self, connection: ClientConnection, request_id: str | None, due: ReplyDue) -> object:
        """The message that answers a request; late ones of others are thrown away."""
        while True:
            try:
                frame = connection.recv(timeout=due.left)
            except TimeoutError as error:
                raise due.missed() from error
            if isinstance(frame, str):
                raise CodecError(f"{self.url} sent text where a message was due: {frame[:200]}")
            message = unpack(frame)
            answered = message.get("request_id") if isinstance(message, Mapping) else None
            if answered is None and self._owed:
                self._drop()  # nobody knows whose it is
            if answered not in self._owed:
                return message
            self._owed.remove(answered)

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
                additional_headers=self._authorization,
                logger=quiet_logger,
            )
        except InvalidURI as error:
            raise ConfigError(str(error), field="server") from error
        except ssl.SSLCertVerificationError as error:
            raise untrusted(self.url, error) from error
        except InvalidStatus as error:
            status = error.response.status_code
            if status == 401:
                raise refused(self.url, self._authorization) from error
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
        self._owed.clear()
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
