"""Observations and chunks on the wire, and every violation of a contract by its name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from reflexarc.contract import (
    ActionChunk,
    EncodedImage,
    Observation,
    PolicyContract,
    check_observation,
    pack,
    unpack,
)
from reflexarc.contract.errors import (
    CodecError,
    ContractViolationError,
    MissingExtraError,
    NotReadyError,
    ReflexarcError,
    error_from_wire,
)
from reflexarc.contract.policy_contract import LIBERO_STATE_EEF, libero_action, libero_cameras

CONTRACT = PolicyContract(
    family="test",
    cameras=libero_cameras(16, 16),
    state=LIBERO_STATE_EEF,
    action=libero_action(10),
)
IMAGE = np.zeros((16, 16, 3), np.uint8)
GOOD = Observation(
    images={"agentview": IMAGE, "eye_in_hand": IMAGE},
    state=np.arange(8.0),
    instruction="pick up the milk",
    session_id="session",
    request_id="request",
    seed=3,
    step_index=0,
    denoising_steps=10,
)


def violation(**changes: Any) -> ContractViolationError:
    with pytest.raises(ContractViolationError) as caught:
        check_observation(CONTRACT, replace(GOOD, **changes))
    return caught.value


def images(**changes: Any) -> dict[str, Any]:
    return {"agentview": IMAGE, "eye_in_hand": IMAGE} | changes


def test_a_good_observation_passes() -> None:
    check_observation(CONTRACT, GOOD)
    check_observation(CONTRACT, replace(GOOD, state=GOOD.state.astype(np.float32)))
    bare = Observation(images=GOOD.images, state=GOOD.state, instruction="go")
    check_observation(CONTRACT, bare)


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"images": {"agentview": IMAGE}}, "images.eye_in_hand", "missing; cameras that came"),
        ({"images": {}}, "images.agentview", "came: none"),
        ({"images": images(wrist=IMAGE)}, "images.wrist", "no such camera; expected ['agentview'"),
        ({"images": images(agentview=IMAGE[:8])}, "images.agentview", "got uint8 (8, 16, 3)"),
        ({"images": images(agentview=IMAGE / 255)}, "images.agentview", "got float64"),
        ({"images": images(agentview=IMAGE[..., :1])}, "images.agentview", "(16, 16, 1)"),
        ({"images": images(agentview=IMAGE[None])}, "images.agentview", "(1, 16, 16, 3)"),
        ({"images": images(agentview=None)}, "images.agentview", "got NoneType"),
        (
            {"images": images(agentview=EncodedImage("png", b""))},
            "images.agentview",
            "got EncodedImage",
        ),
        ({"state": np.zeros(9)}, "state", "floats (8,) in the layout eef3+axisangle3+fingers2"),
        ({"state": np.zeros((1, 8))}, "state", "(1, 8)"),
        ({"state": np.zeros(8, int)}, "state", "got int64"),
        ({"state": [0.0] * 8}, "state", "got list"),
        (
            {"state": np.array([0, np.nan, 0, 0, 0, 0, np.inf, 0])},
            "state",
            "not finite in eef_y, finger_left",
        ),
        ({"instruction": None}, "instruction", "needs an instruction"),
        ({"instruction": ""}, "instruction", "needs an instruction"),
        ({"instruction": "x" * 4097}, "instruction", "longer than 4096"),
        ({"session_id": "x" * 129}, "session_id", "longer than 128"),
        ({"request_id": "x" * 129}, "request_id", "longer than 128"),
        ({"seed": -1}, "seed", "[0, 2**63), got -1"),
        ({"seed": 2**63}, "seed", "[0, 2**63)"),
        ({"denoising_steps": 0}, "denoising_steps", "[1, 100], got 0"),
        ({"denoising_steps": 101}, "denoising_steps", "[1, 100], got 101"),
    ],
)
def test_each_violation_is_named(changes: dict[str, Any], field: str, words: str) -> None:
    error = violation(**changes)
    assert error.field == field and words in error.message
    assert error.to_wire()["code"] == "contract_violation"


def test_all_violations_are_named_at_once() -> None:
    message = violation(images={}, state=np.zeros(3), instruction=None, seed=-1).message
    for field in ("images.agentview", "images.eye_in_hand", "state", "instruction", "seed"):
        assert f"{field}: " in message


def test_thousands_of_unknown_cameras_give_a_short_message() -> None:
    flood = {f"{'camera' * 100}{i}": IMAGE for i in range(3000)}
    assert len(violation(images=flood).message) < 4000


def test_a_policy_without_language_needs_no_instruction() -> None:
    silent = CONTRACT.model_copy(update={"needs_language": False})
    check_observation(silent, replace(GOOD, instruction=None))


def test_observation_round_trip() -> None:
    got = Observation.from_wire(unpack(pack(GOOD.to_wire())))
    check_observation(CONTRACT, got)
    np.testing.assert_array_equal(got.state, GOOD.state)
    assert replace(got, images={}, state=None) == replace(GOOD, images={}, state=None)
    bare = Observation(images={}, state=np.zeros(8))
    assert set(bare.to_wire()) == {"images", "state"}
    assert Observation.from_wire(bare.to_wire()).seed is None


@pytest.mark.parametrize(
    ("message", "field", "words"),
    [
        ([], None, "must be a map, got list"),
        (None, None, "must be a map, got NoneType"),
        ({"state": 1}, "images", "needs the field 'images'"),
        ({"images": {}}, "state", "needs the field 'state'"),
        ({"images": [], "state": 1}, "images", "map from camera name"),
        ({"images": {}, "state": 1, "prompt": "x"}, "prompt", "unknown field 'prompt'"),
        ({"images": {}, "state": 1, b"seed": 1}, "b'seed'", "unknown field b'seed'"),
        ({"images": {}, "state": 1, "seed": "3"}, "seed", "seed must be int, got str"),
        ({"images": {}, "state": 1, "seed": True}, "seed", "seed must be int, got bool"),
        ({"images": {}, "state": 1, "instruction": b"x"}, "instruction", "must be str, got bytes"),
        ({"images": {}, "state": 1, "x" * 10_000: 1}, "x" * 128, "unknown field 'xxx"),
    ],
)
def test_what_is_no_observation(message: object, field: str | None, words: str) -> None:
    with pytest.raises(CodecError) as caught:
        Observation.from_wire(message)
    assert caught.value.field == field and words in caught.value.message
    assert len(caught.value.message) < 300


def test_chunk_round_trip() -> None:
    rng = np.random.default_rng(0)
    chunk = ActionChunk(
        actions=rng.normal(size=(10, 7)).astype(np.float32),
        seed=2**62,
        request_id="r",
        session_id="s",
        timing={"queue_ms": 0.25},
    )
    got = ActionChunk.from_wire(unpack(pack(chunk.to_wire())))
    np.testing.assert_array_equal(got.actions, chunk.actions)
    assert got.actions.dtype == np.float32
    assert (got.seed, got.request_id, got.session_id) == (2**62, "r", "s")
    assert got.timing == {"queue_ms": 0.25}
    from_json = ActionChunk.from_wire({"actions": chunk.actions.tolist(), "seed": 1})
    np.testing.assert_array_equal(from_json.actions, chunk.actions)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (None, "no field 'actions'"),
        ({"status": "ok"}, "no field 'actions'"),
        ({"actions": np.zeros(7)}, "got shape (7,)"),
        ({"actions": "left"}, "are not numbers"),
        ({"actions": [[1.0], [1.0, 2.0]]}, "are not numbers"),
        ({"actions": {"a": 1}}, "are not numbers"),
        ({"actions": np.zeros((1, 7)), "seed": "x"}, "seed must be int"),
        ({"actions": np.zeros((1, 7)), "timing": 3}, "timing must be dict"),
        ({"actions": np.zeros((1, 7)), "request_id": 3}, "request_id must be str"),
    ],
)
def test_what_is_no_chunk(message: object, words: str) -> None:
    with pytest.raises(CodecError) as caught:
        ActionChunk.from_wire(message)
    assert words in caught.value.message


def test_errors_travel() -> None:
    for error in (
        CodecError("bytes", field="frame"),
        ContractViolationError("state is short", field="state"),
        NotReadyError("warming"),
    ):
        got = error_from_wire(unpack(pack(error.to_wire())))
        assert type(got) is type(error) and str(got) == error.message and got.field == error.field
    assert type(error_from_wire({"code": "of a later version", "message": "m"})) is ReflexarcError
    assert "of a later version: m" in str(
        error_from_wire({"code": "of a later version"} | {"message": "m"})
    )
    assert "without a message" in str(error_from_wire({}))
    missing = MissingExtraError("reflexarc train", "train", "torch")
    assert "pip install 'reflexarc[train]'" in missing.message
    assert missing.message in str(error_from_wire(missing.to_wire()))


def test_codes_are_unique() -> None:
    pending, codes = [ReflexarcError], []
    while pending:
        cls = pending.pop()
        codes.append(cls.code)
        pending += [c for c in cls.__subclasses__() if c.__module__ == ReflexarcError.__module__]
    assert len(codes) == len(set(codes)) > 10
