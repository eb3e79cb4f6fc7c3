"""A tiny random Qwen2.5-VL from demonstrations to actions: precompute, train, serve, drive LIBERO.

A smoke run: random weights learn nothing in four steps. No hub is asked, torchvision is not there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner
from websockets.sync.client import connect

from reflexarc.cli.main import app
from reflexarc.client import PolicyClient
from reflexarc.contract import Observation, pack, unpack
from reflexarc.contract.errors import ContractViolationError, DatasetError
from reflexarc.contract.images import prepare_image
from reflexarc.data.generated import GeneratedSettings, write_generated
from reflexarc.data.libero_hdf5 import open_libero
from reflexarc.policy.checkpoint import load_checkpoint
from reflexarc.policy.runtime import PolicyRuntime
from reflexarc.server import BackgroundServer
from reflexarc.server.loading import CheckpointPolicy
from reflexarc.training.preparation import prepare
from reflexarc.training.recipe_files import load_recipe
from reflexarc.training.session import execute, open_run_folder, plan

sys.path.insert(0, str(Path(__file__).parents[1] / "policy"))
sys.path.insert(0, str(Path(__file__).parents[1] / "data" / "lerobot"))
import lerobot_samples
from qwen_samples import SIZE, save_tiny_qwen, tiny_config

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file around the tiny model and made-up demonstrations."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "model").mkdir()
    save_tiny_qwen(folder / "model")
    write_generated(folder / "data", GeneratedSettings(tasks=2, episodes=2, steps=8))
    values = load_recipe("debug_qwen_geometry").model_dump(mode="json")
    values["policy"] = tiny_config(folder / "model", compressor="qformer")
    values["contract"]["image_size"] = SIZE
    values["data"]["paths"] = [str(folder / "data")]
    values["training"] |= {"steps": 4, "batch_size": 4, "accumulate": 2, "log_every": 2,
                           "validate_every": 4, "checkpoint_every": 4}  # fmt: skip
    values["reporting"] = {"tensorboard": False}
    path = folder / "tiny_qwen.yaml"
    path.write_text(json.dumps(values))
    return path


@pytest.fixture(scope="module")
def run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trained from what ``reflexarc data precompute`` wrote."""
    cache = tmp_path_factory.mktemp("stores")
    arguments = ["data", "precompute", str(recipe), "--feature-cache", str(cache),
                 "--device", "cpu", "--threads", "1"]  # fmt: skip
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout.splitlines()[-1])
    assert said["arrays"] == {
        "semantic": f"uint8 (16, 2, {SIZE}, {SIZE}, 3)", "geometry": "fp32 (16, 392, 59)"
    }  # fmt: skip
    loaded = load_recipe(str(recipe))
    output = tmp_path_factory.mktemp("run") / "smoke"
    planned = plan(loaded, output, device=CPU, feature_cache=cache)
    lines: list[str] = []
    folder = open_run_folder(loaded, output, resume=False, fresh=False)
    execute(planned, folder, progress_bar=False, log=lines.append)
    assert any("16 of 16 rows found" in line for line in lines), lines
    return output


def test_neither_hub_nor_torchvision_is_asked(run: Path) -> None:
    assert "torchvision" not in sys.modules
    assert load_checkpoint(run).provenance["step"] == 4


def test_a_server_gives_the_chunks_of_this_process(run: Path, recipe: Path) -> None:
    """Over our own protocol and starVLA's, and for several rows at once."""
    loaded = load_checkpoint(run)
    contract = loaded.policy.contract
    episode = open_libero(load_recipe(str(recipe)).data.paths).episodes[0]
    raw = {c.name: episode.images(c.name, [0])[0] for c in contract.cameras}
    images = {c.name: prepare_image(c, raw[c.name]) for c in contract.cameras}
    state = episode.states(contract.state.layout)[0].astype(np.float32)
    asked = [
        Observation(images, state, instruction=text, seed=3, step_index=0)
        for text in ("pick up the red block", "an instruction of no demonstration")
    ]
    runtime = PolicyRuntime(loaded)
    alone = [runtime.infer([one])[0].actions for one in asked]
    together = [chunk.actions for chunk in runtime.infer(asked)]
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    assert not np.array_equal(alone[0], alone[1]), "it reads the instruction"
    with BackgroundServer(lambda: CheckpointPolicy.load(run, "cpu"), default_seed=3) as server:
        with PolicyClient(server.url) as client:
            np.testing.assert_array_equal(client.infer(asked[0]).actions, alone[0])
        with connect(server.url, compression=None, max_size=None) as socket:
            unpack(socket.recv(timeout=10))
            upright = [raw[c.name][::-1, ::-1].copy() for c in contract.cameras]
            example = {"image": upright, "lang": asked[0].instruction, "state": state}
            socket.send(pack({"examples": [example]}))
            reply = unpack(socket.recv(timeout=60))
            assert np.asarray(reply["data"]["actions"]).shape == (1, 6, 7), reply


def test_views_are_told_by_their_names(run: Path) -> None:
    """The order in which they come says nothing; exchanged, left out or added ones do."""
    random = np.random.default_rng(0)
    server = BackgroundServer(lambda: CheckpointPolicy.load(run, "cpu"))
    with server, PolicyClient(server.url) as client:
        cameras = client.contract.cameras
        images = {c.name: random.integers(0, 256, (c.height, c.width, 3), np.uint8)
                  for c in cameras}  # fmt: skip
        state = np.zeros(client.contract.state.dimension, dtype=np.float32)

        def ask(shown: dict[str, np.ndarray]) -> np.ndarray:
            observation = Observation(shown, state, "lift it", seed=1, step_index=0)
            actions: np.ndarray = client.infer(observation).actions
            return actions

        first, second = images
        usual = ask(images)
        np.testing.assert_array_equal(ask(dict(reversed(images.items()))), usual)
        exchanged = {first: images[second], second: images[first]}
        assert not np.array_equal(ask(exchanged), usual)
        with pytest.raises(ContractViolationError, match=second):
            ask({first: images[first]})
        with pytest.raises(ContractViolationError, match="third"):
            ask(images | {"third": images[first]})
        np.testing.assert_array_equal(ask(images), usual)


def test_bf16_serves_near_the_same(run: Path) -> None:
    exact = CheckpointPolicy.load(run, "cpu")
    rounded = CheckpointPolicy.load(run, "cpu", precision="bf16")
    contract = exact.contract
    images = {c.name: np.full((c.height, c.width, 3), 99, dtype=np.uint8) for c in contract.cameras}
    state = np.zeros(contract.state.dimension, dtype=np.float32)
    asked = [Observation(images, state, instruction="lift it", seed=1, step_index=0)]
    one, other = (policy.infer(asked)[0].actions for policy in (exact, rounded))
    assert 0 < np.abs(one[:, :6] - other[:, :6]).max() < 0.2


@pytest.mark.slow
@pytest.mark.simulator
def test_it_drives_libero(run: Path, tmp_path: Path) -> None:
    """A smoke run of a few steps: the actions mean nothing."""
    with BackgroundServer(lambda: CheckpointPolicy.load(run, "cpu")) as server:
        arguments = [
            "eval", "libero", "--server", server.url, "--suite", "libero_spatial", "--tasks", "0",
            "--states", "40", "--baselines", "none", "--max-steps", "12", "--replan-steps", "4",
            "--videos", "none", "--output", str(tmp_path / "eval"),
        ]  # fmt: skip
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (line,) = (tmp_path / "eval" / "results.jsonl").read_text().splitlines()
    assert json.loads(line)["steps"] == 12


def write_suite(root: Path, lengths: Sequence[int], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder laid out as the published ``*_no_noops_1.0.0_lerobot`` are."""
    cameras = ("observation.images.image", "observation.images.wrist_image")
    states = ["x", "y", "z", "roll", "pitch", "yaw", "pad", "gripper"]
    motors = ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]

    def rows_of(episode: int, length: int, first: int, start: float = 0.0) -> dict[str, Any]:
        rows = original(episode, length, first, start)
        random = np.random.default_rng(episode)
        rows["observation.state"] = random.normal(size=(length, 8)).astype(np.float32)
        actions = random.uniform(-1, 1, size=(length, 7)).astype(np.float32)
        actions[:, 6] = actions[:, 6] > 0
        return rows | {"action": actions}

    def features(codec: str) -> dict[str, Any]:
        found = fields(codec)
        video = found.pop(lerobot_samples.CAMERA)
        found.pop(lerobot_samples.ABSENT)
        found["observation.state"] = {"dtype": "float32", "shape": [8], "names": states}
        found["action"] = {"dtype": "float32", "shape": [7], "names": {"motors": motors}}
        return found | dict.fromkeys(cameras, video)

    original, fields = lerobot_samples.rows_of, lerobot_samples.features
    with monkeypatch.context() as patched:
        patched.setattr(lerobot_samples, "rows_of", rows_of)
        patched.setattr(lerobot_samples, "features", features)
        patched.setattr(lerobot_samples, "CAMERA", cameras[0])
        lerobot_samples.write_v2(root, lengths=lengths)
    for video in sorted((root / "videos").rglob(f"{cameras[0]}/*.mp4")):
        twin = video.parent.with_name(cameras[1]) / video.name
        twin.parent.mkdir(exist_ok=True)
        twin.write_bytes(video.read_bytes())
    return root


def test_the_four_folders_as_the_full_size_recipe_reads_them(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its names of parts and cameras, its gripper, its counts; around the tiny model."""
    full = load_recipe("qwen_geometry_libero_all")
    sources = []
    for place, source in enumerate(full.data.sources):
        folder = write_suite(tmp_path / source.path.name, [9] * (2 + place), monkeypatch)
        sources.append(source.model_copy(update={"path": folder, "episodes": 2 + place}))
    tiny = load_recipe(str(recipe))
    policy = {**tiny.policy, "compressor": "pool"}
    policy["head"] = {**policy["head"], "positions": 8}
    data = full.data.model_copy(update={"sources": tuple(sources)})
    contract = full.contract.model_copy(update={"image_size": SIZE})
    mixed = full.model_copy(update={"policy": policy, "data": data, "contract": contract,
                                    "freeze": ("geometry",)})  # fmt: skip
    preparation = prepare(mixed, CPU)
    assert len(preparation.episodes) == 2 + 3 + 4 + 5
    found = preparation.contract
    assert found.state.layout == "eef3+axisangle3+fingers2" and found.action.horizon == 8
    assert found.action.kind == "delta_osc" and found.action.gripper is not None
    assert (found.action.gripper.index, found.action.gripper.open) == (6, 1.0)
    features = preparation.features(tmp_path / "cache", progress=False)
    batch = preparation.sources(features.arrays, features.first_rows)[0].batch(torch.arange(4))
    draws = preparation.objective.draw(batch, torch.Generator().manual_seed(0))
    total = preparation.objective(preparation.policy, batch, draws)["total"]
    total.backward()
    assert torch.isfinite(total)
    short = (sources[0].model_copy(update={"episodes": 454}), *sources[1:])
    refused = mixed.model_copy(
        update={"data": data.model_copy(update={"sources": short})}
    )  # fmt: skip
    with pytest.raises(DatasetError, match="holds 2 episodes, the recipe says 454"):
        prepare(refused, CPU)
