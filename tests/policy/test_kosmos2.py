"""Kosmos-2 behind the mobile VLA: sizes, order of tokens, adapters, what a folder must hold."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reflexarc.contract import (
    Camera,
    FeatureStatistics,
    NormalizationStatistics,
    PolicyContract,
)
from reflexarc.contract.errors import CheckpointError, ConfigError, UnknownInstructionError
from reflexarc.contract.policy_contract import ActionSpec, History, StateSpec
from reflexarc.policy.backbones.image_statistics import image_statistics
from reflexarc.policy.backbones.kosmos2 import (
    Kosmos2Backbone,
    add_adapters,
    build_kosmos2,
    load_kosmos2,
)
from reflexarc.policy.checkpoint import load_checkpoint, save_checkpoint, trained_weights
from reflexarc.policy.interface import Task
from reflexarc.policy.mobile_vla.config import Kosmos2Config, LoRAConfig, MobileVLAConfig
from reflexarc.policy.mobile_vla.model import MobileVLA

sys.path.insert(0, str(Path(__file__).parent))
from kosmos2_samples import IMAGE_TOKENS, SIZE, WIDTH, tiny_fields, write_tiny_kosmos2

VELOCITY = ActionSpec(
    names=("linear_x", "linear_y"), horizon=10, kind="velocity", control_hz=5.0,
    low=(-0.6, -0.6), high=(0.6, 0.6),
)  # fmt: skip
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def contract(size: int = SIZE, **fields: Any) -> PolicyContract:
    camera = Camera(
        name="front", height=size, width=size, orientation="upright",
        source_height=size, source_width=size,
    )  # fmt: skip
    values = {
        "family": "mobile_vla",
        "cameras": (camera,),
        "state": StateSpec(layout="none", names=()),
        "history": History(frames=8),
        "action": VELOCITY,
        **fields,
    }
    return PolicyContract(**values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_kosmos2(tmp_path_factory.mktemp("kosmos2"))


def tiny_config(folder: Path, **backbone: Any) -> MobileVLAConfig:
    values = {"path": str(folder), "lora": LoRAConfig(rank=4), "max_text_tokens": 32, **backbone}
    return MobileVLAConfig(
        backbone=Kosmos2Config(**values), lstm_layers=4, lstm_hidden=16, head_hidden=(16,)
    )


@pytest.fixture
def policy(folder: Path) -> MobileVLA:
    torch.manual_seed(0)
    built = MobileVLA(tiny_config(folder), contract(), None)
    for name, parameter in built.named_parameters():  # PEFT begins with an update of zero
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return built.eval()


def full_size() -> Kosmos2Backbone:
    """The published Kosmos-2 without memory."""
    from transformers import Kosmos2Config as PublishedConfig

    backbone = Kosmos2Backbone.__new__(Kosmos2Backbone)
    nn.Module.__init__(backbone)
    with torch.device("meta"):
        model = build_kosmos2(PublishedConfig().to_dict())
        backbone._assemble(model, CLIP_MEAN, CLIP_STD, LoRAConfig())
    return backbone


def test_sizes_at_full_size() -> None:
    backbone = full_size()
    sizes = {name: p.numel() for name, p in backbone.named_parameters()}
    lora = {name: size for name, size in sizes.items() if "lora_" in name}
    own = sum(sizes.values()) - sum(lora.values()) - sizes["action_token"]
    assert round(own / 1e6, 2) == 1664.49
    assert round(sum(lora.values()) / 1e6, 2) == 12.58
    assert all(name.startswith("text.") for name in lora)
    assert len(lora) == 24 * 4 * 2, "four projections of 24 layers, two matrices each"
    trained = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert trained == {*lora, "action_token"}
    config = MobileVLAConfig()
    with torch.device("meta"):
        lstm = nn.LSTM(backbone.width, config.lstm_hidden, num_layers=config.lstm_layers)
        widths = (config.lstm_hidden, *config.head_hidden, 20)
        head = [nn.Linear(a, b) for a, b in pairwise(widths)]
    rest = sum(p.numel() for m in (lstm, *head) for p in m.parameters())
    checkpoint = 4 * (sum(lora.values()) + sizes["action_token"] + rest)
    assert 0.2e9 < checkpoint <= 0.25e9, f"{checkpoint / 1e9:.3f} GB"


def told(policy: MobileVLA, *texts: str) -> dict[str, Tensor]:
    return policy.embed_task([Task(instruction=text) for text in texts])


def test_order_of_tokens(policy: MobileVLA) -> None:
    backbone = policy.backbone
    assert isinstance(backbone, Kosmos2Backbone)
    rows = told(policy, "navigate to the red box", "go")
    order = backbone.order(rows["ids"][:, :32], rows["count"])
    words = backbone.tokens._tokenizer.convert_ids_to_tokens
    image = ["<unk>"] * IMAGE_TOKENS
    text = ["▁navigate", "▁to", "▁the", "▁red", "▁box"]
    wanted = ["<s>", "<image>", *image, "</image>", *text, "<unk>", "</s>"]
    assert words(order[0, : len(wanted)].tolist()) == wanted
    assert set(words(order[0, len(wanted) :].tolist())) == {"<pad>"}
    images = torch.randn(2, IMAGE_TOKENS, WIDTH)
    embedded, mask, place = backbone.sequence(images, rows)
    assert place.tolist() == [3 + IMAGE_TOKENS + 5, 3 + IMAGE_TOKENS + 1]
    assert torch.equal(embedded[:, 2 : 2 + IMAGE_TOKENS], images)
    for row in range(2):
        assert torch.equal(embedded[row, place[row]], backbone.action_token)
        assert int(mask[row].sum()) == int(place[row]) + 2, "up to EOS, padding is not seen"
    table = backbone.text.model.embed_tokens
    special = backbone.tokens.special
    assert torch.equal(embedded[:, 0], table(torch.tensor([special.bos, special.bos])))
    assert torch.equal(embedded[0, place[0] + 1], table(torch.tensor(special.eos)))


def test_image_tokens_are_those_of_transformers(policy: MobileVLA, folder: Path) -> None:
    images = torch.randint(0, 256, (3, SIZE, SIZE, 3), dtype=torch.uint8)
    pixels = (images.permute(0, 3, 1, 2) / 255.0 - 0.4) / 0.3
    with torch.no_grad():
        wanted = load_kosmos2(folder).get_image_features(pixels).pooler_output
    torch.testing.assert_close(policy.backbone.image_rows(images), wanted)


def test_a_frame_is_moved_by_image_and_instruction(policy: MobileVLA) -> None:
    images = torch.randn(2, IMAGE_TOKENS, WIDTH)
    with torch.no_grad():
        one = policy.backbone.action_features(images[:1], told(policy, "to the red box"))
        other_image = policy.backbone.action_features(images[1:], told(policy, "to the red box"))
        other_text = policy.backbone.action_features(images[:1], told(policy, "to the blue ball"))
        beside = policy.backbone.action_features(
            images, told(policy, "to the red box", "a much longer instruction than the other one")
        )
    assert (one - other_image).abs().max() > 1e-3
    assert (one - other_text).abs().max() > 1e-3
    torch.testing.assert_close(beside[:1], one, atol=1e-5, rtol=1e-4)


def statistics() -> NormalizationStatistics:
    return NormalizationStatistics(
        state=FeatureStatistics.from_rows(np.zeros((4, 0)), ()),
        action=FeatureStatistics.from_rows(
            np.random.default_rng(0).uniform(-0.6, 0.6, (50, 2)), VELOCITY.names
        ),
        dataset_fingerprint="",
    )


def test_a_checkpoint_holds_adapters_and_head_alone(
    policy: MobileVLA, tmp_path: Path, folder: Path
) -> None:
    weights = trained_weights(policy)
    backbone = {name for name in weights if name.startswith("backbone.")}
    assert backbone
    assert all("lora_" in name or name == "backbone.action_token" for name in backbone)
    save_checkpoint(tmp_path / "checkpoint", policy, statistics(), {})
    loaded = load_checkpoint(tmp_path / "checkpoint").policy
    assert isinstance(loaded, MobileVLA)
    frames = {"front": torch.randint(0, 256, (2, SIZE, SIZE, 3), dtype=torch.uint8)}
    task = told(policy, "navigate to the red box", "stop")
    with torch.no_grad():
        rows = policy.kept_frames(policy.embed_frames(frames, task), task)
        again = loaded.kept_frames(loaded.embed_frames(frames, task), task)
    assert torch.equal(rows["feature"], again["feature"])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"decoder\..*q_proj", "matches none of its"),
        (r".*\.q_proj", "outside of the text model"),
        (r"text\.(", "no regular expression"),
    ],
)
def test_lora_targets_that_cannot_be(pattern: str, message: str) -> None:
    backbone = nn.Module()
    model = build_kosmos2(tiny_fields(vocab_size=20, bos_token_id=0, eos_token_id=2))
    backbone.vision, backbone.text = model.vision_model, model.text_model
    with pytest.raises(ConfigError, match=message):
        add_adapters(backbone, LoRAConfig(target_modules=pattern))


def without_weights(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.unlink()


def of_another_model(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "clip"}))


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()
    for path in folder.glob("*.model"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_weights, "lacks .* tensors|no \\*.safetensors"),
        (of_another_model, "of the type 'clip'"),
        (without_tokenizer, "no tokenizer that loads"),
    ],
)
def test_damaged_folders(folder: Path, tmp_path: Path, damage: Callable[[Path], None],
                         message: str) -> None:  # fmt: skip
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    damage(copy)
    with pytest.raises(CheckpointError, match=message):
        MobileVLA(tiny_config(copy), contract(), None)


def test_contracts_and_texts_that_do_not_fit(policy: MobileVLA, folder: Path) -> None:
    with pytest.raises(ConfigError, match="sees images of 32x32"):
        MobileVLA(tiny_config(folder), contract(64), None)
    with pytest.raises(ConfigError, match="needs_language"):
        MobileVLA(tiny_config(folder), contract(needs_language=False), None)
    with pytest.raises(UnknownInstructionError, match="at most 32"):
        told(policy, "word " * 40)
    with pytest.raises(UnknownInstructionError, match="no instruction came"):
        told(policy, " ")
    names = ("preprocessor_config.json", "processor_config.json")
    assert image_statistics(folder, ((0.5,) * 3,) * 2, names) == ((0.4,) * 3, (0.3,) * 3)
