"""Keypoint tokens: they find places, listen to the instruction, and go through a whole policy."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from reflexarc.policy.layers.fourier import FourierFeatures
from reflexarc.policy.layers.keypoints import KeypointsConfig, KeypointTokens
from reflexarc.policy.statevla.config import StateVLAConfig
from reflexarc.policy.statevla.encoder import Encoder, Representation, Tokenizer

GRID, CHANNELS, D_MODEL = (5, 7), 6, 16


def make_tokens() -> KeypointTokens:
    torch.manual_seed(0)
    return KeypointTokens(
        D_MODEL, cameras=2, grid=GRID, channels=CHANNELS, keypoints=4, hidden=8, tokens=2
    )


@settings(deadline=None, max_examples=20)
@given(row=st.integers(0, GRID[0] - 1), column=st.integers(0, GRID[1] - 1))
def test_a_keypoint_is_where_its_feature_is(row: int, column: int) -> None:
    """A score that one channel alone decides puts the keypoint on the patch that has it."""
    module = make_tokens()
    features = torch.zeros(1, 2, GRID[0] * GRID[1], CHANNELS)
    features[..., 0] = 1.0
    features[:, :, row * GRID[1] + column] = torch.tensor([0.0, 0, 0, 1, 0, 0])
    with torch.no_grad():
        module.position.zero_()
        module.features.zero_()
        module.features[:, 3, 0] = 1.0
        module.scores.zero_()
        module.scores[:, 0] = 50.0
        places = keypoint_places(module, features, torch.zeros(1, D_MODEL))
    expected = torch.tensor([2 * row / (GRID[0] - 1) - 1, 2 * column / (GRID[1] - 1) - 1])
    torch.testing.assert_close(places, expected.expand_as(places), atol=1e-3, rtol=0)


def keypoint_places(
    module: KeypointTokens, features: torch.Tensor, language: torch.Tensor
) -> torch.Tensor:
    """``(B, V, M, 2)``, read from the tokens by a projection that passes only places on."""
    per_token = module.projection.shape[2]
    width = per_token // 2  # two keypoints a token, each its place and then its features
    with torch.no_grad():
        module.bias.zero_()
        module.projection.zero_()
        for keypoint in range(2):
            for axis in range(2):
                module.projection[:, :, keypoint * width + axis, keypoint * 2 + axis] = 1.0
        tokens = module(features, language)
    return tokens[..., :4].unflatten(-1, (2, 2)).flatten(2, 3)


def test_the_instruction_steers_the_keypoints() -> None:
    module = make_tokens()
    features = torch.randn(1, 2, GRID[0] * GRID[1], CHANNELS)
    languages = torch.randn(2, D_MODEL)
    before = [module(features, language[None]) for language in languages]
    torch.testing.assert_close(*before)  # at the start it does not: FiLM begins as the identity
    torch.nn.init.normal_(module.film.weight)
    after = [module(features, language[None]) for language in languages]
    assert (after[0] - after[1]).abs().max() > 1e-3


def test_every_parameter_learns_and_rows_are_independent() -> None:
    torch.manual_seed(0)
    config = StateVLAConfig(
        d_model=D_MODEL,
        encoder_layers=1,
        d_state=4,
        keypoints=KeypointsConfig(number=4, hidden=8, tokens=2),
        language_dimension=12,
        state_octaves=3,
        state_hidden=16,
    )
    tokenizer = Tokenizer(config, state=8, cameras=2, grid=GRID, channels=CHANNELS)
    module = Representation(tokenizer, Encoder(config))
    task = {"language": torch.randn(3, 12)}
    window = {
        "state": torch.randn(3, 1, 8),
        "vision": torch.randn(3, 1, 2, GRID[0] * GRID[1], CHANNELS),
    }
    z = module(task, window, torch.ones(3, 1, dtype=torch.bool))
    assert z.shape == (3, 1, D_MODEL)
    z.square().mean().backward()
    still = [n for n, p in module.named_parameters() if p.grad is None or not p.grad.any()]
    # FiLM's gradient passes through scores alone, and shifts of all scores cancel in a softmax.
    assert not still
    alone = module(
        {"language": task["language"][1:2]},
        {name: rows[1:2] for name, rows in window.items()},
        torch.ones(1, 1, dtype=torch.bool),
    )
    torch.testing.assert_close(alone[0], z[1], atol=1e-5, rtol=0)


def test_keypoints_must_be_dealt_out_evenly() -> None:
    with pytest.raises(ValidationError, match=r"keypoints.number 5 is no multiple of .* 2"):
        KeypointsConfig(number=5, tokens=2)


def test_fourier_features() -> None:
    x = torch.tensor([[0.5, -1.0]])
    torch.testing.assert_close(FourierFeatures(0)(x), x)
    out = FourierFeatures(2)(x)
    assert out.shape == (1, 10)
    torch.testing.assert_close(out[0, 2], torch.tensor(math.sin(math.pi / 4)))
    torch.testing.assert_close(out[0, 9], torch.tensor(math.cos(-math.pi)))
