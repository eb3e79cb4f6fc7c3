"""Committed actions begin the chunk exactly; what was to follow them draws it, less and less."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reflexarc.contract import Observation
from reflexarc.contract.errors import ContractViolationError
from reflexarc.policy.checkpoint import load_checkpoint
from reflexarc.policy.layers.flow_matching import euler_sample, soft_mask
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


@given(prefix=st.integers(0, 12), guide=st.integers(1, 12))
def test_the_soft_mask_is_that_of_the_paper(prefix: int, guide: int) -> None:
    """Its equation 5, with d committed actions and an overlap that ends at H - s."""
    d, end = prefix, prefix + guide
    c = [(end - i) / (end - d + 1) for i in range(d, end)]
    expected = [x * (np.exp(x) - 1) / (np.e - 1) for x in c]
    mask = soft_mask(guide)
    np.testing.assert_allclose(mask, expected, rtol=1e-5)
    assert (mask > 0).all() and (mask < 1).all() and (mask.diff() < 0).all()


@given(seed=st.integers(0, 50), steps=st.integers(1, 6), first=st.integers(0, 2))
@settings(max_examples=25, deadline=None)
def test_the_guide_corrects_through_the_jacobian(seed: int, steps: int, first: int) -> None:
    """Against the paper's formula with the whole Jacobian, in the paper's time."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, 5, 2, generator=generator, dtype=torch.float64)
    mixing = torch.randn(10, 10, generator=generator, dtype=torch.float64) / 3
    guide = torch.randn(1, 2, 2, generator=generator, dtype=torch.float64)
    prefix = torch.randn(1, first, 2, generator=generator, dtype=torch.float64)

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x.flatten(1) @ mixing * (1 + t[:, None])).view_as(x)

    weights = torch.zeros(5, 2, dtype=torch.float64)
    weights[first : first + 2] = soft_mask(2)[:, None]
    target = torch.zeros(1, 5, 2, dtype=torch.float64)
    target[:, first : first + 2] = guide
    x = noise.clone()
    for step in range(steps):
        tau = step / steps
        x[:, :first] = (1 - tau) * noise[:, :first] + tau * prefix
        t = torch.full((1,), 1 - tau, dtype=torch.float64)

        def data(x: torch.Tensor, t: torch.Tensor = t) -> torch.Tensor:
            return x - t * velocity(x, t)

        jacobian = torch.autograd.functional.jacobian(data, x).view(10, 10)
        error = ((target - data(x)) * weights).flatten()
        r_squared = (1 - tau) ** 2 / (tau**2 + (1 - tau) ** 2)
        weight = 5.0 if tau == 0 else min(5.0, (1 - tau) / (tau * r_squared))
        towards_data = -velocity(x, t) + weight * (error @ jacobian).view_as(x)
        x = x + towards_data / steps
    x[:, :first] = prefix

    with torch.inference_mode():
        sampled = euler_sample(velocity, noise, steps, prefix if first else None, guide)
    torch.testing.assert_close(sampled, x, rtol=1e-6, atol=1e-8)


def test_statevla_stays_near_a_guide(saved: Path, observe: Callable[..., Observation]) -> None:
    runtime = PolicyRuntime(load_checkpoint(saved))
    (free,) = runtime.infer([observe(1)])
    prefix = free.actions[:1]
    guide = np.clip(free.actions[1:4] + 0.2, -1, 1)
    guide[:, 6] = free.actions[1:4, 6]
    given = {"action_prefix": prefix, "action_guide": guide}
    (chunk,) = runtime.infer([observe(1, **given)])
    np.testing.assert_array_equal(chunk.actions[:1], prefix)
    plain = runtime.infer([observe(1, action_prefix=prefix)])[0].actions
    before = np.abs(plain[1:4] - guide)[:, :6].mean(1)
    after = np.abs(chunk.actions[1:4] - guide)[:, :6].mean(1)
    assert after[0] < 0.9 * before[0]
    closing = 1 - after / before
    assert closing[0] > closing[1] > closing[2], "the pull must grow weaker"
    # A chunk is its request's alone, whatever it is batched with.
    mixed = runtime.infer([observe(2), observe(1, **given), observe(1, action_prefix=prefix)])
    np.testing.assert_allclose(mixed[1].actions, chunk.actions, atol=1e-5)
    np.testing.assert_allclose(mixed[2].actions, plain, atol=1e-5)
    (alone,) = runtime.infer([observe(1, action_guide=guide)])
    assert not np.array_equal(alone.actions[:, :6], free.actions[:, :6])


@pytest.mark.parametrize(
    "prefix,guide", [(1, 5), (0, 6), (4, 2)], ids=["too long together", "too long", "both long"]
)
def test_more_actions_than_the_horizon_are_refused(
    saved: Path, observe: Callable[..., Observation], prefix: int, guide: int
) -> None:
    runtime = PolicyRuntime(load_checkpoint(saved))
    rows = np.zeros((prefix, 7), np.float32) if prefix else None
    with pytest.raises(ContractViolationError, match="action_guide: expected floats"):
        runtime.infer(
            [observe(1, action_prefix=rows, action_guide=np.zeros((guide, 7), np.float32))]
        )
