"""The clients of ``soak.py``: each behaves well or badly at random, and judges every reply."""

from __future__ import annotations

import base64
import json
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import numpy as np
from websockets.exceptions import ConnectionClosed, WebSocketException
from websockets.sync.client import ClientConnection, connect

from reflexarc.contract import ActionChunk, Observation, ReflexarcError, pack, unpack
from reflexarc.contract.codec import MAX_FRAME_BYTES

REPLY_SECONDS = 60.0
PIPELINED = 4
# What a client does next, and how often. Each oversized frame is 64 MiB.
MIX = {
    "websocket": 0.600,
    "http": 0.150,
    "json": 0.040,
    "malformed": 0.080,
    "violation": 0.060,
    "disconnect": 0.040,
    "slow": 0.028,
    "oversized": 0.002,
}
_MSGPACK = "application/msgpack"


@dataclass(frozen=True)
class Case:
    """An observation with its seed, and the actions ``float32 (H, D)`` that answer it."""

    observation: Observation
    actions: np.ndarray[Any, Any]


@dataclass
class Tally:
    """What happened, counted over all clients."""

    asked: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    unanswered: list[str] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)
    answered: int = 0
    abandoned: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class Client:
    """One peer: a websocket that it opens again after each disconnect, and HTTP."""

    def __init__(
        self, address: str, cases: list[Case], rng: np.random.Generator, tally: Tally
    ) -> None:
        self._address, self._cases, self._rng, self._tally = address, cases, rng, tally
        self._http = httpx.Client(
            base_url=f"http://{address}", timeout=REPLY_SECONDS, trust_env=False
        )
        self._socket: ClientConnection | None = None
        self._actions: dict[str, Callable[[], None]] = {
            "websocket": self.ask_by_websocket,
            "http": self.ask_by_http,
            "json": self.ask_in_json,
            "malformed": self.send_malformed,
            "violation": self.violate_the_contract,
            "disconnect": self.leave_in_the_middle,
            "slow": self.be_slow,
            "oversized": self.send_too_much,
        }

    def act(self) -> None:
        """Do one thing of the mix, and record how the server took it."""
        kind = str(self._rng.choice(list(MIX), p=list(MIX.values())))
        with self._tally.lock:
            self._tally.asked[kind] += 1
        try:
            self._actions[kind]()
        except (OSError, WebSocketException, httpx.HTTPError) as error:
            self._drop()
            self._tally.unanswered.append(f"{kind}: {type(error).__name__}: {error}")
        except (ReflexarcError, ValueError) as error:
            self._drop()
            self._tally.wrong.append(f"{kind}: {type(error).__name__}: {error}")

    def close(self) -> None:
        self._drop()
        self._http.close()

    def ask_by_websocket(self) -> None:
        case = self._draw()
        frame = pack(case.observation.to_wire())
        started = time.perf_counter()
        reply = self._exchange(frame)
        self._tally.milliseconds.append((time.perf_counter() - started) * 1000)
        self._expect_chunk(reply, case)

    def ask_by_http(self) -> None:
        case = self._draw()
        self._expect_chunk(self._post(pack(case.observation.to_wire())), case)

    def ask_in_json(self) -> None:
        case = self._draw()
        body = case.observation.to_wire()
        body["state"] = case.observation.state.tolist()
        body["images"] = {
            name: {
                "__numpy__": base64.b64encode(image.tobytes()).decode(),
                "dtype": image.dtype.str,
                "shape": image.shape,
            }
            for name, image in case.observation.images.items()
        }
        reply = self._post(json.dumps(body).encode(), "application/json")
        if "actions" in reply:
            reply["actions"] = np.array(reply["actions"], np.float32)
        self._expect_chunk(reply, case)

    def send_malformed(self) -> None:
        """A frame that is no message; the connection must live on."""
        frame = pack(self._draw().observation.to_wire())
        noise = self._rng.bytes(1000)
        broken: list[str | bytes] = [
            "text",
            b"",
            noise,
            frame[: self._rng.integers(1, len(frame))],
            frame + noise,
            frame.replace(b"|u1", b"|O8"),
            pack({"images": {}, "state": None, "surprise": 1}),
        ]
        self._expect_refusal(broken[self._rng.integers(len(broken))], "codec", None)

    def violate_the_contract(self) -> None:
        observation = self._draw().observation
        camera, image = next(iter(observation.images.items()))
        violations: list[dict[str, Any]] = [
            {"images": {}},
            {"images": {**observation.images, camera: image[::2]}},
            {"images": {**observation.images, "no_such_camera": image}},
            {"state": observation.state[:-1]},
            {"state": np.full_like(observation.state, np.nan)},
            {"denoising_steps": 1000},
        ]
        wrong = replace(observation, **violations[self._rng.integers(len(violations))])
        self._expect_refusal(pack(wrong.to_wire()), "contract_violation", wrong.request_id)

    def send_too_much(self) -> None:
        oversized = bytes(MAX_FRAME_BYTES + 1)
        if self._rng.random() < 0.5:
            self._note_refusal(self._post(oversized), "frame_too_large", None)
            return
        try:
            self._exchange(oversized)
        except ConnectionClosed as closed:
            if closed.rcvd is None or closed.rcvd.code != 1009:
                raise
            self._drop()
            with self._tally.lock:
                self._tally.refused["closed with 1009"] += 1
        else:
            raise ValueError("a frame above the cap was answered")

    def leave_in_the_middle(self) -> None:
        """Vanish after a whole request, or inside its frame."""
        socket, frame = self._connected(), pack(self._draw().observation.to_wire())
        if self._rng.random() < 0.5:
            socket.send(frame)
        else:
            socket.socket.sendall(_masked_frame(frame)[: self._rng.integers(1, len(frame))])
        if self._rng.random() < 0.5:
            time.sleep(self._rng.uniform(0, 0.02))
        socket.socket.close()
        self._drop()
        with self._tally.lock:
            self._tally.abandoned += 1

    def be_slow(self) -> None:
        """Send drop by drop, several requests before the first reply is read."""
        socket, cases = self._connected(), [self._draw() for _ in range(PIPELINED)]
        for case in cases:
            frame = _masked_frame(pack(case.observation.to_wire()))
            for start in range(0, len(frame), 1 << 16):
                socket.socket.sendall(frame[start : start + (1 << 16)])
                time.sleep(0.01)
        time.sleep(0.2)
        for case in cases:
            self._expect_chunk(unpack(socket.recv(timeout=REPLY_SECONDS)), case)
            time.sleep(0.02)

    def _draw(self) -> Case:
        """A case under a request id of its own."""
        case = self._cases[self._rng.integers(len(self._cases))]
        observation = replace(case.observation, request_id=uuid.uuid4().hex)
        return replace(case, observation=observation)

    def _connected(self) -> ClientConnection:
        if self._socket is None:
            self._socket = connect(
                f"ws://{self._address}/v1/policy",
                compression=None,
                proxy=None,
                max_size=MAX_FRAME_BYTES,
                open_timeout=REPLY_SECONDS,
                close_timeout=2.0,
            )
            self._socket.recv(timeout=REPLY_SECONDS)
        return self._socket

    def _drop(self) -> None:
        connection, self._socket = self._socket, None
        if connection is not None:
            with suppress(OSError, WebSocketException):  # it may be lost already
                connection.close()

    def _exchange(self, frame: str | bytes) -> Any:
        connection = self._connected()
        connection.send(frame)
        reply = connection.recv(timeout=REPLY_SECONDS)
        if isinstance(reply, str):
            raise ValueError(f"text came: {reply[:200]}")
        return unpack(reply)

    def _post(self, body: bytes, content_type: str = _MSGPACK) -> Any:
        headers = {"Content-Type": content_type}
        response = self._http.post("/v1/actions", content=body, headers=headers)
        return unpack(response.content) if content_type == _MSGPACK else response.json()

    def _expect_chunk(self, reply: Any, case: Case) -> None:
        if isinstance(reply, Mapping) and "error" in reply:
            raise ValueError(f"a valid observation was refused: {reply['error']}")
        chunk, asked = ActionChunk.from_wire(reply), case.observation
        if (chunk.request_id, chunk.seed) != (asked.request_id, asked.seed):
            raise ValueError(f"request {asked.request_id} got the reply to {chunk.request_id}")
        if not np.array_equal(chunk.actions, case.actions):
            raise ValueError(f"request {asked.request_id} got another observation's actions")
        with self._tally.lock:
            self._tally.answered += 1

    def _expect_refusal(self, frame: str | bytes, code: str, request_id: str | None) -> None:
        by_http = isinstance(frame, bytes) and self._rng.random() < 0.3
        reply = self._post(frame) if by_http else self._exchange(frame)
        self._note_refusal(reply, code, request_id)

    def _note_refusal(self, reply: Any, code: str, request_id: str | None) -> None:
        error = reply.get("error") if isinstance(reply, Mapping) else None
        if error is None or error.get("code") != code:
            raise ValueError(f"{code} was due, came {error or reply!r:.200}")
        if request_id is not None and reply.get("request_id") != request_id:
            raise ValueError(f"the refusal names request {reply.get('request_id')}")
        with self._tally.lock:
            self._tally.refused[code] += 1


def _masked_frame(payload: bytes) -> bytes:
    """One binary websocket frame as a client sends it; masked with zeros, so as it is."""
    return b"\x82\xff" + len(payload).to_bytes(8, "big") + bytes(4) + payload
