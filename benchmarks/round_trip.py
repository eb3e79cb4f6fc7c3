"""Round trip of one observation with a null policy: our server against openpi-server.

Everything is unmodified and in a process of its own: ``openpi-server`` 0.1.0 and ``openpi-client``
0.1.2 from the registry in their own environment, our server and our clients in this one. The
observation holds two raw 224 px images (301 kB). The ways are measured in turn, block by block,
so that whatever else the machine does hits all alike. Prints markdown.

    python benchmarks/round_trip.py [--rounds 40] [--requests 50]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = ROOT / ".conformance" / "openpi-server-0.1.0"
REQUIREMENTS = (
    "openpi-server==0.1.0",
    "openpi-client==0.1.2",
    "numpy<2",
    "typing_extensions",
    "websockets<18",
)
PROMPT = "pick up the alphabet soup and place it in the basket"
BASELINE = "openpi-client -> openpi-server"
WAYS = {  # name: (which client, which server)
    BASELINE: ("openpi", "openpi"),
    "openpi-client -> reflexarc": ("openpi", "reflexarc"),
    "PolicyClient -> reflexarc": ("websocket", "reflexarc"),
    "HttpPolicyClient -> reflexarc": ("http", "reflexarc"),
}


def serve_openpi(port: int) -> None:
    from openpi_server import WebsocketPolicyServer

    class Zeros:
        def infer(self, observation: Any) -> dict[str, Any]:
            return {"actions": np.zeros((10, 7), np.float32)}

    WebsocketPolicyServer(Zeros(), host="127.0.0.1", port=port).serve_forever()


def serve_reflexarc(port: int) -> None:
    from reflexarc.contract import ActionChunk
    from reflexarc.server import NullPolicy, PolicyServer, PolicyService
    from reflexarc.server.lifecycle import open_port

    class Zeros(NullPolicy):
        def infer(self, observations: Any) -> list[ActionChunk]:
            return [ActionChunk(np.zeros((10, 7), np.float32), observations[0].seed)]

    PolicyServer(PolicyService(Zeros)).run([open_port("127.0.0.1", port)])


def ask_as_openpi(port: int) -> Callable[[], Any]:
    from openpi_client.websocket_client_policy import WebsocketClientPolicy

    first, second = pixels()
    request = {
        "observation/image": first,
        "observation/wrist_image": second,
        "observation/state": np.zeros(8),
        "prompt": PROMPT,
    }
    client = WebsocketClientPolicy("127.0.0.1", port)
    return lambda: client.infer(request)["actions"]


def ask_as_reflexarc(kind: str, port: int) -> Callable[[], Any]:
    from reflexarc.client import HttpPolicyClient, PolicyClient
    from reflexarc.contract import Observation

    first, second = pixels()
    observation = Observation(
        {"agentview": first, "eye_in_hand": second}, np.zeros(8), instruction=PROMPT
    )
    client = (PolicyClient if kind == "websocket" else HttpPolicyClient)(f"127.0.0.1:{port}")
    return lambda: client.infer(observation).actions


def pixels() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    first, second = (rng.integers(0, 256, (224, 224, 3), dtype=np.uint8) for _ in range(2))
    return first, second


def run_client(kind: str, port: int) -> None:
    """For each line on stdin, that many requests; prints their milliseconds as JSON."""
    ask = ask_as_openpi(port) if kind == "openpi" else ask_as_reflexarc(kind, port)
    for _ in range(100):
        assert ask().shape == (10, 7)
    print("ready", flush=True)
    for line in sys.stdin:
        milliseconds = []
        for _ in range(int(line)):
            started = time.perf_counter()
            ask()
            milliseconds.append((time.perf_counter() - started) * 1000)
        print(json.dumps(milliseconds), flush=True)


def openpi_python() -> Path:
    """The interpreter of an environment with openpi's server and client, made once."""
    python = ENVIRONMENT / "bin" / "python"
    done = ENVIRONMENT / ".installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", ENVIRONMENT], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True)
        done.touch()
    return python


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def wait_for_port(port: int) -> None:
    for _ in range(600):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"nothing listens on port {port}")


class Processes:
    """Servers and clients as processes of this file, ended together."""

    def __init__(self) -> None:
        self.python = {"openpi": str(openpi_python())}
        self.started: list[subprocess.Popen[str]] = []

    def start(self, kind: str, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [self.python.get(kind, sys.executable), __file__, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.started.append(process)
        return process

    def end(self) -> None:
        for process in self.started:
            process.kill()
            process.communicate()


def measure(rounds: int, requests: int) -> dict[str, list[list[float]]]:
    """Milliseconds of every request: way -> round -> request."""
    processes = Processes()
    try:
        ports = {server: free_port() for server in ("openpi", "reflexarc")}
        for server, port in ports.items():
            processes.start(server, "--serve", server, "--port", str(port))
            wait_for_port(port)
        clients = {}
        for way, (client, server) in WAYS.items():
            clients[way] = processes.start(client, "--client", client, "--port", str(ports[server]))
            if read_line(way, clients[way]) != "ready":
                raise SystemExit(f"{way}: the client did not become ready")
        times: dict[str, list[list[float]]] = {way: [] for way in WAYS}
        order = list(WAYS)
        for _ in range(rounds):
            for way in order:
                stdin = clients[way].stdin
                assert stdin is not None
                stdin.write(f"{requests}\n")
                stdin.flush()
                times[way].append(json.loads(read_line(way, clients[way])))
            order = order[1:] + order[:1]  # nobody always follows the same neighbour
        return times
    finally:
        processes.end()


def read_line(way: str, process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if not line:
        raise SystemExit(f"{way}: the client ended with {process.wait()}")
    return line


def report(times: dict[str, list[list[float]]]) -> str:
    """A markdown table. The ratio is the median over rounds of the blocks' medians' ratios."""
    baseline = [statistics.median(block) for block in times[BASELINE]]
    count = sum(len(block) for block in times[BASELINE])
    lines = [
        f"Round trip of 301 kB, null policy, {count} requests a way in {len(baseline)} rounds; "
        f"{describe_machine()}.",
        "",
        "| way | median ms | p95 ms | ratio to openpi | quartiles of the ratio |",
        "|---|---:|---:|---:|---:|",
    ]
    for way, blocks in times.items():
        every = np.concatenate(blocks)
        ratios = [statistics.median(b) / base for b, base in zip(blocks, baseline, strict=True)]
        low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
        lines.append(
            f"| {way} | {np.median(every):.3f} | {np.quantile(every, 0.95):.3f} | "
            f"{middle:.2f} | {low:.2f} to {high:.2f} |"
        )
    return "\n".join(lines)


def describe_machine() -> str:
    cpu_info = Path("/proc/cpuinfo")
    names = cpu_info.read_text().splitlines() if cpu_info.is_file() else []
    model = next((n.split(":")[1].strip() for n in names if "model name" in n), platform.machine())
    return f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--requests", type=int, default=50, help="requests in a block")
    parser.add_argument("--serve", choices=("openpi", "reflexarc"), help=argparse.SUPPRESS)
    parser.add_argument("--client", choices=("openpi", "websocket", "http"), help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        (serve_openpi if options.serve == "openpi" else serve_reflexarc)(options.port)
    elif options.client:
        run_client(options.client, options.port)
    else:
        print(report(measure(options.rounds, options.requests)))


if __name__ == "__main__":
    main()
