"""What a Prometheus scrape of ``GET /metrics`` sees: a listener of finished requests.

Times are seconds and sizes bytes, as Prometheus wants them. Labels take only values that this
code names (dialects, error codes, stages): a client cannot make new series.

Tallies are plain numbers that a collector of prometheus-client turns into metrics at each scrape.
Its own counters and histograms lock for each number: ten times the cost, a tenth of a round trip.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Metric, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.registry import Collector

from reflexarc.server.exchange import Exchange

# The oldest text format: every scraper reads it, and nothing of the request chooses another.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STAGES = ("queue", "decode", "preprocess", "device", "postprocess", "encode")
_IN_MS = {stage: f"{stage}_ms" for stage in (*STAGES, "total")}
PHASES = ("loading", "warming", "ready", "draining", "failed")
OK = "ok"

# A null policy answers within a millisecond, a large model on a CPU within seconds.
SECONDS = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip
BATCH_SIZES = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0)


def stage_ms(timing: Mapping[str, float], stage: str) -> float | None:
    """Milliseconds of a stage, named ``queue_ms`` or ``queue``; None where it was not measured."""
    value = timing.get(_IN_MS[stage])
    if value is None:
        value = timing.get(stage)
    return value if value is not None and 0 <= value < math.inf else None


def total_ms(exchange: Exchange) -> float:
    """Milliseconds from the arrival of the request until its reply was handed to the socket."""
    measured = stage_ms(exchange.timing, "total")
    # The wall clock may have been set back in between.
    return max((time.time() - exchange.received_at) * 1000, 0.0) if measured is None else measured


def code_of(exchange: Exchange) -> str:
    """The error's code, or ``ok``."""
    return OK if exchange.error is None else exchange.error.code


class Distribution:
    """How many values fell at or below each of some bounds, and their sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str] = ()) -> None:
        """Write as one series of a metric, with cumulative counts."""
        buckets, below = [], 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            below += count
            buckets.append((bound, below))
        family.add_metric(labels, buckets, sum_value=self._sum)


class ServerMetrics(Collector):
    """Counts requests; every instance has its own registry, so a process may hold many servers.

    Everything happens on the event loop.

    Args:
        phase: reads what ``/readyz`` says.
        waiting: reads how many requests wait or run.
        sessions: reads how many sessions asked lately.
    """

    def __init__(
        self,
        *,
        phase: Callable[[], str],
        waiting: Callable[[], float],
        sessions: Callable[[], float],
    ) -> None:
        self._phase, self._waiting, self._sessions = phase, waiting, sessions
        self._requests: Counter[tuple[str, str]] = Counter()
        self._received: Counter[str] = Counter()
        self._sent: Counter[str] = Counter()
        self._total: defaultdict[str, Distribution] = defaultdict(lambda: Distribution(SECONDS))
        self._stages = {stage: Distribution(SECONDS) for stage in STAGES}
        self._batch_size = Distribution(BATCH_SIZES)
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def __call__(self, exchange: Exchange) -> None:
        """Count one finished request."""
        dialect = exchange.dialect
        self._requests[dialect, code_of(exchange)] += 1
        self._received[dialect] += exchange.bytes_in
        self._sent[dialect] += exchange.bytes_out
        if exchange.chunk is None:
            return  # a refusal or reset takes no time, and would make answers look quick
        self._total[dialect].add(total_ms(exchange) / 1000)
        for stage, distribution in self._stages.items():
            spent = stage_ms(exchange.timing, stage)
            if spent is not None:
                distribution.add(spent / 1000)
        batch_size = exchange.timing.get("batch_size")
        if batch_size is not None:
            self._batch_size.add(batch_size)

    def exposition(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """What a scrape sees of the server; called by the registry."""
        yield from self._gauges()
        yield from self._counters()
        yield from self._histograms()

    def _gauges(self) -> Iterator[Metric]:
        phases = GaugeMetricFamily(
            "reflexarc_phase",
            "1 for the phase that the server is in, 0 for the others.",
            labels=["phase"],
        )
        now = self._phase()
        for phase in PHASES:
            phases.add_metric([phase], float(phase == now))
        yield phases
        yield GaugeMetricFamily(
            "reflexarc_waiting", "Requests that wait or run now.", self._waiting()
        )
        yield GaugeMetricFamily(
            "reflexarc_sessions",
            "Sessions that asked within the last 10 seconds.",
            self._sessions(),
        )

    def _counters(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "reflexarc_requests",
            "Finished requests; code is ok or the error's code.",
            labels=["dialect", "code"],
        )
        for (dialect, code), count in self._requests.items():
            requests.add_metric([dialect, code], count)
        yield requests
        for name, text, counts in (
            ("reflexarc_received_bytes", "Size of requests.", self._received),
            ("reflexarc_sent_bytes", "Size of answers.", self._sent),
        ):
            sizes = CounterMetricFamily(name, text, labels=["dialect"])
            for dialect, size in counts.items():
                sizes.add_metric([dialect], size)
            yield sizes

    def _histograms(self) -> Iterator[Metric]:
        total = HistogramMetricFamily(
            "reflexarc_request_seconds",
            "From the arrival of an answered request until its reply was handed to the socket.",
            labels=["dialect"],
        )
        for dialect, distribution in self._total.items():
            distribution.add_to(total, [dialect])
        yield total
        stages = HistogramMetricFamily(
            "reflexarc_stage_seconds", "Time of an answered request by stage.", labels=["stage"]
        )
        for stage, distribution in self._stages.items():
            distribution.add_to(stages, [stage])
        yield stages
        sizes = HistogramMetricFamily(
            "reflexarc_batch_size",
            "Requests in the batch of an answered request: a batch of 8 counts eight times.",
        )
        self._batch_size.add_to(sizes)
        yield sizes
