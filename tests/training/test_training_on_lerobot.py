"""Recipes on LeRobot folders and mixtures: a run from the first to the last step, and refusals."""

from __future__ import annotations

import json
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from reflexarc.contract.errors import ConfigError, DatasetError
from reflexarc.data.lerobot.encoding import Codec
from reflexarc.data.lerobot.to_lerobot import convert_to_lerobot
from reflexarc.policy.checkpoint import load_checkpoint
from reflexarc.training.batch_order import BatchOrder
from reflexarc.training.config import Recipe
from reflexarc.training.outcome import Outcome
from reflexarc.training.preparation import prepare
from reflexarc.training.recipe_files import load_recipe, recipe_to_yaml
from reflexarc.training.session import execute, open_run_folder, plan

sys.path.insert(0, str(Path(__file__).parents[1] / "data" / "lerobot"))
from lerobot_samples import write_v2, write_v3

CPU = torch.device("cpu")


def train(recipe: Recipe, output: Path) -> Outcome:
    planned = plan(recipe, output, device=CPU, feature_cache=output.with_name("cache"))
    run = open_run_folder(recipe, output, resume=False, fresh=False)
    return execute(planned, run, progress_bar=False)


def recipe_file(folder: Path, **data: Any) -> str:
    """The tiny recipe on a camera ``front`` that stands upright, four steps."""
    packaged = resources.files("reflexarc.training") / "recipes" / "statevla_tiny.yaml"
    values = yaml.safe_load(packaged.read_text())
    values["contract"] = {
        "cameras": ["front"], "image_size": 32, "orientation": "upright", "horizon": 8,
    }  # fmt: skip
    values["training"] = {
        "batch_size": 8, "steps": 4, "validate_every": 2, "checkpoint_every": 2, "log_every": 1,
    }  # fmt: skip
    values["data"] = {"validation_fraction": 0.34, "split_by": "dataset", **data}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def tiny(folder: Path, **data: Any) -> Recipe:
    return load_recipe(recipe_file(folder, **data))


@pytest.mark.parametrize("version", ["v2.0", "v3.0"])
def test_a_run_on_a_folder(tmp_path: Path, version: str) -> None:
    root = tmp_path / "sample"
    _ = write_v3(root) if version == "v3.0" else write_v2(root, version=version)
    recipe = tiny(tmp_path, paths=[str(root)])
    outcome = train(recipe, tmp_path / "run")
    assert outcome.steps_run == 4 and outcome.last is not None
    loaded = load_checkpoint(outcome.last)
    contract = loaded.policy.contract
    assert contract.action.kind == "position" and contract.action.names == ("x", "y", "z")
    assert contract.action.gripper is None and contract.action.control_hz == 10
    assert max(contract.action.high) < 10  # what was demonstrated
    assert (contract.cameras[0].source_height, contract.cameras[0].source_width) == (48, 64)
    assert contract.cameras[0].steps == ("resize_bilinear_32x32",)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    held_out = [json.loads(line) for line in lines if '"validation"' in line]
    assert held_out and all(np.isfinite(line["action_mae"]) for line in held_out)


def test_targets_stay_where_they_are_past_the_end(tmp_path: Path) -> None:
    """Also in an episode that is shorter than the horizon: it is padded and masked."""
    root = write_v2(tmp_path / "sample", lengths=(5, 12))
    preparation = prepare(tiny(tmp_path, paths=[str(root)], validation_fraction=0), CPU)
    table = preparation.samples(preparation.train_episodes, [0, 5])
    assert len(table) == 17 and table.actions.shape == (17, 8, 3)
    assert table.action_mask[0].tolist() == [True] * 5 + [False] * 3
    assert torch.equal(table.actions[0, 4:], table.actions[0, 4].expand(4, 3))


def test_a_gripper_is_classified(tmp_path: Path) -> None:
    root = write_v2(tmp_path / "sample")
    gripper = {"name": "z", "open": -1.0, "closed": 1.0}
    preparation = prepare(tiny(tmp_path, paths=[str(root)], gripper=gripper), CPU)
    action = preparation.contract.action
    assert action.gripper is not None and action.gripper.index == 2
    assert (action.low[2], action.high[2]) == (-1.0, 1.0)


def test_a_mixture_with_weights_maps_to_one_contract(tmp_path: Path) -> None:
    write_v2(tmp_path / "one")
    write_v3(tmp_path / "two")
    recipe = tiny(
        tmp_path,
        validation_fraction=0.0,
        sources=[
            {
                "path": str(tmp_path / "one"),
                "weight": 2.0,
                "state": {"arm": "observation.state[0:3]"},
            },
            {"path": str(tmp_path / "two"), "state": {"arm": "observation.state[2:5]"}},
        ],
    )
    assert load_recipe_again(recipe, tmp_path) == recipe
    preparation = prepare(recipe, CPU)
    assert preparation.contract.state.names == ("arm_0", "arm_1", "arm_2")
    first_rows = np.cumsum([0, *(len(e.image_steps) for e in preparation.episodes[:-1])])
    table = preparation.samples(preparation.train_episodes, first_rows.tolist())
    assert table.weight is not None and sorted(set(table.weight.tolist())) == [1.0, 2.0]
    order = BatchOrder(len(table), 8, 0, table.weight)
    epoch = torch.cat([order.indices(step) for step in range(order.steps_per_epoch)])
    counts = torch.bincount(epoch, minlength=len(table))
    assert torch.equal(counts.double(), table.weight)


def load_recipe_again(recipe: Recipe, folder: Path) -> Recipe:
    path = folder / "again.yaml"
    path.write_text(recipe_to_yaml(recipe))
    return load_recipe(str(path))


def test_a_weighted_order_is_a_function_of_seed_and_epoch_and_leaves_nobody_out() -> None:
    weights = torch.tensor([1.0] * 4 + [0.25] * 10, dtype=torch.float64)
    order = BatchOrder(14, 4, seed=5, weights=weights)
    assert order.epoch_samples == 4 + 2  # a quarter of ten, rounded
    epochs = []
    for epoch in range(5):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        epochs.append(torch.cat([order.indices(step) for step in steps]).tolist())
    for seen in epochs:
        assert sorted(i for i in seen if i < 4) == [0, 1, 2, 3] and len(seen) == 6
    rare = [i for seen in epochs for i in seen if i >= 4]
    assert sorted(rare) == list(range(4, 14))  # each once in five epochs
    again = BatchOrder(14, 4, seed=5, weights=weights)
    assert again.indices(7).tolist() == order.indices(7).tolist()
    assert (
        BatchOrder(14, 4, seed=6, weights=weights).indices(7).tolist() != again.indices(7).tolist()
    )


def test_weights_of_one_change_nothing() -> None:
    plain, weighted = BatchOrder(10, 4, 3), BatchOrder(10, 4, 3, torch.ones(10).double())
    assert plain.steps_per_epoch == weighted.steps_per_epoch
    assert sorted(torch.cat([weighted.indices(i) for i in range(3)]).tolist()) == list(range(10))


def test_converted_demonstrations_train_like_their_files(
    demonstrations: Path, tmp_path: Path
) -> None:
    convert_to_lerobot([demonstrations], tmp_path / "lerobot", codec=Codec("lossless"))
    runs = []
    for name, path in (("hdf5", demonstrations), ("lerobot", tmp_path / "lerobot")):
        recipe = load_recipe(
            "statevla_tiny",
            [
                "training.epochs=null",
                "training.steps=3",
                "training.log_every=1",
                f"data.paths=[{path}]",
            ],
        )
        train(recipe, tmp_path / name)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line)["total"] for line in lines]
        runs.append(losses)
    assert runs[0] == runs[1]


def test_what_does_not_fit_is_refused_before_anything_is_built(
    demonstrations: Path, tmp_path: Path
) -> None:
    root = write_v2(tmp_path / "sample")
    for changes, said in (
        (
            {"contract.cameras": "[agentview]"},
            r"'agentview' is no camera of this data, which has: front",
        ),
        ({"contract.orientation": "opengl"}, r"images of this data are upright: --set"),
        ({"data.state": "[leg]"}, r"has no 'leg' for observation\.state"),
        ({"data.paths": f"[{root}, {demonstrations}]"}, "datasets of incompatible shapes"),
        ({"data.stat": "[a]"}, r"unknown recipe key 'data\.stat'; did you mean 'data\.state'"),
        (
            {"data.sources": "[{path: a, wight: 1}]"},
            r"'data\.sources\[0\]\.wight'.*'data\.sources\[0\]\.weight'",
        ),
    ):
        overrides = [f"{key}={value}" for key, value in changes.items()]
        with pytest.raises((ConfigError, DatasetError), match=said):
            prepare(load_recipe(recipe_file(tmp_path, paths=[str(root)]), overrides), CPU)


@pytest.mark.parametrize("damage", ["state", "video"])
def test_damage_is_found_before_the_first_step(tmp_path: Path, damage: str) -> None:
    root = write_v2(tmp_path / "sample")
    if damage == "video":
        video = next(iter((root / "videos").rglob("*.mp4")))
        video.write_bytes(video.read_bytes()[:-200])
    else:
        path = sorted((root / "data").rglob("*.parquet"))[0]
        table = pq.read_table(path)
        rows = [[float("nan")] * 5, *table.column("observation.state").to_pylist()[1:]]
        pq.write_table(table.set_column(0, "observation.state", pa.array(rows)), path)
    with pytest.raises(DatasetError, match=r"is nan at row 0|episode_00000\d\.mp4"):
        train(tiny(tmp_path, paths=[str(root)]), tmp_path / "run")
    assert not list(tmp_path.rglob("*.safetensors"))
