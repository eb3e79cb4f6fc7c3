"""HTTP on a real socket: forms, statuses, equality with the websocket, health, fuzz."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.sync.client import connect

from reflexarc.contract import ActionChunk, Observation, pack, unpack
from reflexarc.contract.codec import MAX_FRAME_BYTES
from reflexarc.contract.images import encode_image
from reflexarc.server import BackgroundServer, libero_contract

MakeObservation = Callable[..., Observation]
MSGPACK = {"Content-Type": "application/msgpack"}


def json_numpy(array: np.ndarray[Any, Any]) -> dict[str, Any]:
    text = base64.b64encode(array.tobytes()).decode()
    return {"__numpy__": text, "dtype": array.dtype.str, "shape": list(array.shape)}


def json_body(observation: Observation, **changes: Any) -> dict[str, Any]:
    body = {
        "images": {name: json_numpy(image) for name, image in observation.images.items()},
        "state": observation.state.tolist(),
        "instruction": observation.instruction,
        "seed": observation.seed,
        **changes,
    }
    return {key: value for key, value in body.items() if value is not None}


def post(server: BackgroundServer, **arguments: Any) -> httpx.Response:
    return httpx.post(f"{server.http_url}/v1/actions", timeout=20, **arguments)


def test_json_and_msgpack_equal_the_websocket_bit_for_bit(
    null_server: BackgroundServer, make_observation: MakeObservation
) -> None:
    observation = make_observation(seed=11, request_id="x")
    with connect(f"{null_server.url}/v1/policy", compression=None) as connection:
        connection.recv(timeout=10)
        connection.send(pack(observation.to_wire()))
        reference = ActionChunk.from_wire(unpack(connection.recv(timeout=10)))
    as_json = post(null_server, json=json_body(observation, request_id="x"))
    as_msgpack = post(null_server, content=pack(observation.to_wire()), headers=MSGPACK)
    assert as_json.headers["content-type"] == "application/json"
    assert as_msgpack.headers["content-type"] == "application/msgpack"
    for chunk in (
        ActionChunk.from_wire(as_json.json()),
        ActionChunk.from_wire(unpack(as_msgpack.content)),
    ):
        np.testing.assert_array_equal(chunk.actions, reference.actions)
        assert (chunk.seed, chunk.request_id) == (11, "x")


def test_compressed_images_and_json_numpy_state(
    null_server: BackgroundServer, make_observation: MakeObservation
) -> None:
    observation = make_observation(seed=2)
    images = {
        name: {
            "format": image_format,
            "data": base64.b64encode(encode_image(image, image_format).data).decode(),
        }
        for (name, image), image_format in zip(
            observation.images.items(), ("jpeg", "png"), strict=True
        )
    }
    state = json_numpy(observation.state.astype(np.float32))
    response = post(null_server, json=json_body(observation, images=images, state=state))
    assert response.status_code == 200, response.text
    assert np.shape(response.json()["actions"]) == (10, 7)


def test_body_without_content_type_is_json(
    null_server: BackgroundServer, make_observation: MakeObservation
) -> None:
    body = json.dumps(json_body(make_observation())).encode()
    assert post(null_server, content=body).status_code == 200


def test_statuses(null_server: BackgroundServer, make_observation: MakeObservation) -> None:
    observation = make_observation()
    cases: list[tuple[dict[str, Any], int, str, str | None]] = [
        ({"json": json_body(observation, state=[0.0] * 7)}, 422, "contract_violation", "state"),
        ({"json": json_body(observation, state=["a"])}, 422, "codec", "state"),
        ({"json": json_body(observation, state=[10**400])}, 422, "codec", "state"),
        ({"json": json_body(observation, imgs={})}, 422, "codec", "imgs"),
        ({"json": json_body(observation, images={"agentview": 3})}, 422, "codec",
         "images.agentview"),
        ({"json": json_body(observation, images={"agentview": {"format": "jpeg", "data": "!"}})},
         422, "codec", "images.agentview"),
        ({"json": [1]}, 422, "codec", None),
        ({"content": b"{"}, 422, "codec", None),
        ({"content": b"[" * 100_000}, 422, "codec", None),
        ({"content": b""}, 422, "codec", None),
        ({"content": b" " * (16 * 1024 * 1024 + 1)}, 413, "frame_too_large", None),
        ({"content": b"\xff", "headers": MSGPACK}, 422, "codec", None),
        ({"content": bytes(MAX_FRAME_BYTES + 1), "headers": MSGPACK}, 413, "frame_too_large",
         None),
    ]  # fmt: skip
    for arguments, status, code, field in cases:
        response = post(null_server, **arguments)
        as_msgpack = "headers" in arguments
        error = (unpack(response.content) if as_msgpack else response.json())["error"]
        assert (response.status_code, error["code"], error["field"]) == (status, code, field)


def test_error_echoes_the_request_id(
    null_server: BackgroundServer, make_observation: MakeObservation
) -> None:
    body = json_body(make_observation(), state=[], request_id="mine")
    assert post(null_server, json=body).json()["request_id"] == "mine"


def test_contract_and_health(null_server: BackgroundServer) -> None:
    with httpx.Client(base_url=null_server.http_url) as http:
        described = http.get("/v1/contract").json()
        assert described["protocol"] == "reflexarc"
        assert described["contract"] == libero_contract().model_dump(mode="json")
        assert http.get("/livez").status_code == 200
        assert http.get("/readyz").json() == {"phase": "ready"}
        healthz = http.get("/healthz")
        assert (healthz.status_code, healthz.text) == (200, "OK\n")
        assert "/v1/actions" in http.get("/openapi.json").json()["paths"]


def test_foreign_web_page_is_refused(
    null_server: BackgroundServer, make_observation: MakeObservation
) -> None:
    body = json_body(make_observation())
    for origin in ("http://evil.example", "null", "http://[", f"http://evil:{null_server.port}"):
        response = post(null_server, json=body, headers={"Origin": origin})
        assert response.status_code == 403, origin
    rebound = {"Origin": f"http://evil:{null_server.port}", "Host": f"evil:{null_server.port}"}
    assert post(null_server, json=body, headers=rebound).status_code == 403
    own = {"Origin": null_server.http_url}
    assert post(null_server, json=body, headers=own).status_code == 200


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
KEYS = st.sampled_from(
    ["images", "state", "instruction", "seed", "request_id", "session_id", "denoising_steps"]
)
IMAGES = st.dictionaries(
    st.sampled_from(["agentview", "eye_in_hand", "other"]),
    st.fixed_dictionaries(
        {},
        optional={
            "format": st.sampled_from(["png", "jpeg", "raw", "gif"]) | JSON_VALUES,
            "data": st.binary(max_size=64).map(lambda b: base64.b64encode(b).decode()),
            "__numpy__": st.text(max_size=8) | JSON_VALUES,
            "dtype": st.sampled_from(["|u1", "<f8", "|O", "V8"]) | JSON_VALUES,
            "shape": st.lists(st.integers(-1, 2**40), max_size=8) | JSON_VALUES,
        },
    )
    | JSON_VALUES,
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    fields=st.dictionaries(KEYS, JSON_VALUES),
    images=IMAGES,
    state=st.lists(st.floats() | st.integers(), max_size=9) | JSON_VALUES,
)
def test_no_json_body_breaks_the_server(
    null_server: BackgroundServer, fields: dict[str, Any], images: Any, state: Any
) -> None:
    body = json.dumps({"images": images, "state": state, **fields}).encode()
    assert FUZZ_CLIENT.post(f"{null_server.http_url}/v1/actions", content=body).status_code == 422


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_msgpack_body_breaks_the_server(null_server: BackgroundServer, data: Any) -> None:
    observation = Observation(
        images={"agentview": np.zeros((4, 4, 3), np.uint8)}, state=np.zeros(8), instruction="x"
    )
    body = bytearray(pack(observation.to_wire()))
    for _ in range(data.draw(st.integers(1, 6))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    response = FUZZ_CLIENT.post(
        f"{null_server.http_url}/v1/actions", content=bytes(body), headers=MSGPACK
    )
    assert response.status_code == 422


FUZZ_CLIENT = httpx.Client(timeout=20)
