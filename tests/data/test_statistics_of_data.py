"""Statistics over every aligned step, equal to numpy's over the stored rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from reflexarc.contract.errors import DatasetError
from reflexarc.contract.policy_contract import LIBERO_STATE_JOINT
from reflexarc.data import LiberoDataset, compute_statistics, open_libero

WriteFile = Callable[..., Path]


@pytest.mark.parametrize(("kind", "skipped"), [("own", 0), ("official", 1)])
def test_statistics_equal_numpys(write_file: WriteFile, kind: str, skipped: int) -> None:
    path = write_file(kind)
    dataset = open_libero([path])
    statistics = compute_statistics(dataset, "joint7+fingers2")
    with h5py.File(path) as file:
        actions = np.concatenate([file[f"data/demo_{i}/actions"][skipped:] for i in range(3)])
        joints = np.concatenate(
            [file[f"data/demo_{i}/obs/joint_states"][: 9 - skipped] for i in range(3)]
        )
    assert statistics.action.count == statistics.state.count == len(actions)
    np.testing.assert_array_equal(statistics.action.mean, actions.mean(0))
    np.testing.assert_array_equal(statistics.action.std, actions.std(0))
    np.testing.assert_array_equal(statistics.action.q01, np.quantile(actions, 0.01, axis=0))
    np.testing.assert_array_equal(statistics.state.q99[:7], np.quantile(joints, 0.99, axis=0))
    np.testing.assert_array_equal(statistics.state.min[:7], joints.min(0))
    np.testing.assert_array_equal(statistics.state.max[:7], joints.max(0))
    assert statistics.state.names == LIBERO_STATE_JOINT.names
    assert statistics.action.names[6] == "gripper"
    assert statistics.dataset_fingerprint == dataset.fingerprint()


def test_no_episodes_and_unknown_layouts_are_refused(write_file: WriteFile) -> None:
    with pytest.raises(DatasetError, match="no episodes"):
        compute_statistics(LiberoDataset([]), "joint7+fingers2")
    with pytest.raises(DatasetError, match="'quat' is unknown; known: eef3"):
        compute_statistics(open_libero([write_file()]), "quat")
