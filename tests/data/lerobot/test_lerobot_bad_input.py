"""Damaged LeRobot folders: each an error that names the file and the key."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reflexarc.contract.errors import DatasetError
from reflexarc.data import open_libero
from reflexarc.data.lerobot import open_lerobot
from reflexarc.data.lerobot.inspection import inspect_lerobot
from reflexarc.data.mixture import mix

sys.path.insert(0, str(Path(__file__).parent))
from lerobot_samples import CAMERA, edit_info, write_v2, write_v3

EEF = "eef3+axisangle3+fingers2"


@pytest.fixture(params=["v2.1", "v3.0"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    root = tmp_path / "sample"
    return write_v3(root) if request.param == "v3.0" else write_v2(root)


def video_of(root: Path) -> Path:
    return sorted((root / "videos").rglob("*.mp4"))[-1]


def data_of(root: Path) -> Path:
    return sorted((root / "data").rglob("*.parquet"))[-1]


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def replace_column(path: Path, name: str, values: object) -> None:
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index(name), name, pa.array(values)), path)


@pytest.mark.parametrize("which", ["data", "video"])
def test_a_file_that_is_absent(folder: Path, which: str) -> None:
    path = data_of(folder) if which == "data" else video_of(folder)
    path.unlink()
    with pytest.raises(DatasetError, match=r"does not exist, but|is missing or cut short"):
        open_lerobot(folder)


def test_a_file_of_metadata_that_is_absent(folder: Path) -> None:
    tasks = next((folder / "meta").glob("tasks.*"))
    tasks.unlink()
    with pytest.raises(DatasetError, match="tasks"):
        open_lerobot(folder)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.97])
def test_a_truncated_parquet(folder: Path, share: float) -> None:
    cut(data_of(folder), share)
    with pytest.raises(DatasetError, match=r"cannot be read as parquet .*truncated"):
        open_lerobot(folder)


@pytest.mark.parametrize("share", [0.0, 0.4, 0.9])
def test_a_truncated_video_is_found_without_decoding(folder: Path, share: float) -> None:
    video = video_of(folder)
    cut(video, share)
    dataset = open_lerobot(folder)
    with pytest.raises(DatasetError, match=rf"{video.name} .*(cut short|truncated)"):
        dataset.check_images()


def test_a_video_that_was_made_for_streaming_and_cut(tmp_path: Path) -> None:
    """Its headers stand first and promise every frame; only the frames are missing."""
    import av

    root = write_v2(tmp_path / "sample", lengths=(40,))
    video = video_of(root)
    moved = video.with_suffix(".moved.mp4")
    with (
        av.open(str(video)) as source,
        av.open(str(moved), "w", format="mp4", options={"movflags": "faststart"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    moved.replace(video)
    open_lerobot(root).check_images()
    cut(video, 0.8)
    with pytest.raises(DatasetError, match="cut short"):
        open_lerobot(root).check_images()
    with pytest.raises(DatasetError, match=video.name):
        open_lerobot(root).episodes[0].images("front", range(40))


def test_a_video_with_too_few_frames(tmp_path: Path) -> None:
    root = write_v2(tmp_path / "sample", lengths=(12, 5))
    first, second = sorted((root / "videos").rglob("*.mp4"))
    first.write_bytes(second.read_bytes())
    with pytest.raises(
        DatasetError, match=r"ends at 0\.400 s, its last frame should stand at 1\.1"
    ):
        open_lerobot(root).check_images()
    with pytest.raises(DatasetError, match=r"no frame within 1 ms of 0\.9000 s: the nearest is"):
        open_lerobot(root).episodes[0].images("front", [9])


@pytest.mark.parametrize("key", ["observation.state", "action"])
def test_a_value_that_is_not_finite(folder: Path, key: str) -> None:
    path = data_of(folder)
    rows = np.stack(pq.read_table(path).column(key).to_numpy())
    rows[-2, 1] = np.nan
    replace_column(path, key, rows.tolist())
    episode = open_lerobot(folder).episodes[-1]
    with pytest.raises(DatasetError, match=rf"episode_000002: {key} is nan at row 7, dimension 1"):
        episode.states("state5") if key != "action" else episode.actions()


def test_episode_ids_that_come_twice(tmp_path: Path) -> None:
    root = write_v2(tmp_path / "sample")
    path = root / "meta/episodes.jsonl"
    path.write_text(path.read_text() + path.read_text().splitlines()[1] + "\n")
    with pytest.raises(DatasetError, match="episode_index 1 is listed more than once"):
        open_lerobot(root)


def test_rows_of_another_episode(folder: Path) -> None:
    path = data_of(folder)
    column = pq.read_table(path).column("episode_index").to_pylist()
    replace_column(path, "episode_index", [0 for _ in column])
    with pytest.raises(DatasetError, match=r"should be of episode 2, episode_index there is \[0\]"):
        open_lerobot(folder)


def test_lengths_that_disagree(tmp_path: Path) -> None:
    root = write_v2(tmp_path / "sample")
    path = root / "meta/episodes.jsonl"
    path.write_text(path.read_text().replace('"length": 7', '"length": 8'))
    with pytest.raises(DatasetError, match=r"000001\.parquet has 7 rows, .*says 8"):
        open_lerobot(root)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"codebase_version": "v1.6"}, "'v1.6'; versions that are read: v2.0, v2.1, v3.0"),
        ({"fps": 0}, "fps is 0"),
        ({"features": 3}, "not as LeRobot writes it"),
        ({"data_path": "data/{nobody}.parquet"}, "nobody"),
    ],
)
def test_an_info_that_is_wrong(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    root = write_v2(tmp_path / "sample")
    edit_info(root, **changes)
    with pytest.raises(DatasetError, match=said.replace("[", r"\[").replace("{", r"\{")):
        open_lerobot(root)


def test_images_of_another_size_than_stated(folder: Path) -> None:
    features = json.loads((folder / "meta/info.json").read_text())["features"]
    features[CAMERA]["shape"] = [96, 128, 3]
    edit_info(folder, features=features)
    with pytest.raises(DatasetError, match=r"48x64, info\.json says 96x128"):
        open_lerobot(folder).episodes[0].images("front", [0])


def test_modality_outside_the_vector(folder: Path) -> None:
    (folder / "meta/modality.json").write_text('{"state": {"arm": {"start": 2, "end": 9}}}')
    with pytest.raises(
        DatasetError, match=r"part 'arm' is observation\.state\[2:9\], outside the 5"
    ):
        open_lerobot(folder)


def test_timestamps_that_stand_still(folder: Path) -> None:
    path = data_of(folder)
    column = pq.read_table(path).column("timestamp").to_numpy().copy()
    column[-1] = column[-2]
    replace_column(path, "timestamp", column)
    with pytest.raises(DatasetError, match="timestamp does not increase after row 7"):
        open_lerobot(folder).episodes[-1].images("front", [0])


def test_datasets_of_incompatible_shapes(tmp_path: Path, write_file) -> None:  # type: ignore[no-untyped-def]
    one = open_lerobot(write_v2(tmp_path / "one"))
    narrow = open_lerobot(tmp_path / "one", state=["observation.state[0:3]"])
    with pytest.raises(DatasetError, match=r"incompatible shapes.*state of a is \(5\).*of b \(3\)"):
        mix([one, narrow], ["a", "b"], EEF)
    with pytest.raises(DatasetError, match=r"incompatible shapes.*state of a"):
        mix([one, open_libero([write_file()])], ["a", "b"], EEF)
    renamed = open_lerobot(tmp_path / "one", cameras={"side": "front"})
    with pytest.raises(DatasetError, match="no camera in common"):
        mix([one, renamed], ["a", "b"], EEF)


def test_inspection_names_the_bad_and_reports_the_good(tmp_path: Path) -> None:
    root = write_v2(tmp_path / "sample")
    cut(video_of(root), 0.5)
    report, _ = inspect_lerobot(root)
    assert report.episodes == 2 and report.frames == 12 + 7
    (problem,) = report.problems
    assert problem.demo == "episode_000002" and "episode_000002.mp4" in problem.message
    assert report.absent_cameras == ["observation.images.ghost"]
    assert "info.json says total_frames" not in " ".join(report.remarks)
    assert [len(r) for r in (report.states, report.actions)] == [5, 3]
