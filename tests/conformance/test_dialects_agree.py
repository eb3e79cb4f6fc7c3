"""One checkpoint, one set of pixels, state, instruction and seed: every dialect gives one answer.

Clients send what they send: openpi's resizes by itself, vla-eval's sends 256 px as PNG and asks at
every step, the others send 256 px. ``checkpoints/demo`` answers, or where it is missing a tiny
random policy.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from websockets.sync.client import connect

from reflexarc.client import HttpPolicyClient, PolicyClient
from reflexarc.contract import Observation, pack, unpack
from reflexarc.contract.images import resize_bilinear
from reflexarc.server import BackgroundServer
from reflexarc.server.episodes import decision_seed
from reflexarc.server.loading import CheckpointPolicy

INSTRUCTION = "pick up the alphabet soup and place it in the basket"
DEMO = Path(__file__).resolve().parents[2] / "checkpoints" / "demo"
SEED, HORIZON = 41, 10
# The second decision's noise: openpi's and starVLA's clients say no step, so decisions count.
SEEDS = (SEED, decision_seed(SEED, 1))
Actions = npt.NDArray[np.float32]


def picture(rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Smooth colours, which are nearer to a scene than noise is."""
    coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return resize_bilinear(coarse, 256, 256)


@pytest.fixture(scope="module")
def observations() -> list[Observation]:
    """What is seen at the first decision and at the second, in 256 px, upright."""
    rng = np.random.default_rng(0)
    return [
        Observation(
            images={"agentview": picture(rng), "eye_in_hand": picture(rng)},
            state=np.array([-0.05, 0.01, 1.2, 3.1, 0.05, -0.02, 0.038, -0.038])
            + rng.normal(scale=0.01, size=8),
            instruction=INSTRUCTION,
        )
        for _ in range(2)
    ]


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path) -> Iterator[BackgroundServer]:
    checkpoint = DEMO if DEMO.is_dir() else tiny_checkpoint
    with BackgroundServer(
        lambda: CheckpointPolicy.load(checkpoint, "cpu"), default_seed=SEED
    ) as server:
        yield server


@pytest.fixture(scope="module")
def chunks(server: BackgroundServer, observations: list[Observation]) -> list[Actions]:
    """Our own protocol's answers: what every dialect has to give."""
    answers = ask_own(server, observations, SEEDS)
    assert not np.array_equal(answers[0], answers[1])
    return answers


def ask_own(
    server: BackgroundServer, observations: list[Observation], seeds: tuple[int, int]
) -> list[Actions]:
    with PolicyClient(server.url) as client:
        return [
            client.infer(resized(observation, seed=seed)).actions
            for observation, seed in zip(observations, seeds, strict=True)
        ]


def resized(observation: Observation, **changes: Any) -> Observation:
    images = {name: resize_bilinear(i, 224, 224) for name, i in observation.images.items()}
    return replace(observation, images=images, **changes)


def open_is_one(actions: Actions) -> Actions:
    """With a gripper from 1 open to 0 closed."""
    return np.concatenate([actions[:, :6], (1 - actions[:, 6:]) / 2], axis=1)


def test_own_http(
    server: BackgroundServer, observations: list[Observation], chunks: list[Actions]
) -> None:
    with HttpPolicyClient(server.http_url) as client:
        for observation, seed, chunk in zip(observations, SEEDS, chunks, strict=True):
            answer = client.infer(resized(observation, seed=seed))
            np.testing.assert_array_equal(answer.actions, chunk)


def test_openpi(
    openpi: Any, server: BackgroundServer, observations: list[Observation], chunks: list[Actions]
) -> None:
    openpi.call("connect", url=server.url)
    for observation, expected in zip(observations, chunks, strict=True):
        request = {
            "observation/image": observation.images["agentview"],
            "observation/wrist_image": observation.images["eye_in_hand"],
        }
        request = {k: openpi.call("resize", images=i, size=224) for k, i in request.items()}
        request |= {"observation/state": observation.state, "prompt": INSTRUCTION}
        actions = openpi.call("infer", observation=request)["actions"]
        np.testing.assert_array_equal(actions, expected)


def test_vla_eval(
    vla_eval_python: Path,
    tmp_path: Path,
    server: BackgroundServer,
    observations: list[Observation],
) -> None:
    def rows(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """One a step; between the decisions nobody looks, as little as possible is sent."""
        return np.stack([first] + [np.zeros_like(first)] * (HORIZON - 1) + [second])

    first, second = observations
    np.savez(
        script := tmp_path / "script.npz",
        agentview=rows(first.images["agentview"], second.images["agentview"]),
        wrist=rows(first.images["eye_in_hand"], second.images["eye_in_hand"]),
        states=rows(first.state, second.state),
        instruction=INSTRUCTION,
        episodes=1,
    )
    driver = Path(__file__).with_name("vla_eval_driver.py")
    result = tmp_path / "result.json"
    url = f"{server.url}/vla-eval"
    subprocess.run([vla_eval_python, driver, url, script, result], check=True, timeout=120)
    actions = np.array(json.loads(result.read_text())["actions"][0], np.float32)
    chunks = ask_own(server, observations, (SEED, decision_seed(SEED, HORIZON)))
    np.testing.assert_array_equal(actions, np.concatenate(chunks)[: HORIZON + 1])


def test_starvla(
    server: BackgroundServer, observations: list[Observation], chunks: list[Actions]
) -> None:
    with connect(server.url, compression=None, max_size=None) as connection:
        connection.recv(timeout=10)
        for observation, expected in zip(observations, chunks, strict=True):
            images = [observation.images["agentview"], observation.images["eye_in_hand"]]
            example = {"image": images, "lang": INSTRUCTION, "state": observation.state}
            connection.send(pack({"examples": [example]}))
            reply = unpack(connection.recv(timeout=30))
            np.testing.assert_array_equal(reply["data"]["actions"][0], open_is_one(expected))


def test_openvla_oft_and_groot(
    json_numpy_python: Path,
    tmp_path: Path,
    server: BackgroundServer,
    observations: list[Observation],
    chunks: list[Actions],
) -> None:
    np.savez(
        script := tmp_path / "script.npz",
        agentview=observations[0].images["agentview"],
        wrist=observations[0].images["eye_in_hand"],
        state=observations[0].state,
        instruction=INSTRUCTION,
    )
    driver = Path(__file__).with_name("json_numpy_driver.py")
    command = [json_numpy_python, driver, server.http_url, script]
    finished = subprocess.run(command, check=True, capture_output=True, timeout=60)
    report = json.loads(finished.stdout)
    oft = np.array(report["openvla_oft_without_content_type"]["actions"], np.float32)
    np.testing.assert_array_equal(oft, open_is_one(chunks[0]))
    groot = np.concatenate(list(report["groot_patched"]["actions"].values()), axis=1)
    np.testing.assert_array_equal(groot.astype(np.float32), open_is_one(chunks[0]))
