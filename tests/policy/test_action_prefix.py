"""Committed actions: the sampler continues them, and the chunk begins with them exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from reflexarc.contract import Observation
from reflexarc.policy.checkpoint import load_checkpoint
from reflexarc.policy.layers.flow_matching import euler_sample
from reflexarc.policy.runtime import PolicyRuntime


def test_every_step_sees_the_prefix_at_its_time() -> None:
    generator = torch.Generator().manual_seed(0)
    noise, prefix = torch.randn(2, 5, 3, generator=generator), torch.randn(2, 2, 3)
    seen: list[torch.Tensor] = []

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        expected = t[:, None, None] * noise[:, :2] + (1 - t[:, None, None]) * prefix
        torch.testing.assert_close(x[:, :2], expected)
        seen.append(t)
        return x.cumsum(1)  # later rows depend on earlier ones

    sampled = euler_sample(velocity, noise, 4, prefix)
    assert torch.equal(sampled[:, :2], prefix)
    assert len(seen) == 4
    free = euler_sample(lambda x, t: x.cumsum(1), noise, 4)
    assert not torch.equal(sampled[:, 2:], free[:, 2:])


def test_statevla_continues_a_prefix(saved: Path, observe: Callable[..., Observation]) -> None:
    runtime = PolicyRuntime(load_checkpoint(saved))
    (free,) = runtime.infer([observe(1)])
    prefix = np.clip(free.actions[:2] + 0.3, -1, 1)
    prefix[:, 6] = -free.actions[:2, 6]
    (chunk,) = runtime.infer([observe(1, action_prefix=prefix)])
    np.testing.assert_array_equal(chunk.actions[:2], prefix)
    assert not np.array_equal(chunk.actions[2:, :6], free.actions[2:, :6])
    # Rows with and without a prefix may come together.
    mixed = runtime.infer([observe(1), observe(1, action_prefix=prefix)])
    np.testing.assert_array_equal(mixed[0].actions, free.actions)
    np.testing.assert_array_equal(mixed[1].actions, chunk.actions)
