"""reflexarc eval libero --ray: two nodes of a cluster give the table that local workers give."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from reflexarc.server import BackgroundServer, NullPolicy

pytest.importorskip("ray")
ENVIRONMENT = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
EVALUATE = (sys.executable, "-c", "from reflexarc.cli.main import main; main()", "eval", "libero")
OF_THE_CLOCK = ("seconds", "latency_median_ms", "latency_max_ms")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def cluster(folder: Path, cpus: int) -> Iterator[str]:
    """The address of two Ray nodes on this machine, with so many CPUs each."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    size = [f"--num-cpus={cpus}", "--object-store-memory=100000000", "--memory=5000000000"]
    head = ["--head", f"--port={port}", "--include-dashboard=false"]
    head += [f"--ray-client-server-port={free_port()}"]
    nodes: list[subprocess.Popen[bytes]] = []
    log = (folder / "ray.log").open("wb")
    try:
        for role in (head, [f"--address={address}"]):
            command = ["-m", "ray.scripts.scripts", "start", "--block", *role, *size]
            nodes.append(
                subprocess.Popen(
                    [sys.executable, *command],
                    stdout=log,
                    stderr=log,
                    env=ENVIRONMENT,
                    start_new_session=True,
                )
            )
            end = time.monotonic() + 180
            while (folder / "ray.log").read_bytes().count(b"Ray runtime started.") < len(nodes):
                assert time.monotonic() < end, (folder / "ray.log").read_text()
                assert nodes[-1].poll() is None, (folder / "ray.log").read_text()
                time.sleep(0.5)
        yield address
    finally:
        for node in reversed(nodes):
            node.send_signal(signal.SIGTERM)
        for node in nodes:
            try:
                node.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(node.pid, signal.SIGKILL)
        log.close()


def evaluate(url: str, output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    shared = ["--tasks", "0,9", "--states", "40-41", "--baselines", "blank", "--max-steps", "12"]
    return subprocess.run(
        [*EVALUATE, "--server", url, "--output", output, *shared, "--videos", "all", *options],
        capture_output=True,
        text=True,
        timeout=900,
        env=ENVIRONMENT,
        check=False,
    )


def results(output: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in line.items() if k not in OF_THE_CLOCK} for line in lines]
    return sorted(rows, key=lambda row: (row["task"], row["state"], row["arm"]))


@pytest.mark.slow
@pytest.mark.simulator
def test_two_nodes_give_the_table_of_local_workers(tmp_path: Path) -> None:
    with BackgroundServer(NullPolicy) as server, cluster(tmp_path, cpus=1) as address:
        here = evaluate(server.url, tmp_path / "here", "--workers", "2")
        assert here.returncode == 0, here.stderr
        there = evaluate(server.url, tmp_path / "there", "--workers", "2", "--ray", address)
        assert there.returncode == 0, there.stderr
        too_many = evaluate(server.url, tmp_path / "many", "--workers", "3", "--ray", address)
    assert results(tmp_path / "here") == results(tmp_path / "there")
    assert len(results(tmp_path / "there")) == 8
    for folder in ("here", "there"):
        videos = [file.stat().st_size for file in (tmp_path / folder / "videos").glob("*.mp4")]
        assert len(videos) == 8
        assert min(videos) > 1000
    assert too_many.returncode == 2
    assert "error [does_not_fit]: --workers 3: the cluster has room for 2" in too_many.stderr


@pytest.mark.parametrize("address", ["127.0.0.1:1", "no-such-host.invalid:6379"])
def test_a_cluster_that_does_not_answer_is_named(tmp_path: Path, address: str) -> None:
    pytest.importorskip("mujoco")
    finished = evaluate("ws://127.0.0.1:1", tmp_path / "none", "--ray", address)
    assert finished.returncode == 2
    assert "error [cluster_unavailable]" in finished.stderr
    assert address in finished.stderr
    assert "Traceback" not in finished.stderr


def test_more_local_workers_than_a_machine_runs_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("mujoco")
    finished = evaluate("ws://127.0.0.1:1", tmp_path / "none", "--workers", "17")
    assert finished.returncode == 2
    assert "error [config]: --workers 17" in finished.stderr
