"""``reflexarc data inspect | stats | convert`` on LeRobot folders, as a person runs them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from reflexarc.cli.main import app
from reflexarc.contract.errors import ConfigError, DatasetError
from reflexarc.data.libero_hdf5 import open_libero

sys.path.insert(0, str(Path(__file__).parents[1] / "data" / "lerobot"))
from lerobot_samples import ABSENT, write_v2

TESTS = Path(__file__).parents[1]


def run(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "160"}).invoke(app, ["data", *map(str, arguments)])


def test_inspect_prints_draws_and_writes(tmp_path: Path) -> None:
    root = write_v2(tmp_path / "sample")
    out = tmp_path / "out"
    result = run(
        "inspect", root, "--json", out / "r.json", "--contact-sheet", out / "sheet.png",
        "--write-contract", out / "part.yaml",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for words in ("LeRobot v2.1, arm", "3, 7 to 12 rows", ABSENT, "48x64 h264", "pick the pear"):
        assert words in result.output
    (folder,) = json.loads((out / "r.json").read_text())["folders"]
    assert folder["frames"] == 28 and folder["absent_cameras"] == [ABSENT]
    sheet = np.asarray(Image.open(out / "sheet.png"))
    assert sheet.shape == (3 * (160 + 36), 3 * 164, 3) and sheet.std() > 10
    # Frames of 48 x 64 fill their tiles; below the captions nothing white is left.
    assert (sheet[40:140, :160] < 250).any(-1).mean() > 0.95
    part = yaml.safe_load((out / "part.yaml").read_text())
    assert part["contract"] == {"cameras": ["front"], "orientation": "upright"}
    assert part["data"]["state"] == ["observation.state"] and "split_by" not in part["data"]


def test_a_contract_of_episodes_that_share_no_instruction_splits_over_all(tmp_path: Path) -> None:
    root, out = write_v2(tmp_path / "sample", lengths=(5, 6)), tmp_path / "part.yaml"
    assert run("inspect", root, "--write-contract", out).exit_code == 0
    assert yaml.safe_load(out.read_text())["data"]["split_by"] == "dataset"


def test_inspect_ends_with_the_first_problem(tmp_path: Path) -> None:
    root = write_v2(tmp_path / "sample")
    video = sorted((root / "videos").rglob("*.mp4"))[0]
    video.write_bytes(video.read_bytes()[:100])
    result = run("inspect", root)
    assert isinstance(result.exception, DatasetError)
    assert "episode_000000.mp4" in result.exception.message
    assert "2, 7 to 9 rows" in result.output  # the others are reported


def test_stats_of_parts(tmp_path: Path) -> None:
    root = write_v2(tmp_path / "sample")
    result = run("stats", root, "--state", "observation.state[1:3]", "--json", tmp_path / "s.json")
    assert result.exit_code == 0, result.output
    assert "28 steps of 3 episodes" in result.output
    written = json.loads((tmp_path / "s.json").read_text())
    assert written["state"]["names"] == ["state_1_3_0", "state_1_3_1"]
    assert written["action"]["count"] == 28


def test_convert_there_and_back(demonstrations: Path, tmp_path: Path) -> None:
    there = run("convert", demonstrations, "--output", tmp_path / "lerobot", "--codec", "lossless")
    assert there.exit_code == 0, there.output
    assert "mean error 0.000 of 255" in there.output
    back = run("convert", tmp_path / "lerobot", "--output", tmp_path / "hdf5")
    assert back.exit_code == 0, back.output
    one, two = open_libero([demonstrations]), open_libero([tmp_path / "hdf5"])
    assert one.fingerprint() == two.fingerprint()
    again = run("convert", tmp_path / "lerobot", "--output", tmp_path / "hdf5")
    assert isinstance(again.exception, DatasetError) and "exists" in again.exception.message


def test_what_cannot_be_asked_is_named(tmp_path: Path) -> None:
    root = write_v2(tmp_path / "sample")
    for arguments, said in (
        (("convert", root, "--output", tmp_path / "x"), "not converted from LIBERO"),
        (("convert", root, "--output", tmp_path / "x", "--codec", "vp9"), "--codec 'vp9'"),
        (("inspect", root, tmp_path), "in a command each"),
        (("stats", root, "--labels", "meant"), "--labels 'meant'"),
    ):
        result = run(*arguments)
        assert isinstance(result.exception, ConfigError | DatasetError)
        assert said in result.exception.message


@pytest.fixture
def demonstrations(tmp_path: Path) -> Path:
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("training_files", TESTS / "training" / "conftest.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path / "demonstrations"
    folder.mkdir()
    module.write_task_file(folder / "push_the_plate_demo.hdf5", demos=2)
    return folder
