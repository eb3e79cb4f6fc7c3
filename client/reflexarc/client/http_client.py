"""Ask a policy over HTTP, for places that websockets do not reach. Same results, more overhead."""

from __future__ import annotations

import logging
import uuid
from dataclasses import replace
from typing import Any, Literal

import httpx

from reflexarc.client.addresses import http_url, is_loopback
from reflexarc.client.credentials import (
    authorization,
    refused,
    untrusted,
    verification,
    verification_error,
)
from reflexarc.client.replies import (
    Deadline,
    ReplyDue,
    check_same_contract,
    compressed,
    read_chunk,
    read_contract,
)
from reflexarc.contract import ActionChunk, Observation, PolicyContract, pack, unpack
from reflexarc.contract.errors import (
    CodecError,
    NotReadyError,
    ServerUnavailableError,
    TooManyRequestsError,
)

logger = logging.getLogger(__name__)
_MSGPACK = "application/msgpack"
_POLICY_HEADER = "Reflexarc-Policy"


class HttpPolicyClient:
    """The interface of :class:`PolicyClient` over ``POST /v1/actions`` with msgpack bodies.

    Args and errors are those of :class:`PolicyClient`. HTTP has no connection that could name a
    session, so observations without ``session_id`` get this client's own, which ends with it.
    """

    contract: PolicyContract
    metadata: dict[str, Any]

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        retry_for: float = 30.0,
        timeout: float = 60.0,
        image_format: Literal["raw", "jpeg", "png"] = "raw",
        api_key: str | None = None,
    ) -> None:
        self.url = http_url(url)
        self._authorization = authorization(api_key)
        self._retry_for = retry_for
        self._timeout = timeout
        self._image_format = image_format
        self._session = f"http-{uuid.uuid4().hex}"
        self._session_used = False
        self._http = httpx.Client(
            base_url=self.url,
            headers=self._authorization,
            timeout=timeout,
            trust_env=not is_loopback(self.url),
            verify=verification(self.url),
        )
        try:
            self._read_contract()
        except BaseException:
            self._http.close()
            raise

    def infer(self, observation: Observation) -> ActionChunk:
        """The action chunk for one observation; raises what ``PolicyClient.infer`` raises."""
        if observation.request_id is None:
            observation = replace(observation, request_id=uuid.uuid4().hex)
        if observation.session_id is None and self.contract.needs_session:
            observation = replace(observation, session_id=self._session)
            self._session_used = True
        body = pack(compressed(observation, self._image_format).to_wire())
        due = ReplyDue(self.url, self._timeout, observation)
        deadline = Deadline(due.retrying(self._retry_for))
        lost = False
        while True:
            try:
                if lost:
                    self._read_contract(deadline)
                response = self._send("POST", "/v1/actions", body, due)
                if response.headers.get(_POLICY_HEADER, self._policy) != self._policy:
                    # Another server took the address between two requests.
                    self._read_contract(deadline)
                return read_chunk(self.contract, _message(response), observation.request_id)
            except (httpx.TransportError, NotReadyError, TooManyRequestsError) as error:
                lost = True
                self._try_again(deadline, error)

    def close(self) -> None:
        if self._session_used:
            try:
                self._http.delete(f"/v1/sessions/{self._session}", timeout=1.0)
            except httpx.HTTPError as error:  # it ends by itself when it was idle for long
                logger.debug("the session was not ended: %s", error)
            self._session_used = False
        self._http.close()

    def __enter__(self) -> HttpPolicyClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_contract(self, deadline: Deadline | None = None) -> None:
        deadline = deadline or Deadline(self._retry_for)
        while True:
            try:
                response = self._send("GET", "/v1/contract")
                if response.status_code in (429, 503):
                    raise NotReadyError("the server is loading, draining or full")
                break
            except (httpx.TransportError, NotReadyError) as error:
                self._try_again(deadline, error)
        contract, metadata = read_contract(self.url, _message(response))
        if hasattr(self, "contract"):
            check_same_contract(self.url, self.contract, contract)
        self.contract, self.metadata = contract, metadata
        self._policy = response.headers.get(_POLICY_HEADER, "")

    def _send(
        self, method: str, path: str, body: bytes | None = None, due: ReplyDue | None = None
    ) -> httpx.Response:
        headers = {"Content-Type": _MSGPACK} if body is not None else {}
        due = due or ReplyDue(self.url, self._timeout)
        try:
            response = self._http.request(
                method, path, content=body, headers=headers, timeout=due.left
            )
        except httpx.ReadTimeout as error:
            raise due.missed() from error
        except httpx.ConnectError as error:
            unverified = verification_error(error)
            if unverified is None:
                raise
            raise untrusted(self.url, unverified) from error
        if response.status_code == 401:
            raise refused(self.url, self._authorization)
        return response

    def _try_again(self, deadline: Deadline, error: Exception) -> None:
        if not deadline.said:
            logger.warning("%s: %s; asking again for up to %.0f s", self.url, error, deadline.left)
            deadline.said = True
        if not deadline.pause():
            raise ServerUnavailableError(
                f"no policy answered at {self.url} within {deadline.seconds:g} s "
                f"(last: {error or type(error).__name__}); start one with: serve-policy --ckpt DIR"
            ) from error


def _message(response: httpx.Response) -> object:
    """The decoded body, by its Content-Type."""
    content_type = response.headers.get("content-type", "").partition(";")[0]
    if content_type == _MSGPACK:
        return unpack(response.content)
    if content_type == "application/json":
        try:
            return response.json()
        except ValueError as error:
            raise CodecError(f"{response.url} sent JSON that cannot be read: {error}") from error
    raise CodecError(
        f"{response.url} answered HTTP {response.status_code} with {content_type or 'no type'}: "
        "it is no reflexarc server"
    )
