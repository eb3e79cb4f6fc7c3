"""What a run leaves in its folder: its own name, its log, how it ended; stopping a real one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from reflexarc.cli.train import register
from reflexarc.contract.errors import ConfigError
from reflexarc.training.errors import TrainingDivergedError
from reflexarc.training.recipe_files import load_recipe
from reflexarc.training.run_folder import RunFolder
from reflexarc.training.runs.asking_to_stop import stop_run
from reflexarc.training.runs.overview import read_overview
from reflexarc.training.session import plan

TRAIN = ("statevla_tiny", "--threads", "1")


@pytest.fixture
def application() -> typer.Typer:
    app = typer.Typer()
    register(app)
    app.command("other")(lambda: None)
    return app


def test_a_run_without_output_names_its_folder_and_logs_itself(
    application: typer.Typer,
    demonstrations: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["train", *TRAIN, "--data", str(demonstrations), "--set", "training.seed=3"]
    kept = ["--set", "training.keep_best=2", "--set", "training.epochs=3"]
    result = CliRunner().invoke(application, [*arguments, *kept], catch_exceptions=False)
    assert result.exit_code == 0
    (folder,) = (tmp_path / "runs").glob("statevla_tiny_s3_*Z")
    run = RunFolder(folder)
    log = run.log.read_text().splitlines()
    assert "statevla_tiny, starting of 15" in log[0]
    assert "complete at step 15" in log[-1]
    assert sum("validation after step" in line for line in log) == 3
    assert (run.path / "tensorboard").is_dir()
    overview = read_overview(folder)
    assert (overview.state, overview.step, overview.total_steps) == ("complete", 15, 15)
    ranking = json.loads((run.checkpoints / "ranking.json").read_text())
    assert len(ranking) == 2
    assert {int(step) for step in ranking} | {15} == set(run.checkpoint_folders())
    assert overview.best_value == min(ranking.values())
    again = CliRunner().invoke(application, [*arguments, "--resume"])
    assert isinstance(again.exception, ConfigError)
    assert "--resume needs --output" in str(again.exception)
    assert folder.name in str(again.exception)


def test_the_disk_that_kept_checkpoints_need_is_estimated(
    demonstrations: Path, tmp_path: Path
) -> None:
    def needed(*overrides: str) -> int:
        paths = f"data.paths=['{demonstrations}']"
        recipe = load_recipe("statevla_tiny", [paths, "training.epochs=6", *overrides])
        return plan(recipe, tmp_path / "run", device=torch.device("cpu")).estimate.disk_needed

    one = needed("training.keep_best=2") - needed()
    assert one > 0
    assert needed("training.keep_every=2") - needed() == 3 * one


def test_the_error_that_ends_a_run_stands_in_its_log(
    application: typer.Typer, demonstrations: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    arguments = ["train", *TRAIN, "--data", str(demonstrations), "--output", str(output)]
    wild = ["--set", "optimizer.learning_rate=1e30", "--set", "optimizer.gradient_clip=null"]
    result = CliRunner().invoke(application, [*arguments, *wild])
    assert isinstance(result.exception, TrainingDivergedError)
    assert "ended by TrainingDivergedError: not finite" in RunFolder(output).log.read_text()
    overview = read_overview(output)
    assert overview.state == "died" and "TrainingDivergedError" in (overview.reason or "")


@pytest.mark.slow
def test_a_run_that_trains_is_stopped_from_outside(demonstrations: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "reflexarc.cli", "train", *TRAIN, "--output", str(output),
         "--data", str(demonstrations), "--set", "training.epochs=null",
         "--set", "training.steps=1000000", "--set", "training.validate_every=1000000",
         "--set", "training.checkpoint_every=1000000", "--set", "training.log_every=1"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 300
        while not (output / "metrics.jsonl").is_file():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        assert read_overview(output).state == "running"
        said = stop_run(output, patience=120)
        assert process.wait(60) == 128 + 15
        step = read_overview(output).step
        assert f"step_{step:08d}" in said and "--resume" in said
        assert read_overview(output).state == "stopped"
        assert f"SIGTERM at step {step}" in RunFolder(output).log.read_text().splitlines()[-1]
    finally:
        process.kill()
        process.wait()
