"""SIGTERM while every client asks: what the server had accepted must still be answered."""

from __future__ import annotations

import threading
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from soak_clients import Case
from soak_server import ServerProcess
from websockets.exceptions import ConnectionClosed, InvalidHandshake
from websockets.sync.client import connect

from reflexarc.contract import pack, unpack

BATCH_SECONDS = 0.025
LOAD_SECONDS = 3.0
REPLY_SECONDS = 60.0
# A request sent so long before the signal was in the server's hands, however busy the machine.
SURELY_RECEIVED_SECONDS = 0.1


@dataclass
class Answers:
    """What the clients saw.

    Attributes:
        sent: request id -> when its last byte was handed to the kernel.
        answered: request ids with their right chunk.
        refused: request ids with a named error, and its code.
        wrong: replies that belong to another request.
    """

    sent: dict[str, float] = field(default_factory=dict)
    answered: set[str] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


def terminate_under_load(folder: Path, cases: list[Case], clients: int) -> dict[str, Any]:
    """Ask, send SIGTERM, ask on until the connections end; counts of what became of requests.

    ``lost`` counts requests that reached the policy, or were sent well before the signal, and
    whose client got neither chunk nor error. A client's last request, sent while the server closes
    its connection, was never accepted: ``sent_after_the_end``.
    """
    answers = Answers()
    with ServerProcess(folder, BATCH_SECONDS) as server:
        threads = [
            threading.Thread(
                target=_by_http if index % 4 == 0 else _by_websocket,
                args=(server.address, cases, np.random.default_rng((7, index)), answers),
                daemon=True,
            )
            for index in range(clients)
        ]
        for thread in threads:
            thread.start()
        time.sleep(LOAD_SECONDS)
        signalled = time.monotonic()
        server.terminate()
        for thread in threads:
            thread.join(REPLY_SECONDS)
    hung = sum(thread.is_alive() for thread in threads)
    told = answers.answered | set(answers.refused)
    early = {i for i, when in answers.sent.items() if when < signalled - SURELY_RECEIVED_SECONDS}
    lost = (set(server.inferred()) | early) - told
    return {
        "sent": len(answers.sent),
        "answered": len(answers.answered),
        "refused": dict(Counter(answers.refused.values())),
        "sent_after_the_end": len(set(answers.sent) - told - lost),
        "lost": len(lost) + hung,
        "wrong": len(answers.wrong),
        "server_failures": len(server.failures),
        "faults": [*server.failures, *answers.wrong][:10],
    }


def _by_websocket(
    address: str, cases: list[Case], rng: np.random.Generator, answers: Answers
) -> None:
    url = f"ws://{address}/v1/policy"
    try:
        with connect(url, compression=None, proxy=None, max_size=None) as socket:
            socket.recv(timeout=REPLY_SECONDS)
            while True:
                case, request_id = _draw(cases, rng)
                socket.send(pack(case.observation.to_wire()))
                answers.sent[request_id] = time.monotonic()
                reply = socket.recv(timeout=REPLY_SECONDS)
                assert isinstance(reply, bytes)
                _note(answers, case, unpack(reply))
    except (ConnectionClosed, OSError, InvalidHandshake):
        return  # the server has ended


def _by_http(address: str, cases: list[Case], rng: np.random.Generator, answers: Answers) -> None:
    headers = {"Content-Type": "application/msgpack"}
    try:
        with httpx.Client(
            base_url=f"http://{address}", trust_env=False, timeout=REPLY_SECONDS
        ) as http:
            while True:
                case, request_id = _draw(cases, rng)
                body = pack(case.observation.to_wire())
                # Before it is sent: httpx says only when it is answered.
                answers.sent[request_id] = time.monotonic()
                reply = http.post("/v1/actions", content=body, headers=headers)
                _note(answers, case, unpack(reply.content))
    except httpx.TransportError:
        return


def _draw(cases: list[Case], rng: np.random.Generator) -> tuple[Case, str]:
    case, request_id = cases[rng.integers(len(cases))], uuid.uuid4().hex
    observation = replace(case.observation, request_id=request_id)
    return replace(case, observation=observation), request_id


def _note(answers: Answers, case: Case, reply: Any) -> None:
    request_id = case.observation.request_id
    assert request_id is not None
    if not isinstance(reply, Mapping) or reply.get("request_id") not in (request_id, None):
        answers.wrong.append(f"{request_id} got {reply!r:.200}")
    elif "error" in reply:
        answers.refused[request_id] = reply["error"]["code"]
        time.sleep(0.01)  # a server that drains refuses at once
    elif np.array_equal(reply["actions"], case.actions):
        answers.answered.add(request_id)
    else:
        answers.wrong.append(f"{request_id} got another observation's actions")
