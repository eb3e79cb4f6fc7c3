"""LeRobot folders of every version and codec: rows, frames by time, names, absent cameras."""

from __future__ import annotations

import io
import json
import pickle
import re
import sys
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from reflexarc.contract.errors import DatasetError
from reflexarc.data.lerobot import ActionMeaning, is_lerobot, open_lerobot

sys.path.insert(0, str(Path(__file__).parent))
from lerobot_samples import (
    ABSENT,
    CAMERA,
    FPS,
    SIZE,
    TASKS,
    edit_info,
    level,
    level_of_frame,
    read_level,
    rows_of,
    write_v2,
    write_v3,
)

LENGTHS = (12, 7, 9)
_NEAR = 6  # levels of grey; neighbours lie 17 apart


@pytest.fixture(scope="module", params=["v2.0-h264", "v2.1-av1", "v3.0-h264", "v3.0-av1"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    version, codec = request.param.split("-")
    root = tmp_path_factory.mktemp(request.param) / "sample"
    if version == "v3.0":
        return write_v3(root, lengths=LENGTHS, codec=codec)
    return write_v2(root, version=version, lengths=LENGTHS, codec=codec)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_v2(tmp_path_factory.mktemp("lerobot") / "sample", lengths=LENGTHS)


def test_rows_instructions_and_absent_cameras(folder: Path) -> None:
    assert is_lerobot(folder) and not is_lerobot(folder.parent)
    dataset = open_lerobot(folder)
    assert dataset.absent_cameras == (ABSENT,) and dataset.cameras == ("front",)
    assert [episode.length for episode in dataset.episodes] == list(LENGTHS)
    assert dataset.mapping.state_spec.layout == "state5"
    assert dataset.mapping.state_spec.names == tuple(f"joint_{i}" for i in range(5))
    assert dataset.action_spec(4).names == ("x", "y", "z")
    assert dataset.action_spec(4).control_hz == FPS
    first = 0
    for index, episode in enumerate(dataset.episodes):
        rows = rows_of(index, LENGTHS[index], first)
        np.testing.assert_array_equal(episode.states("state5"), rows["observation.state"])
        np.testing.assert_array_equal(episode.actions(), rows["action"].astype(np.float64))
        assert episode.instruction == TASKS[index % 2]
        assert episode.task_name == TASKS[index % 2].replace(" ", "_")
        first += LENGTHS[index]
    dataset.check_images()


def test_frames_are_those_of_their_rows_in_any_order(folder: Path) -> None:
    dataset = open_lerobot(folder)
    for index, episode in enumerate(dataset.episodes):
        frames = episode.images("front", range(episode.length))
        assert frames.shape == (episode.length, *SIZE, 3) and frames.dtype == np.uint8
        for step, image in enumerate(frames):
            assert abs(read_level(image) - level(index, step)) <= _NEAR
        order = [episode.length - 1, 0, 3, 3, 1]
        np.testing.assert_array_equal(episode.images("front", order), frames[order])
    # From one episode to another and back: in v3.0 both lie in one file.
    first, second = (e.images("front", [2])[0] for e in dataset.episodes[:2])
    assert abs(read_level(first) - level(0, 2)) <= _NEAR
    assert abs(read_level(second) - level(1, 2)) <= _NEAR


def test_time_counts_from_the_first_row(tmp_path: Path) -> None:
    """GR00T's sample begins its timestamps one period late; its videos begin at 0."""
    dataset = open_lerobot(write_v2(tmp_path / "late", lengths=(6,), first_time=1 / FPS))
    frames = dataset.episodes[0].images("front", range(6))
    assert [abs(read_level(f) - level(0, i)) <= _NEAR for i, f in enumerate(frames)] == [True] * 6


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_decode_for_themselves(sample: Path, method: str) -> None:
    dataset = open_lerobot(sample)
    dataset.episodes[1].images("front", [0])  # a decoder stands open in the parent
    data = pickle.dumps(dataset)
    with get_context(method).Pool(1) as pool:
        got = pool.starmap(level_of_frame, [(data, step) for step in (1, 5)])
    assert [abs(g - level(1, s)) <= _NEAR for g, s in zip(got, (1, 5), strict=True)] == [True] * 2


def test_a_stride_leaves_frames_out_and_keeps_rows(sample: Path) -> None:
    episode = open_lerobot(sample, frame_stride=5).episodes[0]
    assert episode.image_steps.tolist() == [0, 5, 10] and episode.length == 12
    assert abs(read_level(episode.images("front", [2])[0]) - level(0, 10)) <= _NEAR


def test_parts_by_modality_slices_and_names(tmp_path: Path) -> None:
    root = write_v2(tmp_path / "parts", lengths=(4,))
    (root / "meta/modality.json").write_text(
        '{"state": {"arm": {"start": 0, "end": 3}, "hand": {"start": 4, "end": 5}},'
        ' "action": {"arm": {"start": 0, "end": 2}},'
        ' "video": {"view": {"original_key": "observation.images.front"}}}'
    )
    dataset = open_lerobot(
        root,
        state=["hand", "arm"],
        action={"reach": "arm", "grip": "action[2:3]"},
        cameras={"main": "view"},
        meaning=ActionMeaning(kind="delta_osc", gripper="grip", gripper_closed=1.0),
    )
    episode, rows = dataset.episodes[0], rows_of(0, 4, 0)
    assert dataset.mapping.state_spec.layout == "hand1+arm3"
    assert dataset.mapping.state_spec.names == ("hand", "arm_0", "arm_1", "arm_2")
    np.testing.assert_array_equal(
        episode.states("hand1+arm3"), rows["observation.state"][:, [4, 0, 1, 2]]
    )
    spec = dataset.action_spec(2)
    assert spec.names == ("reach_0", "reach_1", "grip") and spec.kind == "delta_osc"
    assert spec.gripper is not None and spec.gripper.index == 2
    np.testing.assert_array_equal(episode.actions(), rows["action"].astype(np.float64))
    assert dataset.cameras == ("main",) and episode.images("main", [1]).shape == (1, *SIZE, 3)
    whole = open_lerobot(root)
    assert whole.cameras == ("view",)  # GR00T's name
    assert whole.fingerprint() != dataset.fingerprint()


def test_names_that_are_not_there_are_named(sample: Path) -> None:
    for options, said in (
        ({"state": ["leg"]}, "'leg' for observation.state; it has: observation.state, action"),
        ({"action": ["action[1:9]"]}, "outside the 3 columns"),
        ({"cameras": ["ghost"]}, "declares 'observation.images.ghost', but there is no file"),
        ({"cameras": ["side"]}, "no camera 'side'; cameras that are there: front"),
    ):
        with pytest.raises(DatasetError, match=_literal(said)):
            open_lerobot(sample, **options)
    with pytest.raises(DatasetError, match="the gripper 'grip' is none"):
        open_lerobot(sample, meaning=ActionMeaning(gripper="grip")).action_spec(1)
    episode = open_lerobot(sample).episodes[0]
    with pytest.raises(DatasetError, match="no camera 'hand'; it has: front"):
        episode.images("hand", [0])
    with pytest.raises(DatasetError, match=_literal("outside 0..11")):
        episode.images("front", [12])


def test_images_inside_parquet(tmp_path: Path) -> None:
    root = write_v2(tmp_path / "png", lengths=(5,))
    path = next((root / "data").rglob("*.parquet"))
    cells = []
    for step in range(5):
        out = io.BytesIO()
        Image.fromarray(np.full((*SIZE, 3), 40 * step, np.uint8)).save(out, format="PNG")
        cells.append({"bytes": out.getvalue(), "path": f"frame-{step}.png"})
    table = pq.read_table(path).append_column("observation.image", pa.array(cells))
    pq.write_table(table, path, row_group_size=2)
    features = json.loads((root / "meta/info.json").read_text())["features"]
    features["observation.image"] = {"dtype": "image", "shape": [3, *SIZE], "names": None}
    edit_info(root, features=features)
    dataset = open_lerobot(root, cameras={"wrist": "observation.image"})
    images = dataset.episodes[0].images("wrist", [4, 1, 1])
    assert images.shape == (3, *SIZE, 3)
    assert images[:, 0, 0, 0].tolist() == [160, 40, 40]


def test_the_sample_of_gr00t(shared_data: Path) -> None:
    root = shared_data / "lerobot_v2.0_gr1_picknplace"
    dataset = open_lerobot(root, state=["left_arm", "right_arm"], action=["right_arm"])
    assert dataset.absent_cameras == ("observation.images.egoview",)
    assert [e.length for e in dataset.episodes] == [416, 470, 470, 412, 328]
    assert dataset.episodes[4].instruction.startswith("pick the cupcake from the counter")
    assert dataset.mapping.state_spec.layout == "left_arm7+right_arm7"
    dataset.check_images()
    for episode in dataset.episodes:
        ends = episode.images("ego_view", [0, episode.length - 1])
        assert ends.shape == (2, 256, 256, 3) and ends.std() > 10


def test_a_camera_key_is_a_name_too(sample: Path) -> None:
    assert open_lerobot(sample, cameras={"front": CAMERA}).cameras == ("front",)


def _literal(text: str) -> str:
    return re.escape(text)
