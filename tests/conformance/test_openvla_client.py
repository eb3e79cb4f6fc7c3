"""``requests`` and ``json-numpy`` as OpenVLA's, OFT's and GR00T's clients use them, live."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reflexarc.contract import ActionChunk, Observation
from reflexarc.contract.images import resize_bilinear
from reflexarc.server import BackgroundServer, NullPolicy

INSTRUCTION = "pick up the alphabet soup and place it in the basket"


class Seeing(NullPolicy):
    """The null policy, which keeps what it saw and holds the gripper half of the chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Observation] = []

    def infer(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        self.seen.extend(observations)
        chunks = super().infer(observations)
        for chunk in chunks:
            chunk.actions[:5, 6], chunk.actions[5:, 6] = -1, 1  # open, then closed
        return chunks


@pytest.fixture(scope="module")
def observation() -> Observation:
    rng = np.random.default_rng(0)
    images = {
        name: rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)
        for name in ("agentview", "eye_in_hand")
    }
    return Observation(images, rng.normal(size=8), instruction=INSTRUCTION)


@pytest.fixture(scope="module")
def conversation(
    json_numpy_python: Path, observation: Observation, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Seeing]:
    """What the clients held, and the policy with what it saw."""
    script = tmp_path_factory.mktemp("script") / "observation.npz"
    np.savez(
        script,
        agentview=observation.images["agentview"],
        wrist=observation.images["eye_in_hand"],
        state=observation.state,
        instruction=INSTRUCTION,
    )
    policy = Seeing()
    driver = Path(__file__).with_name("json_numpy_driver.py")
    with BackgroundServer(lambda: policy, default_seed=3) as server:
        command = [json_numpy_python, driver, server.http_url, script]
        finished = subprocess.run(command, check=True, capture_output=True, timeout=60)
    return json.loads(finished.stdout), policy


def expected_chunk() -> np.ndarray[Any, Any]:
    actions = NullPolicy().infer([Observation({}, np.zeros(8), seed=3)])[0].actions
    actions[:5, 6], actions[5:, 6] = 1, 0  # OpenVLA's and GR00T's gripper: 1 opens, 0 closes
    return actions


@pytest.mark.parametrize("way", ["without_content_type", "encoded", "patched"])
def test_oft_client_holds_a_list_of_arrays(
    conversation: tuple[dict[str, Any], Seeing], way: str
) -> None:
    report = conversation[0][f"openvla_oft_{way}"]
    assert report["status"] == 200
    assert report["type"] == "list of ndarray"
    np.testing.assert_array_equal(np.array(report["actions"], np.float32), expected_chunk())


def test_no_content_type_was_sent(conversation: tuple[dict[str, Any], Seeing]) -> None:
    assert conversation[0]["openvla_oft_without_content_type"]["sent_type"] is None
    assert conversation[0]["openvla_oft_patched"]["sent_type"] == "application/json"


def test_one_image_is_told_that_the_policy_has_two_cameras(
    conversation: tuple[dict[str, Any], Seeing],
) -> None:
    report = conversation[0]["openvla_one_image"]
    assert report["status"] == 422
    for part in ("dialect openvla", "wrist_image: missing", "images.eye_in_hand", "keys that came"):
        assert part in report["actions"]["error"]["message"]


def test_wrong_keys_are_told_with_dialect_and_expectation(
    conversation: tuple[dict[str, Any], Seeing],
) -> None:
    report = conversation[0]["openvla_wrong_keys"]
    assert report["status"] == 422
    for part in ("dialect openvla", "image: missing", "full_image uint8", "keys that came: img"):
        assert part in report["actions"]["error"]["message"]


def test_groot_client_holds_its_parts(conversation: tuple[dict[str, Any], Seeing]) -> None:
    report = conversation[0]["groot_patched"]
    assert report["status"] == 200
    parts = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
    assert list(report["actions"]) == [f"action.{part}" for part in parts]
    chunk = np.concatenate([report["actions"][f"action.{part}"] for part in parts], axis=1)
    np.testing.assert_array_equal(chunk.astype(np.float32), expected_chunk())


def test_get_says_ready(conversation: tuple[dict[str, Any], Seeing]) -> None:
    assert conversation[0]["ready"] == 200


def test_policy_sees_the_cameras_own_pixels_under_the_contracts_names(
    conversation: tuple[dict[str, Any], Seeing], observation: Observation
) -> None:
    assert len(conversation[1].seen) == 4
    for seen in conversation[1].seen:
        assert seen.instruction == INSTRUCTION
        np.testing.assert_array_equal(seen.state, observation.state)
        for camera, image in observation.images.items():
            np.testing.assert_array_equal(seen.images[camera], resize_bilinear(image, 224, 224))
