"""Many clients of a policy that takes 25 ms a batch: our server against openpi-server.

The policy sleeps 25 ms, whatever the batch, as a thread does that waits for a GPU. Both servers,
and the unmodified openpi clients that ask them, run in processes of their own; blocks of all
scenarios are measured in turn. While 16 clients ask, ``/livez`` is polled, also of a null policy
whose clients pause for 25 ms and so ask at the same pace. Prints markdown, writes JSON.

    python benchmarks/batching.py [--rounds 7] [--seconds 3]
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import Processes, describe_machine, openpi_python, openpi_server, write_json
from synthetic_policy import BATCH_MS

from reflexarc.client.load import jain_index

LOAD = str(Path(__file__).with_name("openpi_load.py"))
SIZES = {"small": 32, "large": 224}
IDEAL_A_CLIENT = 1000 / BATCH_MS
CLIENT_PROCESSES = 2
LIVEZ_PAUSE_SECONDS = 0.1  # seldom, so that the polling itself takes nothing from who is measured


@dataclass(frozen=True)
class Scenario:
    """Clients of one server.

    Attributes:
        server: openpi, or ours: small, large (images), small null, large null.
        size: small or large images.
        clients: at once.
        think_ms: pause between a reply and the next request.
    """

    server: str
    size: str
    clients: int
    think_ms: float = 0.0


SCENARIOS = {
    f"{size} {clients} {name}": Scenario(size if name == "ours" else name, size, clients)
    for size, clients in (("small", 16), ("large", 16), ("small", 4), ("small", 1))
    for name in ("openpi", "ours")
}
SCENARIOS["small 16 null, pausing"] = Scenario("small null", "small", 16, think_ms=BATCH_MS)
# What clients and server reach when nothing has to be computed.
SCENARIOS |= {f"{size} 16 null": Scenario(f"{size} null", size, 16) for size in SIZES}


@dataclass(frozen=True)
class Target:
    """A bound on a figure, ``at_least`` or ``at_most``."""

    what: str
    value: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool:
        low = -np.inf if self.at_least is None else self.at_least
        high = np.inf if self.at_most is None else self.at_most
        return bool(low <= self.value <= high)


class Livez:
    """Polls ``/livez`` while the ``with`` block runs."""

    def __init__(self, port: int) -> None:
        self._port, self._end = port, threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self.milliseconds: list[float] = []

    def __enter__(self) -> Livez:
        self._thread.start()
        return self

    def _poll(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        while not self._end.wait(LIVEZ_PAUSE_SECONDS):
            started = time.perf_counter()
            connection.request("GET", "/livez")
            assert connection.getresponse().read()
            self.milliseconds.append((time.perf_counter() - started) * 1000)

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


class Bench:
    """The servers and client processes, and one block of a scenario."""

    def __init__(self, processes: Processes, seconds: float, options: Sequence[str]) -> None:
        self._processes, self._seconds = processes, seconds
        ours = (str(Path(sys.executable).with_name("serve-policy")), *options, "--policy")
        self._ports = {
            "openpi": processes.serve(*openpi_server(BATCH_MS)),
            "small": processes.serve(*ours, "benchmarks.synthetic_policy:SmallImages"),
            "large": processes.serve(*ours, "benchmarks.synthetic_policy:LargeImages"),
            "small null": processes.serve(*ours, "benchmarks.synthetic_policy:SmallNull"),
            "large null": processes.serve(*ours, "benchmarks.synthetic_policy:LargeNull"),
        }
        self._clients = [processes.start(openpi_python(), LOAD) for _ in range(CLIENT_PROCESSES)]

    def run(self, scenario: Scenario) -> dict[str, Any]:
        """Answers a second, latencies and fairness of one block; ``/livez`` of ours."""
        shares = np.array_split(np.arange(scenario.clients), CLIENT_PROCESSES)
        pairs = [(c, len(s)) for c, s in zip(self._clients, shares, strict=True) if len(s)]
        block = {
            "port": self._ports[scenario.server],
            "size": SIZES[scenario.size],
            "seconds": self._seconds,
            "warm_up": 1.0,
            "think_ms": scenario.think_ms,
            "start": time.monotonic() + 1.0,
        }
        for client, count in pairs:
            assert client.stdin is not None
            client.stdin.write(json.dumps({**block, "clients": count}) + "\n")
            client.stdin.flush()
        livez: list[float] = []
        if scenario.server != "openpi":
            with Livez(self._ports[scenario.server]) as polled:
                times = [t for client, _ in pairs for t in self._processes.read(client)]
            livez = polled.milliseconds
        else:
            times = [t for client, _ in pairs for t in self._processes.read(client)]
        latencies = np.concatenate([np.array(t) for t in times])
        return {
            "answers_per_second": latencies.size / self._seconds,
            "median_ms": float(np.median(latencies)),
            "p95_ms": float(np.quantile(latencies, 0.95)),
            "fairness": jain_index([len(t) for t in times]),
            "livez_p95_ms": float(np.quantile(livez, 0.95)) if livez else None,
        }


def measure(rounds: int, seconds: float, options: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Figures of every block: scenario -> round."""
    with Processes("batching") as processes:
        bench = Bench(processes, seconds, options)
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in SCENARIOS}
        order = list(SCENARIOS)
        for _ in range(rounds):
            for name in order:
                results[name].append(bench.run(SCENARIOS[name]))
            order = order[1:] + order[:1]
        return results


def targets(results: dict[str, list[dict[str, Any]]]) -> list[Target]:
    """The figures that the targets are about; ratios are medians over the rounds' ratios."""

    def figure(scenario: str, name: str = "answers_per_second") -> float:
        return statistics.median(block[name] for block in results[scenario])

    def ratio(above: str, below: str, name: str = "answers_per_second") -> float:
        pairs = zip(results[above], results[below], strict=True)
        return statistics.median(a[name] / b[name] for a, b in pairs)

    def of_ideal(scenario: str) -> float:
        return figure(scenario) / (IDEAL_A_CLIENT * SCENARIOS[scenario].clients)

    return [
        Target("small, 16 clients, to openpi", ratio("small 16 ours", "small 16 openpi"), 10.0),
        Target("small, 16 clients, of 640/s", of_ideal("small 16 ours"), 0.85),
        Target("301 kB, 16 clients, to openpi", ratio("large 16 ours", "large 16 openpi"), 7.0),
        Target("301 kB, 16 clients, of 640/s", of_ideal("large 16 ours"), 0.70),
        Target("small, 4 clients, of 160/s", of_ideal("small 4 ours"), 0.88),
        Target(
            "1 client, median latency to unbatched openpi",
            ratio("small 1 ours", "small 1 openpi", "median_ms"),
            at_most=1.03,
        ),
        Target("fairness, small, 16 clients", figure("small 16 ours", "fairness"), 0.95),
        Target("fairness, 301 kB, 16 clients", figure("large 16 ours", "fairness"), 0.95),
        Target(
            "/livez p95 under 16 clients, to a null policy's",
            ratio("small 16 ours", "small 16 null, pausing", "livez_p95_ms"),
            at_most=3.0,
        ),
    ]


def report(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Prints markdown; returns the figures."""
    rounds = len(next(iter(results.values())))
    print(
        f"Policy of {BATCH_MS:g} ms a batch, unmodified openpi clients in {CLIENT_PROCESSES} "
        f"processes, medians of {rounds} rounds; {describe_machine()}.\n\n"
        "| images, clients, server | answers/s | median ms | p95 ms | Jain | /livez p95 ms |\n"
        "|---|---:|---:|---:|---:|---:|"
    )
    medians: dict[str, dict[str, float]] = {}
    for name, blocks in results.items():
        medians[name] = {
            key: statistics.median(block[key] for block in blocks)
            for key in blocks[0]
            if blocks[0][key] is not None
        }
        found = medians[name]
        livez = f"{found['livez_p95_ms']:.2f}" if "livez_p95_ms" in found else ""
        print(
            f"| {name} | {found['answers_per_second']:.1f} | {found['median_ms']:.1f} | "
            f"{found['p95_ms']:.1f} | {found['fairness']:.3f} | {livez} |"
        )
    print("\n| figure | measured | target | met |\n|---|---:|---:|---|")
    shown = targets(results)
    for target in shown:
        bound = f"≥ {target.at_least:g}" if target.at_least is not None else f"≤ {target.at_most:g}"
        met = "yes" if target.met else "no"
        print(f"| {target.what} | {target.value:.3f} | {bound} | {met} |")
    return {
        "rounds": rounds,
        "medians": medians,
        "blocks": results,
        "targets": [{**vars(target), "met": target.met} for target in shown],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a block")
    options, ours = parser.parse_known_args()  # what is unknown goes to serve-policy
    write_json("batching", report(measure(options.rounds, options.seconds, ours)))


if __name__ == "__main__":
    main()
