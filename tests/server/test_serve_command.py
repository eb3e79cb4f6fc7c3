"""serve-policy and reflexarc query as processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reflexarc.contract.errors import CheckpointError

SERVE = (sys.executable, "-c", "from reflexarc.cli.main import serve_policy; serve_policy()")
REFLEXARC = (sys.executable, "-c", "from reflexarc.cli.main import main; main()")
ENVIRONMENT = {**os.environ, "COLUMNS": "200"}


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=ENVIRONMENT, check=False
    )


@pytest.fixture
def wrong_folders(tmp_path: Path, tiny_checkpoint: Path) -> dict[str, Path]:
    altered = tmp_path / "altered"
    altered.mkdir()
    for file in tiny_checkpoint.iterdir():
        (altered / file.name).write_bytes(file.read_bytes())
    weights = bytearray((altered / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (altered / "model.safetensors").write_bytes(weights)
    old_file = tmp_path / "policy.pt"
    old_file.write_bytes(b"PK")
    return {"missing": tmp_path / "none", "pt": old_file, "altered": altered, "empty": tmp_path}


@pytest.mark.parametrize("kind", ["missing", "pt", "altered", "empty"])
def test_wrong_checkpoint_is_refused_before_a_port_opens(
    wrong_folders: dict[str, Path], kind: str
) -> None:
    folder = wrong_folders[kind]
    finished = run(*SERVE, "--ckpt", folder, "--port", "0")
    assert finished.returncode == 2
    assert f"error [{CheckpointError.code}]" in finished.stderr
    assert str(folder) in finished.stderr.replace("\n", "")
    assert "Traceback" not in finished.stderr
    assert "ws://" not in finished.stdout


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--device", "cuda:99", "cuda:99"),
        ("--compile", "fast", "one of auto, off, graph"),
        ("--compile", "graph", "needs a CUDA device"),
    ],
)
def test_what_the_device_cannot_is_refused(
    tiny_checkpoint: Path, option: str, value: str, said: str
) -> None:
    device = [] if option == "--device" else ["--device", "cpu"]
    finished = run(*SERVE, "--ckpt", tiny_checkpoint, option, value, *device, "--port", "0")
    assert finished.returncode == 2
    assert "error [config]" in finished.stderr and said in finished.stderr
    assert "ws://" not in finished.stdout


@pytest.fixture(scope="module")
def command_server(tiny_checkpoint: Path) -> Iterator[list[str]]:
    """The lines that the command prints until it is ready."""
    process = subprocess.Popen(
        [*SERVE, "--checkpoint", tiny_checkpoint, "--port", "0", "--device", "cpu",
         "--denoising-steps", "2"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        lines = []
        while not lines or not lines[-1].startswith("Ready"):
            lines.append(process.stdout.readline())
            assert lines[-1], f"serve-policy ended with {process.wait()}: {lines}"
        yield lines
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.stdout.close()


def url_of(lines: list[str]) -> str:
    return next(word for word in lines[0].split() if word.startswith("ws://"))


def test_command_prints_url_contract_and_what_to_try(command_server: list[str]) -> None:
    text = "".join(command_server)
    url = url_of(command_server)
    assert url.replace("ws://", "http://") in command_server[0]
    assert "agentview 224x224 rotated_180" in command_server[1]
    assert "eef3+axisangle3+fingers2" in command_server[1]
    assert f"reflexarc query --server {url}" in text
    assert f"reflexarc eval libero --server {url}" in text


def test_query_prints_the_contract(command_server: list[str]) -> None:
    finished = run(*REFLEXARC, "query", "--server", url_of(command_server))
    assert finished.returncode == 0, finished.stderr
    for part in ("statevla", "uint8 224x224", "eef3+axisangle3+fingers2", "denoising_steps 2"):
        assert part in finished.stdout


def test_query_prints_a_chunk_from_files(command_server: list[str], tmp_path: Path) -> None:
    picture = tmp_path / "view.png"
    Image.fromarray(np.zeros((224, 224, 3), np.uint8)).save(picture)
    given = [
        *("--image", f"agentview={picture}", "--image", f"eye_in_hand={picture}"),
        *("--state", "0,0,1,3.1,0,0,0.04,-0.04", "--seed", "3"),
        *("--instruction", "pick up the alphabet soup and place it in the basket"),
    ]
    by_websocket = run(*REFLEXARC, "query", "--server", url_of(command_server), *given)
    address = url_of(command_server).replace("ws://", "http://")
    by_http = run(*REFLEXARC, "query", "--server", address, *given)
    for finished in (by_websocket, by_http):
        assert finished.returncode == 0, finished.stderr
        assert "10 actions, seed 3" in finished.stdout
    rows = [
        [line for line in finished.stdout.splitlines() if line.startswith("│")]
        for finished in (by_websocket, by_http)
    ]
    assert len(rows[0]) == 10 and rows[0] == rows[1]


def test_query_names_what_is_missing(command_server: list[str], tmp_path: Path) -> None:
    cases = {
        ("--instruction", "x"): "images.agentview: missing",
        ("--image", "agentview"): "write CAMERA=FILE",
        ("--image", f"agentview={tmp_path}/none.png"): "none.png",
        ("--state", "1,b"): "numbers separated by commas",
    }
    for given, expected in cases.items():
        finished = run(*REFLEXARC, "query", "--server", url_of(command_server), *given)
        assert finished.returncode == 2
        assert expected in finished.stderr and "Traceback" not in finished.stderr


def test_query_of_an_absent_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    finished = run(*REFLEXARC, "query", "--server", f"ws://127.0.0.1:{port}", "--retry-for", "0.2")
    assert finished.returncode == 2
    assert "error [server_unavailable]" in finished.stderr
