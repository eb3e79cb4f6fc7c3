"""The websocket /v1/policy on a real socket: replies, named errors, limits, concurrency."""

from __future__ import annotations

import gc
import socket
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import msgpack
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame
from websockets.streams import StreamReader
from websockets.sync.client import ClientConnection, connect

from reflexarc.contract import ActionChunk, Observation, PolicyContract, pack, unpack
from reflexarc.contract.codec import MAX_FRAME_BYTES
from reflexarc.contract.images import encode_image
from reflexarc.server import BackgroundServer, NullPolicy, libero_contract

MakeObservation = Callable[..., Observation]


def open_policy(server: BackgroundServer) -> tuple[ClientConnection, Any]:
    connection = connect(f"{server.url}/v1/policy", compression=None, max_size=None)
    return connection, unpack(connection.recv(timeout=10))


def ask(connection: ClientConnection, message: Any) -> Any:
    connection.send(message if isinstance(message, bytes | str) else pack(message))
    return unpack(connection.recv(timeout=10))


def expected_actions(seed: int) -> np.ndarray[Any, Any]:
    observation = Observation(images={}, state=np.zeros(8), seed=seed)
    return NullPolicy().infer([observation])[0].actions


def test_first_frame_names_protocol_contract_and_sampling(null_server: BackgroundServer) -> None:
    connection, first = open_policy(null_server)
    connection.close()
    assert (first["protocol"], first["protocol_version"]) == ("reflexarc", 1)
    contract = PolicyContract.model_validate(first["contract"], strict=False)
    assert contract == libero_contract()
    assert first["sampling"] == {"noise_shape": [10, 7], "denoising_steps": 1}


def test_reply_belongs_to_its_request(
    null_server: BackgroundServer, make_observation: MakeObservation
) -> None:
    connection, _ = open_policy(null_server)
    observation = make_observation(seed=3, request_id="r-3", session_id="s-1")
    chunk = ActionChunk.from_wire(ask(connection, observation.to_wire()))
    connection.close()
    np.testing.assert_array_equal(chunk.actions, expected_actions(3))
    assert (chunk.seed, chunk.request_id, chunk.session_id) == (3, "r-3", "s-1")
    assert {"queue_ms", "decode_ms", "infer_ms"} <= set(chunk.timing)


def test_server_draws_a_seed_that_reproduces_the_chunk(
    null_server: BackgroundServer, make_observation: MakeObservation
) -> None:
    connection, _ = open_policy(null_server)
    first, second = (
        ActionChunk.from_wire(ask(connection, make_observation(seed=None).to_wire()))
        for _ in range(2)
    )
    again = ActionChunk.from_wire(ask(connection, make_observation(seed=first.seed).to_wire()))
    connection.close()
    assert first.seed != second.seed
    np.testing.assert_array_equal(again.actions, first.actions)


def violations() -> list[tuple[str, Callable[[dict[str, Any]], None], str]]:
    def drop_camera(message: dict[str, Any]) -> None:
        del message["images"]["eye_in_hand"]

    def small_image(message: dict[str, Any]) -> None:
        message["images"]["agentview"] = np.zeros((64, 64, 3), np.uint8)

    def joint_state(message: dict[str, Any]) -> None:
        message["state"] = np.zeros(9)

    def nan_state(message: dict[str, Any]) -> None:
        message["state"] = np.full(8, np.nan)

    def list_state(message: dict[str, Any]) -> None:
        message["state"] = [0.0] * 8

    def no_instruction(message: dict[str, Any]) -> None:
        del message["instruction"]

    def negative_seed(message: dict[str, Any]) -> None:
        message["seed"] = -1

    return [
        ("missing camera", drop_camera, "images.eye_in_hand"),
        ("image size", small_image, "images.agentview"),
        ("state layout", joint_state, "state"),
        ("not finite", nan_state, "state"),
        ("list for array", list_state, "state"),
        ("no instruction", no_instruction, "instruction"),
        ("seed", negative_seed, "seed"),
    ]


@pytest.mark.parametrize("name,damage,field", violations(), ids=[v[0] for v in violations()])
def test_violation_is_named_and_the_connection_lives(
    null_server: BackgroundServer,
    make_observation: MakeObservation,
    name: str,
    damage: Callable[[dict[str, Any]], None],
    field: str,
) -> None:
    connection, _ = open_policy(null_server)
    message = make_observation(request_id="bad").to_wire()
    damage(message)
    reply = ask(connection, message)
    assert reply["error"]["code"] == "contract_violation"
    assert reply["error"]["field"] == field
    assert reply["request_id"] == "bad"
    good = ActionChunk.from_wire(ask(connection, make_observation(seed=5).to_wire()))
    connection.close()
    np.testing.assert_array_equal(good.actions, expected_actions(5))


MALFORMED = {
    "text": "hello",
    "empty": b"",
    "garbage": bytes(range(255, 155, -1)),
    "truncated": pack({"images": {}, "state": np.zeros(8)})[:-3],
    "not a map": pack([1, 2, 3]),
    "unknown field": pack({"images": {}, "state": np.zeros(8), "imgs": 1}),
    "no state": pack({"images": {}}),
    "images a list": pack({"images": [], "state": np.zeros(8)}),
    "object dtype": msgpack.packb(
        {"images": {}, "state": {b"__ndarray__": True, b"data": b"\1" * 8, b"dtype": "|O",
                                 b"shape": [1]}}
    ),
    "array longer than its bytes": msgpack.packb(
        {"images": {}, "state": {b"__ndarray__": True, b"data": b"", b"dtype": "<f8",
                                 b"shape": [65536, 65536]}}
    ),
    "deep": b"\x91" * 100 + b"\x00",
    "extension type": b"\xd4\x05\x00",
    "bad utf-8 key": b"\x81\xa1\xff\x00",
}  # fmt: skip


@pytest.mark.parametrize("frame", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_frame_is_named_and_the_connection_lives(
    null_server: BackgroundServer, make_observation: MakeObservation, frame: bytes | str
) -> None:
    connection, _ = open_policy(null_server)
    reply = ask(connection, frame)
    assert reply["error"]["code"] == "codec", reply
    good = ActionChunk.from_wire(ask(connection, make_observation(seed=5).to_wire()))
    connection.close()
    np.testing.assert_array_equal(good.actions, expected_actions(5))


def test_frame_above_the_cap_closes_with_1009(null_server: BackgroundServer) -> None:
    connection, _ = open_policy(null_server)
    with pytest.raises(ConnectionClosed) as closed:
        connection.send(bytes(MAX_FRAME_BYTES + 1))
        connection.recv(timeout=20)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1009


def test_png_images_give_the_chunk_of_raw_ones(make_observation: MakeObservation) -> None:
    seen: list[Observation] = []

    class Recording(NullPolicy):
        def infer(self, observations: Sequence[Observation]) -> list[ActionChunk]:
            seen.extend(observations)
            return super().infer(observations)

    observation = make_observation()
    packed: dict[str, Any] = {
        name: encode_image(image, "png") for name, image in observation.images.items()
    }
    with BackgroundServer(Recording) as server:
        connection, _ = open_policy(server)
        ask(connection, replace(observation, images=packed).to_wire())
        connection.close()
    for name, image in observation.images.items():
        np.testing.assert_array_equal(seen[0].images[name], image)


@pytest.mark.parametrize("image_format", ["png", "jpeg"])
def test_damaged_or_huge_image_is_named(
    null_server: BackgroundServer, make_observation: MakeObservation, image_format: str
) -> None:
    connection, _ = open_policy(null_server)
    message = make_observation().to_wire()
    whole = encode_image(message["images"]["agentview"], image_format)
    huge = bytearray(encode_image(message["images"]["agentview"], "png").data)
    huge[16:24] = (60_000).to_bytes(4, "big") * 2  # width and height in the header
    huge[29:33] = zlib.crc32(huge[12:29]).to_bytes(4, "big")
    bad_images = [
        replace(whole, data=whole.data[: len(whole.data) // 2]),
        replace(whole, data=b"no image"),
        replace(whole, format="png", data=bytes(huge)),
        replace(whole, format="raw", shape=None),
    ]
    for image in bad_images:
        message["images"]["agentview"] = image
        reply = ask(connection, message)
        assert (reply["error"]["code"], reply["error"]["field"]) == ("codec", "images.agentview")
    connection.close()


def test_policy_that_raises_gives_an_error_id_and_no_traceback(
    make_observation: MakeObservation, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(NullPolicy):
        def infer(self, observations: Sequence[Observation]) -> list[ActionChunk]:
            if observations[0].seed == 1:
                raise RuntimeError("secret path /weights")
            if observations[0].seed == 2:
                return [ActionChunk(np.full((10, 7), np.nan, np.float32), 2)]
            return super().infer(observations)

    with BackgroundServer(Broken) as server:
        connection, _ = open_policy(server)
        raised = ask(connection, make_observation(seed=1).to_wire())["error"]
        not_finite = ask(connection, make_observation(seed=2).to_wire())["error"]
        good = ActionChunk.from_wire(ask(connection, make_observation(seed=3).to_wire()))
        connection.close()
    assert raised["code"] == not_finite["code"] == "inference_failed"
    assert "secret" not in raised["message"]
    error_id = raised["message"].rsplit(" ", 1)[1]
    assert error_id in caplog.text and "secret path /weights" in caplog.text
    np.testing.assert_array_equal(good.actions, expected_actions(3))


def test_concurrent_clients_get_their_own_replies(
    null_server: BackgroundServer, make_observation: MakeObservation
) -> None:
    wrong: list[str] = []

    def client(number: int) -> None:
        connection, _ = open_policy(null_server)
        for step in range(15):
            seed = 1000 * number + step
            observation = make_observation(seed=seed, request_id=f"{number}/{step}")
            chunk = ActionChunk.from_wire(ask(connection, observation.to_wire()))
            same = np.array_equal(chunk.actions, expected_actions(seed))
            if not same or chunk.request_id != observation.request_id:
                wrong.append(f"{number}/{step}")
        connection.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


def test_pipelined_requests_are_answered_in_order(
    null_server: BackgroundServer, make_observation: MakeObservation
) -> None:
    connection, _ = open_policy(null_server)
    for seed in range(5):
        connection.send(pack(make_observation(seed=seed).to_wire()))
    seeds = [ActionChunk.from_wire(unpack(connection.recv(timeout=10))).seed for _ in range(5)]
    connection.close()
    assert seeds == [0, 1, 2, 3, 4]


def test_unknown_websocket_path_is_refused(null_server: BackgroundServer) -> None:
    with pytest.raises(Exception, match=r"403|404"):
        connect(f"{null_server.url}/v2/policy")


@pytest.mark.parametrize("path", ["/v1/policy", "/"])
def test_foreign_web_page_is_refused(null_server: BackgroundServer, path: str) -> None:
    with pytest.raises(Exception, match="403"):
        connect(f"{null_server.url}{path}", origin="http://evil.example")  # type: ignore[arg-type]
    connect(f"{null_server.url}{path}", origin=null_server.http_url).close()  # type: ignore[arg-type]


@pytest.mark.parametrize("whole", [True, False])
def test_lost_connection_keeps_no_frame_until_the_garbage_collector_comes(
    make_observation: MakeObservation, whole: bool
) -> None:
    frame = pack(make_observation().to_wire())
    start_of_frame = b"\x82\xff" + len(frame).to_bytes(8, "big") + bytes(4) + frame[:-1]
    with BackgroundServer(NullPolicy) as server:
        connections = server._server.server_state.connections
        gc.collect()
        gc.disable()
        try:
            connection, _ = open_policy(server)
            assert connections
            if whole:
                ask(connection, frame)
            else:
                connection.socket.sendall(start_of_frame)
            connection.socket.shutdown(socket.SHUT_RDWR)
            for _ in range(200):
                if not connections:
                    break
                time.sleep(0.05)
            time.sleep(0.2)  # the rest of the same turn of the server's event loop
            assert not [owner for owner in gc.get_objects() if holds_a_frame(owner, len(frame))]
        finally:
            gc.enable()


def holds_a_frame(owner: object, size: int) -> bool:
    """Whether this is a part of a websocket that holds a whole frame, or nearly."""
    kind = type(owner)  # not isinstance: a dead weak reference is also among the objects
    held: Any = owner
    if kind is Frame:
        return len(held.data) >= size - 1
    return kind is StreamReader and len(held.buffer) >= size - 1
