"""``reflexarc eval offline`` on LeRobot folders; GR00T's sample from training to the comparison."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from reflexarc.cli.recipe_data_section import read_recipe_data
from reflexarc.contract import ActionChunk, Camera, Observation, PolicyContract
from reflexarc.contract.errors import ReflexarcError
from reflexarc.contract.images import prepare_image
from reflexarc.data.lerobot import LeRobotDataset, open_lerobot
from reflexarc.eval.offline import evaluate_offline
from reflexarc.eval.offline_settings import OfflineSettings
from reflexarc.eval.offline_summary import OfflineSummary
from reflexarc.policy.checkpoint import load_checkpoint
from reflexarc.server import BackgroundServer, NullPolicy
from reflexarc.server.loading import CheckpointPolicy
from reflexarc.training.recipe_files import load_recipe
from reflexarc.training.session import execute, open_run_folder, plan

sys.path.insert(0, str(Path(__file__).parents[1] / "data" / "lerobot"))
from lerobot_samples import SIZE, write_v3

ROOT = Path(__file__).parents[2]


class Recorded(NullPolicy):
    """Answers what was recorded; keeps what it was asked."""

    def __init__(self, dataset: LeRobotDataset) -> None:
        camera = Camera(
            name=dataset.cameras[0], height=SIZE[0], width=SIZE[1], orientation="upright",
            source_height=SIZE[0], source_width=SIZE[1],
        )  # fmt: skip
        spec = dataset.action_spec(4)
        narrow = spec.model_copy(update={"low": (-50.0,) * 3, "high": (50.0,) * 3})
        contract = PolicyContract(
            family="statevla",
            cameras=(camera,),
            state=dataset.mapping.state_spec,
            action=narrow,
        )
        super().__init__(contract)
        self.dataset, self.layout = dataset, dataset.mapping.state_spec.layout
        self.asked: list[Observation] = []

    def infer(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        self.asked.extend(observations)
        return [self._answer(observation) for observation in observations]

    def _answer(self, observation: Observation) -> ActionChunk:
        step = observation.step_index
        assert step is not None
        fitting = [
            e
            for e in self.dataset.episodes
            if e.length > step
            and np.allclose(e.states(self.layout)[step], observation.state, atol=1e-6)
        ]
        chunk = np.zeros((4, 3), dtype=np.float32)
        rest = fitting[0].actions()[step : step + 4]
        chunk[: len(rest)] = rest
        return ActionChunk(chunk, seed=0)


def compare(
    policy: object, data: Path, output: Path, every: int = 1, recipe: dict[str, Any] | None = None
) -> OfflineSummary:
    with BackgroundServer(lambda: policy) as server:  # type: ignore[arg-type,return-value]
        settings = OfflineSettings(
            server=server.url, data=data, output=output, every=every, recipe_data=recipe
        )
        return evaluate_offline(settings, notify=lambda text: None)


def test_what_was_recorded_has_no_error(tmp_path: Path) -> None:
    root = write_v3(tmp_path / "sample")
    policy = Recorded(open_lerobot(root))
    summary = compare(policy, root, tmp_path / "out", every=3)
    assert summary.complete and summary.total.episodes == 3
    assert summary.total.questions == len(policy.asked) == 4 + 3 + 3
    assert summary.total.mse.value < 1e-9
    episode, asked = policy.dataset.episodes[0], policy.asked[1]
    np.testing.assert_array_equal(asked.images["front"], episode.images("front", [3])[0])
    assert asked.instruction == episode.instruction


def test_what_the_recipe_renamed_and_sliced_is_found_by_it(tmp_path: Path) -> None:
    root = write_v3(tmp_path / "sample")
    names: dict[str, Any] = {
        "state": {"arm": "observation.state[1:4]"},
        "action": {"reach": "action[0:2]", "grip": "action[2:3]"},
        "cameras": {"scene": "front"},
    }
    policy = Recorded(open_lerobot(root, **names))
    with pytest.raises(ReflexarcError, match=r"does not have the policy's state .*--recipe RUN"):
        compare(policy, root, tmp_path / "out")
    mixture = {
        "sources": [{"path": "elsewhere/other"}, {"path": "elsewhere/sample", **names}],
        "gripper": None,
    }
    for number, recipe in enumerate((names, mixture)):
        summary = compare(policy, root, tmp_path / f"out{number}", every=4, recipe=recipe)
        assert summary.complete and summary.total.mse.value < 1e-9
    asked = policy.asked[1]
    np.testing.assert_array_equal(
        asked.images["scene"], policy.dataset.episodes[0].images("scene", [4])[0]
    )
    for recipe, said in (
        ({"sources": [{"path": "a"}, {"path": "b"}]}, "is none of the recipe's sources"),
        ({"state": 3}, r"data\.state is 3, expected a list"),
        ({"action_kind": "dance"}, "data.action_kind is 'dance'"),
        ({"gripper": {"open": 1.0}}, "KeyError 'name'"),
        ({**names, "state": {"arm": "observation.state[0:4]"}}, "its state is arm_0, arm_1"),
    ):
        with pytest.raises(ReflexarcError, match=said):
            compare(policy, root, tmp_path / "no", recipe=recipe)


@pytest.mark.parametrize("renamed", [False, True])
def test_the_sample_trains_and_is_compared(tmp_path: Path, renamed: bool) -> None:
    shared = Path(os.environ.get("REFLEXARC_SHARED_DATA", ROOT.parent / "shared" / "data"))
    root = shared / "lerobot_v2.0_gr1_picknplace"
    if not root.is_dir():
        pytest.skip("the shared sample data is not here")
    packaged = resources.files("reflexarc.training") / "recipes" / "statevla_tiny.yaml"
    values = yaml.safe_load(packaged.read_text())
    values["contract"] = {
        "cameras": ["head" if renamed else "ego_view"],
        "image_size": 32,
        "orientation": "upright",
        "horizon": 8,
    }
    values["data"] = {
        "paths": [str(root)],
        "state": ["left_arm", "right_arm", "right_hand"],
        "action": ["right_arm", "right_hand"],
        "frame_stride": 40,
        "split_by": "dataset",
        "validation_fraction": 0.2,
    }
    if renamed:
        values["data"].update(
            state={"arm": "left_arm", "hand": "right_hand[0:3]"},
            action={"move": "right_arm", "grasp": "action[29:35]"},
            cameras={"head": "ego_view"},
        )
    values["training"] = {"batch_size": 16, "steps": 4, "validate_every": 2, "checkpoint_every": 4}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    run = tmp_path / "run"
    planned = plan(
        load_recipe(str(path)), run, device=torch.device("cpu"), feature_cache=tmp_path / "cache"
    )
    folder = open_run_folder(planned.preparation.recipe, run, resume=False, fresh=False)
    outcome = execute(planned, folder, progress_bar=False)
    assert outcome.last is not None
    loaded = load_checkpoint(outcome.last)
    (camera,) = loaded.policy.contract.cameras
    episode = planned.preparation.episodes[0]
    image = prepare_image(camera, episode.images(camera.name, [0])[0])
    assert image.shape == (32, 32, 3)
    recipe = read_recipe_data(run) if renamed else None
    stored = read_recipe_data(outcome.last)
    assert recipe is None or all(stored[k] == recipe[k] for k in ("state", "action", "cameras"))
    summary = compare(CheckpointPolicy(loaded), root, tmp_path / "out", every=200, recipe=recipe)
    assert summary.complete and summary.total.episodes == 5
    names = [dimension.name for dimension in summary.total.dimensions]
    first, last = ("move_0", "grasp_5") if renamed else ("right_arm_0", "right_hand_5")
    assert names[0] == first and names[-1] == last and len(names) == 13
    assert np.isfinite(summary.total.mae.value) and summary.total.gripper is None


def test_a_path_without_a_recipe_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("data: [")
    (tmp_path / "list.yaml").write_text("- 1")
    for path in (tmp_path / "none", tmp_path, tmp_path / "broken.yaml", tmp_path / "list.yaml"):
        with pytest.raises(ReflexarcError, match="holds no recipe"):
            read_recipe_data(path)
