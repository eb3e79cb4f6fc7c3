"""Replicas on Ray Serve: throughput of two against one, a replica killed, all of them replaced.

    python benchmarks/replicas.py [--seconds 5] [--rounds 3] [--demo]

Throughput: closed loops against one process without Ray, one replica and two, in turn; a policy
that takes 20 ms a row, as a device that is full, or with ``--demo`` the demo checkpoint on one
thread each. Kill and replacement: robots whose policy sees the states of four steps, kept in its
replica; what they were told is compared with what a single process would have told them.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.request import urlopen

import numpy as np
from common import OUTPUTS, ROOT, free_port

sys.path.insert(0, str(ROOT))
from benchmarks.replica_policies import process_of

from reflexarc.client import PolicyClient, RecedingHorizonExecutor
from reflexarc.contract import Observation

SERVE = (sys.executable, "-c", "from reflexarc.cli.main import serve_policy; serve_policy()")
ROW_MS = 20.0
ROBOTS = 8
STEP_SECONDS = 0.05  # of a robot at 20 Hz; it asks every second step
SIDES = {"one process": (), "1 replica": ("--replicas", "1"), "2 replicas": ("--replicas", "2")}


@contextmanager
def serving(name: str, *options: str) -> Iterator[tuple[str, int, Path]]:
    """``(url, process id, log)`` of a server that is ready."""
    log = OUTPUTS / f"replicas-{name.replace(' ', '-')}.log"
    OUTPUTS.mkdir(parents=True, exist_ok=True)
    port = free_port()

    with log.open("w") as output:
        process = subprocess.Popen(
            [*SERVE, *options, "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        try:
            wait_for(log, "Ready.")
            yield f"ws://127.0.0.1:{port}", process.pid, log
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        finally:
            process.kill()
            process.wait()


def wait_for(log: Path, text: str, seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while text not in log.read_text():
        if time.monotonic() > end or "error [" in log.read_text():
            raise SystemExit(f"{text!r} is not in {log}")
        time.sleep(0.1)


def observe(size: int, step: int, instruction: str) -> Observation:
    images = {name: np.zeros((size, size, 3), np.uint8) for name in ("agentview", "eye_in_hand")}
    state = np.zeros(8)
    state[0] = step
    return Observation(images, state, instruction, step_index=step)


def answers_a_second(url: str, clients: int, seconds: float) -> tuple[float, float]:
    """``(answers a second, median latency in ms)`` of closed loops, each a session of its own."""
    latencies: list[float] = []
    end = time.monotonic() + seconds

    def ask() -> None:
        with PolicyClient(url, retry_for=30) as policy:
            camera = policy.contract.cameras[0]
            observation = observe(
                camera.height, 0, "pick up the alphabet soup and place it in the basket"
            )
            while time.monotonic() < end:
                began = time.perf_counter()
                policy.infer(observation)
                latencies.append((time.perf_counter() - began) * 1000)

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(latencies) / seconds, statistics.median(latencies)


def throughput(options: tuple[str, ...], clients: int, seconds: float, rounds: int) -> None:
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in SIDES}
    with ExitStack() as stack:
        urls = {
            name: stack.enter_context(serving(name, *options, *extra))[0]
            for name, extra in SIDES.items()
        }
        for url in urls.values():
            answers_a_second(url, clients, 1.0)
        for _ in range(rounds):
            for name, url in urls.items():
                measured[name].append(answers_a_second(url, clients, seconds))
    base = statistics.median(rate for rate, _ in measured["one process"])
    print(f"| {clients} closed loops | answers a second | p50 ms | against one process |")
    print("|---|--:|--:|--:|")
    for name, values in measured.items():
        rate = statistics.median(rate for rate, _ in values)
        latency = statistics.median(latency for _, latency in values)
        ratios = [
            value[0] / single[0]
            for value, single in zip(values, measured["one process"], strict=True)
        ]
        spread = f"{min(ratios):.2f} - {max(ratios):.2f}"
        print(f"| {name} | {rate:.1f} | {latency:.0f} | {rate / base:.2f} ({spread}) |")
    print(flush=True)


@dataclass
class Robots:
    """What robots saw while replicas died or were replaced."""

    decisions: int = 0
    wrong: int = 0
    errors: list[str] = field(default_factory=list)
    slowest_ms: float = 0.0
    processes: set[int] = field(default_factory=set)

    def run(self, url: str, stop: threading.Event) -> None:
        try:
            with PolicyClient(url, retry_for=60) as policy:
                executor = RecedingHorizonExecutor(policy, replan_steps=2)
                step = 0
                while not stop.is_set():
                    began = time.perf_counter()
                    action = executor.next_action(
                        lambda step=step: observe(32, step, "go")  # type: ignore[misc]
                    )
                    self.slowest_ms = max(self.slowest_ms, (time.perf_counter() - began) * 1000)
                    if step % 2 == 1:  # says the sum of what its decision remembered
                        first = step - 1
                        wanted = min(1000, sum(range(max(0, first - 3), first + 1)))
                        self.decisions += 1
                        self.wrong += round(float(action[0]) * 1000) != wanted
                    step += 1
                    time.sleep(STEP_SECONDS)
        except Exception as error:
            self.errors.append(repr(error))


def codes(url: str) -> dict[str, int]:
    text = urlopen(url.replace("ws://", "http://") + "/metrics", timeout=30).read().decode()
    found: Counter[str] = Counter()
    for line in text.splitlines():
        if line.startswith("reflexarc_requests_total{"):
            found[line.partition('code="')[2].partition('"')[0]] += int(float(line.split()[-1]))
    return dict(found)


def which(url: str) -> set[int]:
    """Processes that answer new sessions."""
    with PolicyClient(url, retry_for=60) as policy:
        sessions = (f"which-{time.monotonic()}-{number}" for number in range(6))
        observation = observe(32, 0, "go")

        return {process_of(policy.infer(replace(observation, session_id=s))) for s in sessions}


def disturbed(what: str, seconds: float) -> None:
    """Robots ask while a replica is killed, or while all of them are replaced."""
    config = Path(tempfile.mkdtemp(prefix="reflexarc-")) / "policy.json"
    config.write_text(f'{{"milliseconds": {ROW_MS}}}')
    policy = ("--policy", "benchmarks.replica_policies:Remembers", "--policy-config", str(config))
    with serving(what, *policy, "--replicas", "2") as (url, server, log):
        before = which(url)
        counted = codes(url)
        robots, stop = Robots(), threading.Event()
        threads = [threading.Thread(target=robots.run, args=(url, stop)) for _ in range(ROBOTS)]
        for thread in threads:
            thread.start()
        time.sleep(seconds)
        robots.slowest_ms = 0.0
        began = time.monotonic()
        if what == "kill":
            os.kill(min(before), signal.SIGKILL)
            while min(before) in which(url) or len(which(url)) < 2:
                time.sleep(0.2)
        else:
            os.kill(server, signal.SIGHUP)
            wait_for(log, "the replicas are replaced")
        lasted = time.monotonic() - began
        time.sleep(seconds)
        stop.set()
        for thread in threads:
            thread.join(120)
        after = codes(url)
    told = {code: after[code] - counted.get(code, 0) for code in sorted(after)}
    event = "a replica killed" if what == "kill" else "both replaced"
    print(
        f"| {event} | {robots.decisions} | {robots.wrong} | {len(robots.errors)} | "
        f"{', '.join(f'{code} {count}' for code, count in told.items())} | "
        f"{robots.slowest_ms:.0f} ms | {lasted:.1f} s |",
        flush=True,
    )
    for error in robots.errors[:5]:
        print(f"error: {error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--demo", action="store_true", help="also the demo checkpoint")
    parser.add_argument("--only", choices=("throughput", "kill", "replace"))
    options = parser.parse_args()
    if options.only in (None, "throughput"):
        config = Path(tempfile.mkdtemp(prefix="reflexarc-")) / "policy.json"
        config.write_text(f'{{"milliseconds": {ROW_MS}, "image_size": 224}}')
        policy = ("--policy", "benchmarks.replica_policies:WhoAnswers")
        given = (*policy, "--policy-config", str(config))
        throughput(given, options.clients, options.seconds, options.rounds)
        if options.demo:
            demo = ("--ckpt", "checkpoints/demo", "--threads", "1")
            throughput(demo, options.clients, options.seconds, options.rounds)
    if options.only != "throughput":
        print(f"| {ROBOTS} robots | decisions | with a wrong window | errors | server's answers "
              "| longest step | until whole again |")  # fmt: skip
        print("|---|--:|--:|--:|---|--:|--:|")
        for what in ("kill", "replace"):
            if options.only in (None, what):
                disturbed(what, options.seconds)


if __name__ == "__main__":
    main()
