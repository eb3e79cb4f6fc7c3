"""``reflexarc checkpoint probe`` on LeRobot folders: what they hold is read, the rest is named."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from reflexarc.cli.main import app
from reflexarc.data.lerobot import open_lerobot
from reflexarc.data.lerobot.encoding import Codec
from reflexarc.data.lerobot.to_lerobot import convert_to_lerobot
from reflexarc.data.libero_hdf5 import open_libero
from reflexarc.training.probe.episodes import gather_frames
from reflexarc.training.recipe_files import load_recipe
from reflexarc.training.session import execute, open_run_folder, plan

sys.path.insert(0, str(Path(__file__).parents[1] / "data" / "lerobot"))
from lerobot_samples import write_v3


def test_converted_demonstrations_say_the_same(
    task_file: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "hdf5" / "pick_up_the_red_block_demo.hdf5"
    path.parent.mkdir()
    task_file(path, demos=3, steps=21, stride=4)
    random = np.random.default_rng(0)
    with h5py.File(path, "r+") as file:
        for demo in file["data"].values():
            demo.attrs["object_names"] = json.dumps(["red_block_1", "plate_1"])
            demo["object_positions"] = np.cumsum(random.normal(size=(21, 2, 3)) * 0.01, axis=0)
    convert_to_lerobot([path], tmp_path / "lerobot", codec=Codec("lossless"))
    one = gather_frames(open_libero([path]).episodes)
    two = gather_frames(open_lerobot(tmp_path / "lerobot").episodes)
    assert two.remarks == () and two.target_names == one.target_names
    assert list(two.objects) == ["plate_1", "red_block_1"]
    for name, values in one.objects.items():
        np.testing.assert_array_equal(two.objects[name], values)
    for name, values in one.general.items():
        np.testing.assert_array_equal(two.general[name], values)
    np.testing.assert_array_equal(two.grasped, one.grasped)


@pytest.mark.parametrize("split_by", ["task", "dataset"])
def test_a_run_on_a_folder_is_probed_by_the_names_of_its_recipe(
    tmp_path: Path, split_by: str
) -> None:
    root = write_v3(tmp_path / "sample", lengths=(12, 13, 9, 14, 10, 12, 11, 13))
    packaged = resources.files("reflexarc.training") / "recipes" / "statevla_tiny.yaml"
    values = yaml.safe_load(packaged.read_text())
    values["contract"] = {
        "cameras": ["scene"], "image_size": 32, "orientation": "upright", "horizon": 4,
    }  # fmt: skip
    values["data"] = {
        "paths": [str(root)],
        "state": {"arm": "observation.state[0:3]", "hand": "observation.state[3:5]"},
        "cameras": {"scene": "front"},
        "split_by": split_by,
        "validation_fraction": 0.3,
    }
    values["training"] = {"batch_size": 8, "steps": 2, "validate_every": 2, "checkpoint_every": 2}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    planned = plan(
        load_recipe(str(path)), tmp_path / "run", device=torch.device("cpu"),
        feature_cache=tmp_path / "cache",
    )  # fmt: skip
    run = open_run_folder(planned.preparation.recipe, tmp_path / "run", resume=False, fresh=False)
    execute(planned, run, progress_bar=False)
    arguments = ["checkpoint", "probe", str(tmp_path / "run"), "--data", str(root)]
    arguments += ["--output", str(tmp_path / "out"), "--device", "cpu", "--threads", "1"]
    arguments += ["--feature-cache", str(tmp_path / "cache")]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "8 of 8 episodes hold no positions of objects" in result.output
    found = json.loads((tmp_path / "out/probe.json").read_text())
    assert found["data"]["held_out_in_training"] is True
    assert found["data"]["fingerprint"] == planned.preparation.dataset_fingerprint
    assert found["data"]["frames"] == 12 + 13 + 9 + 14 + 10 + 12 + 11 + 13
    readings = {(r["scope"], r["target"]): r for r in found["readings"]}
    assert {target for _, target in readings} == {"arm", "hand"}
    # The state is a part of the policy's input, so that the state alone reads it.
    assert readings["all tasks", "arm"]["scores"]["state"]["r2"] > 0.99
    assert "thousandths of the data's own units" in (tmp_path / "out/probe.md").read_text()
