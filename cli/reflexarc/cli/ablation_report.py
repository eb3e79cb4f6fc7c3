"""What the arms of an ablation cost and reached: ``ablation.json``, ``.md`` and ``.png``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reflexarc.training.ablation import ArmCosts
    from reflexarc.training.runs.plot import Curves

LEAST_SUCCESS = 0.3
"""Below this rate of the reference a comparison of success rates says nothing."""
_COLORS = ("#2a6f97", "#d1495b", "#3a7d44", "#8d6a9f", "#c77d16")
_DEMONSTRATION = (
    "A demonstration of the machinery, not a ranking: the compact configuration stands in for "
    "Qwen2.5-VL and for a geometry encoder, with one seed."
)


def write_report(
    output: Path, arms: Sequence[str], *, reference: str, suites: Sequence[str], compact: bool
) -> list[Path]:
    """Read the arms' runs and evaluations below ``output`` and write the three files there."""
    from reflexarc.training.ablation import read_costs

    read = {arm: read_costs(arm, output / arm) for arm in arms}
    success = {suite: _success(output / "eval" / suite, arms, reference) for suite in suites}
    costs = [cost for cost, _ in read.values()]
    values = {
        "note": _DEMONSTRATION if compact else "",
        "reference": reference,
        "arms": [asdict(cost) for cost in costs],
        "success": success,
    }
    figure = _draw([curves for _, curves in read.values()], costs, success)
    paths = [output / f"ablation.{ending}" for ending in ("json", "md", "png")]
    _replace(paths[0], json.dumps(values, indent=2).encode())
    _replace(paths[1], _markdown(values, costs).encode())
    temporary = paths[2].with_name(f".{paths[2].name}.{os.getpid()}.tmp")
    figure.savefig(temporary, dpi=110, format="png")
    temporary.replace(paths[2])
    return paths


def _success(folder: Path, arms: Sequence[str], reference: str) -> dict[str, Any]:
    """Rates of one suite, and each pair of arms on the same initial states."""
    from reflexarc.eval.compare import compare
    from reflexarc.eval.intervals import wilson_interval
    from reflexarc.eval.saved_run import read_results

    rates: dict[str, Any] = {}
    for arm in arms:
        episodes = [one for one in read_results(folder / arm) if one.arm == "policy"]
        solved = sum(one.success for one in episodes)
        interval = wilson_interval(solved, len(episodes))
        rates[arm] = {"successes": solved, "trials": len(episodes), **asdict(interval)}
    pairs = []
    for place, one in enumerate(arms):
        for other in arms[place + 1 :]:
            total = compare(folder / other, folder / one).total
            pairs.append(
                {
                    "first": other,
                    "second": one,
                    "pairs": total.pairs,
                    "difference": total.difference,
                    "low": total.low,
                    "high": total.high,
                    "mcnemar_p": total.mcnemar_p,
                }
            )
    known = rates.get(reference)
    empty = known is not None and known["estimate"] < LEAST_SUCCESS
    return {"rates": rates, "pairs": pairs, "empty": empty}


def _markdown(values: Mapping[str, Any], costs: Sequence[ArmCosts]) -> str:
    suites = values["success"]
    titles = ["arm", "parameters", *(["held out"] if costs else []), "samples/s", "memory"]
    titles += [f"{suite}: success" for suite in suites]
    lines = [" | ".join(["", *titles, ""]).strip(), "|:--|" + "--:|" * (len(titles) - 1)]
    for cost in costs:
        total = sum(cost.parameters.values())
        own = cost.parameters.get("compressor", 0)
        cells = [cost.arm, f"{total:,} (compressor {own:,})"]
        cells.append("-" if cost.best is None else f"{cost.best[0]} {cost.best[1]:.4f}")
        speed = cost.samples_per_second
        cells.append("-" if speed is None else f"{speed:.1f}")
        cells.append("-" if cost.memory is None else f"{cost.memory[1]:,.0f} MiB")
        for success in suites.values():
            cells.append(_rate(success["rates"][cost.arm]))
        lines.append("| " + " | ".join(cells) + " |")
    parts = ["\n".join(lines)]
    for suite, success in suites.items():
        parts.append(_paired(suite, success, values["reference"]))
    if values["note"]:
        parts.insert(0, values["note"])
    return "\n\n".join(parts) + "\n"


def _paired(suite: str, success: Mapping[str, Any], reference: str) -> str:
    lines = [f"{suite}, pairs on the same initial states:", ""]
    lines += ["| pair | difference in points | McNemar's p |", "|:--|--:|--:|"]
    for pair in success["pairs"]:
        low, high = 100 * pair["low"], 100 * pair["high"]
        lines.append(
            f"| {pair['first']} - {pair['second']} | {100 * pair['difference']:+.0f} "
            f"[{low:+.0f}, {high:+.0f}] | {pair['mcnemar_p']:.2f} |"
        )
    if success["empty"]:
        lines += ["", f"Empty: {reference} succeeds in fewer than {LEAST_SUCCESS:.0%} of episodes, "
                  "so that no arm shows what its geometry is worth."]  # fmt: skip
    return "\n".join(lines)


def _rate(rate: Mapping[str, Any]) -> str:
    low, high = 100 * rate["low"], 100 * rate["high"]
    return f"{rate['successes']}/{rate['trials']} [{low:.0f}, {high:.0f}]"


def _draw(runs: Sequence[Curves], costs: Sequence[ArmCosts], success: Mapping[str, Any]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 7.5), layout="constrained")
    axes = figure.subplots(2, 3).ravel()
    names = [cost.arm for cost in costs]
    colors = [_COLORS[place % len(_COLORS)] for place in range(len(names))]
    for kind, axis in (("train", axes[0]), ("validation", axes[1])):
        for run, name, color in zip(runs, names, colors, strict=True):
            metric = "total" if kind == "train" else run.best_metric
            curves = getattr(run, kind)
            if metric in curves:
                points = curves[metric]
                marker = "o" if len(points) == 1 else None  # one point makes no line
                axis.plot(*points.T, color=color, label=name, lw=1.2, marker=marker)
        axis.set_title("training loss" if kind == "train" else f"held out: {runs[0].best_metric}")
        axis.set_xlabel("step")
        axis.set_yscale("log")
    axes[0].legend(frameon=False)
    _bars(
        axes[2], names, colors, [sum(c.parameters.values()) / 1e6 for c in costs], "parameters, M"
    )
    _bars(axes[3], names, colors, [c.samples_per_second or 0 for c in costs], "samples/s")
    _bars(axes[4], names, colors, [c.memory[1] if c.memory else 0 for c in costs], "memory, MiB")
    _rates(axes[5], names, colors, success)
    return figure


def _bars(axis: Any, names: list[str], colors: list[str], values: list[float], title: str) -> None:
    axis.bar(names, values, color=colors)
    axis.set_title(title)


def _rates(axis: Any, names: list[str], colors: list[str], success: Mapping[str, Any]) -> None:
    width = 0.8 / max(1, len(success))
    for place, (suite, found) in enumerate(success.items()):
        for column, (name, color) in enumerate(zip(names, colors, strict=True)):
            rate = found["rates"][name]
            at = column + (place - (len(success) - 1) / 2) * width
            error = [[rate["estimate"] - rate["low"]], [rate["high"] - rate["estimate"]]]
            axis.bar(at, rate["estimate"], width * 0.9, yerr=error, color=color, capsize=3)
            axis.text(at, 0.01, suite, rotation=90, ha="center", fontsize=7)
    axis.set_xticks(range(len(names)), names)
    axis.set_ylim(0, 1)
    axis.set_title("success, 95 % intervals" if success else "success: not evaluated")


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
