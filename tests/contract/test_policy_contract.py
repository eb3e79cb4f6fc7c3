"""A contract is strict, whole and survives JSON."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from reflexarc.contract import PROTOCOL_VERSION, Camera, PolicyContract
from reflexarc.contract.policy_contract import (
    LIBERO_STATE_EEF,
    LIBERO_STATE_JOINT,
    LIBERO_STATES,
    Gripper,
    libero_action,
    libero_cameras,
)


def contract(**changes: Any) -> PolicyContract:
    fields: dict[str, Any] = {
        "family": "test",
        "cameras": libero_cameras(),
        "state": LIBERO_STATE_EEF,
        "action": libero_action(10),
    }
    return PolicyContract(**(fields | changes))


def test_json_round_trip() -> None:
    original = contract(checkpoint_fingerprint="ab", history={"frames": 2, "stride": 4})
    assert PolicyContract.model_validate_json(original.model_dump_json()) == original
    assert original.protocol_version == PROTOCOL_VERSION


def test_steps_of_a_camera() -> None:
    agentview, _ = libero_cameras(224, 256)
    assert agentview.steps == ("rotate_180", "resize_bilinear_224x224")
    assert libero_cameras(256, 256)[0].steps == ("rotate_180",)
    raw = agentview.model_copy(update={"orientation": "opengl", "source_height": 224})
    assert raw.steps == ("resize_bilinear_224x224",)
    same = raw.model_copy(update={"source_width": 224})
    assert same.steps == ()


def test_libero_layouts() -> None:
    assert LIBERO_STATE_EEF.dimension == 8 and LIBERO_STATE_JOINT.dimension == 9
    assert set(LIBERO_STATES) == {
        "eef3+axisangle3+fingers2", "joint7+fingers2", "eef3+axisangle3+fingers2+joint7"
    }  # fmt: skip
    action = libero_action(10)
    assert action.dimension == 7 and action.control_hz == 20
    assert action.gripper == Gripper(index=6, open=-1, closed=1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"camera": ()}, "Extra inputs are not permitted"),
        ({"cameras": (*libero_cameras(), libero_cameras()[0])}, "camera names must differ"),
        ({"state_normalization": "zscore"}, "state_normalization"),
        ({"history": {"frames": 0}}, "history.frames"),
        ({"history": {"length": 2}}, "history.length"),
        ({"action": libero_action(10).model_dump() | {"horizon": 0}}, "action.horizon"),
        ({"action": libero_action(10).model_dump() | {"low": (-1.0,) * 6}}, "6 low and 7 high"),
        (
            {
                "action": libero_action(10).model_dump()
                | {"gripper": Gripper(index=7, open=0, closed=1)}
            },
            "gripper index 7 is outside 7",
        ),
        ({"action": libero_action(10).model_dump() | {"kind": "torque"}}, "action.kind"),
        ({"family": None}, "family"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        contract(**changes)
    assert words in str(caught.value)


@pytest.mark.parametrize("field", ["height", "source_width"])
def test_camera_sizes_are_bounded(field: str) -> None:
    for size in (0, 4097):
        with pytest.raises(ValidationError, match=field):
            Camera(**(libero_cameras()[0].model_dump() | {field: size}))


def test_contracts_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        contract().family = "other"
