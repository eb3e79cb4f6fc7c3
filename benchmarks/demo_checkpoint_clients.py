"""The demo checkpoint on this machine's CPU with 1, 2 and 4 clients in a closed loop.

``serve-policy --ckpt checkpoints/demo`` in a process of its own, loaded by ``reflexarc bench``'s
generator; the numbers of clients are measured in turn, round by round. Options that are not its own
go to ``serve-policy``. Prints markdown, writes JSON.

    python benchmarks/demo_checkpoint_clients.py [--rounds 5] [--seconds 10] [--max-batch 4]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from common import ROOT, Processes, describe_machine, write_json

CLIENTS = (1, 2, 4)


def measure(rounds: int, seconds: float, options: Sequence[str]) -> dict[int, list[dict[str, Any]]]:
    """Summaries: clients -> round."""
    from reflexarc.client.load import LoadSettings, run_load

    serve = str(Path(sys.executable).with_name("serve-policy"))
    results: dict[int, list[dict[str, Any]]] = {clients: [] for clients in CLIENTS}
    with Processes("demo_checkpoint_clients") as processes:
        checkpoint = str(ROOT / "checkpoints" / "demo")
        port = processes.serve(serve, "--ckpt", checkpoint, "--device", "cpu", *options)
        while httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False).status_code != 200:
            pass
        for number in range(rounds):
            for clients in CLIENTS[number % 3 :] + CLIENTS[: number % 3]:
                settings = LoadSettings(
                    f"ws://127.0.0.1:{port}",
                    clients=clients,
                    seconds=seconds,
                    warm_up_seconds=2.0,
                    processes=1,
                )
                results[clients].append(run_load(settings, ceiling=False).to_json())
    return results


def report(results: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    """Prints markdown; returns the figures. Ratios are medians over the rounds' ratios."""
    rounds = len(results[1])
    print(
        f"Demo checkpoint, 301 kB an observation, medians of {rounds} rounds; "
        f"{describe_machine()}.\n\n"
        "| clients | answers/s | to 1 client | p50 ms | p95 ms | batch | device ms | Jain |\n"
        "|---:|---:|---:|---:|---:|---:|---:|---:|"
    )
    rows = []
    for clients, blocks in results.items():

        def median(*path: str, blocks: list[dict[str, Any]] = blocks) -> float:
            values = []
            for block in blocks:
                value: Any = block
                for key in path:
                    value = value.get(key, float("nan"))
                values.append(float(value))
            return statistics.median(values)

        ratio = statistics.median(
            block["throughput"] / base["throughput"]
            for block, base in zip(blocks, results[1], strict=True)
        )
        row = {
            "clients": clients,
            "answers_per_second": median("throughput"),
            "ratio_to_one_client": ratio,
            "p50_ms": median("latency_ms", "p50"),
            "p95_ms": median("latency_ms", "p95"),
            "batch_size": median("server_timing_ms", "batch_size"),
            "device_ms": median("server_timing_ms", "device_ms"),
            "fairness": median("fairness"),
        }
        rows.append(row)
        print(
            f"| {clients} | {row['answers_per_second']:.2f} | {ratio:.2f} | {row['p50_ms']:.1f} | "
            f"{row['p95_ms']:.1f} | {row['batch_size']:.0f} | {row['device_ms']:.1f} | "
            f"{row['fairness']:.3f} |"
        )
    return {"rounds": rounds, "clients": rows, "blocks": {str(k): v for k, v in results.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="of a block")
    options, ours = parser.parse_known_args()  # what is unknown goes to serve-policy
    results = measure(options.rounds, options.seconds, ours)
    write_json("demo_checkpoint_clients", report(results))


if __name__ == "__main__":
    main()
