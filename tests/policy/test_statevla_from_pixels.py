"""A StateVLA that trains its own patches, and one on a SigLIP folder, from frame to chunk."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from reflexarc.contract import NormalizationStatistics, Observation, PolicyContract
from reflexarc.contract.errors import CheckpointError
from reflexarc.policy.backbones.vision import VisionBackboneConfig
from reflexarc.policy.checkpoint import load_checkpoint, save_checkpoint
from reflexarc.policy.interface import Task
from reflexarc.policy.language import LanguageEmbeddings
from reflexarc.policy.runtime import PolicyRuntime
from reflexarc.policy.statevla.config import StateVLAConfig
from reflexarc.policy.statevla.model import StateVLA

CONVOLUTION = "representation.tokenizer.patches.convolution.weight"


def build(
    vision: VisionBackboneConfig,
    config: StateVLAConfig,
    contract: PolicyContract,
    embeddings: LanguageEmbeddings,
) -> StateVLA:
    torch.manual_seed(0)
    return StateVLA(config.model_copy(update={"vision": vision}), contract, embeddings).eval()


@pytest.fixture
def from_pixels(
    config: StateVLAConfig, contract: PolicyContract, embeddings: LanguageEmbeddings
) -> StateVLA:
    vision = VisionBackboneConfig(name="conv2d", pool=1, channels=12)
    return build(vision, config, contract, embeddings)


def test_pixels_are_kept_and_the_convolution_is_trained_within_the_representation(
    from_pixels: StateVLA,
) -> None:
    policy = from_pixels
    frames = {
        name: torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8)
        for name in policy.contract.camera_names
    }
    task = policy.embed_task([Task(instruction="pick up the milk")] * 3)
    rows = policy.embed_frames(frames, task)["vision"]
    assert rows.dtype == torch.uint8
    assert torch.equal(rows, torch.stack(list(frames.values()), dim=1))
    window = {"vision": rows[:, None], "state": torch.zeros(3, 1, 8)}
    z = policy.encode(task, window, torch.ones(3, 1, dtype=torch.bool))["z"]
    z.square().sum().backward()
    weight = dict(policy.named_parameters())[CONVOLUTION]
    assert weight.grad is not None
    assert weight.grad.abs().max() > 0
    # A target network that copies the representation copies the convolution with it.
    target = copy.deepcopy(policy.representation)
    assert "tokenizer.patches.convolution.weight" in target.state_dict()


def test_a_checkpoint_of_it_answers_as_before(
    tmp_path: Path,
    from_pixels: StateVLA,
    statistics: NormalizationStatistics,
    observe: Callable[..., Observation],
) -> None:
    folder = save_checkpoint(tmp_path / "pixels", from_pixels, statistics, {})
    first, second = (load_checkpoint(folder) for _ in range(2))
    assert torch.equal(
        first.policy.state_dict()[CONVOLUTION], from_pixels.state_dict()[CONVOLUTION]
    )
    seen = PolicyRuntime(first).infer([observe(1)])[0].actions
    again = PolicyRuntime(second).infer([observe(1)])[0].actions
    other = observe(1, images=observe(2).images)
    assert (seen == again).all()
    assert (PolicyRuntime(first).infer([other])[0].actions != seen).any()


def test_a_checkpoint_names_its_siglip_and_refuses_another(
    tmp_path: Path,
    config: StateVLAConfig,
    contract: PolicyContract,
    embeddings: LanguageEmbeddings,
    statistics: NormalizationStatistics,
    observe: Callable[..., Observation],
) -> None:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    sizes = SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=64,
        patch_size=16,
    )
    siglip = tmp_path / "siglip"
    SiglipVisionModel(sizes).save_pretrained(siglip)
    vision = VisionBackboneConfig(name="siglip", path=str(siglip), pool=1)
    policy = build(vision, config, contract, embeddings)
    folder = save_checkpoint(tmp_path / "policy", policy, statistics, {})
    manifest = json.loads((folder / "policy.json").read_text())
    assert manifest["config"]["vision"]["path"] == str(siglip)
    assert manifest["frozen_backbones"]["vision"] == {
        "name": "siglip",
        "sha256": policy.vision.identity.sha256,
    }
    copied = (siglip / "model.safetensors").stat().st_size
    with_it = sum(p.numel() for p in policy.parameters()) * 4
    assert (folder / "model.safetensors").stat().st_size < with_it - copied / 2
    loaded = load_checkpoint(folder)
    assert PolicyRuntime(loaded).infer([observe(1)])[0].actions.shape == (5, 7)
    SiglipVisionModel(sizes).save_pretrained(siglip)  # other random weights, the same shapes
    with pytest.raises(CheckpointError, match=r"was trained with the frozen vision siglip"):
        load_checkpoint(folder)
    siglip.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="there is no folder"):
        load_checkpoint(folder)
