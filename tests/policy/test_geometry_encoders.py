"""Encoders of geometry: shapes, order of tokens, normalisation, licences, and what is missing."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from reflexarc.contract.errors import CheckpointError, ConfigError
from reflexarc.policy.backbones.geometry_dinov2 import DepthAnythingGeometry, Dinov2Geometry
from reflexarc.policy.backbones.geometry_encoder import (
    FOLDER_NAMES,
    GeometryEncoderConfig,
    build_geometry_encoder,
)
from reflexarc.policy.backbones.geometry_mapanything import MapAnythingGeometry
from reflexarc.policy.backbones.geometry_rays import RayFeatures, viewing_rays

TINY = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
IMAGENET = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def images(rows: int = 2, side: int = 28) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(
        0, 256, (rows, 2, side, side, 3), generator=generator, dtype=torch.uint8
    )  # fmt: skip


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dinov2")
    Dinov2Model(Dinov2Config(**TINY)).save_pretrained(str(folder))
    return folder


def test_dinov2_gives_a_grid_a_view(dinov2: Path) -> None:
    """As the model's own output for one normalised image, its class token left out."""
    encoder = build_geometry_encoder(GeometryEncoderConfig(name="dinov2", path=str(dinov2)))
    assert isinstance(encoder, Dinov2Geometry) and encoder.channels == 32
    seen = images(side=42)
    tokens = encoder(seen)
    assert tokens.shape == (2, 2, 3, 3, 32) and encoder.grid(42, 42) == (3, 3)
    mean, std = IMAGENET
    pixels = ((seen[1, 0].float() / 255 - mean) / std).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = encoder.model(pixel_values=pixels).last_hidden_state[0, 1:]
    assert torch.allclose(tokens[1, 0].flatten(0, 1), expected, atol=1e-5)
    encoder.train()
    assert not encoder.model.training and not any(p.requires_grad for p in encoder.parameters())


def test_depth_anything_is_the_dinov2_inside_it(tmp_path: Path) -> None:
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    torch.manual_seed(0)
    backbone = Dinov2Config(**TINY, out_features=["stage1", "stage2"], reshape_hidden_states=False)
    config = DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=32, patch_size=14,
        neck_hidden_sizes=[8, 8], reassemble_factors=[2, 1], fusion_hidden_size=8,
        head_hidden_size=4,
    )  # fmt: skip
    whole = DepthAnythingForDepthEstimation(config)
    whole.save_pretrained(str(tmp_path))
    encoder = DepthAnythingGeometry(str(tmp_path))
    own = whole.backbone.state_dict()
    for name, tensor in encoder.model.state_dict().items():
        assert torch.equal(tensor, own[name]), name
    assert encoder(images()).shape == (2, 2, 2, 2, 32)


def test_rays_point_where_patches_are() -> None:
    rays = viewing_rays(14, 14)
    assert rays.shape == (14, 14, 19)
    direction = rays[..., :3]
    assert torch.allclose(direction.norm(dim=-1), torch.ones(14, 14))
    assert direction[0, 0, 0] < 0 and direction[0, 0, 1] < 0 and direction[-1, -1, 0] > 0
    encoder = RayFeatures()
    tokens = encoder(images(side=64))
    assert tokens.shape == (2, 2, 14, 14, encoder.channels)
    assert torch.equal(tokens[0, 0, ..., 40:], tokens[1, 1, ..., 40:])  # no image moves a ray
    assert not torch.equal(tokens[0, 0, ..., :40], tokens[1, 1, ..., :40])


def test_each_states_its_licence() -> None:
    for encoder in (RayFeatures, Dinov2Geometry, DepthAnythingGeometry, MapAnythingGeometry):
        assert "Apache-2.0" in encoder.licence
    assert "CC-BY-NC" in MapAnythingGeometry.licence and "CC-BY-NC" in DepthAnythingGeometry.licence


@pytest.mark.parametrize("name", FOLDER_NAMES)
def test_what_is_missing_is_named(name: str, dinov2: Path) -> None:
    config = GeometryEncoderConfig(name=name, path="/nowhere")  # type: ignore[arg-type]
    with pytest.raises((CheckpointError, ConfigError), match=r"/nowhere|pip install 'git"):
        build_geometry_encoder(config)


def test_folders_and_images_that_do_not_fit_are_named(dinov2: Path) -> None:
    with pytest.raises(CheckpointError, match="a model of the type 'dinov2', not 'depth_anything'"):
        DepthAnythingGeometry(str(dinov2))
    with pytest.raises(ConfigError, match=r"patches of 14 pixels.*a multiple of 14, such as 224"):
        Dinov2Geometry(str(dinov2)).grid(225, 225)


PACKAGE = """
    import torch
    from types import SimpleNamespace
    from safetensors.torch import load_file

    class Sharing(torch.nn.Module):
        dim = 6
        def forward(self, views):
            together = torch.stack(views).mean(0)
            final = SimpleNamespace(features=[view + together for view in views])
            return final, [final]

    class MapAnything(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = torch.nn.Conv2d(3, 6, 14, stride=14)
            self.info_sharing = Sharing()
        @classmethod
        def from_pretrained(cls, folder):
            made = cls()
            made.load_state_dict(load_file(folder + "/model.safetensors"))
            return made
        def forward(self, views):
            assert all(view["data_norm_type"] == ["dinov2"] * len(view["img"]) for view in views)
            self.info_sharing([self.patches(view["img"]) for view in views])
            raise AssertionError("the heads behind it are not to be computed")
"""


def test_a_package_with_mapanythings_interface(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MapAnything itself cannot be had here: a stand-in with its names, from a package's place."""
    package = tmp_path / "mapanything" / "models"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("")
    (package / "__init__.py").write_text(textwrap.dedent(PACKAGE))
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.startswith("mapanything")]:
        monkeypatch.delitem(sys.modules, name)
    weights = torch.nn.Conv2d(3, 6, 14, stride=14)
    folder = tmp_path / "weights"
    folder.mkdir()
    save_file(
        {f"patches.{n}": t.detach() for n, t in weights.named_parameters()},
        folder / "model.safetensors",
    )
    encoder = build_geometry_encoder(GeometryEncoderConfig(name="mapanything", path=str(folder)))
    seen = images(side=42)
    tokens = encoder(seen)
    assert tokens.shape == (2, 2, 3, 3, 6)
    mean, std = IMAGENET
    pixels = ((seen.float() / 255 - mean) / std).permute(0, 1, 4, 2, 3)
    with torch.no_grad():
        views = torch.stack([weights(view) for view in pixels.unbind(1)], dim=1)
    expected = (views + views.mean(1, keepdim=True)).permute(0, 1, 3, 4, 2)
    assert torch.allclose(tokens, expected, atol=1e-5)
    swapped = encoder(seen.flip(1)).flip(1)
    assert torch.allclose(swapped, tokens, atol=1e-5)
