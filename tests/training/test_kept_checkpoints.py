"""Which checkpoints stay, and that a kill between two writes loses none of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from reflexarc.training import kept_checkpoints
from reflexarc.training.kept_checkpoints import KeptCheckpoints
from reflexarc.training.run_folder import TRAINING_STATE, RunFolder

METRICS = {10: 0.5, 20: 0.4, 30: 0.6, 40: 0.4, 50: 0.3, 60: None, 70: 0.45}


def save(run: RunFolder, step: int) -> None:
    (run.checkpoint(step) / TRAINING_STATE).mkdir(parents=True, exist_ok=True)


def train(run: RunFolder, kept: KeptCheckpoints, *, after: int = 0, until: int = 70) -> None:
    for step, metric in METRICS.items():
        if after < step <= until:
            save(run, step)
            kept.add(step, metric)


def steps(run: RunFolder) -> list[int]:
    return list(run.checkpoint_folders())


def pointed(run: RunFolder) -> tuple[str, str]:
    last, best = run.pointed("last"), run.pointed("best")
    assert last and best
    return last.name, best.name


@pytest.mark.parametrize(
    ("best", "every", "kept"),
    [
        (1, None, [50, 70]),
        (3, None, [20, 40, 50, 70]),  # 20 and 40 are equal: both are among three
        (2, None, [20, 50, 70]),  # the earlier wins
        (1, 30, [30, 50, 60, 70]),
    ],
)
def test_last_the_best_and_the_milestones_stay(
    tmp_path: Path, best: int, every: int | None, kept: list[int]
) -> None:
    run = RunFolder(tmp_path)
    train(run, KeptCheckpoints(run, best=best, every=every))
    assert steps(run) == kept
    assert pointed(run) == ("step_00000070", "step_00000050")
    with_state = [s for s in steps(run) if (run.checkpoint(s) / TRAINING_STATE).is_dir()]
    assert with_state == [70]


def test_wants_tells_beforehand_what_would_stay(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    kept = KeptCheckpoints(run, best=2, every=1000)
    assert kept.wants(10, 0.5)
    train(run, kept, until=30)
    assert kept.ranking == {20: 0.4, 10: 0.5}
    assert kept.wants(31, 0.49) and not kept.wants(31, 0.5) and not kept.wants(31, None)
    assert kept.wants(2000, None)


class Killed(BaseException):
    """In the place of SIGKILL."""


@pytest.mark.parametrize("survives", range(12))
def test_a_kill_between_any_two_writes_is_made_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survives: int
) -> None:
    whole = RunFolder(tmp_path / "whole")
    train(whole, KeptCheckpoints(whole, best=2, every=30))
    run = RunFolder(tmp_path / "run")
    kept = KeptCheckpoints(run, best=2, every=30)
    train(run, kept, until=30)
    writes = 0
    write_text = kept_checkpoints.write_text

    def dying(path: Path, text: str) -> None:
        nonlocal writes
        writes += 1
        if writes > survives:
            raise Killed
        write_text(path, text)

    for module in ("kept_checkpoints", "run_folder"):
        monkeypatch.setattr(f"reflexarc.training.{module}.write_text", dying)
    with pytest.raises(Killed):
        train(run, kept, after=30)
    monkeypatch.undo()
    last = run.pointed("last")
    assert last is not None
    step = int(last.name.removeprefix("step_"))
    resumed = KeptCheckpoints(run, best=2, every=30)
    resumed.resume(step)
    assert max(steps(run)) == step
    train(run, resumed, after=step)
    assert steps(run) == steps(whole)
    assert pointed(run) == pointed(whole)
    ranking = "checkpoints/ranking.json"
    assert (run.path / ranking).read_text() == (whole.path / ranking).read_text()


def test_other_processes_decide_alike_and_write_nothing(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    first = KeptCheckpoints(run, best=2)
    train(run, first)
    second = KeptCheckpoints(run, best=2, writes=False)
    second.resume(70)
    assert second.ranking == first.ranking
    before = run.pointed("last")
    second.add(80, 0.1)
    assert run.pointed("last") == before and 80 not in steps(run)


def test_a_run_older_than_the_ranking_keeps_its_best(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    save(run, 10)
    save(run, 20)
    run.point("last", run.checkpoint(20))
    run.point("best", run.checkpoint(10))
    kept = KeptCheckpoints(run)
    kept.resume(20, best=(10, 0.5))
    assert steps(run) == [10, 20] and not kept.wants(21, 0.5)
