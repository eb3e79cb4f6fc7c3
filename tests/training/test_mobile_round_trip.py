"""Mobile VLA from episodes to served velocities, with the compact backbone and with Kosmos-2."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from reflexarc.client import HttpPolicyClient, PolicyClient, RecedingHorizonExecutor
from reflexarc.contract import Observation
from reflexarc.contract.errors import ConfigError, DatasetError
from reflexarc.contract.messages import HistoryRow
from reflexarc.data.mobile.writing import write_episode
from reflexarc.policy.checkpoint import load_checkpoint
from reflexarc.policy.interface import Task
from reflexarc.policy.mobile_vla.model import MobileVLA
from reflexarc.policy.runtime import PolicyRuntime
from reflexarc.server import BackgroundServer
from reflexarc.server.loading import CheckpointPolicy
from reflexarc.training.feature_store.embedding import embed_episode
from reflexarc.training.preparation import Preparation, prepare
from reflexarc.training.recipe_files import load_recipe
from reflexarc.training.run_folder import RunFolder
from reflexarc.training.samples import BatchSource
from reflexarc.training.session import execute, open_run_folder, plan
from reflexarc.training.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parents[1] / "policy"))
from kosmos2_samples import SIZE, write_tiny_kosmos2

CPU = torch.device("cpu")
TOLD = ("navigate to the red box", "navigate to the blue ball")
LENGTHS = (20, 24, 12)  # the last one is shorter than a window and a chunk
COMPACT = {"name": "compact", "vision": {"name": "tiny_random", "pool": 1}, "width": 16,
           "queries": {"number": 4, "key_width": 8, "hidden": 8, "values": 4}}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mobile")
    for task, told in enumerate(TOLD):
        for number, length in enumerate(LENGTHS):
            random = np.random.default_rng([task, number])
            images = random.integers(0, 256, (length, SIZE, SIZE, 3), np.uint8)
            actions = random.uniform(-0.4, 0.5, (length, 2))
            path = folder / f"episode_2025111{task}_{number}.h5"
            write_episode(path, images, actions, told, control_hz=5.0,
                          expert_actions=actions / 2)  # fmt: skip
    return folder


@pytest.fixture(scope="module", params=["compact", "kosmos2"])
def recipe(
    request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    values = load_recipe("mobile_vla_small").model_dump(mode="json")
    backbone: dict[str, Any] = dict(COMPACT)
    if request.param == "kosmos2":
        path = write_tiny_kosmos2(tmp_path_factory.mktemp("kosmos2"))
        backbone = {"name": "kosmos2", "path": str(path), "lora": {"rank": 4},
                    "max_text_tokens": 32}  # fmt: skip
    values["policy"] = {"backbone": backbone, "lstm_layers": 4, "lstm_hidden": 16,
                        "head_hidden": [16]}  # fmt: skip
    values["language"] = {"encoder": "hashed"}
    values["contract"] |= {"image_size": SIZE}
    values["data"] |= {"paths": [str(data)], "train_fraction": 0.7, "validation_fraction": 0.3,
                       "pattern": "episode_2025111*.h5", "feature_dtype": "fp32"}  # fmt: skip
    values["training"] |= {"steps": 4, "epochs": None, "batch_size": 8, "accumulate": 2,
                           "validate_every": 2, "checkpoint_every": 2, "log_every": 2,
                           "keep_every": 2}  # fmt: skip
    values["reporting"] = {"tensorboard": False}
    written = tmp_path_factory.mktemp("recipe") / "mobile_smoke.yaml"
    written.write_text(json.dumps(values))
    return written


@pytest.fixture(scope="module")
def preparation(recipe: Path) -> Preparation:
    return prepare(load_recipe(str(recipe)), CPU)


def trained(recipe: Path, output: Path, *overrides: str, resume: bool = False) -> list[str]:
    loaded = load_recipe(str(recipe), overrides)
    planned = plan(loaded, output, device=CPU, feature_cache=recipe.parent / "features")
    lines: list[str] = []
    folder = open_run_folder(loaded, output, resume=resume, fresh=False)
    execute(planned, folder, progress_bar=False, log=lines.append)
    return lines


@pytest.fixture(scope="module")
def run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run") / "smoke"
    lines = trained(recipe, output)
    assert any("2 of 6 episodes are shorter than 18 steps" in line for line in lines), lines
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert any("loss_velocity" in row for row in metrics)
    return output


def test_targets_are_the_chunks_after_every_frame(preparation: Preparation) -> None:
    episode = preparation.train_episodes[0]
    table = preparation.samples([episode], [0])
    assert table.window_actions is not None and table.window_mask is not None
    length, rows = episode.length, episode.labelled_actions("expert")
    assert table.window_actions.shape == (length, 8, 10, 2)
    normalized = preparation.processor.normalize_actions(rows)
    for step in (0, 3, 9, length - 1):
        for place, frame in enumerate(range(step - 7, step + 1)):
            real = range(frame, min(frame + 10, length)) if frame >= 0 else range(0)
            assert int(table.window_mask[step, place].sum()) == len(real)
            wanted = normalized[list(real)]
            torch.testing.assert_close(table.window_actions[step, place, : len(real)], wanted)


def test_the_loss_is_hubers_over_what_is_real(preparation: Preparation) -> None:
    episode, policy = preparation.train_episodes[0], preparation.policy
    assert isinstance(policy, MobileVLA)
    rows = embed_episode(policy, episode, episode.image_steps, batch_size=8)
    features = {name: values.numpy() for name, values in rows.items()}
    source = BatchSource(preparation.samples([episode], [0]), features, preparation.task)
    batch = source.batch(torch.tensor([0, 2, episode.length - 1]))
    assert batch.window_actions is not None and batch.window_mask is not None
    policy.eval()
    with torch.no_grad():
        losses = preparation.objective.eval()(policy, batch, {})
        predicted = policy.predict(policy.encode(batch.task, batch.window, batch.valid))
    assert predicted.shape == (3, 8, 10, 2)
    error = predicted - batch.window_actions
    huber = torch.where(error.abs() < 1, error.square() / 2, error.abs() - 0.5).mean(-1)
    torch.testing.assert_close(losses["loss_velocity"], huber[batch.window_mask].mean())
    assert torch.equal(losses["total"], losses["loss_velocity"])
    assert preparation.objective.weight(batch) == float(batch.window_mask.sum())


def test_resuming_is_exact(
    recipe: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in its last step, then gone on with from the checkpoint of two steps before."""
    half, step = tmp_path / "half", Trainer._step

    def killed(trainer: Trainer, index: int) -> int:
        if index == 3:
            raise KeyboardInterrupt
        return step(trainer, index)

    monkeypatch.setattr(Trainer, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        trained(recipe, half)
    monkeypatch.undo()
    assert any("resuming at step 2" in line for line in trained(recipe, half, resume=True))
    first = load_file(RunFolder(run).checkpoint(4) / "model.safetensors")
    again = load_file(RunFolder(half).checkpoint(4) / "model.safetensors")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_what_the_backbone_trains_is_all_that_a_checkpoint_holds_of_it(run: Path) -> None:
    weights = load_file(RunFolder(run).checkpoint(4) / "model.safetensors")
    names = {name for name in weights if name.startswith("backbone.")}
    assert names
    assert not any(name.startswith("backbone.vision.") for name in names)
    if any("lora_" in name for name in names):
        assert all("lora_" in name or name == "backbone.action_token" for name in names)
        moved = [name for name in names if "lora_B" in name and weights[name].abs().max() > 0]
        assert moved, "PEFT begins with an update of zero: what differs was learnt"


def images_at(step: int) -> np.ndarray:
    random = np.random.default_rng([7, step])
    return random.integers(0, 256, (SIZE, SIZE, 3), np.uint8)


def observe(step: int, told: str = TOLD[0], **fields: Any) -> Observation:
    return Observation({"front": images_at(step)}, np.zeros(0, np.float32), told,
                       step_index=step, seed=step, **fields)  # fmt: skip


class Counted:
    """The runtime as an executor asks a client; counts what passes through the backbone."""

    def __init__(self, run: Path) -> None:
        loaded = load_checkpoint(run)
        self.runtime, self.contract = PolicyRuntime(loaded), loaded.policy.contract
        policy = loaded.policy
        assert isinstance(policy, MobileVLA)
        self.seen: dict[str, int] = {"image_rows": 0, "action_features": 0}
        for name in self.seen:
            self._count(policy.backbone, name)

    def _count(self, backbone: Any, name: str) -> None:
        called: Callable[..., torch.Tensor] = getattr(backbone, name)

        def counting(images: torch.Tensor, *rest: Any) -> torch.Tensor:
            self.seen[name] += len(images)
            return called(images, *rest)

        setattr(backbone, name, counting)

    def infer(self, observation: Observation) -> Any:
        return self.runtime.infer([observation])[0]


def driven(policy: Any, steps: int = 12, replan: int = 1, **fields: Any) -> np.ndarray:
    executor = RecedingHorizonExecutor(policy, replan)
    return np.stack([
        executor.next_action(lambda step=step: observe(step, **fields)) for step in range(steps)
    ])  # fmt: skip


def test_a_session_reads_every_frame_once(run: Path) -> None:
    kept = Counted(run)
    with_session = driven(kept, session_id="mine")
    assert kept.seen == {"image_rows": 12, "action_features": 12}
    alone = Counted(run)
    chunks = []
    for step in range(12):
        past = [observe(before) for before in range(max(0, step - 7), step)]
        history = tuple(HistoryRow(row.step_index or 0, row.state, row.images) for row in past)
        chunks.append(alone.infer(observe(step, history=history)).actions[0])
    windows = sum(min(step + 1, 8) for step in range(12))
    assert alone.seen == {"image_rows": windows, "action_features": windows}
    # Eight frames in one batch round otherwise than one.
    np.testing.assert_allclose(with_session, np.stack(chunks), atol=1e-5)


def test_at_equal_batch_shape_a_kept_feature_is_the_one_computed_anew(run: Path) -> None:
    policy = load_checkpoint(run).policy
    task = policy.embed_task([Task(instruction=TOLD[0])])
    with torch.inference_mode():
        rows = [
            policy.embed_frames({"front": torch.from_numpy(images_at(step))[None]}, task)
            for step in range(8)
        ]
        kept = [policy.kept_frames(row, task)["feature"] for row in rows]
        again = [policy.kept_frames(row, task)["feature"] for row in rows]
        valid = torch.ones(1, 8, dtype=torch.bool)
        actions = [
            policy.sample_actions(
                policy.encode(task, {"feature": torch.stack(features, 1)}, valid), None, steps=1
            )
            for features in (kept, again)
        ]
        images = {"image": torch.stack([row["image"] for row in rows], 1)}
        trained_on = policy.sample_actions(policy.encode(task, images, valid), None, steps=1)
    assert torch.equal(actions[0], actions[1])
    torch.testing.assert_close(trained_on, actions[0], atol=1e-5, rtol=1e-4)


def test_served_velocities_are_those_of_this_process(run: Path) -> None:
    expected = driven(Counted(run), replan=4, session_id="mine")
    assert np.isfinite(expected).all() and np.ptp(expected) > 0
    with BackgroundServer(lambda: CheckpointPolicy.load(run, "cpu")) as server:
        for client_class in (PolicyClient, HttpPolicyClient):
            with client_class(server.url) as client:
                assert client.contract.action.names == ("linear_x", "linear_y")
                np.testing.assert_array_equal(driven(client, replan=4), expected)


def test_the_instruction_moves_the_chunk(run: Path) -> None:
    policy = Counted(run)
    one = policy.infer(observe(0, TOLD[0])).actions
    other = policy.infer(observe(0, TOLD[1])).actions
    assert np.abs(one - other).max() > 0


def test_what_the_data_cannot_give(recipe: Path, data: Path) -> None:
    with pytest.raises(DatasetError, match=r"mend data\.pattern"):
        prepare(load_recipe(str(recipe), ["data.pattern=run_*.h5"]), CPU)
    with pytest.raises(ConfigError, match="no camera of this data"):
        prepare(load_recipe(str(recipe), ["contract.cameras=[wrist]"]), CPU)


def test_images_of_two_sizes_are_refused(recipe: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "mixed")
    images = np.zeros((20, 2 * SIZE, 2 * SIZE, 3), np.uint8)
    path = tmp_path / "mixed" / "episode_20251119_9.h5"
    write_episode(path, images, np.zeros((20, 2)), TOLD[0], control_hz=5.0)
    with pytest.raises(DatasetError, match="train on files of one image size"):
        prepare(load_recipe(str(recipe), [f"data.paths=[{tmp_path / 'mixed'}]"]), CPU)
