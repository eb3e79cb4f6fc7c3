"""The inference before the first request: when it runs, on what, and what its failure does."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest
import torch
from websockets.sync.client import connect

from reflexarc.contract import ActionChunk, Observation, check_observation, unpack
from reflexarc.contract.errors import InferenceError, NotReadyError
from reflexarc.policy.checkpoint import LoadedPolicy, load_checkpoint
from reflexarc.policy.statevla.model import StateVLA
from reflexarc.server import BackgroundServer, NullPolicy, Phase
from reflexarc.server.loading import CheckpointPolicy, blank_observation
from reflexarc.server.null_policy import libero_contract

INSTRUCTION = "pick up the alphabet soup and place it in the basket"  # the only one it knows


class WatchedPolicy(CheckpointPolicy):
    """Keeps the observations that it was asked for."""

    def __init__(self, loaded: LoadedPolicy) -> None:
        super().__init__(loaded)
        self.asked: list[Observation] = []
        self.batches: list[Sequence[Observation]] = []

    def infer(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        self.asked += observations
        self.batches.append(observations)
        return super().infer(observations)


class WarmsLong(NullPolicy):
    def __init__(self) -> None:
        super().__init__()
        self.warming, self.may_end = threading.Event(), threading.Event()

    def warm_up(self) -> None:
        self.warming.set()
        assert self.may_end.wait(20)


def test_clients_wait_while_the_policy_warms() -> None:
    policy = WarmsLong()
    with BackgroundServer(lambda: policy, wait=False) as server:
        assert policy.warming.wait(20)
        ready = httpx.get(f"{server.http_url}/readyz")
        assert (ready.status_code, ready.json()) == (503, {"phase": "warming"})
        refused = httpx.post(f"{server.http_url}/v1/actions", content=b"{}")
        assert refused.json()["error"]["code"] == NotReadyError.code
        assert "warming" in refused.json()["error"]["message"]
        with connect(f"{server.url}/v1/policy", compression=None) as connection:
            with pytest.raises(TimeoutError):
                connection.recv(timeout=0.2)
            policy.may_end.set()
            assert "contract" in unpack(connection.recv(timeout=10))
        assert httpx.get(f"{server.http_url}/readyz").json() == {"phase": "ready"}


def test_server_that_is_stopped_while_warming_ends() -> None:
    policy = WarmsLong()
    with BackgroundServer(lambda: policy, wait=False) as server:
        assert policy.warming.wait(20)
    assert server.service.phase is Phase.DRAINING
    policy.may_end.set()


def test_checkpoint_answers_an_instruction_it_knows_before_ready(tiny_checkpoint: Path) -> None:
    policy = WatchedPolicy(load_checkpoint(tiny_checkpoint))
    with BackgroundServer(lambda: policy) as server:
        assert server.service.phase is Phase.READY
        sizes = [len(batch) for batch in policy.batches]
        assert sizes == [1, 2, 4], "every batch size in use is warm before the first request"
        for observation in policy.asked:
            assert observation.instruction == INSTRUCTION
            check_observation(policy.contract, observation)


def test_policy_that_names_no_instruction_is_served(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StateVLA, "extra_files", lambda self: {})
    policy = WatchedPolicy(load_checkpoint(tiny_checkpoint))
    with BackgroundServer(lambda: policy) as server:
        assert server.service.phase is Phase.READY
        assert policy.asked[0].instruction != INSTRUCTION


def test_policy_without_language_gets_no_instruction() -> None:
    contract = libero_contract(needs_language=False)
    observation = blank_observation(contract, None)
    check_observation(contract, observation)
    assert observation.instruction is None


def test_damaged_weights_are_refused_before_ready(tiny_checkpoint: Path) -> None:
    loaded = load_checkpoint(tiny_checkpoint)
    with torch.no_grad():
        for weights in loaded.policy.parameters():
            weights.fill_(float("nan"))
    server = BackgroundServer(lambda: CheckpointPolicy(loaded))
    with pytest.raises(InferenceError, match="not finite"), server:
        pytest.fail("a policy whose actions are not finite must not be served")
    assert server.service.phase is not Phase.READY
