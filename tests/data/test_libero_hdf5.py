"""The reader's rows: aligned, in order, and the same from every kind of file."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable
from operator import methodcaller
from pathlib import Path

import h5py
import numpy as np
import pytest

from reflexarc.contract.errors import DatasetError
from reflexarc.data import open_libero

EEF = "eef3+axisangle3+fingers2"
JOINT = "joint7+fingers2"
WriteFile = Callable[..., Path]


def stored(path: Path, demo: str, key: str) -> np.ndarray:
    with h5py.File(path) as file:
        return file[f"data/{demo}/{key}"][()]


@pytest.mark.parametrize("kind", ["own", "regenerated"])
def test_rows_stand_before_their_action(write_file: WriteFile, kind: str) -> None:
    path = write_file(kind)
    episode = open_libero([path]).episodes[1]
    assert (episode.demo, episode.length, episode.alignment) == ("demo_1", 9, "before_action")
    np.testing.assert_array_equal(episode.actions(), stored(path, "demo_1", "actions"))
    np.testing.assert_array_equal(episode.states(EEF)[:, :3], stored(path, "demo_1", "obs/ee_pos"))


def test_official_observations_precede_the_next_action(write_file: WriteFile) -> None:
    path = write_file("official")
    episode = open_libero([path]).episodes[0]
    assert (episode.length, episode.alignment) == (8, "after_action")
    assert "libero-v1" in episode.recognised_by
    np.testing.assert_array_equal(episode.actions(), stored(path, "demo_0", "actions")[1:])
    np.testing.assert_array_equal(
        episode.states(JOINT)[:, :7], stored(path, "demo_0", "obs/joint_states")[:-1]
    )
    np.testing.assert_array_equal(episode.image_steps, np.arange(8))
    np.testing.assert_array_equal(
        episode.images("agentview", range(8)), stored(path, "demo_0", "obs/agentview_rgb")[:-1]
    )


def test_official_file_without_its_tag_is_recognised(write_file: WriteFile) -> None:
    path = write_file("official")
    with h5py.File(path, "r+") as file:
        del file["data"].attrs["tag"]
    assert open_libero([path]).episodes[0].alignment == "after_action"


def test_a_file_that_cannot_be_recognised_asks(write_file: WriteFile) -> None:
    path = write_file("regenerated")
    with h5py.File(path, "r+") as file:
        file["data"].attrs["env_args"] = "{}"
    with pytest.raises(DatasetError, match=r"demo_0.*env_args without num_samples.*say which"):
        open_libero([path])
    dataset = open_libero([path], alignment="after_action")
    assert dataset.episodes[0].length == 8
    assert dataset.episodes[0].recognised_by == "the caller"


def test_own_images_stand_at_their_steps(write_file: WriteFile) -> None:
    episode = open_libero([write_file("own")]).episodes[2]
    assert episode.render_stride == 4 and episode.seed == 1002
    assert episode.image_steps.dtype == np.int64 and episode.image_shape == (8, 8, 3)
    np.testing.assert_array_equal(episode.image_steps, [0, 4, 8])
    wrist = episode.images("eye_in_hand", [2, 0, 2])
    assert wrist.shape == (3, 8, 8, 3) and wrist.dtype == np.uint8
    np.testing.assert_array_equal(wrist[:, 0, 0, 0], [108, 100, 108])
    assert episode.images("agentview", []).shape == (0, 8, 8, 3)
    with pytest.raises(DatasetError, match=r"demo_2.*3\.\.3 are outside 0\.\.2"):
        episode.images("agentview", [3])


def test_state_layouts(write_file: WriteFile) -> None:
    path = write_file("own")
    episode = open_libero([path]).episodes[0]
    parts = [stored(path, "demo_0", f"obs/{k}") for k in ("ee_pos", "ee_ori", "gripper_states")]
    np.testing.assert_array_equal(episode.states(EEF), np.concatenate(parts, axis=1))
    assert episode.states(JOINT).shape == (9, 9) and episode.states(JOINT).dtype == np.float64
    with pytest.raises(DatasetError, match="joint7\\+fingers2"):
        episode.states("joint6")


def test_files_and_demos_come_in_natural_order(write_file: WriteFile, tmp_path: Path) -> None:
    write_file("own", name="task_10", demos=12)
    write_file("own", name="task_9", demos=1)
    hidden = tmp_path / ".parts"
    hidden.mkdir()
    (hidden / "000001.hdf5").write_bytes(b"half a file")
    episodes = open_libero([tmp_path]).episodes
    assert [e.task_name for e in episodes[:2]] == ["task_9", "task_10"]
    assert [e.demo for e in episodes[1:]] == [f"demo_{i}" for i in range(12)]


@pytest.mark.parametrize(
    ("name", "instruction"),
    [
        ("put_the_bowl_on_the_stove", "put the bowl on the stove"),
        ("KITCHEN_SCENE3_turn_on_the_stove", "turn on the stove"),
        ("LIVING_ROOM_SCENE10_pick_up_the_book", "pick up the book"),
    ],
)
def test_a_regenerated_files_instruction_is_its_name(
    write_file: WriteFile, name: str, instruction: str
) -> None:
    assert open_libero([write_file("regenerated", name=name)]).instructions == [instruction]


def test_episodes_cross_processes(write_file: WriteFile) -> None:
    dataset = open_libero([write_file("own")])
    dataset.episodes[0].actions()  # the parent has had the file open before the fork
    assert pickle.loads(pickle.dumps(dataset)).fingerprint() == dataset.fingerprint()  # noqa: S301
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            read = pool.map_async(methodcaller("states", EEF), dataset.episodes).get(timeout=60)
        assert [float(states[0, 0]) for states in read] == [0.0, 0.1, 0.2]


def test_nothing_is_read_before_it_is_asked_for(write_file: WriteFile) -> None:
    path = write_file("own", size=64)
    with h5py.File(path) as file:
        dataset = file["data/demo_1/actions"]
        offset, size = dataset.id.get_offset(), dataset.id.get_storage_size()
    content = bytearray(path.read_bytes())
    content[offset : offset + size] = b"\xff" * size  # NaN
    path.write_bytes(content)
    dataset = open_libero([path])  # the damage is in demo_1's actions alone
    dataset.episodes[0].actions()
    dataset.episodes[1].images("agentview", [0])
    with pytest.raises(DatasetError, match="demo_1: actions"):
        dataset.episodes[1].actions()


def test_fingerprint_follows_actions_and_names(write_file: WriteFile) -> None:
    path = write_file("own")
    before = open_libero([path]).fingerprint()
    assert open_libero([path]).fingerprint() == before and len(before) == 64
    with h5py.File(path, "r+") as file:
        file["data/demo_0/actions"][3, 2] += 1e-9
    changed = open_libero([path]).fingerprint()
    assert changed != before
    renamed = path.rename(path.with_name("other_demo.hdf5"))
    assert open_libero([renamed]).fingerprint() not in (before, changed)
