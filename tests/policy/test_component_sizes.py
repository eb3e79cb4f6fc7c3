"""Sizes of the components at the width of the published StateVLA.

They are really built: 20 MB cost less than the imports that the meta device needs.
Numbers are computed from the layers, not taken from the document's own table, which counts the
encoder as 12.3 M and the policy as 1.8 M.
"""

from __future__ import annotations

from torch import nn

from reflexarc.policy.layers.mamba import Mamba, MambaStack
from reflexarc.policy.statevla.action_head import FlowMatchingHead, GripperHead
from reflexarc.policy.statevla.config import StateVLAConfig
from reflexarc.policy.statevla.encoder import Encoder
from reflexarc.policy.statevla.token_layout import TokenLayout
from reflexarc.training.objectives.masked_predictor import MaskedPredictor
from reflexarc.training.objectives.temporal_predictor import TemporalPredictor

PUBLISHED = StateVLAConfig()
WIDTH, HORIZON, MOTION, ACTION = 256, 10, 6, 7
LINEAR = WIDTH * WIDTH + WIDTH
"""A square linear layer with its bias."""


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def millions(module: nn.Module) -> float:
    return round(size(module) / 1e6, 2)


def test_the_default_config_is_of_the_published_width() -> None:
    assert PUBLISHED.d_model == WIDTH
    assert (PUBLISHED.encoder_layers, PUBLISHED.d_state) == (12, 16)
    assert (PUBLISHED.policy_layers, PUBLISHED.policy_d_state) == (3, 64)
    assert (PUBLISHED.d_conv, PUBLISHED.expand, PUBLISHED.policy_mlp_hidden) == (4, 2, 256)


def test_a_mamba_block() -> None:
    assert size(Mamba(WIDTH, d_state=16, d_conv=4, expand=2)) == 437_760
    assert size(Mamba(WIDTH, d_state=64, d_conv=4, expand=2)) == 511_488


def test_the_context_encoder() -> None:
    """12 blocks, each with its norm, and a final norm; the projection to z comes on top."""
    encoder = Encoder(PUBLISHED)
    assert size(encoder.stack) == 12 * (437_760 + WIDTH) + WIDTH == 5_256_448
    assert millions(encoder.stack) == 5.26
    assert size(encoder) - size(encoder.stack) == LINEAR + 2 * WIDTH == 66_304


def test_the_masked_predictor() -> None:
    """256 -> 192, six blocks and a norm, 192 -> 256, a mask token; positions are no weights."""
    layout = TokenLayout(("agentview", "eye_in_hand"), 196, (14, 14), latent_tokens=1, d_model=256)
    predictor = MaskedPredictor(layout)
    block = size(Mamba(192)) + 192
    assert size(Mamba(192)) == 251_520
    ends = 256 * 192 + 192 + 192 * 256 + 256
    assert size(predictor) == ends + 6 * block + 192 + 192 + 5 * 192 == 1_610_368
    assert millions(predictor) == 1.61
    assert predictor.positions.shape == (395, 192)


def test_the_temporal_predictor() -> None:
    predictor = TemporalPredictor(WIDTH, ACTION, hidden=512)
    assert size(predictor) == 1_056_512
    assert millions(predictor) == 1.06
    # Two latent tokens and a horizon of three widen its ends, and nothing between.
    wider = TemporalPredictor(2 * WIDTH, 3 * ACTION, hidden=512)
    assert size(wider) - size(predictor) == 2 * WIDTH * 512 + WIDTH + 2 * ACTION * 512


def test_the_policy_backbone_and_the_gripper_classifier() -> None:
    backbone = MambaStack(WIDTH, 3, d_state=64, mlp_hidden=256)
    gated_mlp = 2 * WIDTH * 256 + 256 * WIDTH
    assert size(backbone) == 3 * (511_488 + gated_mlp + 2 * WIDTH) + WIDTH == 2_126_080
    head = FlowMatchingHead(PUBLISHED, horizon=HORIZON, action=MOTION)
    assert size(head.stack) == size(backbone)
    assert size(GripperHead(PUBLISHED, horizon=HORIZON)) == 134_154


def test_the_flow_matching_policy() -> None:
    """The published one has 2,395,654: backbone, time, state and action layers, position."""
    assert size(FlowMatchingHead(PUBLISHED, horizon=HORIZON, action=MOTION)) == 2_395_654
