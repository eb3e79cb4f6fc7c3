"""The websocket / for openpi's clients, spoken here by hand; the real client: tests/conformance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from reflexarc.contract import ActionChunk, Camera, Observation, PolicyContract, pack, unpack
from reflexarc.contract.policy_contract import LIBERO_STATE_JOINT, Gripper, History
from reflexarc.server import BackgroundServer, NullPolicy, libero_contract

MakeObservation = Callable[..., Observation]


def libero_request(observation: Observation) -> dict[str, Any]:
    return {
        "observation/image": observation.images["agentview"],
        "observation/wrist_image": observation.images["eye_in_hand"],
        "observation/state": observation.state,
        "prompt": observation.instruction,
    }


def open_openpi(server: BackgroundServer) -> ClientConnection:
    connection = connect(server.url, compression=None, max_size=None)
    assert "contract" in unpack(connection.recv(timeout=10))
    return connection


def ask(connection: ClientConnection, request: Any) -> Any:
    connection.send(request if isinstance(request, bytes | str) else pack(request))
    reply = connection.recv(timeout=10)
    return reply if isinstance(reply, str) else unpack(reply)


def test_reply_holds_one_array_and_openpis_timings(
    null_server: BackgroundServer, make_observation: MakeObservation
) -> None:
    connection = open_openpi(null_server)
    first, second = (ask(connection, libero_request(make_observation())) for _ in range(2))
    connection.close()
    assert set(first) == {"actions", "server_timing", "policy_timing"}
    assert first["actions"].shape == (10, 7) and first["actions"].dtype == np.float32
    assert set(first["server_timing"]) == {"infer_ms"}
    assert set(second["server_timing"]) == {"infer_ms", "prev_total_ms"}
    assert set(second["policy_timing"]) == {"infer_ms"}


def test_policy_sees_the_request_under_the_contracts_names(
    make_observation: MakeObservation,
) -> None:
    seen: list[Observation] = []

    class Recording(NullPolicy):
        def infer(self, observations: Any) -> Any:
            seen.extend(observations)
            return super().infer(observations)

    observation = make_observation()
    with BackgroundServer(Recording) as server:
        connection = open_openpi(server)
        ask(connection, libero_request(observation))
        connection.close()
    np.testing.assert_array_equal(seen[0].images["agentview"], observation.images["agentview"])
    np.testing.assert_array_equal(seen[0].images["eye_in_hand"], observation.images["eye_in_hand"])
    np.testing.assert_array_equal(seen[0].state, observation.state)
    assert seen[0].instruction == observation.instruction


WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "image size": (
        {"observation/image": np.zeros((256, 256, 3), np.uint8)},
        ["observation/image", "(224, 224, 3)", "(256, 256, 3)"],
    ),
    "float image": (
        {"observation/wrist_image": np.zeros((224, 224, 3), np.float32)},
        ["observation/wrist_image", "uint8", "float32"],
    ),
    "state length": ({"observation/state": np.zeros(9)}, ["observation/state", "(8,)", "(9,)"]),
    "integer state": ({"observation/state": np.zeros(8, int)}, ["observation/state", "int64"]),
    "empty prompt": ({"prompt": ""}, ["prompt", "instruction"]),
    "prompt bytes": ({"prompt": b"pick"}, ["prompt", "text"]),
    "missing key": ({"observation/wrist_image": None}, ["observation/wrist_image", "missing",
                                                        "uint8 (224, 224, 3)", "prompt"]),
}  # fmt: skip


@pytest.mark.parametrize("change,parts", WRONG.values(), ids=WRONG.keys())
def test_error_is_text_that_names_dialect_key_and_expectation(
    null_server: BackgroundServer,
    make_observation: MakeObservation,
    change: dict[str, Any],
    parts: list[str],
) -> None:
    connection = open_openpi(null_server)
    request = {**libero_request(make_observation()), **change}
    request = {key: value for key, value in request.items() if value is not None}
    text = ask(connection, request)
    assert isinstance(text, str)
    for part in ["dialect openpi", *parts]:
        assert part in text, text
    assert ask(connection, libero_request(make_observation()))["actions"].shape == (10, 7)
    connection.close()


@pytest.mark.parametrize("frame", ["text", b"\xc1", b"", pack([1]), pack({"observation": []})])
def test_malformed_frame_is_told_and_the_connection_lives(
    null_server: BackgroundServer, make_observation: MakeObservation, frame: bytes | str
) -> None:
    connection = open_openpi(null_server)
    assert "dialect openpi" in ask(connection, frame)
    assert ask(connection, libero_request(make_observation()))["actions"].shape == (10, 7)
    connection.close()


def changed(**fields: Any) -> PolicyContract:
    return libero_contract().model_copy(update=fields)


THIRD_CAMERA = Camera(
    name="sideview", height=224, width=224, orientation="rotated_180",
    source_height=256, source_width=256,
)  # fmt: skip
UPSIDE_DOWN = tuple(
    camera.model_copy(update={"orientation": "opengl"}) for camera in libero_contract().cameras
)
OTHER_GRIPPER = libero_contract().action.model_copy(
    update={"gripper": Gripper(index=6, open=1.0, closed=0.0)}
)
NO_GRIPPER = libero_contract().action.model_copy(update={"gripper": None})
CANNOT_SUPPLY = {
    "joint state": (changed(state=LIBERO_STATE_JOINT), "joint7"),
    "third camera": (changed(cameras=(*libero_contract().cameras, THIRD_CAMERA)), "sideview"),
    "goal image": (changed(needs_goal_image=True), "goal_image"),
    "history": (changed(history=History(frames=2)), "history"),
    "no gripper": (changed(action=NO_GRIPPER), "gripper"),
}


@pytest.mark.parametrize("contract,part", CANNOT_SUPPLY.values(), ids=CANNOT_SUPPLY.keys())
def test_policy_that_openpi_cannot_drive_refuses_at_the_handshake(
    contract: PolicyContract, part: str
) -> None:
    with BackgroundServer(lambda: NullPolicy(contract)) as server:
        connection = connect(server.url, compression=None)
        with pytest.raises(ConnectionClosed) as closed:
            connection.recv(timeout=10)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1008
        assert "openpi" in closed.value.rcvd.reason and part in closed.value.rcvd.reason


class Echo(NullPolicy):
    """Answers with the gripper open, then closed; keeps what it saw."""

    def __init__(self, contract: PolicyContract) -> None:
        super().__init__(contract)
        self.seen: list[Observation] = []

    def infer(self, observations: Any) -> Any:
        self.seen.extend(observations)
        gripper = self.contract.action.gripper
        assert gripper is not None
        actions = np.zeros((10, 7), np.float32)
        actions[:5, 6], actions[5:, 6] = gripper.open, gripper.closed
        return [ActionChunk(actions=actions, seed=0) for _ in observations]


def test_orientation_and_gripper_are_converted(make_observation: MakeObservation) -> None:
    policy = Echo(changed(cameras=UPSIDE_DOWN, action=OTHER_GRIPPER))
    observation = make_observation()
    with BackgroundServer(lambda: policy) as server:
        connection = open_openpi(server)
        reply = ask(connection, libero_request(observation))
        connection.close()
    np.testing.assert_array_equal(reply["actions"][:, 6], [-1] * 5 + [1] * 5)
    for camera, image in observation.images.items():
        np.testing.assert_array_equal(policy.seen[-1].images[camera], image[::-1, ::-1])
