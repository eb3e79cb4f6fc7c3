"""A mobile robot's HDF5 episodes: what is written is read, and what is wrong is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from reflexarc.contract.errors import DatasetError
from reflexarc.data.mobile.dataset import is_mobile, open_mobile
from reflexarc.data.mobile.episode import read_episode
from reflexarc.data.mobile.inspection import inspect_mobile
from reflexarc.data.mobile.writing import write_episode
from reflexarc.data.statistics import compute_statistics

SIDE = 16


def episode(length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (length, SIDE, SIDE, 3), np.uint8)
    return images, random.uniform(-0.5, 0.5, (length, 2)).astype(np.float32)


def write(path: Path, length: int = 24, told: str = "navigate to the red box", seed: int = 0,
          **fields: Any) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    images, actions = episode(length, seed)
    write_episode(path, images, actions, told, control_hz=5.0, **fields)
    return images, actions


def foreign(path: Path, **datasets: Any) -> None:
    """A file as another recorder writes it: three velocities, no rate, text as bytes."""
    images, actions = episode(20)
    rows = np.concatenate([actions, np.zeros((20, 1))], axis=1)
    with h5py.File(path, "w") as file:
        for key, value in {"images": images, "actions": rows, **datasets}.items():
            if value is not None:
                file[key] = value


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "episode_0.h5"
    meant = episode(24, seed=9)[1]
    images, actions = write(path, expert_actions=meant)
    found = read_episode(path)
    assert (found.length, found.image_shape, found.control_hz) == (24, (SIDE, SIDE, 3), 5.0)
    assert (found.instruction, found.task_name) == ("navigate to the red box",
                                                    "navigate_to_the_red_box")  # fmt: skip
    assert np.array_equal(found.actions(), actions.astype(np.float64))
    assert np.array_equal(found.labelled_actions("expert"), meant.astype(np.float64))
    wanted = [5, 0, 5, 23]
    assert np.array_equal(found.images("front", wanted), images[wanted])
    assert found.states("none").shape == (24, 0)


def test_a_folder_is_a_dataset_with_statistics(tmp_path: Path) -> None:
    for number, told in enumerate(["to the red box", "to the blue ball", "to the red box"]):
        write(tmp_path / f"episode_{number}.h5", told=told, seed=number)
    (tmp_path / "notes.txt").write_text("no episode")
    assert is_mobile(tmp_path)
    data = open_mobile([tmp_path])
    assert [e.instruction for e in data.episodes] == [
        "to the red box", "to the blue ball", "to the red box"
    ]  # fmt: skip
    spec = data.action_spec(10)
    assert (spec.kind, spec.control_hz, spec.names) == ("velocity", 5.0, ("linear_x", "linear_y"))
    found = compute_statistics(data, "none")
    rows = np.concatenate([e.actions() for e in data.episodes])
    np.testing.assert_allclose(found.action.mean, rows.mean(0))
    assert found.state.names == ()
    again = open_mobile([tmp_path]).fingerprint()
    assert data.fingerprint() == again
    assert data.subset(data.episodes[:2]).fingerprint() != again


@pytest.mark.parametrize("text", [b"go to the  box", "go to the box", np.array([b"go to the box"])])
def test_files_of_other_recorders(tmp_path: Path, text: Any) -> None:
    path = tmp_path / "episode_20251112_1.h5"
    foreign(path, language_instruction=text)
    found = open_mobile([tmp_path], pattern="episode_2025111*.h5", control_hz=10.0)
    assert found.episodes[0].instruction == "go to the box"
    assert found.control_hz == 10.0
    assert found.episodes[0].actions().shape == (20, 2), "the third velocity is left out"


def test_an_instruction_that_is_missing_needs_a_fallback(tmp_path: Path) -> None:
    foreign(tmp_path / "episode_1.h5")
    with pytest.raises(DatasetError, match=r"data\.fallback_instruction") as caught:
        open_mobile([tmp_path], control_hz=5.0)
    assert caught.value.field == "language_instruction"
    given = open_mobile([tmp_path], control_hz=5.0, fallback_instruction="go")
    assert given.episodes[0].instruction == "go"


def test_rates_are_said_and_equal(tmp_path: Path) -> None:
    foreign(tmp_path / "episode_1.h5", language_instruction="go")
    with pytest.raises(DatasetError, match=r"data\.control_hz"):
        open_mobile([tmp_path])
    write(tmp_path / "episode_2.h5")
    with pytest.raises(DatasetError, match="5, 10 Hz"):
        open_mobile([tmp_path], control_hz=10.0)


def edited(change: Callable[[Any], None]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        write(path)
        with h5py.File(path, "r+") as file:
            change(file)

    return damage


def replaced(key: str, value: Any) -> Callable[[Path], None]:
    def change(file: Any) -> None:
        del file[key]
        if value is not None:
            file[key] = value

    return edited(change)


def not_a_number(file: Any) -> None:
    file["actions"][7, 1] = np.nan


@pytest.mark.parametrize(
    ("damage", "message", "field"),
    [
        (edited(not_a_number), r"actions is nan at row 7, dimension 1", "actions"),
        (replaced("actions", np.zeros((24, 1))), r"expected \(T, 2 or more\)", "actions"),
        (replaced("actions", np.zeros((9, 2))), "24 images and 9 actions", "actions"),
        (replaced("actions", None), "actions is missing", "actions"),
        (replaced("images", np.zeros((24, 3, 8, 8), np.uint8)), "expected uint8", "images"),
        (replaced("images", np.zeros((24, 8, 8, 3))), "expected uint8", "images"),
        (lambda path: path.write_bytes(b"not HDF5"), "cannot be opened as HDF5", None),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path, damage: Callable[[Path], None], message: str, field: str | None
) -> None:
    path = tmp_path / "episode_3.h5"
    damage(path)
    with pytest.raises(DatasetError, match=message) as caught:
        open_mobile([tmp_path]).episodes[0].actions()
    assert str(path) in caught.value.message
    assert caught.value.field == field


def test_paths_and_patterns_that_name_nothing(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="does not exist"):
        open_mobile([tmp_path / "gone"])
    write(tmp_path / "episode_1.h5")
    with pytest.raises(DatasetError, match=r"matches 'demo_\*.h5'; mend data.pattern"):
        open_mobile([tmp_path], pattern="demo_*.h5")
    with pytest.raises(DatasetError, match="named twice"):
        open_mobile([tmp_path, tmp_path / "episode_1.h5"])


def test_inspection_counts_short_episodes_and_goes_on_after_a_bad_one(tmp_path: Path) -> None:
    write(tmp_path / "episode_1.h5", length=12)
    write(tmp_path / "episode_2.h5", length=30)
    edited(not_a_number)(tmp_path / "episode_3.h5")
    foreign(tmp_path / "episode_4.h5")
    report = inspect_mobile([tmp_path])
    assert (report.episodes, report.short, report.longest) == (3, 1, 30)
    assert [problem.key for problem in report.problems] == ["actions"]
    assert any("1 of 3 episodes are shorter than 18 steps" in text for text in report.remarks)
    assert any("fallback_instruction" in text for text in report.remarks)
    assert any("control_hz" in text for text in report.remarks)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    images, actions = episode(5)
    with pytest.raises(DatasetError, match="do not fit"):
        write_episode(tmp_path / "a.h5", images[:4], actions, "go", control_hz=5.0)
    actions[0, 0] = np.inf
    with pytest.raises(DatasetError, match="not finite"):
        write_episode(tmp_path / "a.h5", images, actions, "go", control_hz=5.0)
    assert not list(tmp_path.iterdir())
