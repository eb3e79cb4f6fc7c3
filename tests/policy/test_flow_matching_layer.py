"""The conventions of flow matching, pinned by properties and by transformers' PI0."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reflexarc.policy.layers.flow_matching import (
    TimeEmbedding,
    euler_sample,
    interpolate,
    sample_times,
    target_velocity,
)


@settings(deadline=None)
@given(steps=st.integers(1, 12), seed=st.integers(0, 1000))
def test_the_exact_velocity_of_a_straight_path_returns_the_data(steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    data, noise = torch.randn(2, 3, 5, 6, generator=generator, dtype=torch.float64)
    velocity = target_velocity(data, noise)
    sampled = euler_sample(lambda x, t: velocity, noise, steps)
    torch.testing.assert_close(sampled, data, atol=1e-12, rtol=0)


def test_one_step_is_taken_at_t_one_and_steps_walk_down() -> None:
    seen = []

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(t.tolist())
        return torch.zeros_like(x)

    euler_sample(velocity, torch.zeros(2, 1), 1)
    euler_sample(velocity, torch.zeros(2, 1), 4)
    assert seen == [[1.0] * 2, [1.0] * 2, [0.75] * 2, [0.5] * 2, [0.25] * 2]


def test_interpolation_ends_at_noise_and_data() -> None:
    data, noise = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    torch.testing.assert_close(interpolate(data, noise, torch.ones(2)), noise)
    torch.testing.assert_close(interpolate(data, noise, torch.zeros(2)), data)
    # The slope over t is the target velocity.
    slope = interpolate(data, noise, torch.full((2,), 0.7)) - interpolate(
        data, noise, torch.full((2,), 0.2)
    )
    torch.testing.assert_close(slope / 0.5, target_velocity(data, noise), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("density", "mean"), [("beta", 0.6004), ("uniform", 0.5)])
def test_the_density_has_its_mean_and_stays_in_range(density: str, mean: float) -> None:
    t = sample_times(200_000, density, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    assert t.mean().item() == pytest.approx(mean, abs=3e-3)
    assert t.min() >= 0
    assert t.max() <= 1
    if density == "beta":
        assert t.min() >= 0.001


def test_the_density_is_that_of_pi0() -> None:
    from transformers import PI0Config

    config = PI0Config()
    reference = torch.distributions.Beta(
        config.time_sampling_beta_alpha, config.time_sampling_beta_beta
    )
    quantiles = torch.linspace(0.02, 0.98, 49)
    ours = sample_times(400_000, "beta", torch.Generator().manual_seed(1)).quantile(quantiles)
    torch.manual_seed(2)
    theirs = (
        reference.sample((400_000,)) * config.time_sampling_scale + config.time_sampling_offset
    ).quantile(quantiles)
    torch.testing.assert_close(ours, theirs, atol=5e-3, rtol=0)


def test_the_time_embedding_is_that_of_pi0() -> None:
    from transformers import PI0Config
    from transformers.models.pi0.modeling_pi0 import PI0TimestepEmbeddings

    config = PI0Config()
    reference = PI0TimestepEmbeddings(config)
    ours = TimeEmbedding(config.dit_config.hidden_size, config.min_period, config.max_period)
    t = torch.linspace(0, 1, 33)
    torch.testing.assert_close(ours(t), reference(t), atol=1e-5, rtol=0)


def test_nearly_every_dimension_of_the_time_embedding_varies() -> None:
    embedded = TimeEmbedding(256)(torch.linspace(0, 1, 1999))
    moved = embedded.amax(0) - embedded.amin(0)
    assert (moved > 0.05).sum() == 256


def test_an_odd_time_embedding_is_refused() -> None:
    with pytest.raises(ValueError, match="even, got 7"):
        TimeEmbedding(7)
