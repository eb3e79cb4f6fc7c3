"""starVLA's messages on ``/``, as its server and its LIBERO client have them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from reflexarc.contract import ActionChunk, EncodedImage, Observation, PolicyContract, pack, unpack
from reflexarc.contract.images import encode_image, resize_bilinear
from reflexarc.contract.policy_contract import LIBERO_STATE_JOINT
from reflexarc.server import BackgroundServer, NullPolicy, libero_contract
from reflexarc.server.episodes import decision_seed

SEED = 11


class Seeing(NullPolicy):
    """The null policy with a gripper that opens, then closes; keeps what it saw."""

    def __init__(self, contract: PolicyContract | None = None) -> None:
        super().__init__(contract)
        self.seen: list[Observation] = []

    def infer(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        self.seen.extend(observations)
        chunks = super().infer(observations)
        for chunk in chunks:
            chunk.actions[:5, 6], chunk.actions[5:, 6] = -1, 1
        return chunks


POLICY = Seeing()


@pytest.fixture(scope="module")
def server() -> Iterator[BackgroundServer]:
    with BackgroundServer(lambda: POLICY, default_seed=SEED) as server:
        yield server


@pytest.fixture
def connection(server: BackgroundServer) -> Iterator[ClientConnection]:
    POLICY.seen.clear()
    with connect(server.url, compression=None, max_size=None) as connection:
        connection.metadata = unpack(connection.recv(timeout=10))  # type: ignore[attr-defined]
        yield connection


def example(number: int = 0, size: int = 256, **changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(number)
    images = [rng.integers(0, 256, (size, size, 3), dtype=np.uint8) for _ in range(2)]
    return {"image": images, "lang": f"task {number}", "state": rng.normal(size=8), **changes}


def ask(connection: ClientConnection, message: Any) -> Any:
    connection.send(message if isinstance(message, str | bytes) else pack(message))
    reply = connection.recv(timeout=10)
    return reply if isinstance(reply, str) else unpack(reply)


def test_first_frame_holds_what_its_clients_read(connection: Any) -> None:
    assert connection.metadata["action_chunk_size"] == 10
    assert connection.metadata["training_obs_image_size"] == [224, 224]
    assert connection.metadata["available_unnorm_keys"] == ["null"]
    assert connection.metadata["default_unnorm_key"] == "null"
    assert connection.metadata["contract"]["family"] == "null"  # openpi's and starVLA's are one


@pytest.mark.parametrize("kind", ["infer", "predict_action", None])
def test_wrapped_and_flat_requests(connection: ClientConnection, kind: str | None) -> None:
    payload = {
        "examples": [example()],
        "unnorm_key": None,
        "do_sample": False,
        "use_ddim": True,
        "num_ddim_steps": 10,
    }
    wrapped = {"type": kind, "request_id": "r-7", "payload": payload}
    reply = ask(connection, payload if kind is None else wrapped)
    actions = reply.pop("data")["actions"]
    assert reply == {
        "status": "ok",
        "ok": True,
        "type": "inference_result",
        "request_id": "default" if kind is None else "r-7",
    }
    assert actions.dtype == np.float32 and actions.shape == (1, 10, 7)
    expected = NullPolicy().infer([Observation({}, np.zeros(8), seed=SEED)])[0].actions
    np.testing.assert_array_equal(actions[0, :, :6], expected[:, :6])
    # Its LIBERO client executes 1 - 2 * (g > 0.5): what opens there must be 1.
    executed = 1.0 - 2.0 * (actions[0, :, 6] > 0.5)
    np.testing.assert_array_equal(executed, [-1] * 5 + [1] * 5)


def test_policy_sees_scene_then_wrist_in_its_own_size(connection: ClientConnection) -> None:
    sent = example(3)
    ask(connection, {"examples": [{**sent, "state": sent["state"][None]}]})
    (seen,) = POLICY.seen
    for camera, image in zip(("agentview", "eye_in_hand"), sent["image"], strict=True):
        np.testing.assert_array_equal(seen.images[camera], resize_bilinear(image, 224, 224))
    np.testing.assert_array_equal(seen.state, sent["state"])
    assert seen.instruction == "task 3"


def test_examples_of_one_message_are_answered_in_order(connection: ClientConnection) -> None:
    reply = ask(connection, {"examples": [example(number) for number in range(3)]})
    assert reply["data"]["actions"].shape == (3, 10, 7)
    assert sorted(seen.instruction or "" for seen in POLICY.seen) == ["task 0", "task 1", "task 2"]


def test_seeds_follow_from_the_servers_and_the_decision(connection: ClientConnection) -> None:
    for _ in range(2):
        ask(connection, {"examples": [example(), example(1)]})
    seeds = [decision_seed(SEED, decision) for decision in (0, 0, 1, 1)]
    assert [seen.seed for seen in POLICY.seen] == seeds and seeds[0] == SEED != seeds[2]


def test_compressed_images_are_decoded(connection: ClientConnection) -> None:
    sent = example()
    images = [encode_image(image, "png") for image in sent["image"]]
    assert ask(connection, {"examples": [{**sent, "image": images}]})["ok"]
    np.testing.assert_array_equal(
        POLICY.seen[0].images["agentview"], resize_bilinear(sent["image"][0], 224, 224)
    )


def test_ping_and_unknown_type(connection: ClientConnection) -> None:
    assert ask(connection, {"type": "ping", "request_id": "p"}) == {
        "status": "ok",
        "ok": True,
        "type": "ping",
        "request_id": "p",
    }
    reply = ask(connection, {"type": "dance"})
    assert (reply["status"], reply["ok"], reply["type"]) == ("error", False, "unknown")
    assert "dialect starvla: type: 'dance' is unknown" in reply["error"]["message"]
    assert POLICY.seen == []


BOMB = EncodedImage("png", encode_image(np.zeros((5000, 1, 3), np.uint8), "png").data)
WRONG: dict[str, tuple[Any, list[str]]] = {
    "no examples": ({"type": "infer", "payload": {"image": 1}},
                    ["examples: missing", "keys that came: image"]),
    "empty": ({"examples": []}, ["examples", "1 to 16"]),
    "too many": ({"examples": [{}] * 17}, ["examples", "1 to 16", "17"]),
    "no list": ({"examples": 3}, ["examples", "no list"]),
    "no map": ({"examples": [3]}, ["examples[0]", "int"]),
    "payload": ({"type": "infer", "payload": [1]}, ["payload", "map"]),
    "no image": ({"examples": [example(image=None)]}, ["image: missing", "images"]),
    "one image": ({"examples": [example(image=example()["image"][:1])]},
                  ["examples[0].image[1]: missing", "images.eye_in_hand", "agentview"]),
    "float image": ({"examples": [example(image=[np.zeros((8, 8, 3))] * 2)]},
                    ["examples[0].image[0]", "uint8", "float64"]),
    "wide image": ({"examples": [example(image=[np.zeros((8, 16, 3), np.uint8)] * 2)]},
                   ["examples[0].image[0]", "8 high and 16 wide", "224"]),
    "tall png": ({"examples": [example(image=[BOMB] * 2)]}, ["examples[0].image[0]", "4096"]),
    "no state": ({"examples": [example(state=None)]}, ["state: missing", "keys that came"]),
    "state length": ({"examples": [example(state=np.zeros(7))]},
                     ["examples.state", "(8,)", "(7,)"]),
    "two states": ({"examples": [example(state=np.zeros((2, 8)))]}, ["state", "(2, 8)"]),
    "lang bytes": ({"examples": [example(lang=b"x")]}, ["lang", "text", "bytes"]),
    "empty lang": ({"examples": [example(lang="")]}, ["examples.lang", "instruction"]),
}  # fmt: skip


@pytest.mark.parametrize("message,parts", WRONG.values(), ids=WRONG.keys())
def test_error_names_dialect_and_key_and_the_connection_lives(
    connection: ClientConnection, message: Any, parts: list[str]
) -> None:
    reply = ask(connection, {**message, "request_id": "e"})
    head = {key: reply[key] for key in ("status", "ok", "type", "request_id")}
    assert head == {
        "status": "error",
        "ok": False,
        "type": "inference_result",
        "request_id": "e",
    }
    for part in ["dialect starvla", *parts]:
        assert part in reply["error"]["message"], reply["error"]["message"]
    assert ask(connection, {"examples": [example()]})["ok"]


def test_openpi_on_the_same_connection(connection: ClientConnection) -> None:
    """Only the keys of a message say whose it is."""
    sent = example(size=224)
    request = {
        "observation/image": sent["image"][0],
        "observation/wrist_image": sent["image"][1],
        "observation/state": sent["state"],
        "prompt": sent["lang"],
    }
    np.testing.assert_array_equal(ask(connection, request)["actions"][:, 6], [-1] * 5 + [1] * 5)
    assert "dialect openpi" in ask(connection, {"observation/image": sent["image"][0]})
    assert ask(connection, {"examples": [sent]})["ok"]


def test_policy_that_its_client_cannot_drive_refuses_at_the_handshake() -> None:
    contract = libero_contract().model_copy(update={"state": LIBERO_STATE_JOINT})
    with (
        BackgroundServer(lambda: NullPolicy(contract)) as server,
        connect(server.url, compression=None) as connection,
        pytest.raises(ConnectionClosed, match=r"1008.*state.*joint7"),
    ):
        connection.recv(timeout=10)
