"""A folder opened for a policy that exists: the rows that its contract names, or an error."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from reflexarc.contract import Camera, PolicyContract
from reflexarc.contract.errors import DatasetError
from reflexarc.data.lerobot import LeRobotDataset, open_lerobot
from reflexarc.data.lerobot.for_contract import open_for_contract
from reflexarc.data.lerobot.mapping import ActionMeaning

sys.path.insert(0, str(Path(__file__).parent))
from lerobot_samples import SIZE, write_v2


def contract_of(dataset: LeRobotDataset) -> PolicyContract:
    cameras = tuple(
        Camera(name=name, height=32, width=32, orientation="upright",
               source_height=SIZE[0], source_width=SIZE[1])
        for name in dataset.cameras
    )  # fmt: skip
    return PolicyContract(
        family="statevla",
        cameras=cameras,
        state=dataset.mapping.state_spec,
        action=dataset.action_spec(4),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = write_v2(tmp_path / "sample", lengths=(6,))
    (root / "meta/modality.json").write_text(
        '{"state": {"arm": {"start": 0, "end": 3}, "hand_2": {"start": 3, "end": 5}},'
        ' "action": {"reach": {"start": 0, "end": 2}, "grip": {"start": 2, "end": 3}},'
        ' "video": {"view": {"original_key": "observation.images.front"}}}'
    )
    return root


@pytest.mark.parametrize(
    ("state", "action", "gripper"),
    [(["hand_2", "arm"], ["grip", "reach"], "grip"), (["arm"], ["reach"], None), (None, None, "z")],
)
def test_parts_are_found_by_the_contracts_names(
    folder: Path, state: list[str] | None, action: list[str] | None, gripper: str | None
) -> None:
    trained = open_lerobot(
        folder, state=state, action=action, meaning=ActionMeaning("delta_osc", gripper)
    )
    contract = contract_of(trained)
    found = open_for_contract(folder, contract)
    assert found.action_spec(4) == contract.action and found.cameras == trained.cameras
    (one,), (two,) = trained.episodes, found.episodes
    layout = contract.state.layout
    np.testing.assert_array_equal(one.states(layout), two.states(layout))
    np.testing.assert_array_equal(one.actions(), two.actions())


def test_what_the_folder_does_not_have_is_named(folder: Path, tmp_path: Path) -> None:
    contract = contract_of(open_lerobot(folder, state=["arm"], action=["reach"]))
    other = write_v2(tmp_path / "other", lengths=(6,))
    with pytest.raises(DatasetError, match=r"the policy's state 'arm3'; it has: state \(5\)"):
        open_for_contract(other, contract)
    sideways = contract.cameras[0].model_copy(update={"orientation": "opengl"})
    with pytest.raises(DatasetError, match="'view', opengl; the dataset has view, upright"):
        open_for_contract(folder, contract.model_copy(update={"cameras": (sideways,)}))
    absent = contract.cameras[0].model_copy(update={"name": "wrist"})
    with pytest.raises(DatasetError, match="no camera 'wrist'; cameras that are there: view"):
        open_for_contract(folder, contract.model_copy(update={"cameras": (absent,)}))
