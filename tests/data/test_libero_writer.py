"""The demonstration writer: LIBERO's layout, nothing half-written, resumable."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from reflexarc.contract.errors import DatasetError
from reflexarc.data.libero_hdf5 import open_libero
from reflexarc.data.libero_writer import Demonstration, TaskFileWriter, TaskHeader, atomic_path

TASK = "pick_up_the_milk_and_place_it_in_the_basket"
HEADER = TaskHeader(
    instruction="pick up the milk and place it in the basket",
    problem_name="libero_floor_manipulation",
    domain_name="robosuite",
    bddl_file_name="libero/libero/bddl_files/libero_object/x.bddl",
    bddl_file_content="(define)",
    image_size=8,
    render_stride=4,
    action_noise=0.1,
    seed=3,
)


def make_demonstration(attempt: int, length: int = 10) -> Demonstration:
    rng = np.random.default_rng(attempt)
    steps = np.arange(0, length, 4)
    shape = (len(steps), 8, 8, 3)
    return Demonstration(
        attempt=attempt,
        seed=1000 + attempt,
        actions=rng.uniform(-1, 1, (length, 7)),
        expert_actions=rng.uniform(-1, 1, (length, 7)),
        states=rng.normal(size=(length, 12)),
        eef_positions=rng.normal(size=(length, 3)),
        eef_quaternions=rng.normal(size=(length, 4)),
        eef_axis_angles=rng.normal(size=(length, 3)),
        finger_positions=rng.normal(size=(length, 2)),
        joint_positions=rng.normal(size=(length, 7)),
        image_steps=steps,
        images={
            camera: rng.integers(0, 256, shape, dtype=np.uint8)
            for camera in ("agentview", "eye_in_hand")
        },
        object_poses={"milk_1": {"position": [0.0, 0.1, 0.2], "quaternion": [0.0, 0.0, 0.0, 1.0]}},
        object_positions=rng.normal(size=(length, 1, 3)),
        object_names=("milk_1",),
        model_file="<mujoco/>" * 20_000,  # real ones are longer than an HDF5 attribute's 64 KiB
    )


def demos_of(path: Path) -> list[int]:
    with h5py.File(path) as file:
        data = file["data"]
        return [int(data[f"demo_{i}"].attrs["attempt"]) for i in range(data.attrs["num_demos"])]


def test_layout_and_attributes(tmp_path: Path) -> None:
    writer = TaskFileWriter(tmp_path, TASK)
    demonstration = make_demonstration(0)
    writer.add(demonstration)
    writer.add_failure(1, "slipped")
    path = writer.assemble(HEADER)

    assert path.name == f"{TASK}_demo.hdf5"
    with h5py.File(path) as file:
        data = file["data"]
        assert data.attrs["tag"] == "reflexarc-v1"
        assert data.attrs["alignment"] == "before_action"
        assert data.attrs["render_stride"] == 4
        assert data.attrs["image_size"] == 8
        assert data.attrs["num_demos"] == 1
        assert data.attrs["total"] == 10
        problem = json.loads(data.attrs["problem_info"])
        assert problem["language_instruction"] == HEADER.instruction
        demo = data["demo_0"]
        assert demo.attrs["num_samples"] == 10
        assert demo.attrs["seed"] == 1000
        assert demo.attrs["model_file"] == demonstration.model_file
        assert json.loads(demo.attrs["object_poses"]) == demonstration.object_poses
        np.testing.assert_array_equal(demo.attrs["init_state"], demonstration.states[0])
        np.testing.assert_array_equal(demo["obs/image_steps"], [0, 4, 8])
        assert demo["obs/agentview_rgb"].shape == (3, 8, 8, 3)
        assert demo["robot_states"].shape == (10, 9)
        assert demo["obs/ee_states"].shape == (10, 6)
        np.testing.assert_array_equal(demo["dones"], [0] * 9 + [1])


def test_the_reader_gives_back_what_was_written(tmp_path: Path) -> None:
    writer = TaskFileWriter(tmp_path, TASK)
    demonstrations = [make_demonstration(attempt, 9 + attempt) for attempt in range(12)]
    for demonstration in reversed(demonstrations):
        writer.add(demonstration)
    writer.assemble(HEADER)

    episodes = open_libero([tmp_path]).episodes
    assert [episode.seed for episode in episodes] == list(range(1000, 1012))
    for episode, demonstration in zip(episodes, demonstrations, strict=True):
        assert episode.alignment == "before_action"
        assert episode.instruction == HEADER.instruction
        np.testing.assert_array_equal(episode.actions(), demonstration.actions)
        np.testing.assert_array_equal(episode.image_steps, demonstration.image_steps)
        np.testing.assert_array_equal(
            episode.states("joint7+fingers2"),
            np.hstack([demonstration.joint_positions, demonstration.finger_positions]),
        )
        for camera in ("agentview", "eye_in_hand"):
            frames = range(len(episode.image_steps))
            np.testing.assert_array_equal(
                episode.images(camera, list(frames)), demonstration.images[camera]
            )


def test_more_demonstrations_join_an_assembled_file(tmp_path: Path) -> None:
    TaskFileWriter(tmp_path, TASK).add(make_demonstration(0))
    TaskFileWriter(tmp_path, TASK).add_failure(1, "slipped")
    TaskFileWriter(tmp_path, TASK).assemble(HEADER)
    writer = TaskFileWriter(tmp_path, TASK)
    assert writer.attempts() == {0: True, 1: False}
    writer.add(make_demonstration(3))
    writer.add(make_demonstration(2))
    path = writer.assemble(HEADER)
    assert demos_of(path) == [0, 2, 3]
    assert TaskFileWriter(tmp_path, TASK).attempts() == {0: True, 1: False, 2: True, 3: True}
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_kill_between_rename_and_cleaning_duplicates_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = TaskFileWriter(tmp_path, TASK)
    for attempt in (0, 1):
        writer.add(make_demonstration(attempt))
    with monkeypatch.context() as patched:

        def killed(_path: Path) -> None:
            raise KeyboardInterrupt

        patched.setattr("reflexarc.data.libero_writer.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            writer.assemble(HEADER)
    assert writer.attempts() == {0: True, 1: True}
    assert demos_of(writer.assemble(HEADER)) == [0, 1]


def test_nothing_new_leaves_the_file_untouched(tmp_path: Path) -> None:
    writer = TaskFileWriter(tmp_path, TASK)
    writer.add(make_demonstration(0))
    before = writer.assemble(HEADER).stat()
    assert writer.assemble(HEADER).stat() == before


def test_an_error_leaves_no_file_under_a_final_name(tmp_path: Path) -> None:
    path = tmp_path / "file.hdf5"

    def write_half() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    writer = TaskFileWriter(tmp_path, TASK)
    writer.add(make_demonstration(0))
    part = writer.parts_folder / "000000.hdf5"
    part.write_bytes(part.read_bytes()[:1000])
    with pytest.raises(DatasetError, match=r"000000\.hdf5"):
        writer.assemble(HEADER)
    assert not writer.path.exists()
