"""History, goal image and action prefix: on the wire, and what a contract refuses of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from reflexarc.contract import (
    HistoryRow,
    Observation,
    PolicyContract,
    check_observation,
    pack,
    unpack,
)
from reflexarc.contract.errors import (
    CodecError,
    ContractViolationError,
    HistoryMissingError,
    error_from_wire,
)
from reflexarc.contract.policy_contract import (
    LIBERO_STATE_EEF,
    History,
    libero_action,
    libero_cameras,
)

CONTRACT = PolicyContract(
    family="test",
    cameras=libero_cameras(16, 16),
    state=LIBERO_STATE_EEF,
    history=History(frames=3, states=2, stride=2),
    action=libero_action(10),
    needs_goal_image=True,
)
IMAGES = {name: np.full((16, 16, 3), 7, np.uint8) for name in CONTRACT.camera_names}
STATE = np.arange(8.0)
GOOD = Observation(
    images=IMAGES,
    state=STATE,
    instruction="pick up the milk",
    step_index=9,
    history=(HistoryRow(5, STATE, IMAGES), HistoryRow(7, STATE), HistoryRow(8, STATE, IMAGES)),
    goal_image=IMAGES,
    action_prefix=np.zeros((3, 7), np.float32),
    action_guide=np.full((7, 7), 0.5, np.float32),
)


def violation(contract: PolicyContract = CONTRACT, **changes: Any) -> ContractViolationError:
    with pytest.raises(ContractViolationError) as caught:
        check_observation(contract, replace(GOOD, **changes))
    return caught.value


def test_everything_survives_the_wire() -> None:
    check_observation(CONTRACT, GOOD)
    back = Observation.from_wire(unpack(pack(GOOD.to_wire())))
    check_observation(CONTRACT, back)
    assert [row.step_index for row in back.history] == [5, 7, 8]
    assert [row.images is None for row in back.history] == [False, True, False]
    np.testing.assert_array_equal(back.goal_image["agentview"], IMAGES["agentview"])  # type: ignore[index]
    np.testing.assert_array_equal(back.action_prefix, GOOD.action_prefix)  # type: ignore[arg-type]
    np.testing.assert_array_equal(back.action_guide, GOOD.action_guide)  # type: ignore[arg-type]


def test_what_is_not_there_is_not_sent() -> None:
    plain = Observation(images=IMAGES, state=STATE)
    assert set(plain.to_wire()) == {"images", "state"}
    assert Observation.from_wire(plain.to_wire()).history == ()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"step_index": None}, "step_index"),
        ({"step_index": -1}, "step_index"),
        ({"step_index": 0, "goal_image": None, "history": ()}, "goal_image"),
        ({"goal_image": {"agentview": IMAGES["agentview"]}}, "goal_image.eye_in_hand"),
        ({"history": (HistoryRow(5, STATE), HistoryRow(5, STATE))}, "history[1].step_index"),
        ({"history": (HistoryRow(9, STATE),)}, "history[0].step_index"),
        ({"history": (HistoryRow(-1, STATE),)}, "history[0].step_index"),
        ({"history": (HistoryRow(5, STATE[:3]),)}, "history[0].state"),
        ({"history": (HistoryRow(5, STATE * np.nan),)}, "history[0].state"),
        ({"history": (HistoryRow(5, STATE, {}),)}, "history[0].images.agentview"),
        ({"history": tuple(HistoryRow(s, STATE) for s in range(5))}, "history"),
        ({"action_prefix": np.zeros((10, 7), np.float32)}, "action_prefix"),
        ({"action_prefix": np.zeros((0, 7), np.float32)}, "action_prefix"),
        ({"action_prefix": np.zeros((2, 6), np.float32)}, "action_prefix"),
        ({"action_prefix": np.full((2, 7), np.inf, np.float32)}, "action_prefix"),
        ({"action_prefix": np.full((2, 7), 1.5, np.float32)}, "action_prefix"),
        ({"action_prefix": np.zeros((2, 7), np.int64)}, "action_prefix"),
        ({"action_guide": np.zeros((8, 7), np.float32)}, "action_guide"),
        ({"action_guide": np.full((2, 7), 1.5, np.float32)}, "action_guide"),
    ],
)
def test_violations_are_named(changes: dict[str, Any], field: str) -> None:
    assert violation(**changes).field == field


def test_a_policy_without_history_takes_neither_history_nor_goal() -> None:
    plain = CONTRACT.model_copy(update={"history": History(), "needs_goal_image": False})
    assert not plain.needs_session
    error = violation(plain)
    assert "goal_image: this policy takes none" in error.message
    assert "send no history" in error.message


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("history", {}, "must be a list"),
        ("history", [3], r"history\[0\] must be a map"),
        ("history", [{"state": STATE}], r"history\[0\].step_index is missing"),
        ("history", [{"step_index": True, "state": STATE}], "must be int"),
        ("history", [{"step_index": 1}], "'state'"),
        ("history", [{"step_index": 1, "state": STATE, "when": 2}], "unknown field 'when'"),
        ("history", [{"step_index": 1, "state": STATE, "images": 3}], r"history\[0\].images"),
        ("history", [{"step_index": 1, "state": STATE}] * 1025, "more than 1024"),
        ("goal_image", [], "goal_image must be a map"),
    ],
)
def test_wrong_forms_are_named(field: str, value: Any, match: str) -> None:
    with pytest.raises(CodecError, match=match):
        Observation.from_wire({"images": {}, "state": STATE, field: value})


def test_many_problems_stay_a_short_message() -> None:
    wide = CONTRACT.model_copy(update={"history": History(frames=256)})
    rows = tuple(HistoryRow(s, STATE[:1], {}) for s in range(255))
    error = violation(wide, step_index=300, history=rows)
    assert "more" in error.message
    assert len(error.message) < 4000


def test_window_steps() -> None:
    history = History(frames=4, states=2, stride=3)
    assert history.frame_steps(10) == [1, 4, 7, 10]
    assert history.frame_steps(5) == [2, 5]
    assert history.state_steps(0) == [0]
    assert (history.rows, history.span) == (4, 9)


def test_the_error_keeps_its_name() -> None:
    error = error_from_wire(HistoryMissingError("steps 1, 2", field="history").to_wire())
    assert isinstance(error, HistoryMissingError)
    assert error.field == "history"
