"""What a masked JEPA cannot train with, at the command line: refused before the first step."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import pytest
import torch
from typer.testing import CliRunner, Result

from reflexarc.cli.main import app
from reflexarc.contract.errors import ReflexarcError
from reflexarc.policy.language import LanguageEmbeddings
from reflexarc.policy.language_table import write_table
from reflexarc.training.runs.overview import read_overview

from .conftest import TASKS, write_task_file

MASKED = (
    "objective={name: masked_jepa, predictor_layers: 1, predictor_width: 16, predictor_d_state: 4}",
    "policy.keypoints={number: 4, hidden: 8, tokens: 2}",  # six tokens of input
    "reporting.tensorboard=false",
)


def train(data: Path, output: Path, *overrides: str, more: tuple[str, ...] = ()) -> Result:
    arguments = ["train", "statevla_tiny", "--data", str(data), "--output", str(output)]
    arguments += ["--threads", "1", *more]
    for override in (*MASKED, *overrides):
        arguments += ["--set", override]
    return CliRunner().invoke(app, arguments)


def refusal(result: Result, output: Path) -> ReflexarcError:
    assert isinstance(result.exception, ReflexarcError), result.output
    assert not output.exists(), "a run was begun"
    return result.exception


@pytest.mark.parametrize(
    ("overrides", "field", "said"),
    [
        (
            ("objective.masking_strategy=random", "objective.mask_ratio=0.05"),
            "objective.mask_ratio",
            "0.05 of 6 tokens leaves nothing hidden; choose one between 0.167 and 0.833",
        ),
        (
            ("objective.masking_strategy=random", "objective.mask_ratio=0.95"),
            "objective.mask_ratio",
            "0.95 of 6 tokens leaves nothing visible",
        ),
        (
            ("objective.masking_strategy=random", "objective.mask_ratio=1.0"),
            "objective.mask_ratio",
            "mask_ratio",
        ),
        (
            ("objective.max_masked_modalities=4",),
            "objective.max_masked_modalities",
            "may leave nothing visible of the 4 modalities language, state, agentview, eye_in_hand",
        ),
        (
            ("objective.mask_probabilities={language: 0, state: 0, agentview: 0, eye_in_hand: 0}",),
            "objective.mask_probabilities",
            "leaves nothing hidden",
        ),
        (
            ("objective.mask_probabilities={language: 0.2, state: 0.2, agentview: 0.5}",),
            "objective.mask_probabilities",
            "says nothing of eye_in_hand",
        ),
    ],
)
def test_masks_that_hide_nothing_or_all(
    overrides: tuple[str, ...], field: str, said: str, demonstrations: Path, tmp_path: Path
) -> None:
    error = refusal(train(demonstrations, tmp_path / "run", *overrides), tmp_path / "run")
    assert said in error.message
    assert error.field is not None and field in error.field


def test_demonstrations_without_one_of_the_modalities(tmp_path: Path) -> None:
    for name, absent in (("camera", "obs/eye_in_hand_rgb"), ("state", "obs/gripper_states")):
        folder = tmp_path / name
        folder.mkdir()
        path = folder / f"{TASKS[0]}_demo.hdf5"
        write_task_file(path, seed=0)
        with h5py.File(path, "r+") as file:
            for demonstration in file["data"].values():
                del demonstration[absent]
        error = refusal(train(folder, tmp_path / "run"), tmp_path / "run")
        assert absent.partition("/")[2] in error.message


def test_a_table_of_another_width(demonstrations: Path, tmp_path: Path) -> None:
    texts = [task.replace("_", " ") for task in TASKS]
    write_table(LanguageEmbeddings(texts, torch.randn(2, 24), "mine"), tmp_path / "table",
                overwrite=False)  # fmt: skip
    settings = (f"language={{table: {tmp_path / 'table'}}}",)
    error = refusal(train(demonstrations, tmp_path / "run", *settings), tmp_path / "run")
    assert "policy.language_dimension is 16" in error.message and "have 24" in error.message


def test_a_state_that_is_not_a_number(tmp_path: Path) -> None:
    for task in TASKS:
        write_task_file(tmp_path / f"{task}_demo.hdf5", seed=0)
    with h5py.File(tmp_path / f"{TASKS[1]}_demo.hdf5", "r+") as file:
        demonstration = next(iter(file["data"].values()))
        demonstration["obs/ee_pos"][3, 1] = float("nan")
    error = refusal(train(tmp_path, tmp_path / "run"), tmp_path / "run")
    assert "obs/ee_pos is nan at row 3" in error.message and TASKS[1] in error.message


def test_weights_that_make_the_scan_not_finite_end_before_a_step(
    demonstrations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NaN reaches the scan: its tokens are named and no checkpoint is written."""
    from reflexarc.training.preparation import Preparation

    monkeypatch.setenv("REFLEXARC_SCAN", "blocked")
    sources = Preparation.sources

    def damaged(preparation: Preparation, *arguments: object) -> object:
        with torch.no_grad():
            for parameter in preparation.policy.get_submodule("representation").parameters():
                parameter.fill_(float("nan"))
        return sources(preparation, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Preparation, "sources", damaged)
    result = train(demonstrations, tmp_path / "run")
    assert isinstance(result.exception, ReflexarcError), result.exception
    assert "not finite" in result.exception.message
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))


def test_a_run_says_which_scan_it_used_and_when_it_changes(
    demonstrations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    monkeypatch.setenv("REFLEXARC_SCAN", "blocked")
    loop = ("training.epochs=null", "training.steps=3", "training.log_every=2")
    assert train(demonstrations, output, *loop).exit_code == 0
    last = output / (output / "last").read_text().strip()
    manifest = json.loads((last / "policy.json").read_text())
    assert manifest["provenance"]["scan"] == "blocked"
    assert "the scan is now" not in train(demonstrations, output, *loop, more=("--resume",)).output

    manifest["provenance"]["scan"] = "native"
    (last / "policy.json").write_text(json.dumps(manifest))
    resumed = train(demonstrations, output, *loop, more=("--resume",))
    said = " ".join(resumed.output.split())
    assert "the scan is now blocked, it was native until here" in said
    assert "REFLEXARC_SCAN=native keeps them" in said


def test_the_list_shows_the_step_at_which_a_run_stands(tmp_path: Path) -> None:
    """One that was stopped between two lines of metrics stands at its checkpoint."""
    run = tmp_path / "run"
    (run / "checkpoints" / "step_00000007").mkdir(parents=True)
    (run / "recipe.yaml").write_text("name: tiny\ntraining: {epochs: 5}\n")
    line = {"kind": "train", "step": 4, "epoch": 0.2, "total": 1.0}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (run / "last").write_text("checkpoints/step_00000007\n")
    found = read_overview(run)
    assert (found.step, found.total_steps) == (7, 100)
    assert found.epoch == pytest.approx(0.35)
