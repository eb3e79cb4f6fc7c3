"""What a run reports: the files, a resume without doubled steps, named errors."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import pytest

from reflexarc.contract.errors import ConfigError, MissingExtraError
from reflexarc.training.recipe_files import load_recipe
from reflexarc.training.reporting import open_reporters
from reflexarc.training.run_folder import RunFolder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    return RunFolder(tmp_path)


def report(run: RunFolder, first: int, last: int, *overrides: str) -> None:
    """A process that has done ``first`` steps, trains to ``last``, and is killed."""
    reporters = open_reporters(run, load_recipe("statevla_tiny", overrides), step=first)
    for step in range(first + 1, last + 1):
        reporters.train(step, step / 4, {"total": 1 / step, "learning_rate": 1e-3})
    reporters.validation(last, last / 4, {"action_mae": 0.5})
    reporters.message(f"saved at {last}")


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    """What TensorBoard shows for a tag."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator(str(folder))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def test_a_resumed_run_reports_no_step_twice(run: RunFolder) -> None:
    report(run, 0, 6)
    time.sleep(1.1)  # TensorBoard's files are in order of the second in which they were begun
    report(run, 4, 8)  # killed at 6, its last checkpoint stood at 4
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 9))
    assert lines[0] == {
        "kind": "train", "step": 1, "epoch": 0.25, "total": 1.0, "learning_rate": 1e-3
    }  # fmt: skip
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [8]
    shown = scalars(run.tensorboard, "train/total")
    assert [step for step, _ in shown] == list(range(1, 9))
    assert shown[2][1] == pytest.approx(1 / 3)
    assert scalars(run.tensorboard, "validation/action_mae") == [(8, 0.5)]


def test_the_text_log_keeps_what_happened_and_is_on_disk_at_once(run: RunFolder) -> None:
    report(run, 0, 2)  # nothing was closed
    report(run, 1, 2)
    lines = run.log.read_text().splitlines()
    assert sum("step 2 epoch 0.500 total=0.5 learning_rate=0.001" in line for line in lines) == 2
    assert all(line[4] == "-" and "Z " in line for line in lines)
    assert lines[-1].endswith("saved at 2")


def test_the_recipe_may_do_without_tensorboard(run: RunFolder) -> None:
    report(run, 0, 1, "reporting.tensorboard=false")
    assert not run.tensorboard.exists()


def absent(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Let a package look as if it was not installed."""
    found = importlib.util.find_spec

    def find(name: str, *rest: Any) -> Any:
        return None if name == package else found(name, *rest)

    for module in ("tensorboard_events", "weights_and_biases"):
        monkeypatch.setattr(f"reflexarc.training.reporting.{module}.find_spec", find)


def test_what_is_not_installed_is_named_where_the_recipe_insists(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent(monkeypatch, "wandb")
    with pytest.raises(ConfigError, match="pip install wandb"):
        report(run, 0, 1, "reporting.wandb=true")
    absent(monkeypatch, "tensorboard")
    with pytest.raises(MissingExtraError, match="tensorboard"):
        report(run, 0, 1, "reporting.tensorboard=true")


def test_what_is_not_installed_is_left_out_with_a_line_where_it_is_only_the_default(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent(monkeypatch, "tensorboard")
    report(run, 0, 1)
    assert "pip install tensorboard" in run.log.read_text()
    absent(monkeypatch, "wandb")
    monkeypatch.setenv("WANDB_API_KEY", "set")
    report(run, 0, 1)
    assert "pip install wandb" in run.log.read_text()


def test_weights_and_biases_continues_the_same_run(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for first, last in ((0, 3), (2, 4)):
        recipe = load_recipe("statevla_tiny", ["reporting.wandb=true", "reporting.group=tests"])
        reporters = open_reporters(run, recipe, step=first)
        for step in range(first + 1, last + 1):
            reporters.train(step, step / 4, {"total": 1 / step})
        reporters.close()
    made = [folder.name for folder in (run.path / "wandb").glob("offline-run-*")]
    identity = run.wandb_run_id.read_text().strip()
    assert len(made) == 2 and all(name.endswith(f"-{identity}") for name in made)
