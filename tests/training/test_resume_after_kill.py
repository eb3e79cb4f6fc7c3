"""Runs that are killed at random moments, stopped by a scheduler or shared otherwise go on exactly.

Real processes; what they compute is compared to the last bit with a run that nobody disturbed.
"""

from __future__ import annotations

import random
import signal
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

STEPS = 120


@pytest.fixture
def recipe(tmp_path: Path, demonstrations: Path, recipe_in_two_stages: Path) -> Path:
    """The first stage of the recipe in two: temporal JEPA, a target network, averaged weights."""
    values = yaml.safe_load(recipe_in_two_stages.read_text())
    for stage in values["stages"]:
        stage["training"] |= {
            "steps": STEPS, "log_every": 3, "checkpoint_every": 7, "validate_every": 25,
        }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def set_options(**options: object) -> list[str]:
    return [part for k, v in options.items() for part in ("--set", f"training.{k}={v}")]


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_steps_a_run_ends_with_the_same_bits(
    recipe: Path, tmp_path: Path, world: int, seed: int
) -> None:
    """Losses, weights, averages, moments and target; with other loader workers each time."""
    chosen = random.Random(seed)
    options = ["--stage", "1"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(recipe, whole, *options, world=world), whole)
    for kill_at in sorted(chosen.sample(range(3, STEPS - 6), 3)):
        workers = set_options(loader_workers=chosen.choice([0, 1, 3]))
        processes = start(recipe, killed, *options, "--resume", *workers, world=world)
        wait_for_step(killed, kill_at, processes)
        for process in processes:
            process.kill()
        finish(processes, killed, status=-signal.SIGKILL)
    finish(start(recipe, killed, *options, "--resume", world=world), killed)
    assert metrics(killed) == metrics(whole)
    assert len(metrics(whole)) > STEPS / 3
    assert largest_difference(final_tensors(killed), final_tensors(whole)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_process_stops_all_after_the_same_step(
    recipe: Path, tmp_path: Path, number: signal.Signals
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    finish(start(recipe, whole, "--stage", "1", world=2), whole)
    processes = start(recipe, stopped, "--stage", "1", world=2)
    wait_for_step(stopped, 10, processes)
    processes[1].send_signal(number)
    finish(processes, stopped, status=128 + number)
    assert number.name in printed(stopped, 0).read_text()
    assert metrics(stopped)[-1]["step"] < STEPS
    finish(start(recipe, stopped, "--stage", "1", "--resume", world=2), stopped)
    assert metrics(stopped) == metrics(whole)
    assert largest_difference(final_tensors(stopped), final_tensors(whole)) == 0


@pytest.mark.slow
def test_sharding_equals_ddp_and_a_run_may_change_its_engine(recipe: Path, tmp_path: Path) -> None:
    """FSDP2 killed halfway, then FSDP2 again, ZeRO-2, DDP, or one process: to 1e-5 of DDP."""
    options = ["--stage", "1", *set_options(steps=40)]
    ddp = tmp_path / "ddp"
    finish(start(recipe, ddp, *options, "--engine", "ddp", world=2), ddp)
    for name, then in (("fsdp2", 2), ("zero2", 2), ("ddp", 2), ("auto", 1)):
        output = tmp_path / f"{name}_of_{then}"
        processes = start(recipe, output, *options, "--engine", "fsdp2", world=2)
        wait_for_step(output, 9, processes)
        for process in processes:
            process.kill()
        finish(processes, output, status=-signal.SIGKILL)
        again = [*options, "--engine", name, "--resume"]
        finish(start(recipe, output, *again, world=then), output)
        assert largest_difference(final_tensors(output), final_tensors(ddp)) <= 1e-5
        assert_close_metrics(output, ddp)


@pytest.mark.slow
def test_three_processes_and_passes_share_a_batch_that_does_not_divide(
    recipe: Path, tmp_path: Path
) -> None:
    """Batches of 8 and a last one of 4 over 3 processes: as one process computes them."""
    options = ["--stage", "2", "--from-scratch", *set_options(steps=12)]
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    finish(start(recipe, alone, *options), alone)
    finish(start(recipe, shared, *options, world=3), shared)
    assert largest_difference(final_tensors(shared), final_tensors(alone)) <= 1e-5
