"""Runs that torchrun and ``accelerate launch`` start: one machine, two nodes, signals, full disks.

Real launchers and processes, two at a time, on CPUs over gloo.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import yaml

from .train_processes import (
    assert_close_metrics,
    final_tensors,
    finish,
    largest_difference,
    metrics,
    printed,
    start,
    wait_for_step,
)

pytestmark = pytest.mark.slow
TORCHRUN = ["torch.distributed.run"]
ACCELERATE = ["accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
FSDP = ["--use_fsdp", "--fsdp_version", "2"]
STEPS = 24


@pytest.fixture
def recipe(tmp_path: Path, recipe_in_two_stages: Path) -> Path:
    values = yaml.safe_load(recipe_in_two_stages.read_text())
    for stage in values["stages"]:
        stage["training"] |= {
            "steps": STEPS, "log_every": 2, "checkpoint_every": 5, "validate_every": 12,
        }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def launch(
    launcher: Sequence[str], recipe: Path, output: Path, *extra: str, node: int = 0
) -> subprocess.Popen[bytes]:
    """A launcher in a session of its own; what it and its processes print goes to a file."""
    with printed(output, node).open("a") as text:
        return subprocess.Popen(
            [sys.executable, "-m", *launcher, "-m", "reflexarc.cli", "train", str(recipe),
             "--stage", "1", "--output", str(output), "--device", "cpu", "--threads", "1",
             "--feature-cache", str(output.parent / "cache"), *extra],
            stdout=text, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def run(launcher: Sequence[str], recipe: Path, output: Path, *extra: str) -> str:
    """Launch and wait; returns what was printed."""
    finish([launch(launcher, recipe, output, *extra)], output)
    return printed(output, 0).read_text()


def kill_all(launcher: subprocess.Popen[bytes]) -> None:
    """A machine that goes: the launcher and every process that it started."""
    processes = [*psutil.Process(launcher.pid).children(recursive=True), launcher]
    for process in processes:
        process.kill()
    launcher.wait()


def test_accelerate_launches_what_torchrun_does(recipe: Path, tmp_path: Path) -> None:
    """Also what its own settings ask for; a setting other than the recipe's is refused."""
    torchrun, multi, fsdp = (tmp_path / name for name in ("torchrun", "multi", "fsdp"))
    run([*TORCHRUN, "--standalone", "--nproc-per-node", "2"], recipe, torchrun)
    port = ["--main_process_port", str(free_port())]
    told = run([*ACCELERATE, *port, "--multi_gpu"], recipe, multi)
    assert "2 processes, engine ddp" in told
    assert metrics(multi) == metrics(torchrun)
    assert largest_difference(final_tensors(multi), final_tensors(torchrun)) == 0
    told = run([*ACCELERATE, *port, *FSDP], recipe, fsdp)
    assert "2 processes, engine fsdp2" in told
    assert largest_difference(final_tensors(fsdp), final_tensors(torchrun)) <= 1e-5
    assert_close_metrics(fsdp, torchrun)

    refused = tmp_path / "refused"
    launcher = [*ACCELERATE, *port, *FSDP, "--mixed_precision", "bf16"]
    assert launch(launcher, recipe, refused).wait(timeout=600) != 0
    assert "ACCELERATE_MIXED_PRECISION, which is bf16" in printed(refused, 0).read_text()
    assert not refused.exists()


def nodes(recipe: Path, output: Path, *extra: str) -> list[subprocess.Popen[bytes]]:
    """Two launchers that meet at one address, as on two machines; a process each."""
    meet = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d",
            "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "run"]  # fmt: skip
    return [
        launch([*TORCHRUN, *meet, "--node-rank", str(node)], recipe, output, *extra, node=node)
        for node in (0, 1)
    ]


def test_two_nodes_one_of_which_dies(recipe: Path, tmp_path: Path) -> None:
    """The other ends and says why; the run goes on with both, and ends with the same bits."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(nodes(recipe, whole), whole)
    started = nodes(recipe, broken)
    wait_for_step(broken, 12, started)
    kill_all(started[1])
    began = time.monotonic()
    assert started[0].wait(timeout=300) != 0
    assert time.monotonic() - began < 120
    assert "error [process_lost]" in printed(broken, 0).read_text()
    finish(nodes(recipe, broken, "--resume"), broken)
    assert metrics(broken) == metrics(whole)
    assert largest_difference(final_tensors(broken), final_tensors(whole)) == 0


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2"])
def test_a_signal_to_one_process_saves_one_checkpoint_under_every_engine(
    recipe: Path, tmp_path: Path, engine: str
) -> None:
    options = ["--stage", "1", "--engine", engine]
    stopped = tmp_path / "stopped"
    processes = start(recipe, stopped, *options, world=2)
    wait_for_step(stopped, 8, processes)
    processes[1].send_signal(signal.SIGTERM)
    finish(processes, stopped, status=128 + signal.SIGTERM)
    at = int((stopped / "last").read_text().rpartition("_")[2])
    assert 8 <= at < STEPS
    finish(start(recipe, stopped, *options, "--resume", world=2), stopped)
    whole = tmp_path / "whole"
    finish(start(recipe, whole, *options, world=2), whole)
    assert metrics(stopped) == metrics(whole)
    assert largest_difference(final_tensors(stopped), final_tensors(whole)) == 0


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2"])
def test_a_full_disk_ends_all_processes_and_keeps_the_checkpoint_before(
    recipe: Path, tmp_path: Path, engine: str
) -> None:
    """The first process alone writes; the others must not wait for it for ever."""
    options = ["--stage", "1", "--engine", engine]
    whole, full = tmp_path / "whole", tmp_path / "full"
    finish(start(recipe, whole, *options, world=2), whole)
    processes = start(recipe, full, *options, world=2)
    wait_for_step(full, 6, processes)
    for process in processes:
        process.kill()
        process.wait()
    saved = (full / "last").read_text()
    limit = max(path.stat().st_size for path in full.rglob("*.safetensors")) // 2
    processes = start(recipe, full, *options, "--resume", world=2, largest_file=limit)
    for process in processes:
        assert process.wait(timeout=300) == 2, printed(full, 0).read_text()
    assert "error [process_lost]" in printed(full, 1).read_text()
    told = squeezed(printed(full, 0).read_text())
    assert "error [disk_full]" in told and f"`last` is still {saved.strip()[12:]}" in told
    assert (full / "last").read_text() == saved
    finish(start(recipe, full, *options, "--resume", world=2), full)
    assert metrics(full) == metrics(whole)
    assert largest_difference(final_tensors(full), final_tensors(whole)) == 0


def squeezed(text: str) -> str:
    return " ".join(text.split())
