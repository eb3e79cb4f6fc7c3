"""Validation loss against success: whose results, which episodes, what is drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reflexarc.contract.errors import ConfigError
from reflexarc.eval.checkpoint_plot import (
    checkpoint_points,
    markdown,
    rank_correlation,
    validation_values,
    write_checkpoint_plot,
)
from reflexarc.eval.results import EpisodeResult

STEPS = {f"{step:064d}": step for step in (100, 200, 300)}
LOSSES = {100: 0.3, 200: 0.2, 300: 0.1}


def write_results(folder: Path, fingerprint: str, successes: list[bool], state: int = 40) -> Path:
    fields = {
        "suite": "libero_object", "task": 0, "task_name": "t", "instruction": "i",
        "arm": "policy", "seconds": 1.0, "chunks": 1, "held_steps": 0, "latency_median_ms": 1.0,
        "latency_max_ms": 1.0, "seed": 0, "max_steps": 280, "replan_steps": 8, "wait_steps": 10,
        "executor": "receding_horizon", "injected_latency_ms": 0.0, "steps": 9,
        "checkpoint_fingerprint": fingerprint, "contract_sha256": "c",
    }  # fmt: skip
    folder.mkdir()
    lines = [
        EpisodeResult.model_validate(
            {**fields, "state": state + number, "success": success,
             "reason": "success" if success else "timeout"}
        ).model_dump_json()
        for number, success in enumerate(successes)
    ]  # fmt: skip
    (folder / "results.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    outcomes = {300: [True, True, False], 100: [False] * 3, 200: [True, True, True]}
    return [
        write_results(tmp_path / str(step), f"{step:064d}", found)
        for step, found in outcomes.items()
    ]


def test_checkpoints_are_found_by_their_fingerprint(folders: list[Path], tmp_path: Path) -> None:
    points = checkpoint_points(STEPS, LOSSES, folders, "policy")
    assert [(p.step, p.value, p.successes, p.episodes) for p in points] == [
        (100, 0.3, 0, 3), (200, 0.2, 3, 3), (300, 0.1, 2, 3)
    ]  # fmt: skip
    assert rank_correlation(points) == pytest.approx(-0.5)
    assert "| 200 | 0.2000 | 3/3 | 44 to 100 |" in markdown(points, "total")
    write_checkpoint_plot(points, "total", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_results_that_do_not_belong_together_are_refused(
    folders: list[Path], tmp_path: Path
) -> None:
    stranger = write_results(tmp_path / "stranger", "f" * 64, [True] * 3)
    with pytest.raises(ConfigError, match="checkpoint ffffffffffff, of which the run has no folde"):
        checkpoint_points(STEPS, LOSSES, [*folders, stranger], "policy")
    with pytest.raises(ConfigError, match=r"no validation \(step 300\)"):
        checkpoint_points(STEPS, {100: 0.3, 200: 0.2}, folders, "policy")
    others = write_results(tmp_path / "others", f"{100:064d}", [True] * 3, state=43)
    with pytest.raises(ConfigError, match="other tasks and states"):
        checkpoint_points(STEPS, LOSSES, [folders[0], others], "policy")
    with pytest.raises(ConfigError, match="no episode of the arm 'blank'"):
        checkpoint_points(STEPS, LOSSES, folders, "blank")


def test_losses_are_those_of_validations(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = [
        {"kind": "train", "step": 100, "total": 9.0},
        {"kind": "validation", "step": 100, "epoch": 1.0, "total": 0.3, "action_mae": 0.1},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert validation_values(path, "total") == {100: 0.3}
    with pytest.raises(ConfigError, match="no validation of 'flow', but of: action_mae, total"):
        validation_values(path, "flow")
