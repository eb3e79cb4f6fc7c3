"""Frozen encoders of clips: which token is where, what is loaded, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import VJEPA2Config, VJEPA2Model

from reflexarc.contract.errors import CheckpointError, ConfigError
from reflexarc.policy.backbones.clip_encoder import ClipEncoderConfig, build_clip_encoder
from reflexarc.policy.backbones.frame_pooling import FramePooling
from reflexarc.policy.backbones.vision import VisionBackboneConfig, build_vision_backbone
from reflexarc.policy.backbones.vjepa2 import VJEPA2Clips, build_encoder

from .vjepa2_samples import CHANNELS, SIZE, save_tiny_vjepa2, tiny_vjepa2_config

CELLS = SIZE // 16


@pytest.fixture(scope="module")
def vjepa2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_vjepa2(tmp_path_factory.mktemp("vjepa2"))


@pytest.fixture
def clip() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    shape = (2, 16, SIZE, SIZE, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def without_attention(encoder: VJEPA2Clips) -> None:
    """Each token then depends on its own tubelet of pixels alone."""
    with torch.no_grad():
        for layer in encoder.encoder.layer:
            layer.attention.proj.weight.zero_()


def test_a_token_is_its_tubelets_pixels_frame_by_frame_row_by_row(
    vjepa2_folder: Path, clip: Tensor
) -> None:
    encoder = VJEPA2Clips(str(vjepa2_folder), side=2)
    without_attention(encoder)
    before = encoder.tokens(clip)
    assert before.shape == (2, 8 * CELLS * CELLS, CHANNELS)
    frame, row, column = 5, 1, 3
    changed = clip.clone()
    changed[:, frame, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] ^= 255
    moved = (encoder.tokens(changed) - before).abs().amax(dim=(0, 2)) > 0
    place = (frame // 2) * CELLS * CELLS + row * CELLS + column
    assert moved.nonzero().flatten().tolist() == [place]

    whole_frame = clip.clone()
    whole_frame[:, frame] ^= 255
    moved = (encoder.tokens(whole_frame) - before).abs().amax(dim=(0, 2)) > 0
    first = (frame // 2) * CELLS * CELLS
    assert moved.nonzero().flatten().tolist() == list(range(first, first + CELLS * CELLS))


def test_pooled_tokens_are_means_over_time_and_over_two_by_two_cells(
    vjepa2_folder: Path, clip: Tensor
) -> None:
    encoder = VJEPA2Clips(str(vjepa2_folder), side=2)
    pooled = encoder.clip_tokens(clip)
    grid = encoder.tokens(clip).view(2, 8, CELLS, CELLS, CHANNELS).mean(1)
    by_hand = [
        grid[:, r : r + 2, c : c + 2].mean((1, 2)) for r in range(0, 4, 2) for c in range(0, 4, 2)
    ]
    torch.testing.assert_close(pooled, torch.stack(by_hand, 1))


def test_frames_see_each_other(vjepa2_folder: Path, clip: Tensor) -> None:
    encoder = VJEPA2Clips(str(vjepa2_folder), side=2)
    changed = clip.clone()
    changed[:, 0] ^= 255
    others = slice(CELLS * CELLS, None)
    assert not torch.equal(encoder.tokens(changed)[:, others], encoder.tokens(clip)[:, others])


def test_it_computes_what_transformers_own_model_computes(
    vjepa2_folder: Path, clip: Tensor
) -> None:
    encoder = VJEPA2Clips(str(vjepa2_folder), side=2)
    model = VJEPA2Model.from_pretrained(vjepa2_folder).eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    video = ((clip / 255 - mean) / std).permute(0, 1, 4, 2, 3)
    with torch.no_grad():
        expected = model(pixel_values_videos=video, skip_predictor=True).last_hidden_state
    torch.testing.assert_close(encoder.tokens(clip), expected, rtol=1e-5, atol=1e-5)


def test_a_goal_is_one_frame_that_stands_for_a_tubelet(vjepa2_folder: Path, clip: Tensor) -> None:
    encoder = VJEPA2Clips(str(vjepa2_folder), side=2)
    one = encoder.clip_tokens(clip[:, :1])
    assert one.shape == (2, 4, CHANNELS)
    torch.testing.assert_close(one, encoder.clip_tokens(clip[:, :1].expand(-1, 2, -1, -1, -1)))


def test_the_encoder_alone_is_held_frozen_and_in_eval_mode(vjepa2_folder: Path) -> None:
    encoder = VJEPA2Clips(str(vjepa2_folder), side=2)
    whole = VJEPA2Model(VJEPA2Config(**tiny_vjepa2_config()))
    assert sum(p.numel() for p in encoder.parameters()) == sum(
        p.numel() for p in whole.encoder.parameters()
    )
    assert not any(p.requires_grad for p in encoder.parameters())
    encoder.train()
    assert not encoder.training
    assert not encoder.encoder.training


def test_weights_in_bf16_are_near(vjepa2_folder: Path, clip: Tensor) -> None:
    exact = VJEPA2Clips(str(vjepa2_folder), side=2).clip_tokens(clip)
    half = VJEPA2Clips(str(vjepa2_folder), side=2, precision="bf16")
    assert half.encoder.layernorm.weight.dtype == torch.bfloat16
    tokens = half.clip_tokens(clip)
    assert tokens.dtype == torch.float32
    cosine = torch.nn.functional.cosine_similarity(tokens, exact, dim=-1)
    assert cosine.min() > 0.99


def test_statistics_of_the_folders_preprocessor_are_used(
    vjepa2_folder: Path, clip: Tensor, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(vjepa2_folder, tmp_path / "other"))
    values = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(values))
    encoder = VJEPA2Clips(str(folder), side=2)
    assert encoder.settings["image"] == {
        "image_mean": (0.5, 0.5, 0.5), "image_std": (0.25, 0.25, 0.25)
    }  # fmt: skip
    plain = VJEPA2Clips(str(vjepa2_folder), side=2)
    assert not torch.equal(encoder.clip_tokens(clip), plain.clip_tokens(clip))
    (folder / "video_preprocessor_config.json").write_text('{"image_std": [1, 0, 1]}')
    with pytest.raises(CheckpointError, match="deviations above zero"):
        VJEPA2Clips(str(folder), side=2)


def test_weights_in_several_files_and_of_a_classifier_are_found(
    vjepa2_folder: Path, clip: Tensor, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(vjepa2_folder, tmp_path / "parts"))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    for number, part in enumerate((names[::2], names[1::2])):
        chosen = {f"vjepa2.{name}": weights[name] for name in part}
        save_file(chosen, folder / f"model-0000{number}-of-00002.safetensors")
    expected = VJEPA2Clips(str(vjepa2_folder), side=2).clip_tokens(clip)
    torch.testing.assert_close(VJEPA2Clips(str(folder), side=2).clip_tokens(clip), expected)


def test_bad_folders_are_named(vjepa2_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"clips\.path: there is no folder"):
        VJEPA2Clips(str(tmp_path / "absent"), side=2)
    folder = Path(shutil.copytree(vjepa2_folder, tmp_path / "other"))
    weights = load_file(folder / "model.safetensors")
    gone = "encoder.layer.1.mlp.fc1.weight"
    save_file({n: t for n, t in weights.items() if n != gone}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layer\.1\.mlp\.fc1\.weight"):
        VJEPA2Clips(str(folder), side=2)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "siglip"}))
    with pytest.raises(CheckpointError, match="'siglip', not 'vjepa2'"):
        VJEPA2Clips(str(folder), side=2)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        VJEPA2Clips(str(folder), side=2)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        VJEPA2Clips(str(folder), side=2)


def test_clips_that_it_cannot_see_are_named(vjepa2_folder: Path) -> None:
    encoder = VJEPA2Clips(str(vjepa2_folder), side=2)
    encoder.check_clip(SIZE, SIZE, 16)
    with pytest.raises(ConfigError, match="images of 64x64") as raised:
        encoder.check_clip(224, 224, 16)
    assert raised.value.field == "contract.image_size"
    with pytest.raises(ConfigError, match="a multiple of 2") as raised:
        encoder.check_clip(SIZE, SIZE, 15)
    assert raised.value.field == "contract.history.frames"
    with pytest.raises(ConfigError, match=r"4x4 tokens.*3x3"):
        VJEPA2Clips(str(vjepa2_folder), side=3).check_clip(SIZE, SIZE, 16)


@pytest.mark.parametrize(
    ("values", "wrong"),
    [
        ({}, "needs path"),
        ({"path": "x", "time": "newest"}, "belong to frame_pooling"),
        ({"name": "frame_pooling"}, "needs vision"),
        ({"name": "frame_pooling", "vision": {"name": "conv2d", "pool": 1}}, "must be frozen"),
        ({"name": "frame_pooling", "vision": {"name": "tiny_random", "pool": 2}}, "its pool 1"),
        ({"name": "frame_pooling", "vision": {"name": "tiny_random", "pool": 1}, "path": "x"},
         "belong to vjepa2"),
    ],
)  # fmt: skip
def test_options_of_the_other_encoder_are_refused(values: dict[str, object], wrong: str) -> None:
    with pytest.raises(ValidationError, match=wrong):
        ClipEncoderConfig.model_validate(values)


def test_pooled_frames_are_the_front_over_each_frame(clip: Tensor) -> None:
    vision = VisionBackboneConfig(name="tiny_random", pool=1)
    front = build_vision_backbone(vision)
    frames = front(clip.flatten(0, 1)).view(2, 16, 4, 4, 8)
    cells = frames.view(2, 16, 2, 2, 2, 2, 8).mean((3, 5)).flatten(2, 3)
    for time, expected in (
        ("mean", cells.mean(1)),
        ("newest", cells[:, -1]),
        ("newest_and_mean", torch.cat([cells[:, -1], cells.mean(1)], -1)),
    ):
        encoder = FramePooling(vision, 2, time=time)  # type: ignore[arg-type]
        encoder.check_clip(SIZE, SIZE, 16)
        rows = encoder.frame_rows(clip.flatten(0, 1))
        tokens = encoder.clip_tokens(rows.view(2, 16, *rows.shape[1:]))
        assert tokens.shape[-1] == encoder.channels
        torch.testing.assert_close(tokens, expected)


def test_the_packaged_encoder_gives_64_tokens_of_a_256_pixel_clip() -> None:
    config = ClipEncoderConfig(
        name="frame_pooling",
        vision=VisionBackboneConfig(name="efficientnet_lite0", pool=1),
        time="newest_and_mean",
    )
    encoder = build_clip_encoder(config, 8)
    encoder.check_clip(256, 256, 16)
    rows = encoder.frame_rows(torch.zeros(2, 256, 256, 3, dtype=torch.uint8))
    assert encoder.clip_tokens(rows[None]).shape == (1, 64, 224)
    with pytest.raises(ConfigError, match="14x14 tokens"):
        encoder.check_clip(224, 224, 16)


def test_the_published_encoder_has_1012_million_parameters() -> None:
    giant = {"hidden_size": 1408, "num_hidden_layers": 40, "num_attention_heads": 22,
             "mlp_ratio": 48 / 11}  # fmt: skip
    with torch.device("meta"):
        encoder = build_encoder(giant)
        large = build_encoder({})
    assert sum(p.numel() for p in encoder.parameters()) == 1_012_173_952
    assert sum(p.numel() for p in large.parameters()) == 303_885_312
