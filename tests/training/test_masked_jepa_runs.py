"""Whole runs of the masked JEPA: resumed exactly, shared, served, listening to every input."""

from __future__ import annotations

import json
import random
import signal
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from reflexarc.cli.main import app
from reflexarc.client import PolicyClient
from reflexarc.contract import Observation
from reflexarc.contract.errors import ConfigError
from reflexarc.contract.images import prepare_image
from reflexarc.data.libero_hdf5 import open_libero
from reflexarc.policy.checkpoint import load_checkpoint, save_checkpoint
from reflexarc.policy.runtime import PolicyRuntime
from reflexarc.server import BackgroundServer
from reflexarc.server.loading import CheckpointPolicy
from reflexarc.training.probe.dynamics import load_predictor
from reflexarc.training.recipe_files import load_recipe
from reflexarc.training.run_folder import RunFolder
from reflexarc.training.saving import OBJECTIVE_FILE
from reflexarc.training.session import execute, open_run_folder, plan

from .train_processes import (
    assert_close_metrics,
    final_tensors,
    finish,
    largest_difference,
    metrics,
    start,
    wait_for_step,
)

CPU = torch.device("cpu")
OBJECTIVE = {
    "name": "masked_jepa", "predictor_layers": 1, "predictor_width": 16, "predictor_d_state": 4,
    "ema_start": 0.9,
}  # fmt: skip
LOOP = {
    "batch_size": 8, "steps": 12, "log_every": 3, "checkpoint_every": 5, "validate_every": 6,
    "ema_decay": 0.9,
}  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, demonstrations: Path) -> Path:
    """The tiny recipe with keypoints and a masked JEPA."""
    packaged = resources.files("reflexarc.training") / "recipes" / "statevla_tiny.yaml"
    values = yaml.safe_load(packaged.read_text())
    values["name"] = "tiny_masked"
    values["policy"]["keypoints"] = {"number": 4, "hidden": 8, "tokens": 2}
    values["data"]["paths"] = [str(demonstrations)]
    values |= {"objective": OBJECTIVE, "training": LOOP}
    path = tmp_path_factory.mktemp("recipe") / "tiny_masked.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run(recipe: Path, output: Path, *overrides: str, resume: bool = False) -> RunFolder:
    loaded = load_recipe(str(recipe), ["reporting.tensorboard=false", *overrides])
    planned = plan(loaded, output, device=CPU, feature_cache=output.parent / "cache")
    folder = open_run_folder(loaded, output, resume=resume, fresh=False)
    execute(planned, folder, progress_bar=False)
    return folder


@pytest.fixture(scope="module")
def trained(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run(recipe, tmp_path_factory.mktemp("masked") / "run")


def last(folder: RunFolder) -> Path:
    found = folder.pointed("last")
    assert found is not None
    return found


def test_a_run_that_died_is_resumed_to_the_same_bits(
    recipe: Path, trained: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, moments, averages, and the target network, which nothing but the saving keeps."""
    from reflexarc.training.trainer import Trainer

    whole_step = Trainer._step

    def dies(trainer: Trainer, index: int) -> int:
        if index == 8:
            raise KeyboardInterrupt
        return whole_step(trainer, index)

    monkeypatch.setattr(Trainer, "_step", dies)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "run")
    monkeypatch.undo()
    resumed = run(recipe, tmp_path / "run", resume=True)
    one, two = final_tensors(trained.path), final_tensors(resumed.path)
    assert any("objective.target." in name for name in one)
    assert largest_difference(one, two) == 0
    assert metrics(trained.path) == metrics(resumed.path)


def test_validation_samples_chunks_and_measures_skill(trained: RunFolder) -> None:
    lines = [json.loads(line) for line in trained.metrics.read_text().splitlines()]
    validated = [line for line in lines if line["kind"] == "validation"][-1]
    assert {"action_mae", "flow", "gripper", "prediction", "variance", "z_std"} <= set(validated)
    ratio = validated["prediction"] / validated["mean_target"]
    assert validated["mse_over_mean"] == pytest.approx(ratio)
    provenance = load_checkpoint(last(trained)).provenance
    assert provenance["action_heads_trained"] is True
    assert provenance["best_metric"]["name"] == "action_mae"


def test_what_is_served_is_what_was_trained(
    recipe: Path, trained: RunFolder, demonstrations: Path
) -> None:
    """The checkpoint holds the policy alone; predictor and target lie beside it."""
    loaded = load_checkpoint(last(trained))
    own = load_file(last(trained) / OBJECTIVE_FILE)
    assert {name.split(".")[0] for name in own} == {"predictor", "target"}
    representation = loaded.policy.representation  # type: ignore[attr-defined]
    assert load_predictor(last(trained), 7, representation) is None  # it foresees nothing

    contract = loaded.policy.contract
    episode = open_libero([demonstrations]).episodes[0]
    observation = Observation(
        images={
            camera.name: prepare_image(camera, episode.images(camera.name, [1])[0])
            for camera in contract.cameras
        },
        state=episode.states(contract.state.layout)[episode.image_steps[1]],
        instruction=episode.instruction,
        seed=7,
    )
    (here,) = PolicyRuntime(loaded).infer([observation])
    with (
        BackgroundServer(lambda: CheckpointPolicy.load(last(trained), "cpu")) as server,
        PolicyClient(server.url) as client,
    ):
        served = client.infer(observation)
    np.testing.assert_array_equal(served.actions, here.actions)


def sensitivity(checkpoint: Path, data: Path, *extra: str) -> tuple[int, str]:
    arguments = ["checkpoint", "sensitivity", str(checkpoint), "--data", str(data), *extra]
    result = CliRunner().invoke(app, [*arguments, "--device", "cpu", "--threads", "1"])
    return result.exit_code, result.output


def test_z_and_actions_move_with_every_modality(trained: RunFolder, demonstrations: Path) -> None:
    status, said = sensitivity(trained.path, demonstrations, "--json", "--samples", "20")
    found = {one["modality"]: one for one in json.loads(said)}
    assert list(found) == ["language", "state", "agentview", "eye_in_hand", "everything"]
    assert status == 0 and all(one["moves"] for one in found.values())
    assert found["everything"]["z_share"] == pytest.approx(1)
    assert min(one["z"] for one in found.values()) > 1e-4 and found["agentview"]["gripper"] > 0
    status, table = sensitivity(trained.path, demonstrations)
    assert status == 0 and "NOT HEARD" not in table


@pytest.mark.parametrize("dead", ["language", "state", "eye_in_hand"])
def test_an_input_that_is_not_heard_is_found(
    trained: RunFolder, demonstrations: Path, tmp_path: Path, dead: str
) -> None:
    loaded = load_checkpoint(last(trained))
    tokenizer = loaded.policy.representation.tokenizer  # type: ignore[attr-defined]
    with torch.no_grad():
        if dead == "eye_in_hand":
            tokenizer.vision.projection[1] = 0.0
        else:
            weights = tokenizer.language if dead == "language" else tokenizer.state[2]
            weights.weight.zero_()
    folder = save_checkpoint(
        tmp_path / "deaf", loaded.policy, loaded.statistics, dict(loaded.provenance)
    )
    status, said = sensitivity(folder, demonstrations, "--json")
    assert status == 1
    assert [one["modality"] for one in json.loads(said) if not one["moves"]] == [dead]


def test_with_one_instruction_language_is_not_swapped(
    trained: RunFolder, demonstrations: Path
) -> None:
    one = sorted(demonstrations.glob("*.hdf5"))[0]
    status, said = sensitivity(trained.path, one)
    assert status == 0 and "language was not swapped" in said and "state" in said


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("objective.mask_ratio=0", "objective.mask_ratio"),
        ("objective.mask_ratio=1", "objective.mask_ratio"),
        ("objective.block_scale=[0.5, 0.1]", "objective"),
        ("objective.mask_probabilities={agentview: 2}", "objective.mask_probabilities.agentview"),
        ("objective.masking_strategy=blocks", "objective.masking_strategy"),
        ("objective.mask_probabilities={wrist: 0.5}", "objective.mask_probabilities"),
        ("objective.max_masked_modalities=4", "objective.max_masked_modalities"),
        ("contract.cameras=[agentview]", "objective.mask_probabilities"),
    ],
)
def test_masks_that_cannot_be_are_named_before_anything_is_computed(
    recipe: Path, tmp_path: Path, override: str, field: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        run(recipe, tmp_path / "run", override)
    assert caught.value.field == field
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()
    few = ["objective.masking_strategy=random", "objective.mask_ratio=0.1"]
    with pytest.raises(ConfigError, match="of 6 tokens leaves nothing hidden"):
        run(recipe, tmp_path / "run", *few)


def test_checkpointed_activations_change_nothing(
    recipe: Path, trained: RunFolder, tmp_path: Path
) -> None:
    again = run(recipe, tmp_path / "run", "training.activation_checkpointing=true")
    assert largest_difference(final_tensors(trained.path), final_tensors(again.path)) <= 1e-6


def test_a_step_in_two_passes_draws_what_one_pass_draws(
    recipe: Path, trained: RunFolder, tmp_path: Path
) -> None:
    """What is a mean over decisions is the same; VICReg's statistics are those of a pass."""
    again = run(recipe, tmp_path / "run", "training.accumulate=2", "training.steps=3")
    (one, two) = (metrics(path)[0] for path in (trained.path, again.path))
    assert one["step"] == two["step"] == 3
    assert two["flow"] == pytest.approx(one["flow"], rel=0.02)
    assert two["prediction"] == pytest.approx(one["prediction"], rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_killed_at_random_steps_a_run_ends_with_the_same_bits(
    recipe: Path, tmp_path: Path, world: int
) -> None:
    options = ["--set", "training.steps=60", "--set", "training.log_every=2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(recipe, whole, *options, world=world), whole)
    for kill_at in sorted(random.Random(world).sample(range(6, 54), 2)):
        processes = start(recipe, killed, *options, "--resume", world=world)
        wait_for_step(killed, kill_at, processes)
        for process in processes:
            process.kill()
        finish(processes, killed, status=-signal.SIGKILL)
    finish(start(recipe, killed, *options, "--resume", world=world), killed)
    assert metrics(killed) == metrics(whole)
    assert largest_difference(final_tensors(killed), final_tensors(whole)) == 0


@pytest.mark.slow
def test_every_engine_trains_what_one_process_does(recipe: Path, tmp_path: Path) -> None:
    """With patches: attention does not see the shift of keypoints' FiLM, so the gradient of that is
    rounding alone, which AdamW scales up."""
    options = ["--set", "policy.keypoints=null"]
    alone = tmp_path / "alone"
    finish(start(recipe, alone, *options), alone)
    for engine in ("ddp", "fsdp2", "zero2"):
        shared = tmp_path / engine
        finish(start(recipe, shared, *options, "--engine", engine, world=2), shared)
        assert largest_difference(final_tensors(shared), final_tensors(alone)) <= 1e-5, engine
        assert_close_metrics(shared, alone)
