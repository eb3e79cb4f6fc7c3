"""Two replicas on Ray Serve behind one port: sticky sessions, and what happens when one dies."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

pytest.importorskip("ray")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for the package `benchmarks`

from benchmarks.replica_policies import process_of
from replica_server import ReplicaServer, observe, run, serving

from reflexarc.client import HttpPolicyClient, PolicyClient, RecedingHorizonExecutor
from reflexarc.contract import HistoryRow
from reflexarc.contract.errors import HistoryMissingError

REMEMBERS = ("--policy", "benchmarks.replica_policies:Remembers")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReplicaServer]:
    with serving(tmp_path_factory.mktemp("replicas"), *REMEMBERS, "--replicas", "2") as server:
        yield server


def whole_window(step: int) -> tuple[HistoryRow, ...]:
    return tuple(HistoryRow(past, observe(past).state) for past in range(max(0, step - 3), step))


def test_sessions_are_spread_evenly_and_each_stays_where_its_history_is(
    server: ReplicaServer,
) -> None:
    with PolicyClient(server.url) as policy:
        where: dict[str, set[int]] = {}
        for step in range(6):  # nothing is sent twice: another replica would lack the rows before
            for session in ("one", "two", "three", "four"):
                chunk = policy.infer(observe(step, session_id=session))
                where.setdefault(session, set()).add(process_of(chunk))
                assert chunk.session_id == session
    assert all(len(processes) == 1 for processes in where.values())
    counts = sorted(map(str, where.values()))
    assert len(set(counts)) == 2
    assert all(counts.count(process) == 2 for process in counts)
    assert str(server.process.pid) not in {str(pid) for pids in where.values() for pid in pids}


def test_an_http_session_is_routed_by_its_id_whatever_the_connection(server: ReplicaServer) -> None:
    url = server.url.replace("ws://", "http://")
    processes = set()
    for step in range(5):
        with HttpPolicyClient(url) as policy:
            processes.add(process_of(policy.infer(observe(step, session_id="over-http"))))
    assert len(processes) == 1


def test_a_websockets_own_session_stays_in_one_replica(server: ReplicaServer) -> None:
    with PolicyClient(server.url) as policy:
        answers = [policy.infer(observe(step)) for step in range(6)]
    assert len({process_of(answer) for answer in answers}) == 1
    # The window's sum: what the replica remembered, divided by 1000.
    assert [round(float(answer.actions[1, 0]) * 1000) for answer in answers] == [
        sum(range(max(0, step - 3), step + 1)) for step in range(6)
    ]
    assert answers[0].timing["forward_ms"] > 0
    assert answers[0].timing["batch_size"] == 1


def test_an_ended_session_is_forgotten_by_its_replica(server: ReplicaServer) -> None:
    http = server.url.replace("ws://", "http://")
    with PolicyClient(server.url) as policy:
        for step in range(3):
            policy.infer(observe(step, session_id="ends"))
        assert httpx.delete(f"{http}/v1/sessions/ends", timeout=30).json() == {"ended": True}
        assert httpx.delete(f"{http}/v1/sessions/never-asked", timeout=30).status_code == 404
        with pytest.raises(HistoryMissingError):
            policy.infer(observe(3, session_id="ends"))


def test_a_killed_replica_is_told_by_name_and_its_sessions_go_on_elsewhere(
    server: ReplicaServer,
) -> None:
    with PolicyClient(server.url, retry_for=60) as policy:
        first = process_of(policy.infer(observe(0, session_id="bereft")))
        policy.infer(observe(1, session_id="bereft"))
        os.kill(first, signal.SIGKILL)
        with pytest.raises(HistoryMissingError, match="states of steps"):
            for step in range(2, 200):  # until the kill is noticed
                policy.infer(observe(step, session_id="bereft"))
        chunk = policy.infer(observe(3, session_id="bereft", history=whole_window(3)))
        assert process_of(chunk) != first
        assert round(float(chunk.actions[1, 0]) * 1000) == 0 + 1 + 2 + 3


def test_an_executors_episode_goes_through_a_kill_and_sees_the_same_window(
    server: ReplicaServer,
) -> None:
    with PolicyClient(server.url, retry_for=60) as policy:
        pid = process_of(policy.infer(observe(0)))
        executor = RecedingHorizonExecutor(policy, replan_steps=2)
        executed = []
        for step in range(12):
            if step == 6:
                os.kill(pid, signal.SIGKILL)
            executed.append(executor.next_action(lambda step=step: observe(step)))  # type: ignore[misc]
    # Every second action says the sum of the states that its decision saw: at 0, 2, 4, ...
    sums = [round(float(action[0]) * 1000) for action in executed[1::2]]
    assert sums == [sum(range(max(0, step - 3), step + 1)) for step in range(0, 12, 2)]


def test_the_port_tells_what_a_single_process_tells(server: ReplicaServer) -> None:
    url = server.url.replace("ws://", "http://")
    metrics = httpx.get(f"{url}/metrics").text
    assert 'reflexarc_phase{phase="ready"} 1.0' in metrics
    assert 'reflexarc_requests_total{code="ok",dialect="native"}' in metrics
    assert 'code="inference_failed"' not in metrics
    assert httpx.get(f"{url}/readyz").json() == {"phase": "ready"}
    assert httpx.get(f"{url}/v1/contract").json()["contract"]["history"]["states"] == 4


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--ray", "127.0.0.1:1"), "cluster_unavailable", "no Ray cluster answers"),
        (("--ray", "127.0.0.1:port"), "cluster_unavailable", "no Ray cluster answers"),
        (("--replicas", "none"), "config", "--replicas"),
        (("--replicas", "2", "--device", "cuda:1"), "config", "Ray gives each"),
        (("--replicas", "2", "--device", "cuda", "--gpus-per-replica", "0"), "config", "--gpus"),
        (("--replicas", "2", "--gpus-per-replica", "1.5"), "config", "a fraction of one GPU"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    options: tuple[str, ...], code: str, said: str
) -> None:
    finished = run(*REMEMBERS, *options, "--port", "0")
    assert finished.returncode == 2, finished.stderr
    assert f"error [{code}]" in finished.stderr
    assert said in finished.stderr
    assert "Traceback" not in finished.stderr


def test_a_port_in_use_is_refused_before_a_cluster_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        finished = run(*REMEMBERS, "--replicas", "2", "--port", str(port))
    assert finished.returncode == 2
    assert f"port {port} on 127.0.0.1 cannot be opened" in finished.stderr
    assert "ray" not in finished.stderr.lower()


def test_nothing_of_ray_is_imported_without_replicas() -> None:
    code = (
        "import sys; import reflexarc.server, reflexarc.server.service, reflexarc.cli.main;"
        "import reflexarc.server.replicas.source, reflexarc.server.replicas.forwarder;"
        "sys.exit('ray' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
