"""Latency that is added on purpose, to compare executors."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np

from reflexarc.client.executors.asking import ChunkPolicy
from reflexarc.contract import ActionChunk, Observation, PolicyContract
from reflexarc.contract.errors import ConfigError


class LatencyInjected:
    """A policy that answers later than it could.

    On the wall clock ``infer`` returns no earlier than the latency after it was called. With
    ``in_steps`` it returns at once, and an executor shows the chunk to itself only the control
    steps later that the latency covers, rounded up: the robot goes on moving or holds meanwhile,
    and the outcome does not depend on how fast the simulator or the policy runs.

    Args:
        policy: who answers.
        milliseconds: from a request to its answer.
        jitter: each latency is drawn uniformly from ``milliseconds`` ± ``jitter``, not below 0.
        in_steps: count in control steps instead of waiting.
        seed: of the jitter.
    """

    contract: PolicyContract

    def __init__(
        self,
        policy: ChunkPolicy,
        milliseconds: float,
        jitter: float = 0.0,
        *,
        in_steps: bool = False,
        seed: int = 0,
    ) -> None:
        for name, value in (("milliseconds", milliseconds), ("jitter", jitter)):
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(
                    f"{name} of an injected latency must be 0 or more, got {value}", field=name
                )
        self._policy = policy
        self._milliseconds, self._jitter = float(milliseconds), float(jitter)
        self._draw = np.random.default_rng(seed)
        self.in_steps = in_steps
        self.contract = policy.contract
        self.metadata: dict[str, Any] = dict(getattr(policy, "metadata", {}))

    @property
    def period_ms(self) -> float:
        """Milliseconds of one control step."""
        return 1000.0 / self.contract.action.control_hz

    def infer(self, observation: Observation) -> ActionChunk:
        """The policy's chunk, on the wall clock not before the latency has passed."""
        due = time.perf_counter() + (0.0 if self.in_steps else self._next_ms() / 1000)
        chunk = self._policy.infer(observation)
        time.sleep(max(0.0, due - time.perf_counter()))
        return chunk

    def delay_steps(self) -> int:
        """Control steps until the answer to the next request: drawn anew at every call."""
        return math.ceil(self._next_ms() / self.period_ms - 1e-9)

    def _next_ms(self) -> float:
        offset = self._draw.uniform(-self._jitter, self._jitter) if self._jitter else 0.0
        return max(0.0, self._milliseconds + offset)
