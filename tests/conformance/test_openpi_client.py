"""The unmodified openpi-client 0.1.2 from the registry against our live server."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reflexarc.contract import Observation, pack
from reflexarc.contract.images import resize_bilinear
from reflexarc.contract.policy_contract import LIBERO_STATE_JOINT
from reflexarc.server import BackgroundServer, NullPolicy, libero_contract
from reflexarc.server.loading import CheckpointPolicy

MakeRequest = Callable[..., dict[str, Any]]


def test_gets_chunks_from_a_served_checkpoint(
    openpi: Any, tiny_checkpoint: Path, libero_request: MakeRequest
) -> None:
    with BackgroundServer(lambda: CheckpointPolicy.load(tiny_checkpoint, "cpu")) as server:
        metadata = openpi.call("connect", url=server.url)
        assert metadata["contract"]["family"] == "statevla"
        assert len(metadata["contract"]["checkpoint_fingerprint"]) == 64
        first = openpi.call("infer", observation=libero_request())
        second = openpi.call("infer", observation=libero_request())
    for reply in (first, second):
        actions = reply["actions"]
        assert actions.shape == (10, 7) and actions.dtype == np.float32
        assert np.isfinite(actions).all() and np.abs(actions).max() <= 1
        assert set(np.unique(actions[:, 6])) <= {-1.0, 1.0}
        assert reply["policy_timing"]["infer_ms"] <= reply["server_timing"]["infer_ms"]
    assert not np.array_equal(first["actions"], second["actions"]), "the noise was not fresh"
    assert "prev_total_ms" not in first["server_timing"]
    assert second["server_timing"]["prev_total_ms"] > 0


class SeedPolicy(NullPolicy):
    """Its n-th chunk is the null policy's for seed n, so that a test knows what must come."""

    def __init__(self) -> None:
        super().__init__(libero_contract())
        self.asked = 0

    def infer(self, observations: Any) -> Any:
        self.asked += 1
        return super().infer([Observation({}, np.zeros(8), seed=self.asked)])


def test_action_chunk_broker_gets_single_actions(openpi: Any, libero_request: MakeRequest) -> None:
    policy = SeedPolicy()
    with BackgroundServer(lambda: policy) as server:
        openpi.call("connect", url=server.url, broker_horizon=4)
        actions = [openpi.call("infer", observation=libero_request())["actions"] for _ in range(10)]
    chunks = [
        NullPolicy().infer([Observation({}, np.zeros(8), seed=seed)])[0].actions[:4]
        for seed in (1, 2, 3)
    ]
    np.testing.assert_array_equal(np.stack(actions), np.concatenate(chunks)[:10])
    assert policy.asked == 3


def test_error_is_raised_there_by_key_and_the_connection_lives(
    openpi: Any, libero_request: MakeRequest
) -> None:
    with BackgroundServer(NullPolicy) as server:
        openpi.call("connect", url=server.url)
        wrong = libero_request(**{"observation/image": np.zeros((256, 256, 3), np.uint8)})
        with pytest.raises(RuntimeError, match="observation/image: expected uint8"):
            openpi.call("infer", observation=wrong)
        assert openpi.call("infer", observation=libero_request())["actions"].shape == (10, 7)


def test_refusal_at_the_handshake_is_readable_there(openpi: Any) -> None:
    contract = libero_contract().model_copy(update={"state": LIBERO_STATE_JOINT})
    with (
        BackgroundServer(lambda: NullPolicy(contract)) as server,
        pytest.raises(RuntimeError, match=r"1008.*openpi: state: eef3.*needs joint7"),
    ):
        openpi.call("connect", url=server.url)


def test_waits_while_the_policy_loads(openpi: Any, libero_request: MakeRequest) -> None:
    def load() -> NullPolicy:
        time.sleep(1.5)
        return NullPolicy()

    with BackgroundServer(load, wait=False) as server:
        for _ in range(100):  # the client itself gives up at once on a port that is not open
            try:
                openpi.call("connect", url=server.url)
                break
            except RuntimeError as error:
                assert "ConnectionRefused" in str(error)
                time.sleep(0.02)
        assert openpi.call("infer", observation=libero_request())["actions"].shape == (10, 7)


MESSAGES: dict[str, Any] = {
    "observation": {
        "observation/image": np.arange(48, dtype=np.uint8).reshape(4, 4, 3),
        "observation/state": np.linspace(-1, 1, 8),
        "prompt": "stell die Schüssel auf den Teller",
    },
    "dtypes": [
        np.zeros((2, 3), dtype)
        for dtype in ("bool", "int8", "uint16", "int32", "int64", "float16", "float32", ">f8")
    ],
    "scalars": [np.float32(0.1), np.int64(-3), np.bool_(True), 0.1, -3, True, None, "text", b"raw"],
    "shapes": [np.zeros(()), np.zeros((0, 3)), np.zeros((1, 1, 1, 1, 1, 1))],
    "strides": np.arange(24, dtype=np.int16).reshape(4, 6)[::-1, ::2],
    "nested": {"a": {"b": [{"c": np.ones(2, np.float32)}]}, "server_timing": {"infer_ms": 1.5}},
}


@pytest.mark.parametrize("message", MESSAGES.values(), ids=MESSAGES.keys())
def test_codec_gives_the_same_bytes(openpi: Any, message: Any) -> None:
    # The driver decodes our bytes with openpi's codec and encodes the result again.
    assert openpi.call("pack", message=message) == pack(message)


@pytest.mark.parametrize("size", [84, 128, 223, 224, 256, 300, 512])
def test_resizing_gives_the_same_pixels(openpi: Any, size: int) -> None:
    image = np.random.default_rng(size).integers(0, 256, (size, size, 3), dtype=np.uint8)
    theirs = openpi.call("resize", images=image, size=224)
    np.testing.assert_array_equal(resize_bilinear(image, 224, 224), theirs)


def test_client_is_the_published_one(openpi: Any) -> None:
    assert int(openpi.call("numpy_version").split(".")[0]) == 1
