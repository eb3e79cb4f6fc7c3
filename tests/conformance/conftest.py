"""Other projects' published clients, each in a virtual environment of its own."""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reflexarc.contract import pack, unpack

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))  # for the package `policies`
INSTRUCTION = "pick up the alphabet soup and place it in the basket"

# openpi-client needs numpy < 2 and imports typing_extensions without declaring it.
OPENPI = ("openpi-client==0.1.2", "numpy<2", "typing_extensions", "websockets<18")
VLA_EVAL = ("vla-eval==0.8.0",)
JSON_NUMPY = ("json-numpy==2.1.1", "requests>=2.32,<3")


def environment(name: str, requirements: tuple[str, ...]) -> Path:
    """The interpreter of an environment with the unmodified client, made once and kept."""
    key = hashlib.sha256(" ".join((*requirements, sys.version)).encode()).hexdigest()[:10]
    folder = ROOT / ".conformance" / f"{name}-{key}"
    if not folder.exists():
        making = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
        subprocess.run([sys.executable, "-m", "venv", making], check=True)
        pip = [making / "bin" / "python", "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, *requirements], check=True, timeout=600)
        try:
            making.rename(folder)  # only bin/python is used, which does not mind
        except OSError:
            shutil.rmtree(making)  # another test run was faster
    return folder / "bin" / "python"


@pytest.fixture(scope="session")
def openpi_python() -> Path:
    return environment("openpi-client", OPENPI)


@pytest.fixture(scope="session")
def vla_eval_python() -> Path:
    return environment("vla-eval", VLA_EVAL)


@pytest.fixture(scope="session")
def json_numpy_python() -> Path:
    """With ``requests`` and ``json-numpy``, which OpenVLA's and GR00T's clients are made of."""
    return environment("json-numpy", JSON_NUMPY)


class ClientProcess:
    """Another project's client in a process of its own; methods are those of its driver.

    Args:
        python: interpreter of its environment.
        driver: script beside this file.
    """

    def __init__(self, python: Path, driver: str) -> None:
        self.process = subprocess.Popen(
            [python, Path(__file__).with_name(driver)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def call(self, name: str, **arguments: Any) -> Any:
        """The method's result; its exception comes as RuntimeError with type and message."""
        assert self.process.stdin is not None and self.process.stdout is not None
        frame = pack({"call": name, "arguments": arguments})
        self.process.stdin.write(struct.pack(">I", len(frame)) + frame)
        self.process.stdin.flush()
        header = self.process.stdout.read(4)
        assert len(header) == 4, f"the client's process ended with {self.process.wait()}"
        reply = unpack(self.process.stdout.read(struct.unpack(">I", header)[0]))
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply["result"]

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def openpi(openpi_python: Path) -> Iterator[ClientProcess]:
    client = ClientProcess(openpi_python, "openpi_driver.py")
    yield client
    client.close()


@pytest.fixture
def libero_request() -> Callable[..., dict[str, Any]]:
    """What openpi's LIBERO example sends, with pixels of noise."""

    def make(**changes: Any) -> dict[str, Any]:
        rng = np.random.default_rng(0)
        request = {
            "observation/image": rng.integers(0, 256, (224, 224, 3), dtype=np.uint8),
            "observation/wrist_image": rng.integers(0, 256, (224, 224, 3), dtype=np.uint8),
            "observation/state": rng.normal(size=8),
            "prompt": INSTRUCTION,
        }
        return {**request, **changes}

    return make
