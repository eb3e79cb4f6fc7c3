"""A picture of a run of the load generator."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from reflexarc.client.load.summary import LoadSummary


def plot_load(summary: LoadSummary, path: Path) -> None:
    """Latency over time, and its distribution with the percentiles; needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    over_time, distribution = figure.subplots(1, 2)
    settings, latencies = summary.settings, summary.latencies_ms
    load = (
        f"{settings.clients} clients, closed loop"
        if settings.rate is None
        else f"Poisson arrivals, {settings.rate:g}/s over {settings.clients} clients"
    )
    figure.suptitle(
        f"{summary.family}: {load}; {summary.throughput:.1f} answers/s, "
        f"{summary.goodput_share:.1%} of {summary.requests} requests in time"
    )
    over_time.plot(summary.arrivals_s, latencies, ".", markersize=3, alpha=0.4, color="tab:blue")
    over_time.set(xlabel="arrival, s", ylabel="latency, ms", ylim=(0, None))
    ordered = np.sort(latencies)
    share = np.arange(1, len(ordered) + 1) / max(1, len(ordered))
    distribution.plot(ordered, share, color="tab:blue")
    for name in ("p50", "p95", "p99"):
        if name in summary.latency_ms:
            value = summary.latency_ms[name]
            distribution.axvline(value, color="0.6", linewidth=0.8)
            distribution.annotate(f"{name} {value:.1f}", (value, 0.02), rotation=90, fontsize=8)
    distribution.set(xlabel="latency, ms", ylabel="share of answers", ylim=(0, 1), xlim=(0, None))
    if settings.deadline_ms is not None:
        over_time.axhline(settings.deadline_ms, color="tab:red", linewidth=1, label="deadline")
        distribution.axvline(settings.deadline_ms, color="tab:red", linewidth=1)
        over_time.legend(loc="upper right")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    figure.savefig(temporary, dpi=120, format=path.suffix.lstrip(".") or "png")
    temporary.replace(path)
