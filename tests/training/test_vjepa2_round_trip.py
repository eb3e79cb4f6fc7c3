"""From demonstrations to answers: precompute, train, save, load, serve; equal to this process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from reflexarc.cli.main import app
from reflexarc.client import HttpPolicyClient, PolicyClient, RecedingHorizonExecutor
from reflexarc.contract import Observation
from reflexarc.contract.errors import ConfigError, ReflexarcError
from reflexarc.contract.images import prepare_image
from reflexarc.data.dataset import DatasetEpisode
from reflexarc.data.libero_hdf5 import open_libero
from reflexarc.policy.checkpoint import load_checkpoint
from reflexarc.policy.interface import Task
from reflexarc.policy.runtime import PolicyRuntime
from reflexarc.policy.vjepa2_head.model import VJEPA2Head
from reflexarc.server import BackgroundServer
from reflexarc.server.loading import CheckpointPolicy
from reflexarc.training.goals import goal_task
from reflexarc.training.preparation import Preparation, prepare
from reflexarc.training.recipe_files import load_recipe
from reflexarc.training.session import execute, open_run_folder, plan

sys.path.insert(0, str(Path(__file__).parents[1] / "policy"))
from vjepa2_samples import SIZE, save_tiny_vjepa2, tiny_head_config

CPU = torch.device("cpu")
STEPS = 25


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_vjepa2(tmp_path_factory.mktemp("vjepa2"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, task_file: Callable[..., Path]) -> Path:
    """Two tasks with an image at every step."""
    folder = tmp_path_factory.mktemp("every_step")
    for seed, task in enumerate(("pick_up_the_red_block", "pick_up_the_blue_block")):
        path = folder / f"{task}_demo.hdf5"
        task_file(path, demos=3, steps=STEPS, stride=1, image_size=SIZE, seed=seed)
    return folder


@pytest.fixture(scope="module")
def recipe(encoder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The debug recipe on the tiny V-JEPA 2 from its folder, 16 frames of every step."""
    values = load_recipe("debug_vjepa2_head").model_dump(mode="json")
    values["policy"] = {**tiny_head_config(encoder), "static_clips": True}
    values["contract"] |= {"history": {"frames": 16, "states": 5, "stride": 1}, "horizon": 8,
                           "cameras": ["agentview"]}  # fmt: skip
    values["data"] |= {"paths": [str(data)], "feature_dtype": "bf16", "validation_fraction": 0.3}
    values["training"] |= {"steps": 4, "validate_every": 4, "checkpoint_every": 4, "batch_size": 8,
                           "log_every": 2}  # fmt: skip
    values["reporting"] = {"tensorboard": False}
    path = tmp_path_factory.mktemp("recipe") / "vjepa2_smoke.yaml"
    path.write_text(json.dumps(values))
    return path


@pytest.fixture(scope="module")
def store(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What ``reflexarc data precompute`` wrote, and what it said."""
    folder = tmp_path_factory.mktemp("stores")
    arguments = ["data", "precompute", str(recipe), "--feature-cache", str(folder),
                 "--device", "cpu", "--threads", "1"]  # fmt: skip
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return folder, json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def run(
    recipe: Path, store: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run that trained from the store."""
    loaded = load_recipe(str(recipe))
    output = tmp_path_factory.mktemp("run") / "smoke"
    planned = plan(loaded, output, device=CPU, feature_cache=store[0])
    lines: list[str] = []
    folder = open_run_folder(loaded, output, resume=False, fresh=False)
    execute(planned, folder, progress_bar=False, log=lines.append)
    assert any("150 of 150 rows found" in line for line in lines), lines
    return output


@pytest.fixture(scope="module")
def episode(data: Path) -> DatasetEpisode:
    return open_libero([data]).episodes[0]


def observe(episode: DatasetEpisode, contract: Any, step: int, **fields: Any) -> Observation:
    camera = contract.cameras[0]

    def image(frame: int) -> dict[str, np.ndarray]:
        return {camera.name: prepare_image(camera, episode.images(camera.name, [frame])[0])}

    goal = image(len(episode.image_steps) - 1) if step == 0 else None
    state = episode.states(contract.state.layout)[step].astype(np.float32)
    return Observation(image(step), state, step_index=step, seed=step, goal_image=goal, **fields)


def test_the_store_holds_a_row_of_tokens_a_clip(
    store: tuple[Path, dict[str, Any]], recipe: Path
) -> None:
    _, said = store
    assert said["rows"] == said["rows_computed"] == 2 * 3 * STEPS
    assert said["arrays"] == {
        "clip": "bf16 (150, 1, 4, 48)", "static": "bf16 (150, 1, 4, 48)"
    }  # fmt: skip
    assert said["encoders"]["clips"]["id"] == "vjepa2"
    index = json.loads((Path(said["path"]) / "index.json").read_text())
    assert index["key"]["clip"] == "16 frames, stride 1"


@pytest.fixture(scope="module")
def preparation(recipe: Path) -> Preparation:
    return prepare(load_recipe(str(recipe)), CPU)


def test_a_stored_row_is_what_serving_makes_of_the_same_clip(
    preparation: Preparation, store: tuple[Path, dict[str, Any]]
) -> None:
    """At the start (padded), in the middle and at the end; over a shard's border too."""
    features = preparation.features(store[0], progress=False)
    source, held_out = preparation.sources(features.arrays, features.first_rows)
    assert held_out is not None
    policy = preparation.policy
    episode = preparation.train_episodes[0]
    contract = preparation.contract
    images = [
        torch.from_numpy(observe(episode, contract, step).images["agentview"])
        for step in range(STEPS)
    ]
    for step in (0, 1, 7, 15, STEPS - 1):
        window = [images[max(0, step - past)] for past in range(15, -1, -1)]
        clip = {"frames": torch.stack(window)[None, :, None]}
        valid = torch.arange(15, -1, -1)[None] <= step
        with torch.no_grad():
            served = policy.embed_clips(clip, valid)["clip"]
            held = policy.embed_clips({"frames": images[step].expand(1, 16, 1, -1, -1, -1)}, valid)
        batch = source.batch(torch.tensor([step]))
        assert batch.window["clip"].shape == (1, 1, 1, 4, 48)
        torch.testing.assert_close(batch.window["clip"][0], served, rtol=0.01, atol=0.01)
        torch.testing.assert_close(batch.window["static"][0], held["clip"], rtol=0.01, atol=0.01)
        assert int(batch.valid.sum()) == min(step + 1, 16)


def test_every_step_is_an_observation_with_its_padding_masked(
    preparation: Preparation,
) -> None:
    table = preparation.samples(preparation.train_episodes[:1], [0])
    assert len(table) == STEPS
    assert table.frame_row.shape == (STEPS, 1)
    kept = table.action_mask.sum(1)
    assert kept.tolist() == [min(8, STEPS - step) for step in range(STEPS)]
    assert table.weight is not None
    assert float(table.weight.sum()) == pytest.approx(STEPS + 4)  # the change, five times


def test_a_chunk_over_both_protocols_is_the_one_of_this_process(
    run: Path, episode: DatasetEpisode
) -> None:
    loaded = load_checkpoint(run)
    contract = loaded.policy.contract

    def chunks(policy: Any, **fields: Any) -> np.ndarray:
        executor = RecedingHorizonExecutor(policy, 4)
        found = []
        for step in range(12):
            look = lambda step=step: observe(episode, contract, step, **fields)  # noqa: E731
            found.append(executor.next_action(look))
        return np.stack(found)

    class InProcess:
        """The runtime as an executor asks a client."""

        def __init__(self) -> None:
            self.runtime, self.contract = PolicyRuntime(loaded), contract

        def infer(self, observation: Observation) -> Any:
            return self.runtime.infer([observation])[0]

    expected = chunks(InProcess(), session_id="mine")
    assert np.isfinite(expected).all()
    with BackgroundServer(lambda: CheckpointPolicy.load(run, "cpu")) as server:
        for client_class in (PolicyClient, HttpPolicyClient):
            with client_class(server.url) as client:
                np.testing.assert_array_equal(chunks(client), expected)


def test_a_checkpoint_says_which_demonstrations_were_goals(run: Path) -> None:
    loaded = load_checkpoint(run)
    assert loaded.policy.family == "vjepa2_head"
    goals = loaded.provenance["goals"]
    assert len(goals) == 4  # of three a task one is held out
    assert all(name.endswith(("demo_0", "demo_1", "demo_2")) for name in goals)


def sources(recipe: Path, *overrides: str) -> Preparation:
    return prepare(load_recipe(str(recipe), list(overrides)), CPU)


def test_goals_come_from_where_the_recipe_says(recipe: Path) -> None:
    own = sources(recipe, "data.goal={source: episode}")
    assert own.goals is not None
    assert own.goals.candidates == tuple(own.episodes)
    rows = own.goals.task_rows(own.held_out_episodes)
    assert rows.unique().tolist() == [4, 5]

    fixed = sources(recipe, "data.goal={source: task}")
    assert fixed.goals is not None
    assert len(fixed.goals.candidates) == 2
    for episode in fixed.episodes:
        (row,) = fixed.goals.task_rows([episode]).unique().tolist()
        assert fixed.goals.candidates[row].task_name == episode.task_name

    drawn = sources(recipe, "data.goal={source: any}")
    assert drawn.goals is not None
    train = {id(episode) for episode in drawn.train_episodes}
    assert {id(episode) for episode in drawn.goals.candidates} == train
    first = drawn.goals.task_rows(drawn.train_episodes)
    assert torch.equal(first, drawn.goals.task_rows(drawn.train_episodes))
    seen = drawn.goals.task_rows(drawn.held_out_episodes[:1])
    assert len(seen.unique()) == 2
    task = drawn.held_out_episodes[0].task_name
    assert {drawn.goals.candidates[i].task_name for i in seen.tolist()} == {task}


def test_a_goals_row_is_its_demonstrations_last_image(recipe: Path) -> None:
    preparation = sources(recipe, "data.goal={source: episode}")
    goals, policy = preparation.goals, preparation.policy
    assert goals is not None
    assert isinstance(policy, VJEPA2Head)
    episode = preparation.train_episodes[2]
    last = observe(episode, preparation.contract, STEPS - 1).images
    with torch.no_grad():
        task = Task(goal_image={name: torch.from_numpy(image) for name, image in last.items()})
        expected = policy.embed_task([task])["goal"]
    rows = goals.rows["goal"]
    assert rows.dtype == torch.bfloat16  # as the store keeps features
    torch.testing.assert_close(rows[2].float(), expected[0], rtol=0.01, atol=0.01)
    assert goal_task(policy, episode).instruction == episode.instruction


def test_a_held_out_or_unknown_demonstration_is_no_goal(recipe: Path) -> None:
    preparation = sources(recipe)
    held_out = preparation.held_out_episodes[0].demo
    for name in (held_out, "demo_99"):
        with pytest.raises(ConfigError, match=rf"data\.goal\.demonstration: .*'{name}'"):
            sources(recipe, f"data.goal={{source: task, demonstration: {name}}}")


def test_bad_settings_are_named(
    recipe: Path, store: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"policy\.static_clips: true"):
        sources(recipe, "policy.static_clips=false")
    with pytest.raises(ReflexarcError, match="there is no datasets/libero_goal"):
        sources(recipe, "data.paths=[]", "data.suite=libero_goal")
    paths = f"data.paths=['{load_recipe(str(recipe)).data.paths[0]}']"
    other = load_recipe("debug_statevla", [paths, "objective={name: action_chunk}"])
    with pytest.raises(ConfigError, match="trains the family vjepa2_head, not statevla"):
        prepare(other, CPU)


def test_a_store_of_another_encoder_is_refused_by_name(
    recipe: Path, store: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    other = save_tiny_vjepa2(tmp_path / "other")
    from safetensors.torch import load_file, save_file

    weights = load_file(other / "model.safetensors")
    weights["encoder.layernorm.bias"] += 1
    save_file(weights, other / "model.safetensors")
    changed = sources(recipe, f"policy.clips.path={other}")
    with pytest.raises(ConfigError, match=r"encoders\.clips\.sha256"):
        changed.features(Path(store[1]["path"]), progress=False)
    shorter = sources(recipe, "contract.history.frames=8")
    with pytest.raises(ConfigError, match="clip: 16 frames, stride 1 in the store, 8 frames"):
        shorter.features(Path(store[1]["path"]), progress=False)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_precompute_takes_a_suite_and_an_output_and_names_data_that_is_not_there(
    recipe: Path, tmp_path: Path
) -> None:
    arguments = ["data", "precompute", str(recipe), "--set", "data.paths=[]"]
    wanted = ["--suite", "libero_goal", "--output", str(tmp_path), "--dry-run"]
    result = CliRunner().invoke(app, [*arguments, *wanted])
    assert isinstance(result.exception, ReflexarcError)
    assert "there is no datasets/libero_goal" in str(result.exception)
    assert "reflexarc data collect --suite libero_goal" in str(result.exception)


def test_query_draws_chunks_along_a_demonstration(run: Path, data: Path, tmp_path: Path) -> None:
    with BackgroundServer(lambda: CheckpointPolicy.load(run, "cpu")) as server:
        arguments = ["query", "--server", server.url, "--plot", str(tmp_path / "chunks.png")]
        one = ["--data", str(data), "--task", "blue", "--episode", "1", "--every", "8"]
        result = CliRunner().invoke(app, [*arguments, *one], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert "pick_up_the_blue_block_demo.hdf5/demo_1: 4 chunks" in result.output
        assert (tmp_path / "chunks.png").read_bytes().startswith(b"\x89PNG")
        refused = CliRunner().invoke(app, arguments)
        assert isinstance(refused.exception, ConfigError)
        assert "--data" in str(refused.exception)
