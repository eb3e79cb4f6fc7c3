"""``GET /metrics`` of a real server that real clients ask, read by prometheus-client's parser."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from websockets.sync.client import connect

from reflexarc.client import PolicyClient
from reflexarc.contract import ActionChunk, Observation, ReflexarcError, pack
from reflexarc.server import BackgroundServer, NullPolicy
from reflexarc.server.exchange import Exchange
from reflexarc.server.metrics import STAGES, ServerMetrics

MakeObservation = Callable[..., Observation]
Sample = tuple[str, tuple[tuple[str, str], ...]]


def scraped(text: str) -> dict[Sample, float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scrape(server: BackgroundServer) -> dict[Sample, float]:
    answer = httpx.get(f"{server.http_url}/metrics", timeout=20)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return scraped(answer.text)


def settled(
    server: BackgroundServer, name: str, value: float, **labels: str
) -> dict[Sample, float]:
    """Listeners hear of a request after its reply: ask until they did."""
    sample, until = (name, tuple(sorted(labels.items()))), time.monotonic() + 10
    while (found := scrape(server)).get(sample) != value:
        assert time.monotonic() < until, found
        time.sleep(0.02)
    return found


def test_requests_are_counted_by_dialect_and_code_with_their_times_and_bytes(
    make_observation: MakeObservation,
) -> None:
    with BackgroundServer(NullPolicy) as server:
        size = len(pack(make_observation().to_wire()))
        with PolicyClient(server.url) as client:
            for _ in range(3):
                client.infer(make_observation())
            with pytest.raises(ReflexarcError):
                client.infer(make_observation(size=10))
        found = settled(
            server, "reflexarc_requests_total", 1, dialect="native", code="contract_violation"
        )
        native = (("dialect", "native"),)
        assert found["reflexarc_requests_total", (("code", "ok"), *native)] == 3
        assert found["reflexarc_received_bytes_total", native] > 3 * size
        assert found["reflexarc_sent_bytes_total", native] > 3 * 10 * 7 * 4
        assert found["reflexarc_request_seconds_count", native] == 3  # refusals take no time
        assert 0 < found["reflexarc_request_seconds_sum", native] < 30
        for stage in ("queue", "decode", "encode"):
            assert found["reflexarc_stage_seconds_count", (("stage", stage),)] == 3
        assert found["reflexarc_batch_size_count", ()] == 3
        assert found["reflexarc_batch_size_bucket", (("le", "1.0"),)] == 3


def test_gauges_tell_phase_waiting_and_sessions(
    make_slow_policy: Callable[[float], NullPolicy], make_observation: MakeObservation
) -> None:
    policy = make_slow_policy(0.8)
    with BackgroundServer(lambda: policy) as server:
        phases = {"loading": 0, "warming": 0, "ready": 1, "draining": 0, "failed": 0}
        before = scrape(server)
        for phase, value in phases.items():
            assert before["reflexarc_phase", (("phase", phase),)] == value
        assert before["reflexarc_waiting", ()] == 0
        with connect(f"{server.url}/v1/policy", compression=None) as connection:
            connection.recv(timeout=10)
            connection.send(pack(make_observation(session_id="a").to_wire()))
            policy.started.wait(10)  # type: ignore[attr-defined]
            assert scrape(server)["reflexarc_waiting", ()] == 1
            connection.recv(timeout=10)
        assert settled(server, "reflexarc_sessions", 1)["reflexarc_waiting", ()] == 0


def test_each_server_of_a_process_counts_its_own(
    null_server: BackgroundServer, make_observation: MakeObservation
) -> None:
    with BackgroundServer(NullPolicy) as other:
        with PolicyClient(null_server.url) as client:
            client.infer(make_observation())
        assert not any(name == "reflexarc_requests_total" for name, _ in scrape(other))


def test_no_header_makes_a_scrape_fail(null_server: BackgroundServer) -> None:
    for accept in ("application/openmetrics-text; version=x", "text/plain; version=..", "\xff"):
        headers = {"Accept": accept.encode("latin-1")}
        assert httpx.get(f"{null_server.http_url}/metrics", headers=headers).status_code == 200


def metrics() -> ServerMetrics:
    return ServerMetrics(phase=lambda: "ready", waiting=lambda: 0, sessions=lambda: 0)


def exchange(timing: Mapping[str, float]) -> Exchange:
    chunk = ActionChunk(np.zeros((1, 7), np.float32), seed=1)
    return Exchange("native", time.time(), chunk=chunk, timing=timing)


def test_a_histogram_holds_what_numpy_counts() -> None:
    counted, values = metrics(), np.random.default_rng(0).lognormal(2, 2, 200)
    for value in values:
        counted(exchange({f"{stage}_ms": float(value) for stage in STAGES}))
    found = scraped(counted.exposition().decode())
    bounds = [
        dict(labels)["le"]
        for name, labels in found
        if name == "reflexarc_stage_seconds_bucket" and dict(labels)["stage"] == "device"
    ]
    for bound in bounds:
        labels = (("le", bound), ("stage", "device"))
        expected = int((values / 1000 <= float(bound)).sum())
        assert found["reflexarc_stage_seconds_bucket", labels] == expected
    total = found["reflexarc_stage_seconds_sum", (("stage", "device"),)]
    np.testing.assert_allclose(total, values.sum() / 1000)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -1.0])
def test_times_that_are_none_are_not_counted(wrong: float) -> None:
    counted = metrics()
    counted(exchange({"device_ms": wrong, "queue_ms": 1.0}))
    found = scraped(counted.exposition().decode())
    assert found["reflexarc_stage_seconds_count", (("stage", "device"),)] == 0
    assert found["reflexarc_stage_seconds_count", (("stage", "queue"),)] == 1
