"""Replicas that die, are replaced, or are added while robots ask; minutes, so slow."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

pytest.importorskip("ray")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for the package `benchmarks`

from benchmarks.replica_policies import process_of
from replica_server import ReplicaServer, observe, run, serving

from reflexarc.client import HttpPolicyClient, PolicyClient, RecedingHorizonExecutor
from reflexarc.contract.errors import ReflexarcError, ReplicaLostError

pytestmark = pytest.mark.slow
REMEMBERS = ("--policy", "benchmarks.replica_policies:Remembers")
WHO = ("--policy", "benchmarks.replica_policies:WhoAnswers")


class Robots:
    """Loops that ask over websocket, each in a thread, until they are told to stop."""

    def __init__(self, url: str, count: int) -> None:
        self.decisions: Counter[int] = Counter()
        self.errors: list[str] = []
        self._stop = threading.Event()
        self._url = url
        self._threads = [
            threading.Thread(target=self._run, args=(number,)) for number in range(count)
        ]

    def _run(self, number: int) -> None:
        try:
            with PolicyClient(self._url, retry_for=60) as policy:
                step = 0
                executor = RecedingHorizonExecutor(policy, replan_steps=2)
                window: list[int] = []
                while not self._stop.is_set():
                    action = executor.next_action(lambda step=step: observe(step))  # type: ignore[misc]
                    if step % 2 == 1:  # says what the decision one step before remembered
                        window.append(round(float(action[0]) * 1000))
                        first = step - 1
                        wanted = min(1000, sum(range(max(0, first - 3), first + 1)))
                        assert window[-1] == wanted, (number, step, window[-1], wanted)
                    step += 1
                    self.decisions[number] = step // 2
                    time.sleep(0.01)
        except BaseException as error:
            self.errors.append(repr(error))

    def __enter__(self) -> Robots:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(120)

    def go_on(self, more: int = 5) -> None:
        """Wait until every robot has made some more decisions."""
        goal = {number: self.decisions[number] + more for number in range(len(self._threads))}
        end = time.monotonic() + 180
        while any(self.decisions[number] < wanted for number, wanted in goal.items()):
            assert not self.errors, self.errors
            assert time.monotonic() < end, (self.decisions, goal)
            time.sleep(0.05)


def codes(server: ReplicaServer) -> dict[str, int]:
    """Answers of the server so far, by their code."""
    text = httpx.get(server.url.replace("ws://", "http://") + "/metrics", timeout=60).text
    found: Counter[str] = Counter()
    for line in text.splitlines():
        if line.startswith("reflexarc_requests_total{"):
            code = line.partition('code="')[2].partition('"')[0]
            found[code] += int(float(line.rsplit(" ", 1)[1]))
    return dict(found)


def processes(server: ReplicaServer, count: int = 8) -> set[int]:
    with PolicyClient(server.url, retry_for=60) as policy:
        return {
            process_of(policy.infer(observe(0, session_id=f"who-{time.monotonic()}-{number}")))
            for number in range(count)
        }


def test_robots_go_on_when_a_replica_is_killed_and_another_takes_its_place(tmp_path: Path) -> None:
    with serving(tmp_path, *REMEMBERS, "--replicas", "2") as server:
        before = processes(server)
        assert len(before) == 2
        with Robots(server.url, 6) as robots:
            robots.go_on()
            os.kill(min(before), signal.SIGKILL)
            robots.go_on(10)
        assert robots.errors == []
        assert set(codes(server)) <= {"ok", "history_missing"}
        assert codes(server)["history_missing"] >= 1
        until(lambda: len(processes(server)) == 2)
        assert min(before) not in processes(server)


def test_no_request_fails_while_the_replicas_are_replaced(tmp_path: Path) -> None:
    with serving(tmp_path, *WHO, "--replicas", "2") as server:
        before = processes(server)
        failures: list[str] = []
        stop = threading.Event()

        def ask(number: int) -> None:
            url = server.url.replace("ws://", "http://")
            with HttpPolicyClient(url) if number % 2 else PolicyClient(server.url) as policy:
                while not stop.is_set():
                    try:
                        policy.infer(observe(0, session_id=f"robot-{number}"))
                    except ReflexarcError as error:
                        failures.append(error.message)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        server.process.send_signal(signal.SIGHUP)
        server.wait_for("the replicas are replaced", 240)
        time.sleep(2)
        stop.set()
        for thread in threads:
            thread.join(60)
        assert failures == []
        assert set(codes(server)) == {"ok"}
        assert not processes(server) & before


def test_what_kills_every_replica_is_given_up_by_name(tmp_path: Path) -> None:
    with serving(tmp_path, *WHO, "--replicas", "2") as server:
        with (
            PolicyClient(server.url, retry_for=0) as policy,
            pytest.raises(ReplicaLostError, match="what they die of"),
        ):
            policy.infer(observe(0, instruction="die"))
        until(lambda: len(processes(server)) == 2)
        assert codes(server).get("inference_failed") is None


def test_replicas_are_added_where_requests_wait(tmp_path: Path) -> None:
    config = tmp_path / "slow.json"
    config.write_text('{"milliseconds": 200}')
    options = (*WHO, "--policy-config", str(config), "--replicas", "1-2")
    with serving(tmp_path, *options) as server, asking(server, 12):
        until(lambda: len(processes(server)) == 2, 240)


def test_more_than_the_cluster_has_is_refused(tmp_path: Path) -> None:
    finished = run(*WHO, "--replicas", "2", "--gpus-per-replica", "8", "--port", "0")
    assert finished.returncode == 2, finished.stderr
    assert "error [does_not_fit]" in finished.stderr
    assert "2 replicas of 8 GPU need 16, the cluster has" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_a_replica_that_cannot_be_built_ends_the_command_with_its_reason(tmp_path: Path) -> None:
    config = tmp_path / "wrong.json"
    config.write_text('{"seconds": 1}')
    finished = run(*WHO, "--policy-config", str(config), "--replicas", "1", "--port", "0")
    assert finished.returncode == 2, finished.stderr
    assert "error [config]: no replica could be started" in finished.stderr
    assert "seconds" in finished.stderr


@contextmanager
def asking(server: ReplicaServer, count: int) -> Iterator[None]:
    stop = threading.Event()

    def ask() -> None:
        with PolicyClient(server.url, retry_for=60) as policy:
            while not stop.is_set():
                policy.infer(observe(0))

    threads = [threading.Thread(target=ask) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)


def until(holds: Callable[[], bool], seconds: float = 180.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(1.0)
