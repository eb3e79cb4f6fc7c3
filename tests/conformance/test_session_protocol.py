"""Sessions over both protocols: who names them, when they end, and what JSON and JPEG carry."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from policies.families import SHAPES, Episode

from reflexarc.client import HttpPolicyClient, PolicyClient, RecedingHorizonExecutor
from reflexarc.contract import HistoryRow, Observation
from reflexarc.contract.errors import CodecError, HistoryMissingError
from reflexarc.contract.images import encode_image
from reflexarc.policy.checkpoint import load_checkpoint, save_checkpoint
from reflexarc.policy.registry import registered
from reflexarc.policy.runtime import PolicyRuntime
from reflexarc.server import BackgroundServer
from reflexarc.server.loading import CheckpointPolicy

SHAPE = SHAPES["flow_without_gripper"]
EPISODE = Episode(SHAPE.contract, 1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with registered(SHAPE.policy):
        folder = tmp_path_factory.mktemp("protocol") / "flow"
        yield save_checkpoint(folder, SHAPE.build().eval(), SHAPE.statistics(), {})


@pytest.fixture
def server(checkpoint: Path) -> Iterator[BackgroundServer]:
    with BackgroundServer(lambda: CheckpointPolicy.load(checkpoint, "cpu")) as running:
        yield running


def row(step: int) -> HistoryRow:
    seen = EPISODE.observe(step)
    return HistoryRow(step, seen.state, seen.images)


def second(**fields: Any) -> Observation:
    """The decision at step 2 needs step 0, which the request at 0 brought."""
    return EPISODE.observe(2, **fields)


def test_a_connection_is_a_session_of_its_own(server: BackgroundServer) -> None:
    with PolicyClient(server.url) as one, PolicyClient(server.url) as other:
        one.infer(EPISODE.observe(0))
        with pytest.raises(HistoryMissingError):
            other.infer(second())
        assert one.infer(second()).session_id is None
        one.close()  # its session ends; it connects again when it is asked
        with pytest.raises(HistoryMissingError):
            one.infer(EPISODE.observe(4, history=(row(2),)))


def test_a_named_session_outlives_its_connection(server: BackgroundServer) -> None:
    with PolicyClient(server.url) as client:
        client.infer(EPISODE.observe(0, session_id="kept"))
    with HttpPolicyClient(server.url) as client:
        assert client.infer(second(session_id="kept")).session_id == "kept"
        url = f"{server.http_url}/v1/sessions/kept"
        assert httpx.delete(url).status_code == 200
        unknown = httpx.delete(url)
        assert unknown.status_code == 404
        assert unknown.json()["error"]["code"] == "unknown_session"
        with pytest.raises(HistoryMissingError):
            client.infer(second(session_id="kept"))


def test_json_without_session_is_told_what_to_send(server: BackgroundServer) -> None:
    def as_json(observation: Observation) -> dict[str, Any]:
        def image(array: np.ndarray) -> dict[str, Any]:
            return {
                "__numpy__": base64.b64encode(array.tobytes()).decode(),
                "dtype": "|u1",
                "shape": list(array.shape),
            }

        def seen(value: Any) -> dict[str, Any]:
            images = {name: image(array) for name, array in value.images.items()}
            return {"state": value.state.tolist(), "step_index": value.step_index, "images": images}

        return {
            **seen(observation),
            "instruction": observation.instruction,
            "seed": observation.seed,
            "history": [seen(past) for past in observation.history],
        }

    url = f"{server.http_url}/v1/actions"
    refused = httpx.post(url, json=as_json(second()))
    assert refused.status_code == 409
    error = refused.json()["error"]
    assert (error["code"], error["field"]) == ("history_missing", "history")
    assert "steps 0" in error["message"]
    prefix = [[0.1] * 6, [0.2] * 6]
    whole = {**as_json(second(history=(row(0),))), "action_prefix": prefix}
    actions = httpx.post(url, json=whole).json()["actions"]
    np.testing.assert_array_equal(np.float32(actions[:2]), np.float32(prefix))
    bad = httpx.post(url, json={**whole, "history": [{"step_index": 0, "state": "x"}]})
    assert bad.status_code == 422
    assert bad.json()["error"]["field"] == "history[0].state"


def test_past_images_travel_compressed(server: BackgroundServer, checkpoint: Path) -> None:
    expected = PolicyRuntime(load_checkpoint(checkpoint)).infer([second(history=(row(0),))])
    with HttpPolicyClient(server.url, image_format="png") as client:
        chunk = client.infer(second(history=(row(0),)))
        np.testing.assert_array_equal(chunk.actions, expected[0].actions)
        big = encode_image(np.zeros((4096, 4096, 3), np.uint8), "png")
        images: Any = dict.fromkeys(SHAPE.contract.camera_names, big)
        with pytest.raises(CodecError, match="expected 32") as raised:
            client.infer(second(history=(HistoryRow(0, EPISODE.observe(0).state, images),)))
        assert raised.value.field == "history[0].images.agentview"


def test_a_lost_connection_is_made_again_within_an_episode(server: BackgroundServer) -> None:
    """The executor sends the whole window to the new connection's session."""
    with PolicyClient(server.url) as steady, PolicyClient(server.url) as shaky:
        actions = []
        for client in (steady, shaky):
            executor = RecedingHorizonExecutor(client, 2)
            taken = []
            for step in range(12):
                if client is shaky and step in (5, 8):
                    client.close()
                taken.append(executor.next_action(lambda step=step: EPISODE.observe(step)))
            actions.append(np.stack(taken))
        np.testing.assert_allclose(actions[0], actions[1], atol=1e-5)
