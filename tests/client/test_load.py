"""The load generator against real servers; figures are checked against what they must add up to."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from reflexarc.cli.main import app
from reflexarc.client.load import LoadSettings, jain_index, run_load
from reflexarc.client.load.requests import RequestStream
from reflexarc.contract import ActionChunk, Observation, check_observation, unpack
from reflexarc.contract.errors import ConfigError, InferenceError, ServerUnavailableError
from reflexarc.contract.policy_contract import History
from reflexarc.server import BackgroundServer, NullPolicy, libero_contract


class Small(NullPolicy):
    """Takes ``seconds`` a batch; refuses every ``refuse``-th request."""

    def __init__(self, seconds: float = 0.0, refuse: int = 0) -> None:
        super().__init__(libero_contract(image_size=16))
        self.seconds, self.refuse, self.asked = seconds, refuse, 0
        self.deadlines: list[float | None] = []

    def infer(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        time.sleep(self.seconds)
        self.asked += len(observations)
        self.deadlines += [observation.deadline_ms for observation in observations]
        if self.refuse and self.asked % self.refuse == 0:
            raise InferenceError("one of many is refused")
        return super().infer(observations)


def test_closed_loop_counts_what_the_server_answered() -> None:
    policy = Small(0.005)
    with BackgroundServer(lambda: policy) as server:
        settings = LoadSettings(
            server.url, clients=4, seconds=1.0, warm_up_seconds=0.2, processes=2
        )
        found = run_load(settings, ceiling=False)
    assert 0 < found.answered <= policy.asked and not found.errors
    assert found.requests == found.answered == len(found.latencies_ms)
    assert found.throughput == found.goodput and found.goodput_share == 1.0
    assert found.latency_ms["p50"] >= 5.0 and found.server_timing_ms["infer_ms"] >= 5.0
    latencies = [found.latency_ms[name] for name in ("p50", "p90", "p95", "p99", "max")]
    assert latencies == sorted(latencies)
    assert found.fairness is not None and 0.25 <= found.fairness <= 1.0
    assert found.generator_processes == 2 and found.generator_ceiling is None


def test_arrivals_do_not_wait_for_answers() -> None:
    with BackgroundServer(lambda: Small(0.002)) as server:
        settings = LoadSettings(server.url, clients=4, rate=60, seconds=2.0, warm_up_seconds=0.0)
        found = run_load(settings, ceiling=False)
    assert 80 <= found.requests <= 160  # 120, five standard deviations to either side
    assert found.fairness is None and found.answered == found.requests


def test_goodput_counts_by_deadline_and_errors_by_code() -> None:
    policy = Small(0.03)
    with BackgroundServer(lambda: policy) as server:
        settings = LoadSettings(
            server.url, clients=1, rate=30, deadline_ms=20, seconds=1.0, warm_up_seconds=0.0
        )
        late = run_load(settings, ceiling=False)
    assert late.goodput == late.goodput_share == 0.0
    assert late.requests == late.answered + sum(late.errors.values())
    assert set(late.errors) <= {"expired_before_sent", "deadline_exceeded"}
    assert all(left is not None and 0 < left <= 20 for left in policy.deadlines)

    with BackgroundServer(lambda: Small(refuse=5)) as server:
        settings = LoadSettings(server.url, clients=2, seconds=0.5, warm_up_seconds=0.0)
        refused = run_load(settings, ceiling=False)
    assert set(refused.errors) == {"inference_failed"}
    assert refused.answered + refused.errors["inference_failed"] == refused.requests


def test_a_policy_with_history_gets_whole_episodes() -> None:
    contract = libero_contract(image_size=16).model_copy(
        update={"history": History(frames=3, states=5, stride=2), "needs_goal_image": True}
    )
    stream = RequestStream(contract, 0, instruction="do it", deadline=True, seed=0)
    known: set[int] = set()
    for asked in range(60):
        request_id, frame = stream.next(50.0)
        seen = Observation.from_wire(unpack(frame))
        check_observation(contract, seen)
        assert (seen.request_id, seen.deadline_ms) == (request_id, 50.0)
        assert seen.step_index is not None
        if seen.step_index == 0:
            known = set()
            assert seen.goal_image is not None
        known |= {row.step_index for row in seen.history} | {seen.step_index}
        assert set(contract.history.state_steps(seen.step_index)) <= known, asked


def test_an_episode_restarts_after_a_refusal() -> None:
    contract = libero_contract(image_size=16).model_copy(update={"history": History(states=3)})
    stream = RequestStream(contract, 0, instruction="do it", deadline=False, seed=0)
    steps = [Observation.from_wire(unpack(stream.next(None)[1])).step_index for _ in range(3)]
    stream.restart()
    assert Observation.from_wire(unpack(stream.next(None)[1])).step_index == steps[0] == 0


def test_bench_prints_writes_and_draws(tmp_path: Path) -> None:
    with BackgroundServer(Small) as server:
        command = ["bench", "--server", server.url, "--clients", "2", "--duration", "0.5"]
        command += ["--warm-up", "0.1", "--output", f"{tmp_path}/bench.json"]
        command += ["--plot", f"{tmp_path}/bench.png"]
        result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "answers a second" in result.output and "load generator alone" in result.output
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["generator_ceiling"] > 0 and written["throughput"] > 0
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "bench.png"]


def test_a_server_that_is_absent_is_named() -> None:
    with pytest.raises(ServerUnavailableError, match=r"127\.0\.0\.1:9/v1/policy"):
        run_load(LoadSettings("ws://127.0.0.1:9"))
    with pytest.raises(ConfigError, match="clients"):
        LoadSettings("ws://127.0.0.1:9", clients=0)


def test_jain_index() -> None:
    assert jain_index([5, 5, 5, 5]) == 1.0
    assert jain_index([9, 0, 0]) == pytest.approx(1 / 3)
    assert jain_index(np.zeros(3)) == 1.0
