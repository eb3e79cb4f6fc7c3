"""First frames are read once, and again where a file was written since."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import h5py
import pytest
import torch

from reflexarc.training.feature_store import first_frames
from reflexarc.training.feature_store.first_frames import FILE
from reflexarc.training.recipe_files import load_recipe
from reflexarc.training.session import Planned, execute, open_run_folder, plan


@pytest.fixture
def data(demonstrations: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demonstrations, tmp_path / "data"))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The demonstrations whose first frames are read, as they are."""
    seen: list[str] = []
    real = first_frames.recorded_frames

    def counted(episode, camera, frames):  # type: ignore[no-untyped-def]
        seen.append(episode.demo)
        return real(episode, camera, frames)

    monkeypatch.setattr(first_frames, "recorded_frames", counted)
    return seen


def planned(data: Path, folder: Path) -> Planned:
    recipe = load_recipe("statevla_tiny", [f"data.paths=['{data}']", "training.epochs=1"])
    found = plan(recipe, folder / "run", device=torch.device("cpu"), feature_cache=folder / "cache")
    assert found.preparation.feature_key.rows == found.estimate.train_samples + (
        found.estimate.held_out_samples
    )
    return found


def test_a_run_leaves_what_the_next_need_not_read(
    data: Path, tmp_path: Path, reads: list[str]
) -> None:
    first = planned(data, tmp_path)
    assert len(reads) == 2 * 8  # two cameras of eight demonstrations
    assert not (tmp_path / "cache").exists()  # a plan writes nothing
    execute(first, open_run_folder(first.preparation.recipe, first.output, resume=False,
                                   fresh=False), progress_bar=False)  # fmt: skip
    assert [path.name for path in (tmp_path / "cache").glob("*.json")] == [FILE]
    reads.clear()
    second = planned(data, tmp_path)
    assert reads == []
    assert second.preparation.feature_key == first.preparation.feature_key
    assert second.estimate.features_cached


def test_a_file_that_was_written_since_is_read_again(
    data: Path, tmp_path: Path, reads: list[str]
) -> None:
    first = planned(data, tmp_path).preparation
    (tmp_path / "cache").mkdir()
    first._first_frames.save(tmp_path / "cache")
    changed = sorted(data.iterdir())[0]
    before = changed.stat()
    with h5py.File(changed, "r+") as file:
        for camera in ("agentview_rgb", "eye_in_hand_rgb"):
            file[f"data/demo_0/obs/{camera}"][0] = 7  # the same size, other pixels
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    reads.clear()
    second = planned(data, tmp_path).preparation
    assert len(reads) == 2 * 4  # the other file is not read
    keys = first.feature_key.episodes, second.feature_key.episodes
    assert sum(one != two for one, two in zip(*keys, strict=True)) == 1


def test_what_is_no_list_of_digests_is_read_over(
    data: Path, tmp_path: Path, reads: list[str]
) -> None:
    first = planned(data, tmp_path).preparation.feature_key
    (tmp_path / "cache").mkdir()
    for broken in ("", "[1]", '{"a": '):
        (tmp_path / "cache" / FILE).write_text(broken)
        assert planned(data, tmp_path).preparation.feature_key == first
