"""Two processes that share a batch train as one process does, padding rows and VICReg included."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

Runs = dict[str, dict[str, Tensor]]
SCRIPT = Path(__file__).with_name("distributed_steps.py")
OBJECTIVES = ("flow_matching", "temporal_jepa", "masked_jepa")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What three processes wrote: one alone, and two together over gloo."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(world), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, world in ((0, 1), (0, 2), (1, 2))
    ]
    try:
        outputs = [process.communicate(timeout=900)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return folder


@pytest.fixture(params=OBJECTIVES)
def runs(request: pytest.FixtureRequest, folder: Path) -> Runs:
    return {
        name: load_file(folder / f"{request.param}_{name}.safetensors")
        for name in ("0_of_1", "0_of_2", "1_of_2")
    }


def largest_difference(one: dict[str, Tensor], two: dict[str, Tensor], part: str) -> float:
    names = [name for name in one if name.startswith(f"{part}/")]
    assert names and one.keys() == two.keys()
    return max((one[name].double() - two[name].double()).abs().max().item() for name in names)


def test_losses_and_gradients_equal_those_of_one_process(runs: Runs) -> None:
    """Every rank reports the global losses, and gradients are as large as they were alone."""
    alone = runs["0_of_1"]
    largest = max(v.abs().max() for name, v in alone.items() if name.startswith("gradient/"))
    assert largest > 0.05
    for rank in ("0_of_2", "1_of_2"):
        assert largest_difference(alone, runs[rank], "loss") <= 1e-4
        assert largest_difference(alone, runs[rank], "gradient") <= 1e-5


def test_weights_equal_those_of_one_process(runs: Runs) -> None:
    """Three AdamW steps with clipping; the target of temporal JEPA is among the weights."""
    alone = runs["0_of_1"]
    for rank in ("0_of_2", "1_of_2"):
        assert largest_difference(alone, runs[rank], "weight") <= 1e-4
    last = {n: v for n, v in alone.items() if n.startswith("weight/2/")}
    moved = [n for n, v in last.items() if not torch.equal(v, alone[n.replace("/2/", "/0/")])]
    assert len(moved) > len(last) // 3


def test_both_ranks_hold_the_same_weights_and_target_to_the_last_bit(runs: Runs) -> None:
    assert largest_difference(runs["0_of_2"], runs["1_of_2"], "weight") == 0


@pytest.mark.parametrize("name", ["temporal_jepa", "masked_jepa"])
def test_the_target_moved(folder: Path, name: str) -> None:
    seen = load_file(folder / f"{name}_0_of_2.safetensors")
    names = [n for n in seen if n.startswith("weight/1/objective.target.")]
    assert names
    assert any(not torch.equal(seen[n], seen[n.replace("/1/", "/0/")]) for n in names)
