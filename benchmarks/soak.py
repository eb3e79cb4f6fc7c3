"""Soak test of the server: many clients, good and bad, for minutes, against a real process.

Sixteen clients mix valid observations (websocket, HTTP with msgpack and with JSON) with malformed
and oversized frames, contract violations, disconnects in the middle of a request and slow peers.
Each reply to a valid observation must be its own: the policy's actions are a function of images,
state and seed. Exits with 1 when a reply was wrong or missing, when the server failed, or when its
memory grew by more than 5 % after a warm-up of the same mix: medians of the first and last fifth of
the run are compared, because what is in flight comes and goes.

    python benchmarks/soak.py [--clients 16] [--requests 100000] [--seed 0] [--output FILE]
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import subprocess
import tempfile
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from soak_clients import Case, Client, Tally
from tqdm import tqdm

from reflexarc.contract import ActionChunk, Observation
from reflexarc.server import NullPolicy, PolicyServer, PolicyService
from reflexarc.server.lifecycle import open_port

MEMORY_GROWTH_PERCENT = 5.0
CASES = 48
WARM_UP_SHARE = 0.2
MEMORY_SAMPLES = 100
SHOWN_FAULTS = 10


class OwnActions(NullPolicy):
    """Each observation has actions of its own, drawn from a hash of images, state and seed."""

    def infer(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        return [self._own(observation) for observation in observations]

    def _own(self, observation: Observation) -> ActionChunk:
        assert observation.seed is not None
        checksum = zlib.crc32(observation.state.tobytes(), observation.seed)
        for name in self.contract.camera_names:
            checksum = zlib.crc32(observation.images[name].tobytes(), checksum)
        (chunk,) = super().infer([replace(observation, seed=checksum)])
        return replace(chunk, seed=observation.seed)


def serve(port: Connection, log: Path) -> None:
    """The server process: serves until SIGTERM, its log in a file."""
    logging.basicConfig(filename=log, level=logging.WARNING)
    listener = open_port("127.0.0.1", 0)
    port.send(listener.getsockname()[1])
    PolicyServer(PolicyService(OwnActions)).run([listener])


class ServerProcess:
    """The server while the ``with`` block runs; ``failures`` after it says how it ended."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self.failures: list[str] = []

    def __enter__(self) -> ServerProcess:
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        self._process = context.Process(target=serve, args=(there, self._log), daemon=True)
        self._process.start()
        self.address = f"127.0.0.1:{here.recv()}"
        while self.alive() and not self._ready():
            time.sleep(0.05)
        return self

    def _ready(self) -> bool:
        return httpx.get(f"http://{self.address}/readyz", trust_env=False).status_code == 200

    def alive(self) -> bool:
        return self._process.is_alive()

    def memory(self) -> float:
        """Resident MB."""
        assert self._process.pid is not None
        status = Path(f"/proc/{self._process.pid}/statm")
        if status.is_file():
            return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
        asked = ["ps", "-o", "rss=", "-p", str(self._process.pid)]
        kilobytes = subprocess.run(asked, capture_output=True, check=False).stdout
        return int(kilobytes or 0) * 1024 / 1e6

    def __exit__(self, *_: object) -> None:
        if not self.alive():
            self.failures.append(f"the server ended with {self._process.exitcode} by itself")
        self._process.terminate()
        self._process.join(60)
        if self._process.exitcode != 0:
            self.failures.append(f"the server's exit code is {self._process.exitcode}, 0 was due")
            self._process.kill()
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        self.failures += [line for line in lines if line.startswith("ERROR")]


def make_cases(seed: int) -> list[Case]:
    """Observations that differ in images, state and seed, with their right answers."""
    policy, rng = OwnActions(), np.random.default_rng(seed)
    cases = []
    for index in range(CASES):
        images = {
            camera.name: rng.integers(0, 256, (camera.height, camera.width, 3), dtype=np.uint8)
            for camera in policy.contract.cameras
        }
        state = rng.normal(size=policy.contract.state.dimension)
        # Half of them share a seed, so that only state and images tell those apart.
        seed_of_request = 0 if index % 2 else index
        observation = Observation(images, state, "pick up the bowl", seed=seed_of_request)
        cases.append(Case(observation, policy.infer([observation])[0].actions))
    return cases


def storm(
    server: ServerProcess, cases: list[Case], clients: int, requests: int, seed: int, name: str
) -> tuple[Tally, list[float]]:
    """All clients at once until ``requests`` things were done; also the server's memory in MB,
    at 100 or more evenly spaced requests."""
    tally, progress = Tally(), tqdm(total=requests, desc=name, unit=" requests")
    left, memory = iter(range(requests)), []

    def run(client_seed: np.random.SeedSequence) -> None:
        client = Client(server.address, cases, np.random.default_rng(client_seed), tally)
        try:
            while server.alive():
                with tally.lock:
                    index = next(left, None)
                    if index is None:
                        return
                    if index % max(1, requests // MEMORY_SAMPLES) == 0:
                        memory.append(server.memory())
                    progress.update()
                client.act()
        finally:
            client.close()

    with progress, ThreadPoolExecutor(clients) as pool:
        list(pool.map(run, np.random.SeedSequence(seed).spawn(clients)))
    return tally, memory


def summarise(tally: Tally, memory: list[float], failures: list[str]) -> dict[str, Any]:
    fifth = max(1, len(memory) // 5)
    start, end = float(np.median(memory[:fifth])), float(np.median(memory[-fifth:]))
    median, p99 = np.quantile(tally.milliseconds or [0.0], [0.5, 0.99])
    return {
        "asked": dict(sorted(tally.asked.items())),
        "answered": tally.answered,
        "refused": dict(sorted(tally.refused.items())),
        "abandoned": tally.abandoned,
        "wrong": len(tally.wrong),
        "unanswered": len(tally.unanswered),
        "server_failures": len(failures),
        "memory_start_mb": round(start, 1),
        "memory_end_mb": round(end, 1),
        "memory_most_mb": round(max(memory), 1),
        "memory_growth_percent": round(100 * (end / start - 1), 2),
        "websocket_median_ms": round(float(median), 2),
        "websocket_p99_ms": round(float(p99), 2),
        "faults": [*failures, *tally.wrong, *tally.unanswered][:SHOWN_FAULTS],
    }


def broken_bounds(summary: dict[str, Any]) -> list[str]:
    """The bounds that the run broke, in words."""
    broken = [
        f"{name}: {summary[name]}, 0 allowed"
        for name in ("wrong", "unanswered", "server_failures")
        if summary[name]
    ]
    growth = summary["memory_growth_percent"]
    if growth > MEMORY_GROWTH_PERCENT:
        broken.append(f"memory grew by {growth} %, {MEMORY_GROWTH_PERCENT} % allowed")
    return broken


def show(summary: dict[str, Any]) -> None:
    table = Table("", "", title="Soak test of the server", show_header=False)
    for name, value in summary.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {count}" for key, count in value.items())
        if name != "faults":
            table.add_row(name.replace("_", " "), str(value))
    console = Console()
    console.print(table)
    for fault in summary["faults"]:
        console.print(fault, style="red", markup=False)


def main(
    clients: Annotated[int, typer.Option(help="Peers at once.", min=1, max=60)] = 16,
    requests: Annotated[int, typer.Option(help="After the warm-up.", min=100)] = 100_000,
    seed: Annotated[int, typer.Option(help="Of what the clients do.", min=0)] = 0,
    output: Annotated[Path, typer.Option(help="The summary as JSON.")] = Path("outputs/soak.json"),
) -> None:
    """Good and bad clients against one server process; exit 1 when a bound is broken."""
    # The client library logs a traceback when this script cuts its own connections, as it must.
    logging.getLogger("websockets.client").setLevel(logging.CRITICAL + 1)
    cases, started = make_cases(seed), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        with ServerProcess(Path(folder) / "server.log") as server:
            warm_up = max(2000, round(WARM_UP_SHARE * requests))
            storm(server, cases, clients, warm_up, seed + 1, "warm-up")
            tally, memory = storm(server, cases, clients, requests, seed, "soak")
        summary = summarise(tally, memory, server.failures)
    summary = {"clients": clients, "seed": seed, **summary}
    summary["seconds"] = round(time.perf_counter() - started, 1)
    summary["broken_bounds"] = broken_bounds(summary)
    show(summary)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(summary, indent=2) + "\n")
    temporary.replace(output)
    if summary["broken_bounds"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
