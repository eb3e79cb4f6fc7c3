"""Environment steps a second: rendering every step against rendering once a chunk.

Both ways run in turn in one process, from the same seeded resets with the same actions; the
final simulator states must be bit-identical. Prints markdown.

    python benchmarks/simulator_steps.py [--episodes 5] [--steps 80] [--chunk 8]
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from reflexarc.eval.libero.simulator import LiberoSimulator
from reflexarc.eval.libero.suites import load_tasks


def run_episode(
    simulator: LiberoSimulator, seed: int, actions: npt.NDArray[np.float64], render_every: int
) -> tuple[float, npt.NDArray[np.float64]]:
    """``(steps a second, final state)`` of one episode, without its reset."""
    simulator.reset_seeded(seed)
    simulator.observe()  # the first frame after a reset uploads textures
    start = time.perf_counter()
    for step, action in enumerate(actions):
        if step % render_every == 0:
            simulator.observe()
        simulator.step(action)
    return len(actions) / (time.perf_counter() - start), simulator.state()


def describe_machine() -> str:
    import mujoco

    model = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.is_file():
        names = [line for line in cpu_info.read_text().splitlines() if "model name" in line]
        model = names[0].split(":")[1].strip() if names else model
    return (
        f"{model}, {os.cpu_count()} cores, MuJoCo {mujoco.__version__}, "
        f"{os.environ.get('MUJOCO_GL', 'default')} rendering"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", default="libero_object")
    parser.add_argument("--task", type=int, default=0)
    parser.add_argument("--episodes", type=int, default=5)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--chunk", type=int, default=8, help="steps between two renderings")
    parser.add_argument("--image-size", type=int, default=256)
    options = parser.parse_args()

    every: list[float] = []
    on_demand: list[float] = []
    task = load_tasks(options.suite)[options.task]
    with LiberoSimulator(task, image_size=options.image_size) as simulator:
        for episode in range(options.episodes):
            rng = np.random.default_rng(episode)
            actions = np.clip(rng.normal(0, 0.4, (options.steps, 7)), -1, 1)
            finals = []
            for rates, render_every in ((every, 1), (on_demand, options.chunk)):
                rate, final = run_episode(simulator, episode, actions, render_every)
                rates.append(rate)
                finals.append(final)
            first, second = finals
            assert np.array_equal(first, second), f"episode {episode}: final states differ"
    slow, fast = statistics.median(every), statistics.median(on_demand)
    print(
        "| task | image | steps/s, render every step | steps/s, render every "
        f"{options.chunk} steps | ratio | final states | machine |\n"
        "|---|---|---|---|---|---|---|\n"
        f"| {options.suite} {options.task} | {options.image_size} px, 2 cameras "
        f"| {slow:.1f} | {fast:.1f} | {fast / slow:.1f} | bit-identical, "
        f"{options.episodes} of {options.episodes} episodes | {describe_machine()} |"
    )


if __name__ == "__main__":
    main()
