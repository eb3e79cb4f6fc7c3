"""``reflexarc runs``: the list, the picture, and stopping the process that trains."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pytest
import typer
import yaml
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from reflexarc.cli.groups import runs_app
from reflexarc.cli.runs import list_  # registers its commands on the group
from reflexarc.contract.errors import ConfigError
from reflexarc.training.run_folder import RunFolder
from reflexarc.training.runs.asking_to_stop import stop_run
from reflexarc.training.runs.naming import new_run_folder, newest_run
from reflexarc.training.runs.overview import find_runs, read_overview
from reflexarc.training.runs.process import RunProcess, start_of

# Trains as far as a run's folder can tell: the lock, a clean end after SIGTERM, or none.
TRAINS = """
import signal, sys, time
from pathlib import Path
from reflexarc.training.run_folder import RunFolder, exclusive
run, manner = RunFolder(Path(sys.argv[1])), sys.argv[2]
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
with exclusive(run.path):
    print("ready", flush=True)
    while not asked or manner == "deaf":
        time.sleep(0.02)
    if manner == "fails":
        raise ValueError("no space left")
    run.checkpoint(7).mkdir(parents=True)
    run.point("last", run.checkpoint(7))
    if manner == "completes":
        run.summary.write_text("{}")
"""


def make_run(folder: Path, *, seed: int = 0, steps: int = 40, timed: bool = True) -> RunFolder:
    """A run's folder with metrics of every second step."""
    folder.mkdir(parents=True)
    run = RunFolder(folder)
    loop = {"epochs": 5, "seed": seed}
    run.recipe.write_text(yaml.safe_dump({"name": "tiny", "training": loop}))
    random = np.random.default_rng(seed)
    for step in range(2, steps + 1, 2):
        loss = 2 * np.exp(-step / 30) + 0.05 * random.random() + 0.1 * seed
        line = {"kind": "train", "step": step, "epoch": step / 20, "total": loss,
                "learning_rate": 1e-3 * (1 - step / 100), "samples_per_second": 90 + step,
                "gradient_norm": 1.5 * loss, "gradient_norm/flow": loss}  # fmt: skip
        if timed:
            line |= {"time/data": 0.001, "time/forward": 0.02, "time/backward": 0.03}
        run.append_metrics(line)
        if step % 20 == 0:
            run.append_metrics({"kind": "validation", "step": step, "epoch": step / 20,
                                "total": loss * 1.1, "action_mae": loss / 10})  # fmt: skip
    checkpoint = run.checkpoint(steps)
    checkpoint.mkdir(parents=True)
    best = {"name": "action_mae", "value": 0.0531, "step": 20}
    (checkpoint / "policy.json").write_text(json.dumps({"provenance": {"best_metric": best}}))
    run.point("last", checkpoint)
    return run


@pytest.fixture
def call(tmp_path: Path) -> Callable[..., Result]:
    assert list_
    app = typer.Typer()
    app.add_typer(runs_app, name="runs")

    def invoke(*arguments: object) -> Result:
        runner = CliRunner(env={"COLUMNS": "160"})
        return runner.invoke(app, ["runs", *map(str, arguments)])

    return invoke


@pytest.fixture
def trains() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a process that holds a run's lock; none is left when the test ends."""
    started = []

    def start(run: RunFolder, manner: str = "stops") -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", TRAINS, str(run.path), manner],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_the_list_tells_running_stopped_complete_and_died(
    call: Callable[..., Result], trains: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    for name in ("a_running", "b_stopped", "c_complete", "d_killed", "e_failed"):
        make_run(tmp_path / "runs" / name)
    running, stopped, complete, killed, failed = find_runs(tmp_path / "runs")
    trains(RunFolder(running))
    for folder, manner in ((stopped, "stops"), (complete, "completes"), (failed, "fails")):
        process = trains(RunFolder(folder), manner)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    process = trains(RunFolder(killed))
    process.kill()
    process.wait(60)
    states = [read_overview(folder).state for folder in find_runs(tmp_path / "runs")]
    assert states == ["running", "stopped", "complete", "died", "died"]
    result = call("list", tmp_path / "runs")
    assert result.exit_code == 0
    for said in ("40/100", "2.00", "action_mae 0.0531", "at 20", "130", "a_running",
                 "e_failed: ValueError: no space left", "d_killed: it was killed"):  # fmt: skip
        assert said in result.output, said
    rows = json.loads(call("list", tmp_path / "runs", "--json").output)
    assert [row["state"] for row in rows] == states
    assert rows[0]["total_steps"] == 100 and rows[0]["loss"] == pytest.approx(0.55, abs=0.06)


def test_a_run_that_has_nothing_yet_or_is_damaged_is_listed_with_gaps(
    call: Callable[..., Result], tmp_path: Path
) -> None:
    make_run(tmp_path / "whole")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "recipe.yaml").write_text("name: new\n")
    damaged = make_run(tmp_path / "damaged")
    damaged.recipe.write_text("[: {")
    damaged.metrics.write_bytes(b'{"kind": "tra\xff')
    (damaged.path / "last").write_text("checkpoints/step_00000099")
    result = call("list", tmp_path)
    assert result.exit_code == 0, result.output
    assert "-/-" in result.output and "damaged" in result.output and "whole" in result.output
    assert isinstance(call("list", tmp_path / "absent").exception, ConfigError)


@pytest.mark.parametrize("count", [1, 3])
def test_the_picture_shows_every_run(
    call: Callable[..., Result], tmp_path: Path, count: int
) -> None:
    folders = [make_run(tmp_path / f"run_{n}", seed=n, timed=n < 2).path for n in range(count)]
    picture = tmp_path / "out" / "picture.png"
    result = call("plot", *folders, "--output", picture)
    assert result.exit_code == 0, result.exception
    pixels = np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3)
    colors = [(0x2A, 0x6F, 0x97), (0xD1, 0x49, 0x5B), (0x3A, 0x7D, 0x44)][:count]
    assert all((pixels == color).all(axis=1).sum() > 200 for color in colors)
    assert [path.name for path in picture.parent.iterdir()] == ["picture.png"]


def test_the_picture_names_what_it_cannot_draw(call: Callable[..., Result], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert "holds no training run" in str(
        call("plot", tmp_path / "absent", "--output", tmp_path / "a.png").exception
    )
    assert "a .png" in str(call("plot", run.path, "--output", tmp_path / "a.jpeg").exception)
    run.metrics.write_text("")
    said = call("plot", run.path, "--output", tmp_path / "a.png").exception
    assert "no line of training yet" in str(said)


def test_stopping_waits_until_it_is_saved_and_says_what_happened(
    call: Callable[..., Result], trains: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run")
    process = trains(run)
    result = call("stop", run.path)
    assert result.exit_code == 0, result.exception
    assert f"asked process {process.pid}" in result.output
    assert "step_00000007" in result.output and "--resume" in result.output
    assert process.wait(60) == 0
    again = call("stop", run.path)
    assert "nothing trains here, the run is stopped" in str(again.exception)
    other = make_run(tmp_path / "other")
    trains(other, "fails")
    assert "is died (ValueError: no space left)" in call("stop", other.path).output


def test_stopping_gives_up_on_a_process_that_does_not_listen(
    trains: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run")
    process = trains(run, "deaf")
    with pytest.raises(ConfigError, match=r"still trains after 0\.3 s"):
        stop_run(run.path, patience=0.3)
    assert process.poll() is None


def test_a_number_that_belongs_to_another_process_by_now_is_left_alone(
    trains: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run")
    process = trains(run)
    record = json.loads((run.path / "process.json").read_text())
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        for change in ({"pid": bystander.pid}, {"host": "elsewhere"}, {"pid": 2**22 - 1}):
            (run.path / "process.json").write_text(json.dumps({**record, **change}))
            with pytest.raises(ConfigError, match="not a process of this machine"):
                stop_run(run.path, patience=1)
        time.sleep(0.1)
        assert bystander.poll() is None and process.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_a_process_is_told_from_a_later_one_with_its_number() -> None:
    here = os.getpid()
    start = start_of(here)
    assert start is not None and start == start_of(here) and start != start_of(1)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert start_of(ended.pid) is None
    assert not RunProcess(pid=here, host="elsewhere", started=start).is_alive_here()


def test_folders_are_named_by_recipe_seed_and_time(tmp_path: Path) -> None:
    now = datetime(2026, 3, 4, 5, 6, 7, tzinfo=timezone.utc)
    first = new_run_folder("tiny", 3, parent=tmp_path, now=now)
    assert first.name == "tiny_s3_20260304T050607Z"
    first.mkdir()
    second = new_run_folder("tiny", 3, parent=tmp_path, now=now)
    assert second.name == "tiny_s3_20260304T050607Z_2"
    later = new_run_folder("tiny", 3, parent=tmp_path, now=now.replace(year=2027))
    later.mkdir()
    assert newest_run("tiny", 3, parent=tmp_path) == later
    assert newest_run("tiny", 4, parent=tmp_path) is None
    assert new_run_folder("../my run", 0, parent=tmp_path).parent == tmp_path
