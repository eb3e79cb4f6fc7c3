"""Goodput at 90 % load: our batcher against a greedy one, Poisson arrivals with deadlines.

The same server and the same policy, 25 ms a batch of at most 4 (as on a CPU), once with its own
batcher and once with one that starts whatever waits, oldest first, and looks at no deadline. The
load is 90 % of what the former answers in a closed loop on this machine. Blocks are measured in
turn; the load generator's own ceiling is stated. The last column is the ratio of two ideal servers
in simulated time: large batches even out what arrives, so that with ``--max-batch 16`` a greedy
batcher does nearly as well as any. Prints markdown, writes JSON.

    python benchmarks/deadlines.py [--rounds 7] [--seconds 8] [--deadlines 55,60,75] [--max-batch 4]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import deque
from typing import Any

import numpy as np
from common import Processes, describe_machine, write_json

CLIENTS = 64
BATCHERS = ("greedy", "session_aware")
LOAD = 0.9


def serve(batcher: str, port: int, max_batch: int) -> None:
    from synthetic_policy import SmallImages

    import reflexarc.server.service as service_module
    from reflexarc.server import PolicyServer, PolicyService
    from reflexarc.server.batching import Batcher
    from reflexarc.server.lifecycle import open_port
    from reflexarc.server.user_policy import UserPolicy

    class GreedyBatcher(Batcher):
        def schedule(self) -> None:
            if self._waiting and self._ends_at is None:
                self._start(self._waiting[: self._max_batch], time.perf_counter())

    if batcher == "greedy":
        service_module.Batcher = GreedyBatcher  # type: ignore[misc]
    service = PolicyService(
        lambda: UserPolicy(SmallImages, "synthetic"), max_batch=max_batch, max_waiting=4 * CLIENTS
    )
    PolicyServer(service).run([open_port("127.0.0.1", port)])


def measure(rounds: int, seconds: float, deadlines: list[float], max_batch: int) -> dict[str, Any]:
    from reflexarc.client.load import LoadSettings, run_load

    with Processes("deadlines") as processes:
        servers = {
            batcher: processes.serve(
                sys.executable, __file__, "--serve", batcher, "--max-batch", str(max_batch)
            )
            for batcher in BATCHERS
        }
        url = {batcher: f"ws://127.0.0.1:{port}" for batcher, port in servers.items()}
        closed = LoadSettings(url["session_aware"], clients=2 * max_batch, seconds=seconds)
        capacity = run_load(closed)
        rate = LOAD * capacity.throughput
        blocks: list[dict[str, Any]] = []
        for number in range(rounds):
            for deadline in deadlines:
                order = BATCHERS if number % 2 else BATCHERS[::-1]
                for batcher in order:
                    found = run_load(
                        LoadSettings(
                            url[batcher],
                            clients=CLIENTS,
                            rate=rate,
                            deadline_ms=deadline,
                            seconds=seconds,
                            seed=number,
                        ),
                        ceiling=False,
                    )
                    kept = found.to_json()
                    blocks.append({"round": number, "batcher": batcher, **kept})
    return {"capacity": capacity.to_json(), "rate": rate, "blocks": blocks}


def ideal_share(
    rate: float, seconds: float, deadline: float, max_batch: int, *, drop_late: bool
) -> float:
    """Share answered in time by a server without overhead, oldest first.

    Args:
        rate: of Poisson arrivals, a second.
        seconds: of a batch.
        deadline: after an arrival, in seconds.
        max_batch: rows of a batch.
        drop_late: whether requests that would be late are left out.
    """
    count = 50_000
    arrivals = np.cumsum(np.random.default_rng(0).exponential(1 / rate, count)).tolist()
    waiting: deque[float] = deque()
    now, place, good = 0.0, 0, 0
    while place < count or waiting:
        if not waiting:
            now = max(now, arrivals[place])
        while place < count and arrivals[place] <= now:
            waiting.append(arrivals[place])
            place += 1
        while drop_late and waiting and now + seconds > waiting[0] + deadline:
            waiting.popleft()
        batch = [waiting.popleft() for _ in range(min(max_batch, len(waiting)))]
        if batch:
            now += seconds
            good += sum(now <= arrival + deadline for arrival in batch)
    return good / count


def report(result: dict[str, Any], deadlines: list[float], max_batch: int) -> dict[str, Any]:
    """Prints markdown; returns the figures."""
    capacity = result["capacity"]
    print(
        f"25 ms a batch of at most {max_batch}, Poisson arrivals at {result['rate']:.0f}/s "
        f"({LOAD:.0%} of {capacity['throughput']:.0f}/s in a closed loop; the load generator "
        f"alone reaches {capacity['generator_ceiling']:.0f}/s); {describe_machine()}.\n\n"
        "| deadline ms | greedy, in time/s | ours | greedy, share | ours | ratio | ideal ratio |\n"
        "|---:|---:|---:|---:|---:|---:|---:|"
    )
    rows = []
    for deadline in deadlines:
        of_deadline = [b for b in result["blocks"] if b["settings"]["deadline_ms"] == deadline]
        by_batcher = {
            batcher: [b for b in of_deadline if b["batcher"] == batcher] for batcher in BATCHERS
        }
        greedy, ours = (by_batcher[batcher] for batcher in BATCHERS)
        # A round in which the greedy one answers nothing in time has no ratio: one answer a second
        # is taken for it, which favours the greedy one.
        ratio = statistics.median(
            b["goodput"] / max(a["goodput"], 1.0) for a, b in zip(greedy, ours, strict=True)
        )
        batch_seconds = max_batch / capacity["throughput"]
        shares = [
            ideal_share(result["rate"], batch_seconds, deadline / 1000, max_batch, drop_late=drop)
            for drop in (True, False)
        ]
        ideal = shares[0] / max(shares[1], 1e-9)
        figures = [
            statistics.median(block[name] for block in blocks)
            for name in ("goodput", "goodput_share")
            for blocks in (greedy, ours)
        ]
        print(
            f"| {deadline:g} | {figures[0]:.1f} | {figures[1]:.1f} | {figures[2]:.1%} | "
            f"{figures[3]:.1%} | {ratio:.2f} | {ideal:.2f} |"
        )
        row = {"deadline_ms": deadline, "ratio": ratio, "ideal_ratio": ideal, "at_least": 1.5}
        rows.append(row)
    print("\nTarget: a ratio of at least 1.5.")
    return {**result, "ratios": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=8.0, help="of a block")
    parser.add_argument("--deadlines", default="55,60,75", help="milliseconds, comma-separated")
    parser.add_argument("--max-batch", type=int, default=4)
    parser.add_argument("--serve", choices=BATCHERS, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.port, options.max_batch)
        return
    deadlines = [float(text) for text in options.deadlines.split(",")]
    result = measure(options.rounds, options.seconds, deadlines, options.max_batch)
    write_json("deadlines", report(result, deadlines, options.max_batch))


if __name__ == "__main__":
    main()
