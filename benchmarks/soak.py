"""Soak test of the server: many clients, good and bad, for minutes, against a real process.

32 clients mix valid observations (websocket, HTTP with msgpack and with JSON) with malformed and
oversized frames, contract violations, disconnects in the middle of a request and slow peers. Each
reply to a valid observation must be its own: the policy's actions are a function of images, state
and seed. Then a server whose batches take 25 ms gets SIGTERM while all clients ask: whatever it had
accepted must be answered.

Exits with 1 when a reply was wrong or missing, when the server failed, when SIGTERM lost a request,
or when memory grew by more than 5 % after a warm-up of the same mix: medians of the first and last
fifth of the run are compared, because what is in flight comes and goes.

    python benchmarks/soak.py [--clients 32] [--requests 100000] [--seed 0] [--output FILE]
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from soak_clients import Case, Client, Tally
from soak_server import OwnActions, ServerProcess
from soak_sigterm import terminate_under_load
from tqdm import tqdm

from reflexarc.contract import Observation

MEMORY_GROWTH_PERCENT = 5.0
CASES = 48
WARM_UP_SHARE = 0.2
LEAST_WARM_UP = 8000  # fills what is bounded, as the images of sessions that a status page shows
MEMORY_SAMPLES = 100
SHOWN_FAULTS = 10


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
        "memory_mb": [round(megabytes, 1) for megabytes in memory],
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
    broken += [
        f"SIGTERM: {name}: {summary['sigterm'][name]}, 0 allowed"
        for name in ("lost", "wrong", "server_failures")
        if summary["sigterm"][name]
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
        if name not in ("faults", "memory_mb"):
            table.add_row(name.replace("_", " "), str(value))
    console = Console()
    console.print(table)
    for fault in summary["faults"]:
        console.print(fault, style="red", markup=False)


def main(
    clients: Annotated[int, typer.Option(help="Peers at once.", min=1, max=60)] = 32,
    requests: Annotated[int, typer.Option(help="After the warm-up.", min=100)] = 100_000,
    seed: Annotated[int, typer.Option(help="Of what the clients do.", min=0)] = 0,
    output: Annotated[Path, typer.Option(help="The summary as JSON.")] = Path("outputs/soak.json"),
) -> None:
    """Good and bad clients against one server process; exit 1 when a bound is broken."""
    # The client library logs a traceback when this script cuts its own connections, as it must.
    logging.getLogger("websockets.client").setLevel(logging.CRITICAL + 1)
    cases, started = make_cases(seed), time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with ServerProcess(folder) as server:
            warm_up = max(LEAST_WARM_UP, round(WARM_UP_SHARE * requests))
            storm(server, cases, clients, warm_up, seed + 1, "warm-up")
            tally, memory = storm(server, cases, clients, requests, seed, "soak")
        summary = summarise(tally, memory, server.failures)
        summary["sigterm"] = terminate_under_load(folder, cases, clients)
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
