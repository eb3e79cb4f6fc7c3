"""Damaged LeRobot folders as a person meets them: one line that names what is wrong, status 2."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from reflexarc.cli.main import app, main
from reflexarc.contract.errors import DatasetError

sys.path.insert(0, str(Path(__file__).parents[1] / "data" / "lerobot"))
from lerobot_samples import CAMERA, edit_info, picture, write_v2, write_v3, write_video

Damage = Callable[[Path], object]


def video_of(root: Path) -> Path:
    return sorted((root / "videos").rglob("*.mp4"))[-1]


def data_of(root: Path) -> Path:
    return sorted((root / "data").rglob("*.parquet"))[-1]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def set_rows(root: Path, name: str, change: Callable[[np.ndarray], list[object]]) -> None:
    path = data_of(root)
    table = pq.read_table(path)
    rows = np.array(table.column(name).to_pylist())
    column = table.column_names.index(name)
    pq.write_table(table.set_column(column, name, pa.array(change(rows))), path)


def with_nan(rows: np.ndarray) -> list[object]:
    rows[3, 1] = np.nan
    return rows.tolist()


def ragged(rows: np.ndarray) -> list[object]:
    return [[0.0] * (1 + row % 2) for row in range(len(rows))]


def set_modality(root: Path, values: object) -> None:
    (root / "meta/modality.json").write_text(json.dumps(values))


def set_shape(root: Path, key: str, shape: list[int]) -> None:
    features = json.loads((root / "meta/info.json").read_text())["features"]
    features[key]["shape"] = shape
    edit_info(root, features=features)


def list_first_episode(root: Path, **changes: object) -> None:
    """Once more, with changes; or in place of it, where ``changes`` are given."""
    path = root / "meta/episodes.jsonl"
    if path.is_file():
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines = [{**lines[0], **changes}, *lines[1:]] if changes else [lines[0], *lines]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return
    path = next((root / "meta/episodes").rglob("*.parquet"))
    rows = pq.read_table(path).to_pylist()
    if changes.get("length") == 0:
        changes["dataset_to_index"] = rows[0]["dataset_from_index"]
    rows = [{**rows[0], **changes}, *rows[1:]] if changes else [rows[0], *rows]
    pq.write_table(pa.Table.from_pylist(rows), path)


IMAGES, ROWS = ("inspect", "precompute", "train"), ("inspect", "stats", "precompute", "train")
CASES: dict[str, tuple[Damage, tuple[str, ...], str]] = {
    "absent video": (lambda r: video_of(r).unlink(), ROWS, r"does not exist, but|no video of"),
    "absent videos": (
        lambda r: shutil.rmtree(r / "videos"), IMAGES, r"declares .*, but there is no file of",
    ),
    "absent rows": (lambda r: data_of(r).unlink(), ROWS, r"copy the dataset again"),
    "absent tasks": (
        lambda r: next((r / "meta").glob("tasks.*")).unlink(), ROWS, r"tasks\..* copy",
    ),
    "cut video": (lambda r: cut(video_of(r)), IMAGES, r"\.mp4 cannot be decoded .*copy it again"),
    "cut rows": (lambda r: cut(data_of(r)), ROWS, r"\.parquet cannot be read .*copy it again"),
    "no video": (
        lambda r: video_of(r).write_bytes(b"nothing at all"), IMAGES, r"\.mp4 cannot be decoded",
    ),
    "few frames": (
        lambda r: write_video(video_of(r), [picture(2, i) for i in range(3)], "h264"),
        IMAGES,
        r"ends at 0\.200 s, its last frame should stand at",
    ),
    "NaN": (
        lambda r: set_rows(r, "action", with_nan), ROWS, r"action is nan at row 3, dimension 1",
    ),
    "ids twice": (list_first_episode, ROWS, r"episode_index 0 is listed more than once"),
    "no rows": (
        lambda r: list_first_episode(r, length=0), ROWS, r"episode_000000: length is 0; remove",
    ),
    "length in words": (
        lambda r: list_first_episode(r, length="twelve"), ROWS, r"length is 'twelve'|must be int",
    ),
    "wrong rate": (
        lambda r: edit_info(r, fps=30), IMAGES, r"\(10 a second\), info\.json says fps is 30",
    ),
    "no rate": (lambda r: edit_info(r, fps=float("nan")), ROWS, r"fps is nan; write"),
    "shape": (
        lambda r: set_shape(r, "observation.state", [9]), ROWS, r"have 5 values, info\.json says 9",
    ),
    "wider rows": (
        lambda r: set_rows(r, "action", lambda rows: np.pad(rows, [(0, 0), (0, 2)]).tolist()),
        ROWS,
        r"rows of action have 5 values, info\.json says 3",
    ),
    "ragged rows": (
        lambda r: set_rows(r, "action", ragged),
        ROWS,
        r"rows of action differ in length",
    ),
    "image size": (
        lambda r: set_shape(r, CAMERA, [96, 128, 3]), ("inspect", "precompute", "train"),
        r"48x64, info\.json says 96x128",
    ),
    "part": (
        lambda r: set_modality(r, {"state": {"arm": {"start": 0, "end": 2, "original_key": "x"}}}),
        ROWS,
        r"part 'arm' is of 'x', which info\.json does not declare",
    ),
    "camera": (
        lambda r: set_modality(r, {"video": {"view": {"original_key": "observation.images.x"}}}),
        ROWS,
        r"camera 'view' is 'observation\.images\.x', which info\.json does not declare",
    ),
    "no JSON": (
        lambda r: (r / "meta/info.json").write_text("{"), ROWS, r"info\.json cannot be read as",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    packaged = resources.files("reflexarc.training") / "recipes" / "statevla_tiny.yaml"
    values = yaml.safe_load(packaged.read_text())
    values["contract"] = {
        "cameras": ["front"], "image_size": 32, "orientation": "upright", "horizon": 8,
    }  # fmt: skip
    values["training"] = {"batch_size": 8, "steps": 2, "validate_every": 2, "checkpoint_every": 2}
    values["data"] = {"validation_fraction": 0.34, "split_by": "dataset"}
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def command(name: str, root: Path, recipe: Path) -> list[str]:
    out = root.parent
    return {
        "inspect": ["data", "inspect", str(root)],
        "stats": ["data", "stats", str(root)],
        "convert": ["data", "convert", str(root), "--output", str(out / "converted")],
        "precompute": ["data", "precompute", str(recipe), "--data", str(root),
                       "--feature-cache", str(out / "cache")],
        "train": ["train", str(recipe), "--data", str(root), "--output", str(out / "run")],
    }[name]  # fmt: skip


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
@pytest.mark.parametrize("case", CASES)
def test_damage_is_one_named_error(case: str, version: str, tmp_path: Path, recipe: Path) -> None:
    damage, commands, said = CASES[case]
    root = tmp_path / "sample"
    _ = write_v3(root) if version == "v3.0" else write_v2(root)
    if case == "length in words" and version == "v3.0":
        pytest.skip("a column of parquet has one type")
    damage(root)
    for name in commands:
        result = CliRunner(env={"COLUMNS": "200"}).invoke(app, command(name, root, recipe))
        assert isinstance(result.exception, DatasetError), (name, result.output, result.exception)
        assert re.search(said, result.exception.message), (name, result.exception.message)
        assert "\n" not in result.exception.message
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_shell_sees_one_line_and_a_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_v2(tmp_path / "sample")
    cut(data_of(root))
    monkeypatch.setattr(sys, "argv", ["reflexarc", "data", "stats", str(root)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error [dataset]: ") and "Traceback" not in line


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
@pytest.mark.parametrize("what", ["", "meta", "meta/info.json", "videos", "data"])
def test_what_may_not_be_read(what: str, tmp_path: Path, recipe: Path) -> None:
    root = write_v2(tmp_path / "sample")
    (root / what).chmod(0)
    try:
        for name in IMAGES:
            result = CliRunner().invoke(app, command(name, root, recipe))
            assert isinstance(result.exception, DatasetError), (name, result.exception)
    finally:
        (root / what).chmod(0o755)


def test_an_episode_shorter_than_the_horizon_trains(tmp_path: Path, recipe: Path) -> None:
    """It is padded and masked; the horizon is 8."""
    root = write_v2(tmp_path / "sample", lengths=(3, 5, 12))
    result = CliRunner().invoke(app, command("train", root, recipe))
    assert result.exit_code == 0, result.output
