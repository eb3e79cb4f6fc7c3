"""A policy that is shown a goal image is shown it in LIBERO: whose, when, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reflexarc.client import RecedingHorizonExecutor
from reflexarc.contract import ActionChunk, Observation, PolicyContract
from reflexarc.contract.errors import ConfigError, DatasetError
from reflexarc.contract.policy_contract import LIBERO_STATE_EEF, libero_action, libero_cameras
from reflexarc.data.generated import GeneratedSettings, write_generated
from reflexarc.data.libero_hdf5 import open_libero
from reflexarc.eval.baselines import PolicyActions
from reflexarc.eval.goal_images import last_images, load_goals
from reflexarc.eval.libero.observation import LiberoObserver
from reflexarc.eval.libero.simulator import RawState
from reflexarc.eval.offline_data import RecordedEpisode
from reflexarc.eval.results import EpisodeKey
from reflexarc.eval.run import _check_contract
from reflexarc.eval.run_settings import RunSettings

CONTRACT = PolicyContract(
    family="vjepa2_head",
    cameras=libero_cameras(size=32, source_size=64),
    state=LIBERO_STATE_EEF,
    action=libero_action(8),
    needs_language=False,
    needs_goal_image=True,
)


class Task:
    """As far as goals ask of one."""

    def __init__(self, index: int, name: str) -> None:
        self.index, self.name = index, name


TASKS: Any = [Task(4, "pick_up_the_red_block"), Task(7, "pick_up_the_blue_block")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("goals")
    write_generated(folder, GeneratedSettings(tasks=2, episodes=2))
    return folder


def test_a_goal_is_the_last_image_of_the_named_demonstration(data: Path) -> None:
    first, second = (load_goals(CONTRACT, data, TASKS, demo) for demo in (None, "demo_1"))
    assert first[4].source == "pick_up_the_red_block_demo.hdf5/demo_0"
    assert second[7].source == "pick_up_the_blue_block_demo.hdf5/demo_1"
    (episode,) = [e for e in open_libero([data]).episodes
                  if e.task_name.endswith("blue_block") and e.demo == "demo_1"]  # fmt: skip
    expected = last_images(CONTRACT, episode)
    assert expected["agentview"].shape == (32, 32, 3)
    np.testing.assert_array_equal(second[7].images["agentview"], expected["agentview"])
    assert len({goal.sha256 for goal in (*first.values(), *second.values())}) == 4
    with pytest.raises(DatasetError, match="of pick_up_the_red_block named demo_9"):
        load_goals(CONTRACT, data, TASKS, "demo_9")


class Asked:
    """Stands where a client stands and keeps what it is asked."""

    contract = CONTRACT

    def __init__(self) -> None:
        self.requests: list[Observation] = []

    def infer(self, observation: Observation) -> ActionChunk:
        self.requests.append(observation)
        return ActionChunk(actions=np.zeros((8, 7), np.float32), seed=0)


class Standing:
    """A simulator that does not move."""

    def observe_state(self) -> RawState:
        return RawState(np.zeros(3), np.array([0, 0, 0, 1.0]), np.zeros(3), np.zeros(2),
                        np.zeros(7))  # fmt: skip


def test_the_policy_is_shown_it_once_an_episode(data: Path) -> None:
    asked, observer, simulator = Asked(), LiberoObserver(CONTRACT), Standing()
    goal = load_goals(CONTRACT, data, TASKS)[4].images
    source = PolicyActions(
        RecedingHorizonExecutor(asked, 4),
        observer,
        simulator,  # type: ignore[arg-type]
        images=lambda step: observer.black_images(),
        instruction="pick",
        seeds=(0, 4, 40),
        goal=goal,
    )
    for step in range(12):
        source.next_action(step)
    assert [r.step_index for r in asked.requests] == [0, 4, 8]
    assert [r.goal_image is not None for r in asked.requests] == [True, False, False]
    assert asked.requests[0].goal_image is goal


def settings(tmp_path: Path, **changes: Any) -> RunSettings:
    values = {"server": "ws://x", "suite": "libero_object", "tasks": (4, 7), "states": (40,),
              "output": tmp_path}  # fmt: skip
    return RunSettings(**{**values, **changes})


def test_what_does_not_fit_the_policy_is_named(data: Path, tmp_path: Path) -> None:
    _check_contract(settings(tmp_path, goals=data), CONTRACT)
    with pytest.raises(ConfigError, match="with --goals PATH"):
        _check_contract(settings(tmp_path), CONTRACT)
    told = CONTRACT.model_copy(update={"needs_goal_image": False, "needs_language": True})
    with pytest.raises(ConfigError, match="leave out --goals"):
        _check_contract(settings(tmp_path, goals=data), told)
    with pytest.raises(ConfigError, match="other_goal needs a policy that is shown"):
        _check_contract(settings(tmp_path, baselines=("other_goal",)), told)


def test_an_episode_knows_whose_goal_it_was_shown(tmp_path: Path) -> None:
    run = settings(tmp_path, baselines=("replay", "other_goal"))
    identity = run.identity(CONTRACT, {}, {4: "own", 7: "other"})
    shown = {key: key.goal(identity) for key in run.all_episodes()}
    assert shown == {
        EpisodeKey(4, 40, "policy"): "own",
        EpisodeKey(4, 40, "replay"): None,
        EpisodeKey(4, 40, "other_goal", 7): "other",
        EpisodeKey(7, 40, "policy"): "other",
        EpisodeKey(7, 40, "replay"): None,
        EpisodeKey(7, 40, "other_goal", 4): "own",
    }


def test_offline_requests_bring_what_their_episode_ends_with(data: Path) -> None:
    episode = open_libero([data]).episodes[0]
    recorded = RecordedEpisode("x", episode, "executed", episode.image_steps[:3])
    for observation in recorded.observations(CONTRACT, seed=0):
        assert observation.goal_image is not None
        expected = last_images(CONTRACT, episode)
        for name, image in observation.goal_image.items():
            np.testing.assert_array_equal(image, expected[name])
