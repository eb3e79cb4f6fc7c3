"""Observations and policies that the server's tests share. Every server listens on a real port."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from reflexarc.contract import ActionChunk, Observation
from reflexarc.server import BackgroundServer, NullPolicy, libero_contract

INSTRUCTION = "pick up the alphabet soup and place it in the basket"
MakeObservation = Callable[..., Observation]


@pytest.fixture
def make_observation() -> MakeObservation:
    def make(pixels: int = 0, size: int = 224, **fields: Any) -> Observation:
        rng = np.random.default_rng(pixels)
        images = {
            name: rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
            for name in ("agentview", "eye_in_hand")
        }
        values = {"instruction": INSTRUCTION, "seed": 7, **fields}
        return Observation(images=images, state=rng.normal(size=8), **values)

    return make


@pytest.fixture(scope="session")
def null_server() -> Iterator[BackgroundServer]:
    with BackgroundServer(NullPolicy) as server:
        yield server


class SlowPolicy(NullPolicy):
    """Takes ``seconds`` for each chunk; ``started`` is set when it begins one."""

    def __init__(self, seconds: float) -> None:
        super().__init__(libero_contract())
        self.seconds = seconds
        self.started = threading.Event()
        self.finished = 0

    def infer(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        self.started.set()
        time.sleep(self.seconds)
        self.finished += 1
        return super().infer(observations)


@pytest.fixture
def make_slow_policy() -> Callable[[float], SlowPolicy]:
    return SlowPolicy
