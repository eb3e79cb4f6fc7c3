"""``--executor`` and ``--latency-ms``: what they change, and that results say them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reflexarc.client import EXECUTORS, ExecutorName
from reflexarc.contract import ActionChunk, Observation
from reflexarc.contract.policy_contract import PolicyContract
from reflexarc.eval.compare import compare
from reflexarc.eval.durable_log import ResultsError
from reflexarc.eval.execution import evaluation_executor, execution_in_words
from reflexarc.eval.results import EpisodeResult, ResultsLog
from reflexarc.eval.run_settings import RunSettings
from reflexarc.eval.saved_run import read_summary

from .conftest import NullServer
from .results_folders import IDENTITY, episode, write_folder
from .test_evaluate_libero import finish, read_lines, start

DELAYED = IDENTITY.model_copy(update={"executor": "asynchronous", "injected_latency_ms": 200.0})


def test_settings_reach_the_identity(null_contract: PolicyContract, tmp_path: Path) -> None:
    settings = RunSettings(
        server="ws://x", suite="libero_object", tasks=(0,), states=(40,), output=tmp_path,
        executor="real_time_chunking", latency_ms=150,
    )  # fmt: skip
    identity = settings.identity(null_contract, {})
    assert (identity.executor, identity.injected_latency_ms) == ("real_time_chunking", 150.0)
    assert identity.execution == "real time chunking, replan every 8 steps, injected latency 150 ms"
    assert execution_in_words("temporal_ensembling", 1, 0) == (
        "temporal ensembling, replan at every step"
    )


def test_episodes_of_another_executor_or_latency_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, [episode(0, 40, True, identity=DELAYED)], DELAYED)
    for name, value in (("executor", "receding_horizon"), ("injected_latency_ms", 0.0)):
        with pytest.raises(ResultsError, match=f"{name}: there"):
            ResultsLog(tmp_path, DELAYED.model_copy(update={name: value}))
    with ResultsLog(tmp_path, DELAYED) as log:
        assert len(log.results) == 1


def test_episodes_from_before_there_were_executors_are_read() -> None:
    line = json.loads(episode(0, 40, True).model_dump_json())
    for name in ("executor", "injected_latency_ms", "held_steps"):
        del line[name]
    result = EpisodeResult.model_validate(line)
    assert (result.executor, result.injected_latency_ms) == ("receding_horizon", 0.0)
    assert result.differences(IDENTITY) == []


def test_a_comparison_says_that_executors_differ(tmp_path: Path) -> None:
    a = write_folder(tmp_path / "a", [episode(0, 40, True)])
    b = write_folder(tmp_path / "b", [episode(0, 40, True, identity=DELAYED)], DELAYED)
    warnings = "\n".join(compare(a, b).warnings)
    assert "executor: A has receding_horizon, B has asynchronous" in warnings
    assert "injected_latency_ms: A has 0.0, B has 200.0" in warnings
    assert (
        "asynchronous, replan every 8 steps, injected latency 200 ms"
        in (b / "summary.md").read_text()
    )
    assert read_summary(b).identity == DELAYED


class Slow:
    """Answers with how often it was asked; slow by the wall clock, which must not matter."""

    def __init__(self, contract: PolicyContract) -> None:
        self.contract = contract
        self.asked: list[int | None] = []

    def infer(self, observation: Observation) -> ActionChunk:
        self.asked.append(observation.step_index)
        value = len(self.asked) / 100
        return ActionChunk(actions=np.full((10, 7), value, np.float32), seed=0)


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("latency", [0, 100, 400])
def test_latency_counts_in_steps(
    null_contract: PolicyContract, name: ExecutorName, latency: int
) -> None:
    policy = Slow(null_contract)
    observation = Observation(images={}, state=np.zeros(8), instruction="go")
    executor = evaluation_executor(name, policy, 1 if "ensembling" in name else 8, latency)
    actions = [executor.next_action(lambda: replace(observation)) for _ in range(40)]
    steps = latency // 50
    first = next(step for step, action in enumerate(actions) if action[0] > 0)
    assert first == steps
    assert set(executor.delays) == {steps}
    assert executor.held == sum(not action[:6].any() for action in actions)
    if name == "receding_horizon":
        assert policy.asked == list(range(0, 40, 8 + steps))


@pytest.mark.slow
@pytest.mark.simulator
def test_smoke_of_an_executor_in_the_simulator(null_server: NullServer, tmp_path: Path) -> None:
    null_server.start()
    output = tmp_path / "output"
    options = ["--tasks", "0", "--states", "40", "--videos", "all", "--baselines", "none"]
    options += ["--executor", "asynchronous", "--latency-ms", "100"]
    printed = finish(start(null_server, output, *options))
    assert "asynchronous, replan every 8 steps, injected latency 100 ms" in " ".join(
        (output / "summary.md").read_text().split()
    ), printed
    (line,) = read_lines(output / "results.jsonl")
    assert (line["executor"], line["injected_latency_ms"]) == ("asynchronous", 100.0)
    # Two steps of holding for the first chunk, then eight actions, the last two of them while
    # the second chunk is under way; it begins at its third action, as do all that follow.
    requests = read_lines(null_server.log)
    assert [request["step_index"] for request in requests] == [0, 10, 18]
    assert (line["held_steps"], line["chunks"], line["steps"]) == (2, 3, 24)
    assert line["video"] and (output / "videos" / line["video"]).is_file()
    refused = finish(start(null_server, output, *options[:-1], "200"), status=2)
    assert "injected_latency_ms: there 100.0, this run 200.0" in refused
