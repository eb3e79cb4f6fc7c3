"""What the benchmarks share; it runs in openpi's environment too, so imports nothing of ours."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
OUTPUTS = ROOT / "outputs" / "benchmarks"
ENVIRONMENT = ROOT / ".conformance" / "openpi-server-0.1.0"
REQUIREMENTS = (
    "openpi-server==0.1.0",
    "openpi-client==0.1.2",
    "numpy<2",
    "typing_extensions",
    "websockets<18",
)
PROMPT = "pick up the alphabet soup and place it in the basket"


def openpi_python() -> str:
    """The interpreter of an environment with openpi's server and client, made once."""
    python = ENVIRONMENT / "bin" / "python"
    done = ENVIRONMENT / ".installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", ENVIRONMENT], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True)
        done.touch()
    return str(python)


def openpi_request(size: int, seed: int = 0) -> dict[str, Any]:
    """What openpi's LIBERO example sends, with pixels of noise and images of ``size``."""
    rng = np.random.default_rng(seed)
    return {
        "observation/image": rng.integers(0, 256, (size, size, 3), dtype=np.uint8),
        "observation/wrist_image": rng.integers(0, 256, (size, size, 3), dtype=np.uint8),
        "observation/state": rng.normal(size=8),
        "prompt": PROMPT,
    }


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


class Processes:
    """Servers and clients, talked to line by line, ended together.

    Their errors go to ``log``, whose end is shown when one ends early.
    """

    def __init__(self, name: str) -> None:
        OUTPUTS.mkdir(parents=True, exist_ok=True)
        self.log = OUTPUTS / f"{name}.log"
        self._started: list[subprocess.Popen[str]] = []
        self._errors: IO[str] = self.log.open("w")

    def __enter__(self) -> Processes:
        return self

    def start(self, *command: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            cwd=ROOT,
        )
        self._started.append(process)
        return process

    def serve(self, *command: str) -> int:
        """Start a server that takes ``--port``; returns its port once it listens."""
        port = free_port()
        process = self.start(*command, "--port", str(port))
        while process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                return port
            except OSError:
                time.sleep(0.1)
        raise SystemExit(f"{' '.join(command)} ended:\n{self.log.read_text()[-2000:]}")

    def ask(self, process: subprocess.Popen[str], line: str) -> Any:
        """Write a line to a process and read the JSON line that it answers."""
        assert process.stdin is not None
        process.stdin.write(line + "\n")
        process.stdin.flush()
        return self.read(process)

    def read(self, process: subprocess.Popen[str]) -> Any:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            tail = self.log.read_text()[-2000:]
            raise SystemExit(f"{process.args} ended with {process.wait()}:\n{tail}")
        return json.loads(line)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self._started:
            process.kill()
            process.communicate()
        self._errors.close()


def describe_machine() -> str:
    cpu_info = Path("/proc/cpuinfo")
    names = cpu_info.read_text().splitlines() if cpu_info.is_file() else []
    model = next((n.split(":")[1].strip() for n in names if "model name" in n), platform.machine())
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}{load}"


def write_json(name: str, result: Any, output: Path | None = None) -> Path:
    """Write a benchmark's figures, with the machine, under ``outputs/benchmarks``."""
    path = output or OUTPUTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    content = {"machine": describe_machine(), "date": time.strftime("%Y-%m-%d"), **result}
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)
    return path


def openpi_server(milliseconds: float) -> tuple[str, ...]:
    """The command that serves a policy of so many milliseconds by openpi's server."""
    return openpi_python(), __file__, str(milliseconds)


def serve_openpi(milliseconds: float, port: int) -> None:
    """openpi's unmodified server; its policy sleeps as long as a device would compute."""
    from openpi_server import WebsocketPolicyServer

    class Sleeps:
        def infer(self, observation: Any) -> dict[str, Any]:
            if milliseconds:
                time.sleep(milliseconds / 1000)
            return {"actions": np.zeros((10, 7), np.float32)}

    WebsocketPolicyServer(Sleeps(), host="127.0.0.1", port=port).serve_forever()


if __name__ == "__main__":  # as openpi_server() starts it: MILLISECONDS --port PORT
    serve_openpi(float(sys.argv[1]), int(sys.argv[3]))
