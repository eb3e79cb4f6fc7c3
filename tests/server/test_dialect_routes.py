"""HTTP and websocket of other projects, spoken by hand: what none of their clients does."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from reflexarc.contract import ActionChunk, Observation, PolicyContract, pack, unpack
from reflexarc.contract.policy_contract import StateSpec
from reflexarc.server import BackgroundServer, NullPolicy, libero_contract
from reflexarc.server.exchange import Exchange

PICTURE = np.zeros((64, 64, 3), np.uint8)


def json_numpy(array: np.ndarray[Any, Any]) -> dict[str, Any]:
    data = base64.b64encode(array.tobytes()).decode()
    return {"__numpy__": data, "dtype": array.dtype.str, "shape": array.shape}


def oft_request(**changes: Any) -> dict[str, Any]:
    return {
        "full_image": json_numpy(PICTURE),
        "wrist_image": json_numpy(PICTURE),
        "state": json_numpy(np.zeros(8)),
        "instruction": "pick it up",
        **changes,
    }


def openvla_contract() -> PolicyContract:
    """What OpenVLA itself is: one camera, no state."""
    contract = libero_contract()
    stateless = StateSpec(layout="", names=())
    return contract.model_copy(update={"cameras": contract.cameras[:1], "state": stateless})


def test_openvla_itself_gets_one_action() -> None:
    request = {"image": json_numpy(PICTURE), "instruction": "pick it up", "unnorm_key": "bridge"}
    policy = NullPolicy(openvla_contract())
    with BackgroundServer(lambda: policy, default_seed=3) as server:
        reply = httpx.post(f"{server.http_url}/act", content=json.dumps(request))
    assert reply.status_code == 200, reply.text
    action = reply.json()
    assert (action["dtype"], action["shape"]) == ("<f4", [7])
    numbers = np.frombuffer(base64.b64decode(action["__numpy__"]), np.float32)
    first = policy.infer([Observation({}, np.zeros(0), seed=3)])[0].actions[0]
    np.testing.assert_array_equal(numbers[:6], first[:6])


@pytest.mark.parametrize(
    "change,parts",
    [
        ({"state": [0] * 8, "left_wrist_image": 1}, ["left_wrist_image", "one wrist camera"]),
        ({"state": None}, ["state: missing", "state float (8,)"]),
        ({"state": [0] * 7}, ["state: expected floats (8,)", "(7,)"]),
        ({"state": {"__numpy__": "AA==", "dtype": "|O", "shape": [1]}}, ["state", "dtype '|O'"]),
        ({"full_image": json_numpy(np.zeros(3))}, ["full_image", "uint8", "float64 (3,)"]),
        ({"full_image": "{}"}, ["full_image", "__numpy__"]),
        ({"full_image": [[[300, 0, 0]]]}, ["full_image", "uint8", "int64"]),
        ({"instruction": 3}, ["instruction", "text", "int"]),
        ({"\ud800": 1, "wrist_image": None}, ["wrist_image: missing", "\ud800"]),
    ],
)
def test_wrong_values_are_named(
    null_server: BackgroundServer, change: dict[str, Any], parts: list[str]
) -> None:
    body = json.dumps(oft_request(**change))
    reply = httpx.post(f"{null_server.http_url}/act", content=body)
    assert reply.status_code == 422
    message = json.loads(reply.content)["error"]["message"]
    for part in ["dialect openvla", *parts]:
        assert part in message, message


@pytest.mark.parametrize(
    "body,part",
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "expected a map"),
        (b'{"encoded": "{"}', "not JSON"),
        (b'{"encoded": "3"}', "expected a map"),
        (b'{"observation": 3}', "expected a map"),
    ],
)
def test_bodies_that_are_no_request(null_server: BackgroundServer, body: bytes, part: str) -> None:
    reply = httpx.post(f"{null_server.http_url}/act", content=body)
    assert reply.status_code == 422 and part in reply.json()["error"]["message"]


def test_body_above_the_cap_is_413(null_server: BackgroundServer) -> None:
    reply = httpx.post(f"{null_server.http_url}/act", content=b" " * (17 * 2**20), timeout=30)
    assert reply.status_code == 413


def test_pages_of_other_hosts_are_refused(null_server: BackgroundServer) -> None:
    page = {"Origin": "https://example.com"}
    for path in ("act", "reset"):
        reply = httpx.post(f"{null_server.http_url}/{path}", json=oft_request(), headers=page)
        assert reply.status_code == 403
    with pytest.raises(Exception, match="403"):
        connect(f"{null_server.url}/vla-eval", additional_headers=page)


def test_while_the_policy_loads() -> None:
    load = threading.Event()

    def slowly() -> NullPolicy:
        load.wait()
        return NullPolicy()

    with BackgroundServer(slowly, wait=False) as server:
        while True:
            try:
                reply = httpx.post(f"{server.http_url}/act", json=oft_request())
                break
            except httpx.ConnectError:
                time.sleep(0.02)
        assert reply.status_code == 503 and reply.headers["retry-after"] == "1"
        assert "dialect openvla" in reply.json()["error"]["message"]
        for path in ("act", "health"):
            asked = httpx.get(f"{server.http_url}/{path}")
            assert (asked.status_code, asked.json()) == (503, {"status": "loading"})
        load.set()


class Breaks(NullPolicy):
    def infer(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        raise ZeroDivisionError("secret")


def test_failing_policy_is_an_error_id_and_no_traceback() -> None:
    with BackgroundServer(Breaks) as server:
        reply = httpx.post(f"{server.http_url}/act", json=oft_request())
        with connect(f"{server.url}/vla-eval", compression=None) as connection:
            told = ask(connection, "observation", observation())["payload"]["error"]
    assert reply.status_code == 500
    for message in (reply.json()["error"]["message"], told):
        assert "error id" in message and "secret" not in message


def test_listeners_hear_the_dialect_and_the_connection() -> None:
    heard: list[Exchange] = []
    with BackgroundServer(NullPolicy, listeners=[heard.append]) as server:
        httpx.post(f"{server.http_url}/act", json=oft_request())
        httpx.post(f"{server.http_url}/act", json={"observation": {}})
        with connect(f"{server.url}/vla-eval", compression=None) as connection:
            ask(connection, "observation", observation())
            ask(connection, "observation", observation())  # out of the same chunk
    assert [exchange.dialect for exchange in heard] == ["openvla", "groot", "vla_eval"]
    oft, groot, vla_eval = heard
    assert oft.chunk is not None and oft.error is None and oft.bytes_out > 0
    assert groot.chunk is None and groot.error is not None
    assert vla_eval.session is not None and vla_eval.bytes_in > 2 * PICTURE.nbytes


def observation(**changes: Any) -> dict[str, Any]:
    images = {"agentview": PICTURE, "wrist": PICTURE}
    return {
        "images": images,
        "states": np.zeros(8),
        "task_description": "pick it up",
        **changes,
    }


def ask(connection: ClientConnection, kind: str, payload: Any, seq: int = 1) -> Any:
    message = {"type": kind, "payload": payload, "seq": seq, "timestamp": 0.0}
    connection.send(pack(message))
    return unpack(connection.recv(timeout=10))


@pytest.mark.parametrize(
    "message,seq,part",
    [
        ("text", 0, "binary"),
        (b"\xc1", 0, "byte 0xc1"),
        (pack([1]), 0, "expected a map"),
        (pack({"type": "dance", "payload": {}, "seq": 4}), 4, "type: 'dance'"),
        (pack({"type": np.zeros(2), "payload": {}, "seq": 4}), 4, "type"),
        (pack({"type": "observation", "payload": 3, "seq": 4}), 4, "payload"),
        (pack({"type": "observation", "payload": {}, "seq": 4}), 4, "images: missing"),
        (pack({"type": "observation", "payload": observation(images={"agentview": PICTURE}),
               "seq": 5}), 5, "wrist: missing"),
        (pack({"type": "observation", "payload": observation(states=None), "seq": 5}), 5,
         "states: missing"),
        (pack({"type": "observation", "payload": observation(states=np.zeros(9)), "seq": 5}), 5,
         "states: expected floats (8,)"),
    ],
)  # fmt: skip
def test_vla_eval_error_has_the_seq_and_the_connection_lives(
    null_server: BackgroundServer, message: bytes | str, seq: int, part: str
) -> None:
    with connect(f"{null_server.url}/vla-eval", compression=None) as connection:
        connection.send(message)
        reply = unpack(connection.recv(timeout=10))
        assert (reply["type"], reply["seq"]) == ("error", seq)
        assert "dialect vla_eval" in reply["payload"]["error"]
        assert part in reply["payload"]["error"]
        action = ask(connection, "observation", observation(), seq=9)
        assert (action["type"], action["seq"]) == ("action", 9)
        assert action["payload"]["actions"].shape == (7,)


@pytest.mark.parametrize("version", [2, np.zeros(0), np.ones(2), "1", None])
def test_vla_eval_hello_of_another_version_is_refused(
    null_server: BackgroundServer, version: Any
) -> None:
    with (
        connect(f"{null_server.url}/vla-eval", compression=None) as connection,
        pytest.raises(ConnectionClosed, match=r"1008.*protocol_version: .* came"),
    ):
        ask(connection, "hello", {"protocol_version": version})


def test_vla_eval_without_hello_is_refused_by_the_field() -> None:
    contract = libero_contract().model_copy(update={"needs_goal_image": True})
    with (
        BackgroundServer(lambda: NullPolicy(contract)) as server,
        connect(f"{server.url}/vla-eval", compression=None) as connection,
    ):
        reply = ask(connection, "observation", observation())
        assert reply["type"] == "error" and "goal_image: none is sent" in reply["payload"]["error"]


def test_vla_eval_reads_the_arrays_keys_as_text(null_server: BackgroundServer) -> None:
    """Its codec knows an array by the text ``__ndarray__``, openpi's by the same as bytes."""
    import msgpack

    with connect(f"{null_server.url}/vla-eval", compression=None) as connection:
        message = {"type": "observation", "payload": observation(), "seq": 1, "timestamp": 0.0}
        connection.send(pack(message))
        plain = msgpack.unpackb(connection.recv(timeout=10), raw=False)
    assert set(plain["payload"]["actions"]) == {"__ndarray__", "data", "dtype", "shape"}
