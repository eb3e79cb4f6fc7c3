"""GR00T's HTTP interface, as its server and its LIBERO example have it."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest

from reflexarc.contract import ActionChunk, Camera, Observation, PolicyContract
from reflexarc.contract.policy_contract import (
    LIBERO_STATE_JOINT,
    ActionSpec,
    Gripper,
    History,
    StateSpec,
)
from reflexarc.server import BackgroundServer, NullPolicy, libero_contract

SEED = 11
PARTS = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
LANGUAGE = "annotation.human.action.task_description"


class Seeing(NullPolicy):
    def __init__(self, contract: PolicyContract | None = None) -> None:
        super().__init__(contract)
        self.seen: list[Observation] = []

    def infer(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        self.seen.extend(observations)
        return super().infer(observations)


POLICY = Seeing()


@pytest.fixture(scope="module")
def server() -> Iterator[BackgroundServer]:
    with BackgroundServer(lambda: POLICY, default_seed=SEED) as server:
        yield server


def json_numpy(array: npt.NDArray[Any]) -> dict[str, Any]:
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {"__numpy__": data, "dtype": array.dtype.str, "shape": array.shape}


def libero(**changes: Any) -> dict[str, Any]:
    """The observation of GR00T's LIBERO example; None leaves a key out."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (1, 224, 224, 3), dtype=np.uint8)
    observation = {
        "video.image": json_numpy(image),
        "video.wrist_image": json_numpy(image[:, ::-1]),
        **{f"state.{part}": json_numpy(np.array([[i / 10]])) for i, part in enumerate(PARTS[:6])},
        "state.gripper": json_numpy(np.array([[0.04, -0.04]])),
        LANGUAGE: ["pick it up"],
        **changes,
    }
    return {key: value for key, value in observation.items() if value is not None}


def act(server: BackgroundServer, observation: Any) -> httpx.Response:
    return httpx.post(f"{server.http_url}/act", json={"observation": observation})


def chunk(reply: dict[str, Any], parts: Sequence[str] = PARTS) -> npt.NDArray[np.float32]:
    assert list(reply) == [f"action.{part}" for part in parts]
    return np.concatenate([reply[f"action.{part}"] for part in parts], axis=1).astype(np.float32)


def test_reply_has_the_chunks_rows_by_part(server: BackgroundServer) -> None:
    POLICY.seen.clear()
    reply = act(server, libero())
    assert reply.status_code == 200 and reply.headers["content-type"] == "application/json"
    expected = NullPolicy().infer([Observation({}, np.zeros(8), seed=SEED)])[0].actions
    expected[:, 6] = (1 - expected[:, 6]) / 2  # -1 opens, 1 closes -> 1 opens, 0 closes
    np.testing.assert_allclose(chunk(reply.json()), expected, atol=1e-7)
    (seen,) = POLICY.seen
    assert seen.instruction == "pick it up" and seen.images["agentview"].shape == (224, 224, 3)
    np.testing.assert_array_equal(seen.state, [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.04, -0.04])


FORMS: dict[str, dict[str, Any]] = {
    "lists": {"state.gripper": [[0.04, -0.04]], "state.x": [[0]]},
    "flat lists": {"state.gripper": [0.04, -0.04], "state.x": [0.0]},
    "C++ arrays": {"state.gripper": {**json_numpy(np.array([[0.04, -0.04]])), "__numpy__": None,
                   "__ndarray__": json_numpy(np.array([[0.04, -0.04]]))["__numpy__"]}},
    "batch and time": {"video.image": json_numpy(np.zeros((1, 1, 224, 224, 3), np.uint8)),
                       "state.gripper": [[[0.04, -0.04]]]},
    "image as lists": {"video.image": np.zeros((1, 64, 64, 3), int).tolist()},
    "text": {LANGUAGE: "pick it up"},
    "older key": {LANGUAGE: None, "annotation.human.coarse_action": ["pick it up"]},
}  # fmt: skip


@pytest.mark.parametrize("changes", FORMS.values(), ids=FORMS.keys())
def test_forms_that_clients_send(server: BackgroundServer, changes: dict[str, Any]) -> None:
    POLICY.seen.clear()
    changes = dict(changes)
    if "state.gripper" in changes and isinstance(changes["state.gripper"], dict):
        changes["state.gripper"] = {
            key: value for key, value in changes["state.gripper"].items() if value is not None
        }
    reply = act(server, libero(**changes))
    assert reply.status_code == 200, reply.text
    np.testing.assert_array_equal(POLICY.seen[0].state[6:], [0.04, -0.04])
    assert POLICY.seen[0].instruction == "pick it up"


def test_encoded_body_is_answered_plainly_as_by_its_server(server: BackgroundServer) -> None:
    body = {"encoded": json.dumps({"observation": libero()})}
    reply = httpx.post(f"{server.http_url}/act", json=body)
    assert reply.status_code == 200
    assert chunk(reply.json()).shape == (10, 7)


def test_reset_and_health(server: BackgroundServer) -> None:
    assert httpx.post(f"{server.http_url}/reset").json() == {"status": "reset"}
    assert httpx.get(f"{server.http_url}/health").status_code == 200


WRONG: dict[str, tuple[Any, list[str]]] = {
    "no map": ([1], ["expected a map", "video.image"]),
    "missing video": (libero(**{"video.image": None}),
                      ["video.image: missing", "images.agentview", "keys that came"]),
    "missing part": (libero(**{"state.yaw": None}), ["state.yaw: missing", "state.gripper (2,)"]),
    "part length": (libero(**{"state.gripper": [[0.1]]}), ["state.gripper", "(2,)", "(1,)"]),
    "text in state": (libero(**{"state.x": [["a"]]}), ["state.x", "numbers"]),
    "ragged": (libero(**{"state.gripper": [[1, 2], [3]]}), ["state.gripper", "no array"]),
    "two frames": (libero(**{"video.image": json_numpy(np.zeros((2, 8, 8, 3), np.uint8))}),
                   ["video.image", "one observation", "(2, 8, 8, 3)"]),
    "float video": (libero(**{"video.image": json_numpy(np.zeros((1, 8, 8, 3)))}),
                    ["video.image", "uint8", "float64"]),
    "object dtype": (libero(**{"state.x": {"__numpy__": "AAAAAAAAAAA=", "dtype": "|O",
                                           "shape": [1, 1]}}), ["state.x", "dtype"]),
    "huge shape": (libero(**{"state.x": {"__numpy__": "AAAAAAAAAAA=", "dtype": "<f8",
                                         "shape": [60000, 60000]}}), ["state.x", "needs"]),
    "no base64": (libero(**{"state.x": {"__numpy__": "%", "dtype": "<f8", "shape": [1]}}),
                  ["state.x", "base64"]),
    "not finite": (libero(**{"state.x": json_numpy(np.array([[np.nan]]))}), ["state", "eef_x"]),
    "no language": (libero(**{LANGUAGE: None}), [LANGUAGE, "instruction"]),
    "two tasks": (libero(**{LANGUAGE: ["a", "b"]}), [LANGUAGE, "list of one"]),
}  # fmt: skip


@pytest.mark.parametrize("observation,parts", WRONG.values(), ids=WRONG.keys())
def test_error_names_dialect_and_key(
    server: BackgroundServer, observation: Any, parts: list[str]
) -> None:
    reply = act(server, observation)
    assert reply.status_code == 422
    told = reply.json()
    assert told["detail"] == told["error"]["message"]
    for part in ["dialect groot", *parts]:
        assert part in told["detail"], told["detail"]


def test_other_robots_go_by_the_contracts_names() -> None:
    camera = Camera(
        name="sideview", height=64, width=64, orientation="rotated_180",
        source_height=64, source_width=64,
    )  # fmt: skip
    names = (*(f"joint_{i}" for i in range(1, 8)), "hand")
    contract = libero_contract().model_copy(
        update={
            "cameras": (camera,),
            "state": LIBERO_STATE_JOINT,
            "needs_language": False,
            "action": ActionSpec(
                names=names, horizon=4, kind="velocity", control_hz=10, low=(0.0,) * 8,
                high=(100.0,) * 8, gripper=Gripper(index=7, open=100.0, closed=0.0),
            ),
        }
    )  # fmt: skip
    policy = Seeing(contract)
    observation = {
        "video.sideview": json_numpy(np.zeros((1, 64, 64, 3), np.uint8)),
        "state.joint": [[float(i) for i in range(7)]],
        "state.fingers": [[7.0, 8.0]],
    }
    with BackgroundServer(lambda: policy, default_seed=SEED) as server:
        reply = act(server, observation)
        assert reply.status_code == 200, reply.text
        # What sends bare vectors cannot know such a robot, and says which field it lacks.
        refused = httpx.post(f"{server.http_url}/act", json={"full_image": 1})
    np.testing.assert_array_equal(policy.seen[0].state, np.arange(9))
    expected = policy.infer([Observation({}, np.zeros(9), seed=SEED)])[0].actions
    expected[:, 7] /= 100
    np.testing.assert_allclose(chunk(reply.json(), names), expected, rtol=1e-6)
    assert refused.status_code == 422
    assert "dialect openvla: images.sideview: only agentview" in refused.json()["error"]["message"]


CANNOT_SUPPLY = {
    "history": libero_contract().model_copy(update={"history": History(frames=2)}),
    "goal_image": libero_contract().model_copy(update={"needs_goal_image": True}),
    "state": libero_contract().model_copy(update={"state": StateSpec(layout="a", names=("b",))}),
}


@pytest.mark.parametrize("field,contract", CANNOT_SUPPLY.items(), ids=CANNOT_SUPPLY.keys())
def test_refusal_names_the_contracts_field(field: str, contract: PolicyContract) -> None:
    with BackgroundServer(lambda: NullPolicy(contract)) as server:
        reply = act(server, libero())
    assert reply.status_code == 422
    assert f"dialect groot: {field}: " in reply.json()["detail"]
