"""Arms that show or tell something else: what is planned, judged, summarised and refused."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from reflexarc.contract.errors import ConfigError
from reflexarc.contract.images import prepare_image
from reflexarc.contract.policy_contract import PolicyContract
from reflexarc.data.libero_hdf5 import open_libero
from reflexarc.eval.arms import ARMS, BASELINES
from reflexarc.eval.baselines import load_demonstration
from reflexarc.eval.durable_log import ResultsError
from reflexarc.eval.episodes import _roll_out
from reflexarc.eval.report_table import markdown, rich_table
from reflexarc.eval.results import EpisodeKey, EpisodeResult, ResultsLog, RunIdentity
from reflexarc.eval.run import evaluate
from reflexarc.eval.run_settings import RunSettings, parse_baselines
from reflexarc.eval.shown_images import RecordedImages
from reflexarc.eval.summary import Summary, summarize
from reflexarc.eval.videos import Film
from reflexarc.eval.workers import EpisodeQueue

from .conftest import NullServer

REPOSITORY = Path(__file__).parents[2]
DEMONSTRATIONS = REPOSITORY / "checkpoints" / "demo_demonstrations"


def settings(output: Path, **changes: Any) -> RunSettings:
    values = {
        "server": "ws://127.0.0.1:1",
        "suite": "libero_goal",
        "tasks": (1, 4, 8),
        "states": (40, 41),
        "baselines": ("blank", "other_instruction"),
        "output": output,
    }
    return RunSettings.model_validate({**values, **changes})


def test_every_arm_is_parsed_in_the_order_of_the_table() -> None:
    assert parse_baselines("other_goal,other_instruction, swap_images,blank,replay") == BASELINES
    assert BASELINES == ("replay", "blank", "swap_images", "other_instruction", "other_goal")
    with pytest.raises(ConfigError, match=r"'swapped' is unknown; choose from replay, blank"):
        parse_baselines("swapped")


def test_the_other_task_is_the_next_one_or_each_one(tmp_path: Path) -> None:
    def others(**changes: Any) -> list[tuple[int, str, int | None]]:
        keys = settings(tmp_path, states=(40,), **changes).all_episodes()
        return [(key.task, key.arm, key.other_task) for key in keys]

    told = [(task, other) for task, arm, other in others() if arm == "other_instruction"]
    assert told == [(1, 4), (4, 8), (8, 1)]
    every = others(other_task="all", baselines=("swap_images", "other_instruction"))
    assert [(t, o) for t, arm, o in every if arm == "swap_images"] == [(1, 4), (4, 8), (8, 1)]
    pairs = {(t, o) for t, arm, o in every if arm == "other_instruction"}
    assert pairs == {(a, b) for a in (1, 4, 8) for b in (1, 4, 8) if a != b}
    assert all(o is None for _, arm, o in every if not ARMS[arm].involves_other_task)


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_every_episode_is_handed_out_once_and_workers_stay_with_a_task(
    tmp_path: Path, workers: int
) -> None:
    keys = settings(tmp_path, states=range(40, 50), tasks=(1, 4)).all_episodes()
    keys = [key for key in keys if key.task == 4 or key.state < 42]  # one short, one long task
    queue = EpisodeQueue(keys)
    current: list[int | None] = [None] * workers
    taken: list[EpisodeKey] = []
    busy_rounds, moves = 0, 0
    while True:
        row = [queue.take(task) for task in current]
        for worker, key in enumerate(row):
            if key is not None:
                moves += current[worker] not in (None, key.task)
                current[worker] = key.task
                taken.append(key)
        if None in row:
            break
        busy_rounds += 1
    assert Counter(taken) == Counter(keys)
    assert busy_rounds == len(keys) // workers  # nobody waits before the last round
    assert moves <= workers


class Scripted:
    """A simulator whose goals hold at given steps."""

    over = False

    def __init__(self, original: set[int], named: set[int]) -> None:
        self.steps, self.original, self.named = 0, original, named

    def step(self, action: object) -> bool:
        self.steps += 1
        return self.steps in self.original

    def holds(self, simulator: object) -> bool:
        return self.steps in self.named


@pytest.mark.parametrize(
    ("original", "named", "expected"),
    [
        (set(), {7}, (7, False, "named_goal", True, "named")),
        ({3}, {7}, (7, True, "named_goal", True, "original")),  # reached for a moment, earlier
        ({3}, set(), (10, True, "timeout", False, "original")),
        ({8}, {7}, (7, False, "named_goal", True, "named")),  # nothing counts after the end
        (set(), set(), (10, False, "timeout", False, None)),
    ],
)
def test_an_episode_runs_until_the_named_goal(
    original: set[int], named: set[int], expected: tuple[Any, ...]
) -> None:
    script = Scripted(original, named)
    source = SimpleNamespace(next_action=lambda step: np.zeros(7))
    found = _roll_out(script, source, 10, script)  # type: ignore[arg-type]
    assert (
        found.steps, found.success, found.reason, found.named_success, found.first_goal
    ) == expected  # fmt: skip


def test_without_a_goal_that_can_be_judged_the_own_goal_ends_the_episode() -> None:
    script = Scripted({3}, set())
    source = SimpleNamespace(next_action=lambda step: np.zeros(7))
    found = _roll_out(script, source, 10, None)  # type: ignore[arg-type]
    assert (found.steps, found.success, found.named_success) == (3, True, None)


def test_swapped_images_are_the_other_tasks_demonstration(null_contract: PolicyContract) -> None:
    episode = open_libero([DEMONSTRATIONS]).episodes[1]
    film = Film(wanted=False)
    shown = RecordedImages(episode, null_contract, None, film)  # type: ignore[arg-type]
    steps = episode.image_steps
    for step, frame in ((0, 0), (int(steps[1]) + 1, 1), (10_000, len(steps) - 1)):
        for camera in null_contract.cameras:
            raw = episode.images(camera.name, [frame])[0]  # type: ignore[arg-type]
            np.testing.assert_array_equal(shown(step)[camera.name], prepare_image(camera, raw))
            assert shown(step)[camera.name].shape == (64, 64, 3)


IDENTITY = RunIdentity(
    suite="libero_goal",
    seed=0,
    max_steps=300,
    replan_steps=8,
    wait_steps=10,
    checkpoint_fingerprint="f" * 64,
    contract_sha256="c" * 64,
    demonstrations={1: "d1", 4: "d4"},
)


def episode(task: int, state: int, arm: str = "policy", success: bool = True, **fields: Any):
    other = {1: 4, 4: 8, 8: 1}[task] if ARMS[arm].involves_other_task else None  # type: ignore[index]
    values: dict[str, Any] = {
        **IDENTITY.model_dump(exclude={"demonstrations", "goals"}),
        **{"task": task, "task_name": f"task_{task}", "instruction": f"do {task}"},
        **{"state": state, "arm": arm, "success": success, "other_task": other},
        **{"reason": "success" if success else "timeout", "steps": 100, "seconds": 1.0},
        **{"chunks": 13, "latency_median_ms": 50.0, "latency_max_ms": 60.0},
    }
    return EpisodeResult.model_validate({**values, **fields})


def test_both_goals_are_summarised_and_the_original_one_is_compared(tmp_path: Path) -> None:
    results = [episode(task, state) for task in (1, 4, 8) for state in (40, 41)]
    results += [episode(task, state, "blank", False) for task in (1, 4, 8) for state in (40, 41)]
    for task, named in ((1, True), (4, True), (8, None)):
        for state in (40, 41):
            original = task == 4
            results.append(
                episode(
                    task, state, "other_instruction", original, named_success=named,
                    original_success=original, told_instruction="x", reason="named_goal",
                    first_goal="original" if original else "named" if named else None,
                )
            )  # fmt: skip
    summary = summarize(results, settings(tmp_path), IDENTITY)
    assert summary.complete and summary.total is not None
    arm = summary.total.arms["other_instruction"]
    assert (arm.successes, arm.trials) == (2, 6)
    assert arm.named is not None
    assert (arm.named.successes, arm.named.trials) == (4, 4)  # task 8's scene lacks the goal
    assert summary.total.arms["blank"].named is None
    difference = summary.total.differences["other_instruction"]
    assert (difference.policy_only, difference.both, difference.pairs) == (4, 2, 6)
    text = markdown(summary)
    assert "| other instruction | goal named instead |" in text
    assert "| all tasks | 6/6 [61, 100] | 0/6 [0, 39] | 2/6 [10, 70] | 4/4 [51, 100] |" in text
    assert "exact McNemar p against other instruction" in text
    assert Summary.model_validate_json(summary.model_dump_json()) == summary


def test_the_table_of_all_arms_fits_a_terminal(tmp_path: Path) -> None:
    # A goal image beside it is another kind of policy: one column less there.
    told = [arm for arm in ARMS if arm != "other_goal"]
    arms = {"named_success": True, "success": False}
    results = [
        episode(task, 40, arm, **(arms if arm == "other_instruction" else {}))
        for task in (1, 4, 8)
        for arm in told
    ]
    console = Console(width=80, file=io.StringIO(), color_system=None)
    console.print(
        rich_table(summarize(results, settings(tmp_path, baselines=BASELINES[:-1]), IDENTITY))
    )
    text = console.file.getvalue()
    assert "…" not in text
    assert "do 1" in text and "[44, 100]" in text and "instruction" in text


def test_each_pair_of_tasks_counts_with_other_task_all(tmp_path: Path) -> None:
    asked = settings(tmp_path, tasks=(1, 4, 8), states=(40,), other_task="all")
    results = [episode(task, 40) for task in (1, 4, 8)]
    results += [
        episode(key.task, 40, key.arm, False, other_task=key.other_task, named_success=True)
        for key in asked.all_episodes()
        if key.arm == "other_instruction"
    ]
    results += [episode(task, 40, "blank", False) for task in (1, 4, 8)]
    summary = summarize(results, asked, IDENTITY)
    assert summary.complete and summary.total is not None
    assert summary.total.differences["other_instruction"].pairs == 6
    assert not summarize(results[1:], asked, IDENTITY).complete


def test_results_of_earlier_versions_stay_readable(tmp_path: Path) -> None:
    line = episode(1, 40).model_dump(mode="json")
    for field in (
        "other_task", "told_instruction", "original_success", "named_success", "first_goal",
    ):  # fmt: skip
        del line[field]
    (tmp_path / "results.jsonl").write_text(json.dumps(line) + "\n")
    with ResultsLog(tmp_path, IDENTITY) as log:
        assert log.finished == {EpisodeKey(1, 40, "policy")}


def test_images_of_another_demonstration_are_refused(tmp_path: Path) -> None:
    with ResultsLog(tmp_path, IDENTITY) as log:
        log.append(episode(1, 40, "swap_images", False, demonstration_sha256="d4"))
    ResultsLog(tmp_path, IDENTITY).__exit__(None, None, None)
    other = IDENTITY.model_copy(update={"demonstrations": {1: "d1", 4: "x"}})
    with pytest.raises(ResultsError, match="demonstration_sha256: there 'd4', this run 'x'"):
        ResultsLog(tmp_path, other)


@pytest.mark.simulator
def test_arms_that_cannot_run_are_refused_with_the_mend(
    tmp_path: Path, null_server: NullServer, null_contract: PolicyContract
) -> None:
    def refused(match: str, **changes: Any) -> None:
        asked = settings(tmp_path / "output", server=null_server.url, **changes)
        with pytest.raises(ConfigError, match=match):
            evaluate(asked)

    refused(
        "the baseline other_instruction needs another task beside 4: select at least two with "
        "--tasks, or leave it out with --baselines blank",
        tasks=(4,),
    )
    refused(
        "the baselines replay and swap_images need a demonstration of each task: give "
        "--demonstrations, or leave them out with --baselines other_instruction",
        baselines=("replay", "swap_images", "other_instruction"),
    )
    null_server.serve(null_contract.model_copy(update={"needs_language": False}))
    null_server.start()
    refused("other_instruction needs a policy that is told an instruction")
    assert not (tmp_path / "output").exists()


@pytest.mark.simulator
def test_the_goal_of_another_task_is_judged_in_this_scene() -> None:
    """The expert, told another goal of the same scene, reaches that one and not the scene's own."""
    from reflexarc.eval.libero.expert import run_expert
    from reflexarc.eval.libero.goals import goal_in_scene
    from reflexarc.eval.libero.simulator import LiberoSimulator
    from reflexarc.eval.libero.suites import load_init_states, load_tasks

    tasks = load_tasks("libero_goal")
    own, named = tasks[1], tasks[8]  # the bowl on the stove, the bowl on the plate
    state = load_init_states(own)[40]
    with LiberoSimulator(own, render=False) as simulator:
        simulator.reset_to_state(state)
        # Every task of this scene can be judged; one of another scene cannot.
        assert all(goal_in_scene(simulator, task) is not None for task in tasks)
        assert goal_in_scene(simulator, load_tasks("libero_object")[0]) is None

        actions: list[np.ndarray[Any, Any]] = []
        simulator.task = named  # only the expert and the goal look at this
        run_expert(simulator, max_steps=300, before_step=lambda action, _: actions.append(action))
        goal = goal_in_scene(simulator, named)
        assert goal is None  # it holds already: reaching it would say nothing

        simulator.reset_to_state(state)
        source = SimpleNamespace(next_action=lambda step: actions[min(step, len(actions) - 1)])
        outcome = _roll_out(simulator, source, 300, goal_in_scene(simulator, named))  # type: ignore[arg-type]
    assert (outcome.success, outcome.reason, outcome.first_goal) == (False, "named_goal", "named")


def test_a_demonstration_knows_its_episode() -> None:
    first = open_libero([DEMONSTRATIONS]).episodes[0]
    found = load_demonstration(DEMONSTRATIONS, first.task_name)
    assert found.episode.demo == first.demo and len(found.actions) == first.length
