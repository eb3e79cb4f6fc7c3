"""Damaged files: the error names the file, the demo and the key."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from reflexarc.contract.errors import DatasetError
from reflexarc.data import compute_statistics, open_libero

EEF = "eef3+axisangle3+fingers2"
WriteFile = Callable[..., Path]
EditFile = Callable[..., None]


def test_a_truncated_file_is_named(write_file: WriteFile) -> None:
    path = write_file()
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(DatasetError, match=rf"{path.name} cannot be opened as HDF5.*truncated"):
        open_libero([path])


def test_something_else_than_hdf5_is_named(tmp_path: Path) -> None:
    path = tmp_path / "notes_demo.hdf5"
    path.write_text("no demonstrations here")
    with pytest.raises(DatasetError, match=r"notes_demo\.hdf5 cannot be opened as HDF5"):
        open_libero([tmp_path])


@pytest.mark.parametrize(
    "key",
    [
        "actions", "obs", "obs/ee_pos", "obs/ee_ori", "obs/gripper_states", "obs/joint_states",
        "obs/agentview_rgb", "obs/eye_in_hand_rgb", "obs/image_steps",
    ],
)  # fmt: skip
def test_a_missing_key_is_named(write_file: WriteFile, edit_file: EditFile, key: str) -> None:
    path = write_file()
    edit_file(path, f"data/demo_1/{key}")
    with pytest.raises(DatasetError, match=rf"{path.name}, demo_1: .*{key}.* is missing"):
        open_libero([path])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("actions", np.zeros((9, 6)), r"actions has shape \(9, 6\), expected \('any', 7\)"),
        ("actions", np.zeros((0, 7)), "actions has 0 rows"),
        ("actions", np.full((9, 7), b"x"), "actions is .*not numbers"),
        ("obs/ee_pos", np.zeros((8, 3)), r"obs/ee_pos has shape \(8, 3\), expected \(9, 3\)"),
        ("obs/joint_states", np.zeros((9, 6)), "obs/joint_states has shape"),
        ("obs/agentview_rgb", np.zeros((2, 8, 8, 3), np.uint8), "obs/agentview_rgb has shape"),
        ("obs/agentview_rgb", np.zeros((3, 8, 8, 3), np.float32), "is float32, not uint8"),
        ("obs/eye_in_hand_rgb", np.zeros((3, 4, 4, 3), np.uint8), "differ in size"),
        ("obs/image_steps", np.array([0, 4, 9]), "image_steps must increase within 0..8"),
        ("obs/image_steps", np.array([0, 4, 4]), "image_steps must increase"),
        ("obs/image_steps", np.zeros(0, np.int64), "no frames"),
    ],
)
def test_a_wrong_shape_or_type_is_named(
    write_file: WriteFile, edit_file: EditFile, key: str, value: np.ndarray, message: str
) -> None:
    path = write_file()
    edit_file(path, f"data/demo_2/{key}", value)
    with pytest.raises(DatasetError, match=message) as caught:
        open_libero([path])
    assert path.name in caught.value.message and "demo_2" in caught.value.message


def test_an_empty_image_dataset_is_a_demo_without_frames(
    write_file: WriteFile, edit_file: EditFile
) -> None:
    path = write_file("regenerated")
    for camera in ("agentview_rgb", "eye_in_hand_rgb"):
        edit_file(path, f"data/demo_0/obs/{camera}", np.zeros((0, 8, 8, 3), np.uint8))
    with pytest.raises(DatasetError, match=r"demo_0: obs/agentview_rgb has shape \(0, 8, 8, 3\)"):
        open_libero([path])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_actions_that_are_not_finite_are_named(write_file: WriteFile, value: float) -> None:
    path = write_file("official")
    with h5py.File(path, "r+") as file:
        file["data/demo_1/actions"][5, 3] = value
    dataset = open_libero([path])
    with pytest.raises(
        DatasetError, match=rf"{path.name}, demo_1: actions is .* at row 5, dim.* 3"
    ) as caught:
        compute_statistics(dataset, EEF)
    assert caught.value.field == "actions"


def test_states_that_are_not_finite_are_named(write_file: WriteFile) -> None:
    path = write_file()
    with h5py.File(path, "r+") as file:
        file["data/demo_0/obs/ee_ori"][2, 1] = np.nan
    with pytest.raises(DatasetError, match=r"demo_0: obs/ee_ori is nan at row 2, dim.* 1 \(1 such"):
        open_libero([path]).episodes[0].states(EEF)


def test_a_damaged_chunk_is_named(write_file: WriteFile) -> None:
    path = write_file()
    with h5py.File(path, "r+") as file:
        group = file["data/demo_1/obs"]
        pixels = group["agentview_rgb"][()]
        del group["agentview_rgb"]
        dataset = group.create_dataset("agentview_rgb", data=pixels, compression="gzip")
        chunk = dataset.id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + chunk.size] = b"\x00" * chunk.size
    path.write_bytes(content)
    dataset = open_libero([path])
    with pytest.raises(DatasetError, match="demo_1: obs/agentview_rgb cannot be read"):
        dataset.episodes[1].images("agentview", [0])


def test_every_truncation_is_a_named_error(write_file: WriteFile, tmp_path: Path) -> None:
    """Whatever is left of a file, no error but DatasetError leaves the reader."""
    whole = write_file(demos=1).read_bytes()
    path = tmp_path / "cut" / "cut_demo.hdf5"
    path.parent.mkdir()
    for length in range(0, len(whole) - 1, 211):
        path.write_bytes(whole[:length])
        with pytest.raises(DatasetError, match=r"cut_demo\.hdf5"):
            open_libero([path]).fingerprint()


def test_flipped_bytes_raise_nothing_but_dataset_errors(
    write_file: WriteFile, tmp_path: Path
) -> None:
    whole = write_file(demos=1).read_bytes()
    path = tmp_path / "flipped_demo.hdf5"
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for position in rng.integers(0, min(len(whole), 12_000), 4):
            damaged[position] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            episode = open_libero([path]).episodes[0]
            episode.actions()
            episode.images("agentview", [0])
        except DatasetError:
            refused += 1
    assert refused > 0


def test_empty_folders_and_files_are_named(write_file: WriteFile, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"holds no \*\.hdf5 file; collect"):
        open_libero([tmp_path])
    with pytest.raises(DatasetError, match="nowhere does not exist"):
        open_libero([tmp_path / "nowhere"])
    with pytest.raises(DatasetError, match="no data was named"):
        open_libero([])
    path = write_file(demos=0)
    with pytest.raises(DatasetError, match="holds no demo"):
        open_libero([path])
    with h5py.File(path, "w"):
        pass
    with pytest.raises(DatasetError, match="no group 'data'"):
        open_libero([path])


def test_a_file_named_twice_is_refused(write_file: WriteFile, tmp_path: Path) -> None:
    path = write_file()
    with pytest.raises(DatasetError, match="named twice"):
        open_libero([tmp_path, path])
    shutil.copy(path, tmp_path / "copy_demo.hdf5")
    assert len(open_libero([tmp_path]).episodes) == 6
