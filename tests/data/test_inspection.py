"""Every demo is checked; what is bad or odd is named, the rest is still reported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from reflexarc.contract.errors import DatasetError
from reflexarc.data.inspection import count_demos, inspect_libero, no_ops

WriteFile = Callable[..., Path]
EditFile = Callable[..., None]


def test_a_sound_file(write_file: WriteFile) -> None:
    path = write_file()
    visited: list[str] = []
    inspection = inspect_libero([path], on_demo=visited.append)
    (report,) = inspection.files
    assert visited == [f"{path.name} demo_{i}" for i in range(3)]
    assert (report.demos, report.steps, report.frames) == (3, 27, 9)
    assert (report.alignment, report.recognised_by) == ("before_action", "attribute alignment")
    assert report.render_stride == 4 and report.image_shapes == [(8, 8, 3)]
    assert report.seeds == [1000, 1001, 1002] and not inspection.problems
    assert report.gripper_closed_share == pytest.approx(5 / 9)
    assert report.actions[0].minimum == 0.0 and report.actions[0].maximum == pytest.approx(0.208)
    assert [r.name for r in report.states].count("finger_left") == 1 and len(report.states) == 15
    assert json.loads(json.dumps(inspection.to_json()))["files"][0]["steps"] == 27


def test_official_files_lose_one_step_a_demo(write_file: WriteFile) -> None:
    (report,) = inspect_libero([write_file("official")]).files
    assert (report.steps, report.frames, report.alignment) == (24, 24, "after_action")


def test_every_bad_demo_is_named_and_the_rest_reported(
    write_file: WriteFile, edit_file: EditFile, tmp_path: Path
) -> None:
    path = write_file(demos=5)
    edit_file(path, "data/demo_1/obs/ee_pos")
    edit_file(path, "data/demo_3/actions", np.full((9, 7), np.nan))
    (tmp_path / "half_demo.hdf5").write_bytes(path.read_bytes()[:3000])
    inspection = inspect_libero([tmp_path])
    found = {(Path(p.path).name, p.demo, p.key) for p in inspection.problems}
    assert found == {
        ("half_demo.hdf5", "", ""),
        (path.name, "demo_1", "obs/ee_pos"),
        (path.name, "demo_3", "actions"),
    }
    assert [report.demos for report in inspection.files] == [0, 3]
    assert count_demos([tmp_path]) == 5


def test_damaged_images_are_found_only_when_read(
    write_file: WriteFile, edit_file: EditFile
) -> None:
    path = write_file()
    with h5py.File(path, "r+") as file:
        group = file["data/demo_0/obs"]
        del group["agentview_rgb"]
        pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
        dataset = group.create_dataset("agentview_rgb", data=pixels, compression="gzip")
        chunk = dataset.id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + 20] = b"\xff" * 20
    path.write_bytes(content)
    (problem,) = inspect_libero([path]).problems
    assert (problem.demo, problem.key) == ("demo_0", "obs/agentview_rgb")
    assert inspect_libero([path], read_images=False).problems == []


def test_odd_values_are_remarked(write_file: WriteFile) -> None:
    path = write_file(demos=6)
    with h5py.File(path, "r+") as file:
        demos = file["data"]
        demos["demo_0/actions"][2, 1] = 1.5
        demos["demo_1/actions"][4, 6] = 0.25
        demos["demo_3/actions"][...] = demos["demo_2/actions"][()]
        demos["demo_4"].attrs["num_samples"] = 8
        demos["demo_5"].attrs["seed"] = 1004
        demos.attrs["num_demos"] = 50
        for demo in demos.values():
            demo["obs/joint_states"][:, 3] = 0.5
    remarks = inspect_libero([path]).files[0].remarks
    for expected in (
        "demo_0: 1 action values outside [-1, 1], first at aligned step 2, delta_y = 1.5",
        "demo_1: gripper commands other than -1 and +1",
        f"demo_3: the same actions as {path.name} demo_2",
        "demo_4: num_samples is 8, actions has 9 rows",
        "6 demos share 5 seeds",
        "attribute num_demos is 50, the file holds 6",
        "constant state: joint_4",
    ):
        assert expected in remarks
    # The fixture's images hold one number each.
    assert "demo_0: 3 images of agentview have a single colour" in remarks


def test_a_demo_of_unusual_length_is_remarked(write_file: WriteFile) -> None:
    path = write_file("regenerated", samples=4, demos=4)
    long = write_file("regenerated", name="long", samples=9, demos=1)
    with h5py.File(path, "r+") as file, h5py.File(long) as other:
        other.copy(other["data/demo_0"], file["data"], name="demo_7")
    remarks = inspect_libero([path]).files[0].remarks
    assert "demo_7: 9 steps where the median is 4" in remarks


def test_files_that_do_not_fit_together_are_remarked(write_file: WriteFile) -> None:
    paths = [write_file("own"), write_file("official", name="other", size=16)]
    remarks = inspect_libero(paths).remarks
    assert remarks == [
        "files of different alignments: after_action, before_action",
        "files of different image sizes: (16, 16, 3), (8, 8, 3)",
        "files of different render strides: 1, 4",
    ]


def test_no_op_rule() -> None:
    actions = np.zeros((5, 7))
    actions[:, 6] = [-1, -1, 1, 1, 1]
    actions[3, 0] = 2e-4  # moves
    actions[4, 0] = 0.9e-4  # does not
    np.testing.assert_array_equal(no_ops(actions), [True, True, False, False, True])


def test_paths_that_name_nothing_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="holds no"):
        inspect_libero([tmp_path])
