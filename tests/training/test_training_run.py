"""Whole runs of the tiny recipe on small files in the final format."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from reflexarc.contract import Observation
from reflexarc.contract.errors import ConfigError, DatasetError
from reflexarc.contract.images import prepare_image
from reflexarc.data.libero_hdf5 import open_libero
from reflexarc.policy.checkpoint import load_checkpoint
from reflexarc.policy.runtime import PolicyRuntime
from reflexarc.training.config import Recipe
from reflexarc.training.errors import TrainingDivergedError
from reflexarc.training.objective import Batch, Draws
from reflexarc.training.outcome import Outcome
from reflexarc.training.recipe_files import load_recipe
from reflexarc.training.session import execute, open_run_folder, plan

CPU = torch.device("cpu")


@pytest.fixture
def recipe(demonstrations: Path) -> Recipe:
    return tiny(demonstrations)


def tiny(data: Path, *overrides: str) -> Recipe:
    return load_recipe("statevla_tiny", [f"data.paths=['{data}']", *overrides])


def run(recipe: Recipe, output: Path, *, resume: bool = False) -> Outcome:
    planned = plan(recipe, output, device=CPU, feature_cache=output.parent / "cache")
    folder = open_run_folder(recipe, output, resume=resume, fresh=False)
    outcome = execute(planned, folder, progress_bar=False)
    return outcome


def weights(checkpoint: Path | None) -> dict[str, torch.Tensor]:
    assert checkpoint is not None
    return load_file(checkpoint / "model.safetensors")


def assert_same_weights(first: Path | None, second: Path | None) -> None:
    one, two = weights(first), weights(second)
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def metrics_of(output: Path, kind: str) -> list[dict[str, float]]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == kind]


def test_a_run_writes_checkpoints_pointers_metrics_and_summary(
    recipe: Recipe, tmp_path: Path
) -> None:
    outcome = run(recipe, tmp_path / "run")
    output = tmp_path / "run"
    assert outcome.progress.step == outcome.total_steps
    for name, checkpoint in (("last", outcome.last), ("best", outcome.best)):
        assert checkpoint is not None
        assert output / (output / name).read_text().strip() == checkpoint
    kept = {folder.name for folder in (output / "checkpoints").iterdir() if folder.is_dir()}
    assert outcome.last and outcome.best
    assert kept == {outcome.last.name, outcome.best.name}
    assert (outcome.last / "training_state" / "progress.json").is_file()
    validation = metrics_of(output, "validation")
    assert {"total", "flow", "gripper", "action_mae", "gripper_accuracy"} <= validation[-1].keys()
    assert outcome.progress.best_metric == min(line["action_mae"] for line in validation)
    steps = [line["step"] for line in metrics_of(output, "train")]
    assert steps == sorted(steps) and steps[-1] == outcome.total_steps
    summary = json.loads((output / "summary.json").read_text())
    assert summary["last"] == outcome.last.name

    provenance = load_checkpoint(outcome.last).provenance
    assert provenance["step"] == outcome.total_steps
    assert provenance["recipe"]["training"]["seed"] == recipe.training.seed
    assert provenance["dataset"]["training_episodes"] == 6
    assert provenance["best_metric"]["value"] == outcome.progress.best_metric
    assert "torch" in provenance["versions"]


def test_a_dry_run_counts_and_writes_nothing(recipe: Recipe, tmp_path: Path) -> None:
    planned = plan(recipe, tmp_path / "run", device=CPU)
    found = planned.estimate
    # Two tasks of four demos, one each held out; 21 steps rendered at 0, 4, ... 20: 6 frames.
    assert (found.train_samples, found.held_out_samples) == (36, 12)
    assert found.steps_per_epoch == -(-36 // found.batch_size)
    policy = planned.preparation.policy
    assert found.trained_parameters == sum(
        p.numel() for p in policy.parameters() if p.requires_grad
    )
    assert found.memory.total > 16 * found.trained_parameters
    assert found.disk_free > found.disk_needed > found.checkpoint
    assert list(tmp_path.iterdir()) == []


def test_the_estimated_checkpoint_size_is_the_real_one(recipe: Recipe, tmp_path: Path) -> None:
    planned = plan(recipe, tmp_path / "run", device=CPU)
    last = run(recipe, tmp_path / "run").last
    assert last is not None
    size = sum(path.stat().st_size for path in last.rglob("*.safetensors"))
    assert planned.estimate.checkpoint == pytest.approx(size, rel=0.1)
    features = sum(f.stat().st_size for f in (tmp_path / "cache").rglob("*.npy"))
    assert planned.estimate.features == pytest.approx(features, rel=0.1)


def test_a_few_samples_are_overfitted(tmp_path: Path, task_file: Callable[..., Path]) -> None:
    # Many draws of noise and time a step, so that the first and last losses are comparable.
    path = task_file(tmp_path / "one_task_demo.hdf5", demos=1, steps=9)
    recipe = tiny(
        path,
        "data.validation_fraction=0",
        "training.epochs=null",
        "training.steps=300",
        "training.log_every=10",
        "training.checkpoint_every=1000",
        "optimizer.learning_rate=0.01",
        "objective.draws_per_sample=32",
        "objective.state_noise=0",
    )
    outcome = run(recipe, tmp_path / "run")
    losses = [line["total"] for line in metrics_of(tmp_path / "run", "train")]
    assert losses[0] > 5 * losses[-1]
    assert outcome.best is None and outcome.progress.validation == {}


@pytest.mark.parametrize("ema", ["null", "0.9"])
def test_a_stopped_and_resumed_run_ends_with_the_same_weights(
    demonstrations: Path, tmp_path: Path, ema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny(
        demonstrations,
        "training.epochs=null",
        "training.steps=9",
        "training.checkpoint_every=4",
        "training.validate_every=3",
        f"training.ema_decay={ema}",
    )
    # Killed in step 5 (from 0): the newest checkpoint is that of the 4 steps before.
    whole = run(recipe, tmp_path / "whole")

    interrupt_after(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "broken")
    monkeypatch.undo()
    assert (tmp_path / "broken" / "last").read_text().strip() == "checkpoints/step_00000004"
    resumed = run(recipe, tmp_path / "broken", resume=True)

    assert resumed.progress.step == whole.progress.step == 9
    assert_same_weights(whole.last, resumed.last)
    assert whole.progress.best_step == resumed.progress.best_step
    assert whole.progress.best_metric == resumed.progress.best_metric
    assert metrics_of(tmp_path / "whole", "validation") == metrics_of(
        tmp_path / "broken", "validation"
    )
    assert whole.last and resumed.last
    for name in ("tensors.safetensors",):
        one = load_file(whole.last / "training_state" / name)
        two = load_file(resumed.last / "training_state" / name)
        assert all(torch.equal(one[key], two[key]) for key in one)


def interrupt_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Let the trainer die, without any saving, in optimiser step ``steps`` (from 0)."""
    from reflexarc.training.trainer import Trainer

    whole = Trainer._step

    def step(trainer: Trainer, index: int) -> int:
        if index == steps:
            raise KeyboardInterrupt
        return whole(trainer, index)

    monkeypatch.setattr(Trainer, "_step", step)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_last_and_the_run_can_be_resumed(
    demonstrations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    from reflexarc.training.trainer import Trainer

    recipe = tiny(demonstrations, "training.epochs=null", "training.steps=6",
                  "training.checkpoint_every=100", "training.validate_every=100")  # fmt: skip
    whole = run(recipe, tmp_path / "whole")
    step, before = Trainer._step, signal.getsignal(number)

    def signalled(trainer: Trainer, index: int) -> int:
        if index == 3:
            os.kill(os.getpid(), number)
        return step(trainer, index)

    monkeypatch.setattr(Trainer, "_step", signalled)
    stopped = run(recipe, tmp_path / "run")
    monkeypatch.undo()
    assert stopped.stopped_by == number
    assert stopped.progress.step == 4 and stopped.last is not None
    assert signal.getsignal(number) == before
    assert not (tmp_path / "run" / "summary.json").exists()
    assert_same_weights(whole.last, run(recipe, tmp_path / "run", resume=True).last)
    told = [[(v["step"], v["total"]) for v in metrics_of(tmp_path / name, "train")]
            for name in ("whole", "run")]  # fmt: skip
    assert told[0] == told[1]  # the stop divided no interval


def test_resuming_a_complete_run_changes_nothing(recipe: Recipe, tmp_path: Path) -> None:
    first = run(recipe, tmp_path / "run")
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != "recipe.yaml"]
    before = {path: path.read_bytes() for path in files}
    again = run(recipe, tmp_path / "run", resume=True)
    assert (again.steps_run, again.progress) == (0, first.progress)
    assert {path: path.read_bytes() for path in files} == before


def test_bfloat16_trains_and_saves_single_precision(demonstrations: Path, tmp_path: Path) -> None:
    outcome = run(tiny(demonstrations, "training.precision=bf16"), tmp_path / "run")
    assert outcome.progress.validation["total"] < 10
    assert {tensor.dtype for tensor in weights(outcome.last).values()} == {torch.float32}


def test_the_served_policy_equals_the_trained_one(recipe: Recipe, tmp_path: Path) -> None:
    planned = plan(recipe, tmp_path / "run", device=CPU, feature_cache=tmp_path / "cache")
    folder = open_run_folder(recipe, tmp_path / "run", resume=False, fresh=False)
    outcome = execute(planned, folder, progress_bar=False)
    assert outcome.last is not None
    trained = planned.preparation.policy.eval()
    loaded = load_checkpoint(outcome.last)
    for name, parameter in trained.named_parameters():
        assert torch.equal(parameter, loaded.policy.get_parameter(name))

    episode = planned.preparation.held_out_episodes[0]
    contract = loaded.policy.contract
    observation = Observation(
        images={
            camera.name: prepare_image(camera, episode.images(camera.name, [1])[0])
            for camera in contract.cameras
        },
        state=episode.states(contract.state.layout)[episode.image_steps[1]],
        instruction=episode.instruction,
        seed=7,
    )
    chunk = PolicyRuntime(loaded).infer([observation])[0]
    again = PolicyRuntime(load_checkpoint(outcome.last)).infer([observation])[0]
    np.testing.assert_array_equal(chunk.actions, again.actions)
    assert chunk.actions.shape == (contract.action.horizon, 7)
    assert np.abs(chunk.actions).max() <= 1.0

    # The same context from what training read: cached features (float16) and the same state.
    features = planned.preparation.features(tmp_path / "cache", progress=False)
    _, held_out = planned.preparation.sources(features.arrays, features.first_rows)
    assert held_out is not None
    batch = held_out.batch(torch.tensor([1]))
    with torch.inference_mode():
        context = trained.encode(batch.task, batch.window, batch.valid)
        frames = {n: torch.from_numpy(i[None].copy()) for n, i in observation.images.items()}
        window = {n: t.unsqueeze(1) for n, t in trained.embed_frames(frames, batch.task).items()}
        window["state"] = loaded.processor.normalize_state(observation.state[None])[:, None]
        live = trained.encode(batch.task, window, batch.valid)
    for name, expected in context.items():
        torch.testing.assert_close(live[name], expected, atol=5e-3, rtol=5e-3)


def test_features_are_reused_and_another_rendering_is_not_mistaken(
    tmp_path: Path, task_file: Callable[..., Path]
) -> None:
    path = task_file(tmp_path / "one_task_demo.hdf5", seed=1)
    cache = tmp_path / "cache"
    recipe = tiny(path)

    def features() -> tuple[bool, np.ndarray]:
        found = plan(recipe, tmp_path / "run", device=CPU).preparation.features(
            cache, progress=False
        )
        return found.hit, np.array(found.arrays["vision"])

    (first_hit, first), (second_hit, second) = features(), features()
    assert (first_hit, second_hit) == (False, True)
    np.testing.assert_array_equal(first, second)
    with h5py.File(path, "r+") as file:
        for demo in file["data"].values():
            demo["obs/agentview_rgb"][:] = 255 - demo["obs/agentview_rgb"][:]
    changed_hit, changed = features()
    assert not changed_hit
    assert not np.array_equal(first, changed)


def test_a_run_that_stands_there_needs_a_word_and_its_own_recipe(
    recipe: Recipe, tmp_path: Path, task_file: Callable[..., Path]
) -> None:
    output = tmp_path / "run"
    run(recipe, output)
    with pytest.raises(ConfigError, match="--resume, or start over with --fresh"):
        open_run_folder(recipe, output, resume=False, fresh=False)
    other = recipe.model_copy(
        update={"optimizer": recipe.optimizer.model_copy(update={"learning_rate": 0.5})}
    )
    with pytest.raises(ConfigError, match=r"optimizer\.learning_rate: .* -> 0\.5"):
        open_run_folder(other, output, resume=True, fresh=False)
    elsewhere = tmp_path / "other_data"
    elsewhere.mkdir()
    task_file(elsewhere / "pick_up_the_red_block_demo.hdf5", seed=9)
    with pytest.raises(ConfigError, match="other demonstrations"):
        run(tiny(elsewhere), output, resume=True)
    note = output / "my_notes.txt"
    note.write_text("mine")
    open_run_folder(recipe, output, resume=False, fresh=True)
    assert note.is_file() and not (output / "checkpoints").exists()


def test_a_loss_that_is_not_finite_names_its_step_and_overwrites_nothing(
    demonstrations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reflexarc.training.objectives.flow_matching import FlowMatchingObjective

    recipe = tiny(
        demonstrations,
        "training.epochs=null",
        "training.steps=8",
        "training.checkpoint_every=3",
        "training.log_every=100",
    )
    draw, steps = FlowMatchingObjective.draw, 0

    def poisoned(
        objective: FlowMatchingObjective, batch: Batch, generator: torch.Generator
    ) -> Draws:
        nonlocal steps
        draws = draw(objective, batch, generator)
        steps += batch.size == recipe.training.batch_size  # the estimate's batches are smaller
        return {**draws, "noise": draws["noise"] * float("nan")} if steps > 5 else draws

    monkeypatch.setattr(FlowMatchingObjective, "draw", poisoned)
    override = recipe.model_copy(
        update={"data": recipe.data.model_copy(update={"validation_fraction": 0.0})}
    )
    with pytest.raises(TrainingDivergedError, match=r"in step 6: total=nan") as caught:
        run(override, tmp_path / "run")
    assert caught.value.field == "total"
    assert (tmp_path / "run" / "last").read_text().strip() == "checkpoints/step_00000003"
    for values in weights(tmp_path / "run" / "checkpoints" / "step_00000003").values():
        assert torch.isfinite(values).all()


def test_data_that_is_wrong_is_named(tmp_path: Path, task_file: Callable[..., Path]) -> None:
    with pytest.raises(DatasetError, match="reflexarc data collect"):
        plan(tiny(tmp_path / "absent"), tmp_path / "run", device=CPU)
    path = task_file(tmp_path / "one_task_demo.hdf5")
    with pytest.raises(ConfigError, match=r"'\*soup\*' matches none of the tasks.*one_task"):
        plan(tiny(path, "data.tasks=['*soup*']"), tmp_path / "run", device=CPU)
    with pytest.raises(ConfigError, match=r"source_size is 64, but .* 32x32"):
        plan(tiny(path, "contract.source_size=64"), tmp_path / "run", device=CPU)
    with h5py.File(path, "r+") as file:
        file["data/demo_2/actions"][3, 1] = np.nan
    with pytest.raises(DatasetError, match=r"one_task_demo\.hdf5.*demo_2.*actions"):
        plan(tiny(path), tmp_path / "run", device=CPU)


def test_images_of_two_sizes_are_refused(tmp_path: Path, task_file: Callable[..., Path]) -> None:
    task_file(tmp_path / "a_demo.hdf5", image_size=32)
    task_file(tmp_path / "b_demo.hdf5", image_size=48, seed=2)
    recipe = tiny(tmp_path)
    with pytest.raises(DatasetError, match=r"b_demo\.hdf5.*48x48.*32x32"):
        plan(recipe, tmp_path / "run", device=CPU)


def test_the_recipe_chooses_tasks_and_how_many_episodes(
    demonstrations: Path, tmp_path: Path
) -> None:
    recipe = tiny(demonstrations, "data.tasks=['*red*']", "data.episodes_per_task=3")
    preparation = plan(recipe, tmp_path / "run", device=CPU).preparation
    assert {e.task_name for e in preparation.episodes} == {"pick_up_the_red_block"}
    assert len(preparation.episodes) == 3
    everything = open_libero([demonstrations])
    assert preparation.dataset_fingerprint != everything.fingerprint()
