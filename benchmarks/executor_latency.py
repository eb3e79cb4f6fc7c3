"""Executors at injected latencies: success and time in LIBERO, by task, with a plot.

    python benchmarks/executor_latency.py [--plan] [--tasks 0,6,8] [--states 30-39] [--workers 2]

Serves a checkpoint and runs every executor at every latency on the same initial states. The
latency counts in control steps of 50 ms, so that a slow machine changes no result. Every
finished episode is kept: the same command goes on where it was interrupted. Writes
``executor_latency.json``, ``.png`` and ``.svg`` beside the episodes; with ``--plot-only`` from
what is finished.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, get_args

from common import OUTPUTS, Processes, write_json
from scipy.stats import t as student

from reflexarc.client import ExecutorName
from reflexarc.eval.durable_log import RESULTS_FILE
from reflexarc.eval.intervals import PairedCounts, paired_difference, wilson_interval
from reflexarc.eval.results import EpisodeResult
from reflexarc.eval.run import evaluate
from reflexarc.eval.run_settings import DEFAULT_REPLAN_STEPS, RunSettings, parse_indices
from reflexarc.eval.saved_run import read_results

EXECUTORS: tuple[ExecutorName, ...] = get_args(ExecutorName)
LATENCIES_MS = (0, 100, 200, 400)
STEP_SECONDS = 0.05
TITLE = "Executors at injected latencies"
COLOURS = ("#4053d3", "#ddb310", "#b51d14", "#00b25d")


def settings_of(
    options: argparse.Namespace, executor: ExecutorName, latency: int, server: str
) -> RunSettings:
    return RunSettings(
        server=server,
        suite=options.suite,
        tasks=parse_indices(options.tasks, "--tasks"),
        states=parse_indices(options.states, "--states"),
        executor=executor,
        latency_ms=latency,
        replan_steps=DEFAULT_REPLAN_STEPS[executor],
        max_steps=options.max_steps,
        videos="none",
        workers=options.workers,
        output=options.output / f"{executor}_{latency}ms",
    )


def combinations(options: argparse.Namespace) -> list[tuple[ExecutorName, int]]:
    """Every latency of an executor after the other, so that early ends compare latencies."""
    return [(e, latency) for latency in options.latencies for e in options.executors]


def finished(run: RunSettings) -> list[EpisodeResult]:
    """The episodes of a run that are there already, of those that were asked for."""
    path, asked = run.output / RESULTS_FILE, set(run.all_episodes())
    if not path.is_file() or b"\n" not in path.read_bytes():
        return []
    return [result for result in read_results(run.output) if result.key in asked]


def print_plan(options: argparse.Namespace) -> None:
    runs = [settings_of(options, *c, "ws://127.0.0.1:0") for c in combinations(options)]
    done = [finished(run) for run in runs]
    asked = sum(len(run.all_episodes()) for run in runs)
    left = asked - sum(map(len, done))
    print(f"{len(runs)} runs of {len(runs[0].all_episodes())} episodes; {left} of {asked} left")
    for run, results in zip(runs, done, strict=True):
        seconds = f", {fmean(r.seconds for r in results):.0f} s each" if results else ""
        print(f"  {run.executor} at {run.latency_ms:g} ms: {len(results)} done{seconds}")
    seen = [result.seconds for results in done for result in results]
    if seen:
        hours = left * fmean(seen) / options.workers / 3600
        print(f"about {hours:.1f} h at {fmean(seen):.0f} s an episode, {options.workers} workers")


def run_all(options: argparse.Namespace) -> None:
    serve = str(Path(sys.executable).with_name("serve-policy"))
    with Processes("executor_latency") as processes:
        port = processes.serve(serve, "--ckpt", str(options.ckpt), "--device", options.device)
        for executor, latency in combinations(options):
            run = settings_of(options, executor, latency, f"ws://127.0.0.1:{port}")
            if len(finished(run)) < len(run.all_episodes()):
                print(f"{executor} at {latency} ms", flush=True)
                evaluate(run)


def figures(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for every executor, latency and task, and one for all tasks (``task`` None)."""
    rows = []
    for executor, latency in combinations(options):
        run = settings_of(options, executor, latency, "ws://127.0.0.1:0")
        results = finished(run)
        for task in (*run.tasks, None):
            chosen = [r for r in results if task in (r.task, None)]
            if chosen:
                rows.append({"executor": executor, "latency_ms": latency, "task": task,
                             **row_of(chosen)})  # fmt: skip
    return rows


def row_of(results: Sequence[EpisodeResult]) -> dict[str, Any]:
    """Success with Wilson's interval; simulated seconds with Student's over episodes."""
    rate = wilson_interval(sum(r.success for r in results), len(results))
    return {
        "instruction": results[0].instruction,
        "successes": sum(r.success for r in results),
        "episodes": len(results),
        "success": [rate.estimate, rate.low, rate.high],
        "seconds_of_successes": mean_interval(
            [r.steps * STEP_SECONDS for r in results if r.success]
        ),
        "seconds_failures_at_limit": mean_interval([r.steps * STEP_SECONDS for r in results]),
        "held_share": sum(r.held_steps for r in results) / sum(r.steps for r in results),
        "steps_a_chunk": sum(r.steps for r in results) / sum(r.chunks for r in results),
        "outcomes": {f"{r.task}/{r.state}": r.success for r in results},
    }


def mean_interval(values: Sequence[float]) -> list[float] | None:
    """``[mean, low, high]``, 95 %; without two values the limits are the mean."""
    if not values:
        return None
    mean = fmean(values)
    if len(values) < 2:
        return [mean, mean, mean]
    half = float(student.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return [mean, mean - half, mean + half]


def differences(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Success of all tasks minus receding horizon's at the same latency, paired by state."""
    found = []
    totals = {(r["executor"], r["latency_ms"]): r["outcomes"] for r in rows if r["task"] is None}
    for (executor, latency), outcomes in totals.items():
        base = totals.get(("receding_horizon", latency), {})
        pairs = [(outcomes[key], base[key]) for key in outcomes if key in base]
        if executor != "receding_horizon" and pairs:
            lead = paired_difference(PairedCounts.from_outcomes(pairs))
            found.append({"executor": executor, "latency_ms": latency, "pairs": len(pairs),
                          "difference": [lead.estimate, lead.low, lead.high]})  # fmt: skip
    return found


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| task | latency | executor | success | seconds, of successes | held | steps a chunk |",
        "| :-- | --: | :-- | --: | --: | --: | --: |",
    ]
    for row in sorted(rows, key=lambda r: (r["task"] is None, r["task"] or 0, r["latency_ms"])):
        _, low, high = row["success"]
        seconds = row["seconds_of_successes"]
        time = "-" if seconds is None else "{:.1f} [{:.1f}, {:.1f}]".format(*seconds)
        lines.append(
            f"| {'all' if row['task'] is None else row['task']} | {row['latency_ms']} ms "
            f"| {row['executor'].replace('_', ' ')} "
            f"| {row['successes']}/{row['episodes']} [{100 * low:.0f}, {100 * high:.0f}] "
            f"| {time} | {100 * row['held_share']:.0f} % | {row['steps_a_chunk']:.1f} |"
        )
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Success above, time below; a column for each task and one for all."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = [*sorted({r["task"] for r in rows if r["task"] is not None}), None]
    figure, axes = pyplot.subplots(
        2, len(tasks), figsize=(3.4 * len(tasks) + 1, 6.4), sharex=True, sharey="row", squeeze=False
    )
    for column, task in enumerate(tasks):
        here = [row for row in rows if row["task"] == task]
        axes[0][column].set_title(
            "all tasks" if task is None else f"{task}: {short(here[0]['instruction'])}", fontsize=9
        )
        for place, (executor, colour) in enumerate(zip(EXECUTORS, COLOURS, strict=True)):
            mine = [row for row in here if row["executor"] == executor]
            shift = 6 * (place - 1.5)  # side by side, or the intervals hide each other
            label = executor.replace("_", " ")
            draw(axes[0][column], mine, "success", shift, colour, label, scale=100)
            draw(axes[1][column], mine, "seconds_of_successes", shift, colour, label)
        axes[1][column].set_xlabel("injected latency [ms]")
        axes[1][column].set_xticks(sorted({row["latency_ms"] for row in rows}))
        for axis in (axes[0][column], axes[1][column]):
            axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("success [%]")
    axes[0][0].set_ylim(-4, 104)
    axes[1][0].set_ylabel("seconds to success")
    axes[1][0].set_ylim(bottom=0)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False)
    figure.suptitle(f"{TITLE}: 95 % intervals over initial states")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    for kind in ("png", "svg"):
        figure.savefig(folder / f"executor_latency.{kind}", dpi=150)
    pyplot.close(figure)


def draw(
    axis: Any, rows: Sequence[dict[str, Any]], name: str, shift: float, colour: str, label: str,
    scale: float = 1.0,
) -> None:  # fmt: skip
    points = [(row["latency_ms"] + shift, *row[name]) for row in rows if row[name] is not None]
    if points:
        x, mean, low, high = zip(*sorted(points), strict=True)
        below = [scale * (m - lo) for m, lo in zip(mean, low, strict=True)]
        above = [scale * (hi - m) for m, hi in zip(mean, high, strict=True)]
        axis.errorbar(x, [scale * m for m in mean], [below, above], color=colour, label=label,
                      marker="o", markersize=4, linewidth=1.2, capsize=2)  # fmt: skip


def short(instruction: str) -> str:
    return instruction.removeprefix("pick up the ").removesuffix(" and place it in the basket")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt", type=Path, default=Path("checkpoints/demo"))
    parser.add_argument("--suite", default="libero_object")
    parser.add_argument("--tasks", default="0,6,8")
    parser.add_argument("--states", default="30-39")
    parser.add_argument("--latencies", type=int, nargs="+", default=list(LATENCIES_MS))
    parser.add_argument("--executors", nargs="+", default=list(EXECUTORS), choices=EXECUTORS)
    parser.add_argument("--max-steps", type=int, default=400, help="20 s of simulated time")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=OUTPUTS / "executor_latency")
    parser.add_argument("--plan", action="store_true", help="say what is left, and end")
    parser.add_argument("--plot-only", action="store_true", help="of what is finished")
    options = parser.parse_args()
    print_plan(options)
    if options.plan:
        return
    if not options.plot_only:
        run_all(options)
    rows = figures(options)
    if not rows:
        raise SystemExit("nothing is finished yet")
    result = {"title": TITLE, "max_steps": options.max_steps, "rows": rows,
              "against_receding_horizon": differences(rows)}  # fmt: skip
    path = write_json("executor_latency", result, options.output / "executor_latency.json")
    plot(rows, options.output)
    print(f"\n{markdown(rows)}\n\n{path}, {path.with_suffix('.png')}, {path.with_suffix('.svg')}")


if __name__ == "__main__":
    main()
