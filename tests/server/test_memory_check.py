"""What does not fit, cannot be read or may not be read is refused by name before it is loaded."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from reflexarc.client.credentials import authorization
from reflexarc.contract.errors import ConfigError, DoesNotFitError
from reflexarc.server.memory import available_memory, check_fits

COMMAND = (sys.executable, "-c", "from reflexarc.cli.main import serve_policy; serve_policy()")
DEMO = Path(__file__).resolve().parents[2] / "checkpoints" / "demo"


def without_roots_privilege() -> None:
    """In the child: root reads what it may not, unless these two capabilities are gone."""
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


def serve(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, "--ckpt", folder, "--port", "0", *options],
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=without_roots_privilege,
        cwd="/",
        env={**os.environ, "COLUMNS": "300"},
        check=False,
    )


def test_a_checkpoint_larger_than_memory_is_refused_before_it_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "huge"
    shutil.copytree(DEMO, folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(2**43)  # eight terabytes of holes, which take no space and hours to hash
    finished = serve(folder)
    assert finished.returncode == 2
    assert "error [does_not_fit]" in finished.stderr
    assert "16384.3 GiB" in finished.stderr
    assert "Nothing was loaded" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_what_fits_is_let_through(tmp_path: Path) -> None:
    free = available_memory()
    assert free is not None and free > 2**20
    check_fits(DEMO, "cpu")
    (tmp_path / "weights.safetensors").touch()
    os.truncate(tmp_path / "weights.safetensors", free)
    with pytest.raises(DoesNotFitError, match="this machine has"):
        check_fits(tmp_path, "cpu")


@pytest.mark.parametrize(
    "closed", ["the folder", "the folder above", "the manifest", "the weights"]
)
def test_a_checkpoint_closed_to_this_user_is_named(tmp_path: Path, closed: str) -> None:
    folder = tmp_path / "above" / "checkpoint"
    shutil.copytree(DEMO, folder)
    target = {
        "the folder": folder,
        "the folder above": folder.parent,
        "the manifest": folder / "policy.json",
        "the weights": folder / "model.safetensors",
    }[closed]
    target.chmod(0)
    try:
        finished = serve(folder)
    finally:
        target.chmod(0o755)
    assert finished.returncode == 2, finished.stderr
    assert "error [checkpoint]" in finished.stderr
    assert "Permission denied" in finished.stderr
    assert "chmod -R a+rX" in finished.stderr
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize("option", ["--api-keys-file", "--tls-certificate"])
def test_a_secret_closed_to_this_user_is_named(tmp_path: Path, option: str) -> None:
    file = tmp_path / "secret"
    file.write_text("a-key-of-sixteen-characters\n")
    file.chmod(0)
    finished = serve(DEMO, option, str(file))
    assert finished.returncode == 2
    assert f"error [config]: {option} {file}" in finished.stderr
    assert "ermission denied" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_a_key_is_read_from_the_file_that_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "key"
    file.write_text("a-key-of-sixteen-characters\n")
    monkeypatch.delenv("REFLEXARC_API_KEY", raising=False)
    monkeypatch.setenv("REFLEXARC_API_KEY_FILE", str(file))
    assert authorization() == {"Authorization": "Bearer a-key-of-sixteen-characters"}
    assert authorization("") == {}
    monkeypatch.setenv("REFLEXARC_API_KEY", "the-variable-comes-first")
    assert authorization() == {"Authorization": "Bearer the-variable-comes-first"}


@pytest.mark.parametrize("content", [None, "", " \n", "schlüssel"])
def test_a_key_file_without_a_key_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    file = tmp_path / "key"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    monkeypatch.delenv("REFLEXARC_API_KEY", raising=False)
    monkeypatch.setenv("REFLEXARC_API_KEY_FILE", str(file))
    with pytest.raises(ConfigError, match="REFLEXARC_API_KEY_FILE") as refused:
        authorization()
    assert "schl" not in refused.value.message
