"""Figures of a run of the load generator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from reflexarc.client.load.settings import LoadSettings
from reflexarc.client.load.worker import ANSWERED, Samples, count_codes
from reflexarc.contract import PolicyContract

PERCENTILES = (50, 90, 95, 99)
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LoadSummary:
    """Of the requests that arrived after the warm-up.

    Attributes:
        settings: of the run.
        family, checkpoint: of the policy.
        requests: that arrived.
        answered: with a chunk.
        throughput: answers a second.
        latency_ms: of answers, from a request's arrival: mean, p50, p90, p95, p99, max.
        goodput: answers a second within the deadline; equals throughput without one.
        goodput_share: of all requests, those answered within the deadline.
        fairness: Jain's index of the clients' answers in a closed loop, 1 is even; None for
            Poisson arrivals, which the generator itself hands to clients, and without answers.
        errors: by code.
        server_timing_ms: medians of what the server stated.
        generator_processes: of the load generator.
        generator_busy: share of the time that its busiest process computed.
        generator_ceiling: requests a second that it reached alone; None where not measured.
        latencies_ms: of every answer, in order of arrival, for plots.
        arrivals_s: of these answers, after the warm-up.
    """

    settings: LoadSettings
    family: str
    checkpoint: str
    requests: int
    answered: int
    throughput: float
    latency_ms: dict[str, float]
    goodput: float
    goodput_share: float
    fairness: float | None
    errors: dict[str, int]
    server_timing_ms: dict[str, float]
    generator_processes: int
    generator_busy: float
    generator_ceiling: float | None
    latencies_ms: Floats = field(repr=False)
    arrivals_s: Floats = field(repr=False)

    @property
    def generator_limits(self) -> bool:
        """Whether the generator, and not the server, may have been the bottleneck."""
        near = self.generator_ceiling is not None and self.throughput > 0.8 * self.generator_ceiling
        return near or self.generator_busy > 0.9

    def to_json(self) -> dict[str, Any]:
        summary = asdict(self)
        del summary["latencies_ms"], summary["arrivals_s"]
        summary["settings"]["headers"] = sorted(self.settings.headers)  # never a key's value
        return {**summary, "generator_limits": self.generator_limits}


def summarise(
    settings: LoadSettings,
    contract: PolicyContract,
    samples: Sequence[Samples],
    ceiling: float | None,
) -> LoadSummary:
    begin, seconds = settings.warm_up_seconds, settings.seconds
    clients = np.concatenate([np.array(s.clients, np.int64) for s in samples])
    arrivals = np.concatenate([np.array(s.arrivals, np.float64) for s in samples])
    ends = np.concatenate([np.array(s.ends, np.float64) for s in samples])
    codes = [code for s in samples for code in s.codes]
    answered = np.array([code == ANSWERED for code in codes], bool)
    arrived = (arrivals >= begin) & (arrivals < begin + seconds)
    # Counted at the server's pace: answers that came inside the window, whenever asked.
    came = answered & (ends >= begin) & (ends < begin + seconds)
    latencies = (ends - arrivals) * 1000
    most = np.inf if settings.deadline_ms is None else settings.deadline_ms
    good = answered & (latencies <= most)
    order = np.argsort(arrivals, kind="stable")
    shown = order[(answered & arrived)[order]]
    timing: dict[str, list[float]] = {}
    for s in samples:
        for name, values in s.timing.items():
            timing.setdefault(name, []).extend(values)
    counts = np.bincount(clients[came], minlength=settings.clients)
    return LoadSummary(
        settings=settings,
        family=contract.family,
        checkpoint=contract.checkpoint_fingerprint[:16],
        requests=int(arrived.sum()),
        answered=int((answered & arrived).sum()),
        throughput=round(float(came.sum()) / seconds, 3),
        latency_ms=_percentiles(latencies[shown]),
        goodput=round(float((good & came).sum()) / seconds, 3),
        goodput_share=round(float((good & arrived).sum() / max(1, arrived.sum())), 4),
        fairness=round(jain_index(counts), 4) if settings.rate is None and came.any() else None,
        errors=count_codes([code for code, inside in zip(codes, arrived, strict=True) if inside]),
        server_timing_ms={
            name: round(float(np.median(v)), 3) for name, v in sorted(timing.items())
        },
        generator_processes=len(samples),
        generator_busy=round(max(s.busy for s in samples), 3),
        generator_ceiling=ceiling,
        latencies_ms=latencies[shown],
        arrivals_s=arrivals[shown] - begin,
    )


def jain_index(values: npt.ArrayLike) -> float:
    """Jain's index of fairness, from 1/n (one gets all) to 1 (all get the same).

    After https://arxiv.org/abs/cs/9809099.
    """
    x = np.asarray(values, np.float64)
    squares = float((x**2).sum())
    return float(x.sum() ** 2 / (x.size * squares)) if squares else 1.0


def _percentiles(latencies: Floats) -> dict[str, float]:
    if not latencies.size:
        return {}
    found = np.percentile(latencies, PERCENTILES)
    named = {f"p{p}": round(float(v), 3) for p, v in zip(PERCENTILES, found, strict=True)}
    return {
        "mean": round(float(latencies.mean()), 3),
        **named,
        "max": round(float(latencies.max()), 3),
    }
