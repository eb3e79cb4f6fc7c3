"""Start ``reflexarc train`` as real processes, one or several that share a run; no test file."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

MEASURED = ("samples_per_second", "time/", "memory/")
"""Values of a line of metrics that differ from run to run."""


def start(
    recipe: str | Path,
    output: Path,
    *extra: str,
    world: int = 1,
    largest_file: int | None = None,
) -> list[subprocess.Popen]:
    """The processes of one run; what they print goes to ``<output>_<rank>.txt``.

    With ``largest_file`` the system refuses to write any file beyond so many bytes.
    """

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(world):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if world > 1:
            environment |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        with printed(output, rank).open("a") as text:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "reflexarc.cli", "train", str(recipe),
                     "--output", str(output), "--device", "cpu", "--threads", "1",
                     "--feature-cache", str(output.parent / "cache"), *extra],
                    stdout=text, stderr=subprocess.STDOUT, env=environment,
                )
            )  # fmt: skip
        if largest_file is not None:
            resource.prlimit(processes[-1].pid, resource.RLIMIT_FSIZE, (largest_file, -1))
    return processes


def printed(output: Path, rank: int) -> Path:
    return output.with_name(f"{output.name}_{rank}.txt")


def finish(processes: Sequence[subprocess.Popen], output: Path, *, status: int = 0) -> None:
    """Wait for the processes; each must end with ``status``."""
    try:
        for rank, process in enumerate(processes):
            ended = process.wait(timeout=600)
            assert ended == status, f"rank {rank}: {ended}\n{printed(output, rank).read_text()}"
    finally:
        for process in processes:
            process.kill()


def wait_for_step(output: Path, step: int, processes: Sequence[subprocess.Popen]) -> None:
    """Until the run has reported ``step`` or a later one."""
    deadline = time.monotonic() + 600
    while not any(line["step"] >= step for line in whole_lines(output)):
        for rank, process in enumerate(processes):
            assert process.poll() is None, printed(output, rank).read_text()
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.005)


def whole_lines(output: Path) -> list[dict[str, Any]]:
    """Lines of ``metrics.jsonl`` but one that is still being written."""
    path = output / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def metrics(output: Path) -> list[dict[str, Any]]:
    """Lines of metrics without what is measured by a clock."""
    return [
        {name: value for name, value in line.items() if not name.startswith(MEASURED)}
        for line in whole_lines(output)
    ]


def assert_close_metrics(one: Path, two: Path) -> None:
    """The same lines of metrics, their numbers equal but for rounding."""
    for first, second in zip(metrics(one), metrics(two), strict=True):
        assert first.pop("kind") == second.pop("kind")
        assert first == pytest.approx(second, rel=1e-4, abs=1e-5)


def final_tensors(output: Path) -> dict[str, torch.Tensor]:
    """Everything in ``last``: served weights, raw weights, moments, averages."""
    last = output / (output / "last").read_text().strip()
    return {
        **load_file(last / "model.safetensors"),
        **load_file(last / "training_state" / "tensors.safetensors"),
    }


def largest_difference(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    assert one.keys() == two.keys()
    return max((one[name].double() - two[name].double()).abs().max().item() for name in one)
