"""``reflexarc train`` at the command line, and runs that are stopped or killed from outside."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import pytest
import torch
import typer
from click.testing import Result
from safetensors.torch import load_file
from typer.testing import CliRunner

from reflexarc.cli.train import register
from reflexarc.contract.errors import ConfigError, DatasetError
from reflexarc.training.run_folder import exclusive

PROGRAM = """
import sys, typer
from reflexarc.cli.train import register
app = typer.Typer(); register(app)
app.command("other")(lambda: None)
app()
"""


@pytest.fixture
def application() -> typer.Typer:
    app = typer.Typer()
    register(app)
    app.command("other")(lambda: None)  # with one command alone, typer drops its name
    return app


def test_train_then_dry_run_then_features_hit(
    application: typer.Typer, demonstrations: Path, tmp_path: Path
) -> None:
    output = str(tmp_path / "run")
    arguments = ["train", "statevla_tiny", "--output", output, "--data", str(demonstrations)]
    arguments += ["--threads", "1"]
    dry = CliRunner().invoke(application, [*arguments, "--dry-run"], catch_exceptions=False)
    assert dry.exit_code == 0
    for row in ("steps per epoch", "trainable parameters", "estimated memory", "disk free"):
        assert row in dry.stdout
    assert not Path(output).exists()
    result = CliRunner().invoke(application, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "training complete" in result.stdout
    again = CliRunner().invoke(
        application, [*arguments, "--fresh", "--set", "training.seed=3"], catch_exceptions=False
    )
    assert again.exit_code == 0
    assert "cached: hit" in again.stdout


def test_errors_leave_the_command_named(application: typer.Typer, tmp_path: Path) -> None:
    arguments = ["train", "statevla_tiny", "--output", str(tmp_path / "run"), "--threads", "1"]
    for extra in (["--set", "training.sed=1"], ["--resume", "--fresh"]):
        result = CliRunner().invoke(application, [*arguments, *extra])
        assert isinstance(result.exception, ConfigError)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_hides_its_alignment_trains_once_it_is_said(
    application: typer.Typer, demonstrations: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(demonstrations, tmp_path / "data"))
    for path in data.glob("*.hdf5"):
        with h5py.File(path, "r+") as file:
            del file["data"].attrs["alignment"], file["data"].attrs["tag"]
            for demo in file["data"].values():
                demo.attrs.pop("num_samples", None)
    arguments = ["train", "statevla_tiny", "--output", str(tmp_path / "run"), "--data", str(data)]
    arguments += ["--threads", "1", "--dry-run"]
    refused = CliRunner().invoke(application, arguments)
    assert isinstance(refused.exception, DatasetError) and "say which" in str(refused.exception)
    said = [*arguments, "--set", "data.alignment=before_action"]
    assert CliRunner().invoke(application, said, catch_exceptions=False).exit_code == 0


def start(output: Path, data: Path, *extra: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "train", "statevla_tiny", "--output", str(output),
         "--data", str(data), "--threads", "1", "--set", "training.epochs=null",
         "--set", "training.steps=400", "--set", "training.checkpoint_every=20",
         "--set", "training.validate_every=50", *extra],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def wait_for(path: Path, process: subprocess.Popen[str], contents: str = "") -> None:
    deadline = time.monotonic() + 600
    while not (path.is_file() and contents in path.read_text()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(demonstrations: Path, tmp_path: Path) -> None:
    whole = start(tmp_path / "whole", demonstrations)
    assert whole.wait(300) == 0
    killed = start(tmp_path / "killed", demonstrations)
    wait_for(tmp_path / "killed" / "last", killed, "step_0000006")
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    resumed = start(tmp_path / "killed", demonstrations, "--resume")
    assert resumed.wait(300) == 0

    def last(output: Path) -> dict[str, torch.Tensor]:
        return load_file(output / (output / "last").read_text().strip() / "model.safetensors")

    one, two = last(tmp_path / "whole"), last(tmp_path / "killed")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_last_and_says_how_to_resume(
    demonstrations: Path, tmp_path: Path, number: signal.Signals
) -> None:
    output = tmp_path / "run"
    process = start(output, demonstrations, "--set", "training.checkpoint_every=100000")
    wait_for(output / "metrics.jsonl", process, '"step": 40')
    process.send_signal(number)
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 128 + number
    assert "--resume" in text and number.name in text
    saved = output / (output / "last").read_text().strip()
    assert (saved / "training_state" / "progress.json").is_file()
    assert not (output / "summary.json").exists()
    again = start(output, demonstrations, "--set", "training.checkpoint_every=100000", "--resume")
    text, _ = again.communicate(timeout=600)
    assert again.returncode == 0
    assert "400 of 400" in text


def test_a_second_stage_from_the_first_at_the_command_line(
    application: typer.Typer, recipe_in_two_stages: Path, tmp_path: Path
) -> None:
    def train(output: str, *extra: str) -> Result:
        arguments = ["train", str(recipe_in_two_stages), "--output", str(tmp_path / output)]
        return CliRunner().invoke(application, [*arguments, "--threads", "1", *extra])

    assert "--stage 1 --output DIR" in str(train("two", "--stage", "2").exception)
    assert "stage 2 of 2 (policy), from no weights yet" in squeezed(
        train("two", "--stage", "2", "--dry-run").stdout
    )
    first = train("one", "--stage", "1")
    assert first.exit_code == 0, first.exception
    assert "in memory" in first.stdout
    second = train("two", "--stage", "2", "--init-from", str(tmp_path / "one"))
    assert second.exit_code == 0, second.exception
    assert "step 6 of stage 1" in squeezed(second.stdout) and "frozen modules" in second.stdout
    assert (tmp_path / "two" / "summary.json").is_file()
    with exclusive(tmp_path / "two"):
        locked = train("two", "--stage", "2", "--resume")
    assert "another 'reflexarc train'" in str(locked.exception)


def squeezed(text: str) -> str:
    """Without the frames of a table and its line breaks."""
    return " ".join(text.replace("│", " ").split())
