"""DeepSpeed's ZeRO-2 on two processes trains as DDP does, resumes exactly, changes its engine.

Real processes over gloo; runs where DeepSpeed is installed (pip install 'reflexarc[deepspeed]').
"""

from __future__ import annotations

import json
import signal
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

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

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the package deepspeed"),
]
STEPS = 40
OPTIONS = ["--stage", "1", "--set", "training.accumulate=2"]


@pytest.fixture
def recipe(tmp_path: Path, recipe_in_two_stages: Path) -> Path:
    values = yaml.safe_load(recipe_in_two_stages.read_text())
    for stage in values["stages"]:
        stage["training"] |= {
            "steps": STEPS, "log_every": 3, "checkpoint_every": 7, "validate_every": 25,
        }  # fmt: skip
        stage["optimizer"] = {"gradient_clip": 0.5, "learning_rate": 1e-3}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_it_equals_ddp_resumes_to_the_bit_and_hands_over(recipe: Path, tmp_path: Path) -> None:
    """Clipped gradients and their norms, two passes a step, averages, a target network."""
    ddp, whole, killed = tmp_path / "ddp", tmp_path / "whole", tmp_path / "killed"
    finish(start(recipe, ddp, *OPTIONS, "--engine", "ddp", world=2), ddp)
    deepspeed = [*OPTIONS, "--engine", "deepspeed"]
    finish(start(recipe, whole, *deepspeed, world=2), whole)
    assert largest_difference(final_tensors(whole), final_tensors(ddp)) <= 1e-5
    assert_close_metrics(whole, ddp)

    processes = start(recipe, killed, *deepspeed, world=2)
    wait_for_step(killed, 16, processes)
    for process in processes:
        process.kill()
    finish(processes, killed, status=-signal.SIGKILL)
    processes = start(recipe, killed, *deepspeed, "--resume", world=2)
    wait_for_step(killed, 27, processes)
    processes[1].send_signal(signal.SIGTERM)
    finish(processes, killed, status=128 + signal.SIGTERM)
    assert "SIGTERM" in printed(killed, 0).read_text()
    finish(start(recipe, killed, *deepspeed, "--resume", world=2), killed)
    assert metrics(killed) == metrics(whole)
    assert largest_difference(final_tensors(killed), final_tensors(whole)) == 0


def test_a_run_goes_on_under_another_engine_or_alone(recipe: Path, tmp_path: Path) -> None:
    ddp = tmp_path / "ddp"
    finish(start(recipe, ddp, *OPTIONS, "--engine", "ddp", world=2), ddp)
    for first, second, world in (("deepspeed", "fsdp2", 2), ("fsdp2", "deepspeed", 2),
                                 ("deepspeed", "auto", 1)):  # fmt: skip
        output = tmp_path / f"{first}_{second}"
        processes = start(recipe, output, *OPTIONS, "--engine", first, world=2)
        wait_for_step(output, 9, processes)
        for process in processes:
            process.kill()
        finish(processes, output, status=-signal.SIGKILL)
        again = [*OPTIONS, "--engine", second, "--resume"]
        finish(start(recipe, output, *again, world=world), output)
        assert largest_difference(final_tensors(output), final_tensors(ddp)) <= 1e-5
        assert_close_metrics(output, ddp)


def test_bfloat16_and_a_configuration_of_ones_own(recipe: Path, tmp_path: Path) -> None:
    """Products are rounded as under DDP; the file's buckets are used, the recipe does the rest."""
    packaged = resources.files("reflexarc.training.distributed") / "deepspeed_zero2.json"
    values = json.loads(packaged.read_text())
    values["zero_optimization"]["reduce_bucket_size"] = 1000
    config = tmp_path / "zero2.json"
    config.write_text(json.dumps(values))
    options = ["--stage", "1", "--set", "training.precision=bf16", "--set", "training.steps=12"]
    ddp, deepspeed = tmp_path / "ddp", tmp_path / "deepspeed"
    finish(start(recipe, ddp, *options, "--engine", "ddp", world=2), ddp)
    own = ["--engine", "deepspeed", "--deepspeed-config", str(config)]
    finish(start(recipe, deepspeed, *options, *own, world=2), deepspeed)
    assert largest_difference(final_tensors(deepspeed), final_tensors(ddp)) <= 1e-4
    assert len(metrics(deepspeed)) == len(metrics(ddp))
