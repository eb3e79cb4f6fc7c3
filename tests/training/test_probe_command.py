"""``reflexarc checkpoint probe`` on small files whose images and objects are made up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from typer.testing import CliRunner

from reflexarc.contract import FeatureStatistics, NormalizationStatistics, PolicyContract
from reflexarc.contract.errors import CheckpointError, ConfigError, DatasetError
from reflexarc.contract.policy_contract import LIBERO_STATE_EEF, libero_action, libero_cameras
from reflexarc.data.libero_hdf5 import open_libero
from reflexarc.policy.backbones.vision import VisionBackboneConfig
from reflexarc.policy.checkpoint import LoadedPolicy, load_checkpoint, save_checkpoint
from reflexarc.policy.language import LanguageEmbeddings
from reflexarc.policy.statevla.config import StateVLAConfig
from reflexarc.policy.statevla.model import StateVLA
from reflexarc.training.objectives.temporal_predictor import TemporalPredictor
from reflexarc.training.probe.inputs import representation_of
from reflexarc.training.probe.report import markdown
from reflexarc.training.probe.run import ProbeOptions, ProbeResult, check_output, probe
from reflexarc.training.saving import OBJECTIVE_FILE

TASKS = ("pick_up_the_red_block", "pick_up_the_blue_block")
DEMOS, STEPS, STRIDE = 6, 41, 4
TOUCH, GRASP = 16, 20
D_MODEL, LATENTS = 16, 2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, task_file: Callable[..., Path]) -> Path:
    """Two tasks; the hand carries the task's block from step 20 on, the other one lies still."""
    folder = tmp_path_factory.mktemp("probed")
    for seed, task in enumerate(TASKS):
        path = folder / f"{task}_demo.hdf5"
        task_file(path, demos=DEMOS, steps=STEPS, stride=STRIDE, seed=seed)
        with h5py.File(path, "r+") as file:
            for index in range(DEMOS):
                _add_objects(file["data"][f"demo_{index}"], task, seed * 100 + index)
    return folder


def _add_objects(demo: h5py.Group, task: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    names = ("red_block_1", "blue_block_1")
    demo.attrs["object_names"] = json.dumps(names)
    path = np.cumsum(random.normal(size=(STEPS, 3)) * 0.02, axis=0)
    for key, rows in (("ee_pos", path), ("ee_ori", np.zeros((STEPS, 3)))):
        demo["obs"][key][...] = rows
    positions = np.tile(random.normal(size=(1, 2, 3)) * [[[0.05], [0.0]]], (STEPS, 1, 1))
    carried = names.index("red_block_1" if "red" in task else "blue_block_1")
    if carried == 1:
        positions = positions[:, ::-1]  # the carried block's first place varies
    positions[TOUCH:GRASP, carried] += [0.004, 0, 0]  # pushed before it is carried
    positions[GRASP:, carried] += path[GRASP:] - path[GRASP - 1] + [0, 0, 0.05]
    demo["object_positions"] = positions


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """Random weights, with the provenance of a run that held out a third of each task."""
    contract = PolicyContract(
        family="statevla",
        cameras=libero_cameras(size=32, source_size=32),
        state=LIBERO_STATE_EEF,
        action=libero_action(5),
    )
    config = StateVLAConfig(
        d_model=D_MODEL,
        encoder_layers=1,
        latent_tokens=LATENTS,
        vision=VisionBackboneConfig(name="tiny_random", pool=1),
        language_dimension=8,
        state_hidden=16,
        policy_layers=1,
        policy_d_state=4,
        policy_mlp_hidden=8,
        gripper_hidden=8,
    )
    dataset = open_libero([data])
    torch.manual_seed(0)
    language = LanguageEmbeddings(dataset.instructions, torch.randn(2, 8), "random")
    random = np.random.default_rng(0)
    statistics = NormalizationStatistics(
        state=FeatureStatistics.from_rows(random.normal(size=(50, 8)), contract.state.names),
        action=FeatureStatistics.from_rows(random.uniform(-1, 1, (50, 7)), contract.action.names),
        dataset_fingerprint=dataset.fingerprint(),
    )
    provenance = {
        "recipe": {"data": {"validation_fraction": 0.34, "split_seed": 3, "tasks": []}},
        "dataset": {"fingerprint": dataset.fingerprint(), "tasks": list(TASKS)},
        "step": 0,
    }
    folder = tmp_path_factory.mktemp("probed_checkpoint") / "policy"
    return save_checkpoint(folder, StateVLA(config, contract, language), statistics, provenance)


@pytest.fixture
def loaded(checkpoint: Path) -> LoadedPolicy:
    return load_checkpoint(checkpoint)


@pytest.fixture(scope="module")
def result(checkpoint: Path, data: Path) -> ProbeResult:
    return probe(load_checkpoint(checkpoint), ProbeOptions(data=(data,)), progress=False)


def test_the_command_writes_numbers_text_and_picture(
    checkpoint: Path, data: Path, tmp_path: Path, result: ProbeResult
) -> None:
    from reflexarc.cli.main import app

    arguments = ["checkpoint", "probe", str(checkpoint), "--data", str(data), "--threads", "1"]
    arguments += ["--output", str(tmp_path / "out"), "--device", "cpu"]
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    assert "What can be read: all tasks" in outcome.output
    found = json.loads((tmp_path / "out/probe.json").read_text())
    # The same command again gives the same numbers.
    assert found == json.loads(json.dumps(result.to_json()))
    assert found["data"]["held_out_in_training"] is True
    assert found["data"]["fit_episodes"] == 8
    assert found["data"]["test_episodes"] == 4
    assert found["data"]["frames"] == 2 * DEMOS * len(range(0, STEPS, STRIDE))
    assert found["inputs"]["z"] == found["inputs"]["random"] == D_MODEL * LATENTS
    assert (tmp_path / "out/probe.md").read_text() == markdown(result)
    with Image.open(tmp_path / "out/probe.png") as picture:
        assert len(set(picture.convert("RGB").getdata())) > 50
    with pytest.raises(ConfigError, match="is of another checkpoint"):
        other = found | {"checkpoint": {"fingerprint": "0" * 64}}
        (tmp_path / "out/probe.json").write_text(json.dumps(other))
        check_output(tmp_path / "out", result.loaded)


def test_state_reads_what_state_holds_and_nothing_more(result: ProbeResult) -> None:
    """The end-effector is a part of the state; where a resting block lies is not."""
    by = {(r.scope, r.target, r.phase): r for r in result.readings}
    hand = by["all tasks", "end-effector", "all"].scores["state"]
    assert hand.r2 is not None
    assert hand.r2 > 0.999
    assert hand.rmse_mm < 1
    assert hand.r2_interval is not None
    assert hand.r2_interval[0] > 0.999
    resting = by["all tasks", "target object", "before touch"]
    assert resting.scores["state"].r2 is not None
    assert resting.scores["state"].r2 < 0.3
    assert 20 < resting.std_mm < 200
    assert resting.z_minus["state"][0] == pytest.approx(
        (resting.scores["z"].r2 or 0) - resting.scores["state"].r2
    )
    # The block that nobody moves, and that lies at the same place in every episode.
    other = by[TASKS[0], "blue_block_1", "all"]
    assert other.std_mm < 1
    assert all(score.r2 is None for score in other.scores.values())


def test_targets_and_grasps_are_found_in_the_data(result: ProbeResult) -> None:
    frames = result.frames
    assert dict(frames.target_names) == {TASKS[0]: "red_block_1", TASKS[1]: "blue_block_1"}
    np.testing.assert_array_equal(frames.grasped, frames.step >= GRASP)
    np.testing.assert_array_equal(frames.touched, frames.step >= TOUCH)
    counts = {
        r.phase: r.frames
        for r in result.readings
        if (r.scope, r.target) == ("all tasks", "target object")
    }
    between = counts["all"] - counts["before touch"] - counts["after grasp"]
    assert between == len(result.split.test) * len(range(TOUCH, GRASP, STRIDE))
    for scope in ("all tasks", *TASKS):
        assert any(r.scope == scope for r in result.readings)


def test_held_out_episodes_are_those_of_training(
    result: ProbeResult, loaded: LoadedPolicy, data: Path, tmp_path: Path
) -> None:
    from reflexarc.training.samples import split_episodes

    episodes = open_libero([data]).episodes
    _, held_out = split_episodes([e.task_name for e in episodes], 0.34, 3)
    expected = {(episodes[i].task_name, episodes[i].demo) for i in held_out}
    assert {(e.task_name, e.demo) for e in result.split.test} == expected
    fewer = probe(loaded, ProbeOptions(data=(data,), per_task=2), progress=False)
    assert {(e.task_name, e.demo) for e in fewer.split.test} == expected
    assert len(fewer.split.fit) == 4
    # Part of the demonstrations is split alike, and it is said that the rest is not there.
    one = probe(
        loaded, ProbeOptions(data=(data / f"{TASKS[0]}_demo.hdf5",), per_task=2), progress=False
    )
    assert {(e.task_name, e.demo) for e in one.split.test} == {
        (task, demo) for task, demo in expected if task == TASKS[0]
    }
    assert not one.split.held_out_in_training
    assert "not all and only the demonstrations" in one.split.remarks[0]


def test_features_of_the_store_give_the_same(
    result: ProbeResult, loaded: LoadedPolicy, data: Path, tmp_path: Path
) -> None:
    options = ProbeOptions(data=(data,), feature_cache=tmp_path / "cache")
    stored = probe(loaded, options, progress=False)
    # The store keeps half precision.
    np.testing.assert_allclose(stored.probed.inputs["z"], result.probed.inputs["z"], atol=0.02)
    folders = sorted(p for p in (tmp_path / "cache").iterdir() if p.is_dir())
    few = ProbeOptions(data=(data,), feature_cache=tmp_path / "cache", per_task=2)
    again = probe(loaded, few, progress=False)
    assert sorted(p for p in (tmp_path / "cache").iterdir() if p.is_dir()) == folders
    same = [stored.split.episodes.index(e) for e in stored.split.episodes[:1]]
    np.testing.assert_array_equal(again.probed.inputs["z"][0], stored.probed.inputs["z"][same[0]])


def test_skill_of_predictors_whose_answers_are_known(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    """At initialisation a predictor says that nothing changes: exactly the rival's error."""
    import shutil

    folder = tmp_path / "policy"
    shutil.copytree(checkpoint, folder)
    predictor = TemporalPredictor(D_MODEL * LATENTS, STRIDE * 7, hidden=8)
    tensors = {f"predictor.{name}": t for name, t in predictor.state_dict().items()}
    of_policy = representation_of(load_checkpoint(folder).policy).state_dict()
    tensors |= {f"target.{name}": t for name, t in of_policy.items()}
    safetensors.torch.save_file(tensors, folder / OBJECTIVE_FILE)
    options = ProbeOptions(data=(data,), per_task=2)
    found = probe(load_checkpoint(folder), options, progress=False)
    assert found.predictor_horizon == STRIDE
    assert [change.horizon for change in found.changes] == [4, 8, 12]
    for change in found.changes:
        assert change.mse_over_identity == pytest.approx(1)
        assert change.rollouts == change.horizon // STRIDE
        assert change.pairs == 4 * (len(range(0, STEPS, STRIDE)) - change.horizon // STRIDE)
    assert found.changes[0].identity_mse > 0
    assert found.changes[0].share_of_random is not None
    # One that is off by far is worse than no change.
    tensors["predictor.delta.bias"] = torch.randn(D_MODEL * LATENTS) * 10
    safetensors.torch.save_file(tensors, folder / OBJECTIVE_FILE)
    worse = probe(load_checkpoint(folder), options, progress=False)
    assert (worse.changes[0].mse_over_identity or 0) > 1.5
    (folder / OBJECTIVE_FILE).write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=r"holds no temporal predictor"):
        probe(load_checkpoint(folder), options, progress=False)


def test_a_trained_stage_is_probed_with_its_predictor(data: Path, tmp_path: Path) -> None:
    """What the real trainer writes of a temporal objective is what the probe reads."""
    from reflexarc.training.recipe_files import load_recipe
    from reflexarc.training.session import execute, open_run_folder, plan

    changes = [
        f"data.paths=['{data}']",
        "data.validation_fraction=0.34",
        "objective={name: temporal_jepa, horizon: 4, predictor_hidden: 16}",
        "training.best_metric=total",
        "training.epochs=1",
    ]
    recipe = load_recipe("statevla_tiny", changes)
    output = tmp_path / "run"
    planned = plan(recipe, output, device=torch.device("cpu"), feature_cache=tmp_path / "cache")
    folder = open_run_folder(recipe, output, resume=False, fresh=False)
    outcome = execute(planned, folder, progress_bar=False)
    assert outcome.last is not None
    stored = list((tmp_path / "cache").glob("*/*.npy"))
    options = ProbeOptions(data=(data,), feature_cache=tmp_path / "cache")
    found = probe(load_checkpoint(outcome.last), options, progress=False)
    assert found.split.held_out_in_training
    held_out = [(e.task_name, e.demo) for e in planned.preparation.held_out_episodes]
    assert [(e.task_name, e.demo) for e in found.split.test] == held_out
    assert list((tmp_path / "cache").glob("*/*.npy")) == stored  # training's features were found
    assert found.predictor_horizon == 4
    ratios = [change.mse_over_identity for change in found.changes]
    assert all(ratio is not None and ratio > 0 for ratio in ratios)
    # Trained for a moment, it is no longer the predictor of no change.
    assert any(abs((ratio or 1) - 1) > 1e-6 for ratio in ratios)
    # The same two numbers as the trainer's own validation of the same held-out episodes.
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    validated = [line for line in lines if line["kind"] == "validation"][-1]
    at_horizon = next(change for change in found.changes if change.horizon == 4)
    assert at_horizon.identity_mse == pytest.approx(validated["identity"], rel=2e-3)
    assert at_horizon.predicted_mse == pytest.approx(validated["prediction"], rel=2e-3)


def test_without_a_predictor_only_no_change_is_measured(result: ProbeResult) -> None:
    assert result.predictor_horizon is None
    assert all(change.predicted_mse is None for change in result.changes)
    assert "no temporal predictor" in markdown(result)


def test_what_cannot_be_probed_is_named(
    loaded: LoadedPolicy, data: Path, tmp_path: Path, task_file: Callable[..., Path]
) -> None:
    with pytest.raises(ConfigError, match=r"every 4 steps: choose from 4, 8, 12"):
        probe(loaded, ProbeOptions(data=(data,), horizons=(4, 5)), progress=False)
    with pytest.raises(ConfigError, match="two episodes of every task"):
        probe(loaded, ProbeOptions(data=(data,), per_task=1), progress=False)
    plain = tmp_path / "plain"
    plain.mkdir()
    task_file(plain / f"{TASKS[0]}_demo.hdf5")
    with pytest.raises(DatasetError, match="positions of objects are not in this file"):
        probe(loaded, ProbeOptions(data=(plain,)), progress=False)
    (tmp_path / "unknown").mkdir()
    task_file(tmp_path / "unknown/open_the_drawer_demo.hdf5")
    with pytest.raises(ConfigError, match="none of the tasks"):
        probe(loaded, ProbeOptions(data=(tmp_path / "unknown",)), progress=False)
    del loaded.policy.representation
    with pytest.raises(ConfigError, match="no representation z to probe"):
        probe(loaded, ProbeOptions(data=(data,)), progress=False)
