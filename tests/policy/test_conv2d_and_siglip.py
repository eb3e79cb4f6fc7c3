"""Patches trained from scratch, and SigLIP from a folder that save_pretrained wrote."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from reflexarc.contract.errors import CheckpointError, ConfigError
from reflexarc.policy.backbones.conv2d import Conv2dPatches, RawPixels
from reflexarc.policy.backbones.siglip import SiglipVision
from reflexarc.policy.backbones.vision import VisionBackboneConfig, build_vision_backbone

SIZES = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
}


@pytest.fixture
def siglip_folder(tmp_path: Path) -> Path:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    folder = tmp_path / "siglip"
    SiglipVisionModel(SiglipVisionConfig(**SIZES)).save_pretrained(folder)
    return folder


@pytest.fixture
def images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8, generator=generator)


def test_the_published_size_gives_196_patches() -> None:
    front = build_vision_backbone(VisionBackboneConfig(name="conv2d", pool=1))
    patches = front.trained_patches()
    assert front.grid(224, 224) == (14, 14)
    assert patches is not None
    assert sum(p.numel() for p in patches.parameters()) == 3 * 16 * 16 * 256 + 256
    images = torch.zeros(1, 2, 224, 224, 3, dtype=torch.uint8)
    assert patches(images).shape == (1, 2, 196, 256)


def test_the_front_keeps_pixels_and_the_convolution_learns_from_them(images: Tensor) -> None:
    front = RawPixels(channels=12, pool=2)
    rows = front(images)
    assert rows.dtype == torch.uint8
    assert torch.equal(rows, images)
    assert list(front.parameters()) == []
    patches = front.trained_patches()
    tokens = patches(rows)
    assert tokens.shape == (2, 4, 12) == (2, *_product(front.grid(64, 64)), front.channels)
    tokens.square().sum().backward()
    gradient = patches.convolution.weight.grad
    assert gradient is not None
    assert gradient.abs().max() > 0


def test_a_patch_is_the_convolution_of_its_own_pixels(images: Tensor) -> None:
    patches = Conv2dPatches(5)
    before = patches(images)
    changed = images.clone()
    changed[:, 16:32, 32:48] = 255 - changed[:, 16:32, 32:48]  # cell (1, 2) of 4 x 4
    moved = (patches(changed) - before).abs().amax(dim=(0, 2)) > 0
    assert moved.nonzero().flatten().tolist() == [1 * 4 + 2]
    # Features that a store gave back as float are the same as the bytes themselves.
    assert torch.equal(patches(images.half().float()), before)


def test_siglip_equals_the_model_in_the_folder(siglip_folder: Path, images: Tensor) -> None:
    from transformers import SiglipVisionModel

    backbone = build_vision_backbone(
        VisionBackboneConfig(name="siglip", path=str(siglip_folder), pool=1)
    )
    model = SiglipVisionModel.from_pretrained(siglip_folder).eval()
    with torch.no_grad():
        wanted = model(images.permute(0, 3, 1, 2) / 127.5 - 1).last_hidden_state
    tokens = backbone(images)
    assert tokens.shape == (2, 16, 24) == (2, *_product(backbone.grid(64, 64)), backbone.channels)
    torch.testing.assert_close(tokens, wanted, atol=1e-6, rtol=0)
    assert not tokens.requires_grad
    pooled = SiglipVision(str(siglip_folder), pool=2)(images)
    cells = wanted.view(2, 2, 2, 2, 2, 24).mean(dim=(2, 4)).flatten(1, 2)
    torch.testing.assert_close(pooled, cells, atol=1e-6, rtol=0)
    weights = (siglip_folder / "model.safetensors").read_bytes()
    assert backbone.identity.name == "siglip"
    assert backbone.identity.sha256 == hashlib.sha256(weights).hexdigest()


def test_siglip_is_read_out_of_a_folder_of_both_towers(tmp_path: Path, images: Tensor) -> None:
    """What a hub folder such as siglip-base-patch16-224 holds: text, vision and head."""
    from transformers import SiglipConfig, SiglipModel

    text = {**SIZES, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
    del text["image_size"], text["patch_size"]
    both = SiglipModel(SiglipConfig(vision_config=SIZES, text_config=text)).eval()
    both.save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = both.vision_model(images.permute(0, 3, 1, 2) / 127.5 - 1).last_hidden_state
    torch.testing.assert_close(SiglipVision(str(tmp_path))(images), wanted, atol=1e-6, rtol=0)


def test_mean_and_deviation_come_from_the_folder(siglip_folder: Path, images: Tensor) -> None:
    half = SiglipVision(str(siglip_folder))
    path = siglip_folder / "preprocessor_config.json"
    path.write_text(json.dumps({"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}))
    own = SiglipVision(str(siglip_folder))
    assert (half.mean, half.std) == ((0.5,) * 3, (0.5,) * 3)
    assert (own.mean, own.std) == ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    pixels = images.permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (own.mean, own.std))
    wanted = own.features((pixels - mean) / std).flatten(2).transpose(1, 2)
    torch.testing.assert_close(own(images), wanted, atol=1e-6, rtol=0)
    assert (own(images) - half(images)).abs().max() > 1e-3
    path.write_text(json.dumps({"image_mean": [0.4, 0.5], "image_std": [0.2, 0.25, 0.3]}))
    with pytest.raises(CheckpointError, match="three numbers"):
        SiglipVision(str(siglip_folder))


def test_what_is_wrong_with_a_folder_is_named(siglip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no folder .*absent"):
        SiglipVision(str(tmp_path / "absent"))
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(siglip_folder / "config.json", bare)
    with pytest.raises(CheckpointError, match=r"holds no \*\.safetensors"):
        SiglipVision(str(bare))
    (bare / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match="cannot be loaded as a SigLIP"):
        SiglipVision(str(bare))
    import safetensors.torch

    weights = safetensors.torch.load_file(siglip_folder / "model.safetensors")
    weights.pop("encoder.layers.1.mlp.fc1.weight")
    safetensors.torch.save_file(weights, bare / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors.*layers\.1\.mlp\.fc1\.weight"):
        SiglipVision(str(bare))
    with pytest.raises(ConfigError, match=r"set contract\.image_size to 64"):
        SiglipVision(str(siglip_folder)).grid(224, 224)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "siglip"}, "needs path"),
        ({"name": "tiny_random", "path": "x"}, "path belongs to siglip"),
        ({"name": "efficientnet_lite0", "channels": 8}, "channels belongs to conv2d"),
    ],
)
def test_options_of_another_backbone_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        VisionBackboneConfig.model_validate(fields)


def _product(grid: tuple[int, int]) -> tuple[int]:
    return (grid[0] * grid[1],)
