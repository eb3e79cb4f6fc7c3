"""``reflexarc demo``: what it says when its server or its files are missing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reflexarc.cli.demo import _find, _stop, serving
from reflexarc.contract.errors import CheckpointError, ConfigError, ServerUnavailableError

DEMO = (sys.executable, "-c", "from reflexarc.cli.main import main; main()", "demo")


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    result = subprocess.run(
        [*DEMO, "--ckpt", "no/such/checkpoint"],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2
    assert "error [checkpoint]: no/such/checkpoint does not exist" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_files_are_found_here_and_in_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _find(Path("docs/architecture.md"), "--ckpt").is_absolute()  # from the repository
    (tmp_path / "docs").mkdir()
    assert _find(Path("docs"), "--ckpt") == Path("docs")  # the working directory comes first
    with pytest.raises(CheckpointError, match="--ckpt"):
        _find(Path("nowhere"), "--ckpt")
    with pytest.raises(ConfigError, match="--demonstrations"):
        _find(Path("nowhere"), "--demonstrations")


def test_a_server_that_cannot_start_is_said_with_the_end_of_its_log(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    log = tmp_path / "server.log"
    began = pytest.raises(ServerUnavailableError, match=r"ended with status \d+ before it was")
    with began as caught, serving(checkpoint, port, log):
        pytest.fail("an empty folder was served")
    assert log.read_text().strip().splitlines()[-1] in caught.value.message


def test_the_server_gets_a_signal_that_lets_it_finish(tmp_path: Path) -> None:
    program = (
        "import signal, sys, time, pathlib\n"
        "def end(*_):\n"
        f"    pathlib.Path({str(tmp_path / 'ended')!r}).touch()\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        f"pathlib.Path({str(tmp_path / 'began')!r}).touch()\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        while not (tmp_path / "began").exists():
            time.sleep(0.02)
        _stop(process)
    finally:
        process.kill()
    assert process.returncode == 0 and (tmp_path / "ended").exists()


def test_sigterm_ends_the_server_too(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    program = (
        "import time\n"
        "from pathlib import Path\n"
        "from reflexarc.cli.demo import serving\n"
        f"with serving(Path({str(tiny_checkpoint)!r}), {port}, Path({str(tmp_path / 'log')!r})):\n"
        "    print('serving', flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        while process.stdout.readline() not in ("serving\n", ""):
            pass
        process.terminate()
        assert process.wait(60) == 143
    finally:
        process.kill()
        process.communicate()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1).close()


@pytest.mark.slow
@pytest.mark.simulator
def test_the_demo_of_this_repository(tmp_path: Path) -> None:
    """The committed checkpoint in two processes, one state of each task, three arms."""
    output = tmp_path / "demo"
    result = subprocess.run(
        [*DEMO, "--states", "45", "--output", str(output)],
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "init states 45" in result.stdout and "incomplete" not in result.stdout
    assert len((output / "results.jsonl").read_text().splitlines()) == 6
    assert len(list((output / "videos").glob("*.mp4"))) == 6
    port = result.stdout.split("--port ")[1].split()[0]
    with pytest.raises(OSError):  # the server is gone
        socket.create_connection(("127.0.0.1", int(port)), timeout=1).close()
