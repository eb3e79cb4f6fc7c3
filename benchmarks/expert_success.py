"""Success of the scripted expert, by task, as markdown.

    python benchmarks/expert_success.py [--starts seeded] [--episodes 10] [--noise 0.1]

``benchmark`` starts are LIBERO's own initial states 0 to 9; ``seeded`` ones are those that
``reflexarc data collect`` uses.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

from scipy.stats import binomtest

from reflexarc.eval.libero.collect_worker import attempt_seed
from reflexarc.eval.libero.expert import ExpertResult, run_expert
from reflexarc.eval.libero.simulator import LiberoSimulator
from reflexarc.eval.libero.suites import LiberoTask, load_init_states, load_tasks

# The tasks of libero_goal whose goal is one placement.
TASKS: dict[str, Sequence[int]] = {
    "libero_object": range(10),
    "libero_spatial": range(10),
    "libero_goal": (1, 2, 4, 6, 8, 9),
}


def run_task(task: LiberoTask, starts: str, episodes: int, noise: float) -> list[ExpertResult]:
    results = []
    init_states = load_init_states(task)
    with LiberoSimulator(task, render=False) as simulator:
        for episode in range(episodes):
            if starts == "benchmark":
                simulator.reset_to_state(init_states[episode])
            else:
                simulator.reset_seeded(attempt_seed(0, task.name, episode))
            results.append(run_expert(simulator, seed=episode, noise=noise))
    return results


def interval(successes: int, episodes: int) -> str:
    """Wilson's 95 % interval in per cent."""
    bounds = binomtest(successes, episodes).proportion_ci(0.95, method="wilson")
    return f"{100 * successes / episodes:.0f} % [{100 * bounds.low:.0f}, {100 * bounds.high:.0f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suites", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--starts", default="benchmark", choices=["benchmark", "seeded"])
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--noise", type=float, default=0.0)
    options = parser.parse_args()

    print(f"Starts: {options.starts}, {options.episodes} a task; action noise {options.noise}\n")
    print("| suite | task | success | mean steps | longest | failures |\n|---|---|---|---|---|---|")
    totals = {}
    for suite in options.suites:
        tasks = load_tasks(suite)
        outcomes = []
        for index in TASKS[suite]:
            results = run_task(tasks[index], options.starts, options.episodes, options.noise)
            outcomes += results
            steps = [result.steps for result in results if result.success] or [0]
            failures = "; ".join(f"{i}: {r.reason}" for i, r in enumerate(results) if not r.success)
            succeeded = sum(result.success for result in results)
            print(
                f"| {suite} | {index} {tasks[index].instruction} "
                f"| {succeeded} of {options.episodes} "
                f"| {statistics.mean(steps):.0f} | {max(steps)} | {failures} |",
                flush=True,
            )
        successes = sum(result.success for result in outcomes)
        totals[suite] = f"{successes} of {len(outcomes)}: {interval(successes, len(outcomes))}"
    print("\n" + "\n".join(f"{suite}: {text}" for suite, text in totals.items()))


if __name__ == "__main__":
    main()
