"""Requests of many clients in one batch, on real sockets: who shares it, who is refused alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from websockets.sync.client import ClientConnection, connect

from reflexarc.client import PolicyClient
from reflexarc.contract import ActionChunk, Observation, pack, unpack
from reflexarc.contract.errors import InferenceError
from reflexarc.policy.checkpoint import load_checkpoint
from reflexarc.server import BackgroundServer, NullPolicy, libero_contract
from reflexarc.server.loading import CheckpointPolicy
from reflexarc.server.user_policy import UserPolicy

MakeObservation = Callable[..., Observation]
POISON = 666


class GatedPolicy(NullPolicy):
    """Holds its first batch until ``may_go``; remembers the seeds of every batch it was asked."""

    cheap = False

    def __init__(self) -> None:
        super().__init__(libero_contract())
        self.started, self.may_go = threading.Event(), threading.Event()
        self.batches: list[list[int | None]] = []

    def infer(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        self.batches.append([observation.seed for observation in observations])
        self.started.set()
        assert self.may_go.wait(20)
        if POISON in self.batches[-1]:
            raise ValueError("this observation breaks the policy")
        return super().infer(observations)


def opened(server: BackgroundServer) -> ClientConnection:
    connection = connect(f"{server.url}/v1/policy", compression=None)
    connection.recv(timeout=10)
    return connection


def asked_together(
    server: BackgroundServer, policy: GatedPolicy, first: Observation, others: list[Observation]
) -> list[Any]:
    """Replies to ``others``, which all wait while the policy is busy with ``first``."""
    connections = [opened(server) for _ in (first, *others)]
    connections[0].send(pack(first.to_wire()))
    assert policy.started.wait(10)
    for connection, observation in zip(connections[1:], others, strict=True):
        connection.send(pack(observation.to_wire()))
    until(lambda: server.service.waiting == 1 + len(others))
    policy.may_go.set()
    replies = [unpack(connection.recv(timeout=10)) for connection in connections]
    for connection in connections:
        connection.close()
    return replies[1:]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.005)


def test_who_waits_shares_the_next_batch(make_observation: MakeObservation) -> None:
    policy = GatedPolicy()
    with BackgroundServer(lambda: policy) as server:
        others = [make_observation(pixels=seed, seed=seed) for seed in range(1, 6)]
        replies = asked_together(server, policy, make_observation(seed=0), others)
    assert [set(batch) for batch in policy.batches] == [{0}, {1, 2, 3, 4, 5}]
    for seed, reply in enumerate(replies, start=1):
        chunk = ActionChunk.from_wire(reply)
        assert chunk.seed == seed
        assert chunk.timing["batch_size"] == 5
        (alone,) = NullPolicy().infer([make_observation(seed=seed)])
        assert np.array_equal(chunk.actions, alone.actions)


def test_batches_are_as_large_as_the_option_allows(make_observation: MakeObservation) -> None:
    policy = GatedPolicy()
    with BackgroundServer(lambda: policy, max_batch=2) as server:
        others = [make_observation(seed=seed) for seed in range(1, 6)]
        asked_together(server, policy, make_observation(seed=0), others)
    assert [len(batch) for batch in policy.batches] == [1, 2, 2, 1]


def test_only_the_guilty_request_of_a_batch_fails(make_observation: MakeObservation) -> None:
    policy = GatedPolicy()
    with BackgroundServer(lambda: policy) as server:
        others = [make_observation(seed=seed) for seed in (1, POISON, 3)]
        good, bad, also_good = asked_together(server, policy, make_observation(seed=0), others)
    assert bad["error"]["code"] == "inference_failed"
    assert "error id" in bad["error"]["message"]
    assert [ActionChunk.from_wire(reply).seed for reply in (good, also_good)] == [1, 3]


def test_what_violates_the_contract_joins_no_batch(make_observation: MakeObservation) -> None:
    policy = GatedPolicy()
    with BackgroundServer(lambda: policy) as server, opened(server) as early:
        policy.may_go.set()
        early.send(pack(make_observation(size=32).to_wire()))
        assert unpack(early.recv(timeout=10))["error"]["code"] == "contract_violation"
    assert policy.batches == []


def test_a_deadline_that_cannot_be_met_is_refused_by_name(
    make_observation: MakeObservation,
) -> None:
    policy = GatedPolicy()
    with BackgroundServer(lambda: policy) as server, PolicyClient(server.url) as client:
        others = [make_observation(seed=1, deadline_ms=1.0), make_observation(seed=2)]
        late, in_time = asked_together(server, policy, make_observation(seed=0), others)
        assert late["error"]["code"] == "deadline_exceeded"
        assert late["error"]["field"] == "deadline_ms"
        assert ActionChunk.from_wire(in_time).seed == 2
        assert policy.batches == [[0], [2]], "nothing was computed for it"
        response = httpx.post(
            f"{server.http_url}/v1/actions",
            content=pack(make_observation(deadline_ms=1e-6).to_wire()),
            headers={"Content-Type": "application/msgpack"},
        )
        assert response.status_code == 504
        assert client.infer(make_observation(seed=4, deadline_ms=60_000)).seed == 4


@pytest.mark.parametrize("deadline", [0, -1.0, float("nan"), float("inf"), "soon", True])
def test_a_deadline_that_is_none_is_refused(
    null_server: BackgroundServer, make_observation: MakeObservation, deadline: Any
) -> None:
    with opened(null_server) as connection:
        connection.send(pack({**make_observation().to_wire(), "deadline_ms": deadline}))
        error = unpack(connection.recv(timeout=10))["error"]
    assert error["field"] == "deadline_ms"


def test_rows_of_a_batch_equal_those_that_were_asked_alone(
    tiny_checkpoint: Path, make_observation: MakeObservation
) -> None:
    """Also where they differ in denoising steps, which makes two groups of one batch."""
    loaded = load_checkpoint(tiny_checkpoint)
    size = loaded.policy.contract.cameras[0].height
    served = GatedCheckpoint(CheckpointPolicy(loaded, max_batch=8))
    observations = [
        make_observation(pixels=n, size=size, seed=n, denoising_steps=2 + n % 2) for n in range(5)
    ]
    with BackgroundServer(lambda: served) as server, ThreadPoolExecutor(5) as threads:
        served.hold()
        clients = [PolicyClient(server.url) for _ in observations]
        first = threads.submit(clients[0].infer, observations[0])
        assert served.started.wait(10)
        others = [
            threads.submit(client.infer, observation)
            for client, observation in zip(clients[1:], observations[1:], strict=True)
        ]
        until(lambda: server.service.waiting == 5)
        served.may_go.set()
        chunks = [future.result(20) for future in (first, *others)]
        for client in clients:
            client.close()
    assert [chunk.timing["batch_size"] for chunk in chunks] == [1, 4, 4, 4, 4]
    alone = CheckpointPolicy(loaded)
    for chunk, observation in zip(chunks, observations, strict=True):
        (expected,) = alone.infer([observation])
        np.testing.assert_allclose(chunk.actions, expected.actions, atol=1e-5)
        assert {"queue_ms", "preprocess_ms", "device_ms", "postprocess_ms"} <= set(chunk.timing)


class GatedCheckpoint:
    """A checkpoint that holds its next batch until ``may_go``."""

    def __init__(self, policy: CheckpointPolicy) -> None:
        self._policy = policy
        self.started, self.may_go = threading.Event(), threading.Event()
        self.may_go.set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def hold(self) -> None:
        self.started.clear()
        self.may_go.clear()

    def infer_in_parts(self, observations: Sequence[Observation]) -> Any:
        self.started.set()
        assert self.may_go.wait(20)
        return self._policy.infer_in_parts(observations)


class BatchingClass:
    """A user's class that answers several observations in one call."""

    contract = libero_contract()
    asked: list[int]

    def __init__(self) -> None:
        self.asked = []
        self.started, self.may_go = threading.Event(), threading.Event()

    def warm_up(self) -> None:
        """Nothing to try."""

    def infer(self, observation: Observation) -> Any:
        self.asked.append(1)
        self.started.set()
        assert self.may_go.wait(20)
        if observation.seed == POISON:
            return np.zeros((3, 7))
        return np.full((10, 7), 0.5)

    def infer_batch(self, observations: list[Observation]) -> list[Any]:
        self.asked.append(len(observations))
        return [self.infer(observation) for observation in observations]


class TooFew(BatchingClass):
    def infer_batch(self, observations: list[Observation]) -> list[Any]:
        return [np.full((10, 7), 0.5)]


@pytest.mark.parametrize("policy_class", [BatchingClass, TooFew])
def test_user_s_class_answers_a_batch(
    make_observation: MakeObservation, policy_class: type[BatchingClass]
) -> None:
    policy = UserPolicy(policy_class, "mine")
    inner: Any = policy._policy
    with BackgroundServer(lambda: policy) as server:
        others = [make_observation(seed=seed) for seed in (1, POISON, 3)]
        replies = asked_together(server, inner, make_observation(seed=0), others)
    if policy_class is BatchingClass:
        assert 3 in inner.asked
    assert [("actions" in reply) for reply in replies] == [True, False, True]
    assert "(3, 7)" in replies[1]["error"]["message"]


def test_infer_batch_that_gives_too_few_is_named(make_observation: MakeObservation) -> None:
    policy = UserPolicy(TooFew, "mine")
    with pytest.raises(InferenceError, match=r"mine.infer_batch returned 1 results for 2"):
        policy.infer([make_observation(), make_observation()])
