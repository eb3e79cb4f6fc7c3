"""Our pass through Qwen2.5-VL against transformers', its checkpoint, and folders that are wrong."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reflexarc.contract import FeatureStatistics, NormalizationStatistics, PolicyContract
from reflexarc.contract.errors import CheckpointError, ConfigError, UnknownInstructionError
from reflexarc.contract.policy_contract import LIBERO_STATE_EEF, libero_action, libero_cameras
from reflexarc.policy.backbones.qwen2_5_vl import VisionTower, build_qwen
from reflexarc.policy.checkpoint import load_checkpoint, save_checkpoint
from reflexarc.policy.interface import Task, Tensors
from reflexarc.policy.qwen_geometry.config import QwenGeometryConfig
from reflexarc.policy.qwen_geometry.model import QwenGeometry
from reflexarc.policy.qwen_geometry.qwen import QwenSemantic

sys.path.insert(0, str(Path(__file__).parent))
from qwen_samples import SIZE, qwen_fields, save_tiny_qwen, tiny_config, write_tokenizer

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_qwen(tmp_path_factory.mktemp("qwen"))


def contract(**camera: Any) -> PolicyContract:
    size = {"height": SIZE, "width": SIZE, **camera}
    cameras = tuple(one.model_copy(update=size) for one in libero_cameras())
    return PolicyContract(
        family="qwen_geometry", cameras=cameras, state=LIBERO_STATE_EEF, action=libero_action(6)
    )


def build(folder: Path, **fields: Any) -> QwenGeometry:
    config = QwenGeometryConfig.model_validate(tiny_config(folder, **fields))
    torch.manual_seed(1)
    return QwenGeometry.build(config, contract(), {}).eval()


def frames(rows: int) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    shape = (rows, SIZE, SIZE, 3)
    return {
        name: torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        for name in contract().camera_names
    }


def test_states_are_those_of_transformers(folder: Path) -> None:
    """Its own processor, its own search for image tokens, its own positions and masks."""
    from PIL import Image
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
        Qwen2VLImageProcessorPil,
    )

    policy = build(folder)
    semantic = policy.semantic
    assert isinstance(semantic, QwenSemantic)
    images, names = frames(2), contract().camera_names
    task = policy.embed_task([Task("pick up the bowl"), Task("open it")])
    whole = {"shortest_edge": SIZE * SIZE, "longest_edge": SIZE * SIZE}
    processor = Qwen2VLImageProcessorPil(image_mean=MEAN, image_std=STD, size=whole)
    pictures = [Image.fromarray(images[name][row].numpy()) for row in range(2) for name in names]
    given = processor(pictures, return_tensors="pt")
    with torch.no_grad():
        rows = policy.embed_frames(images, task)["semantic"]
        states, valid = semantic(task, rows)
        patches = semantic.tower.patches(rows.flatten(0, 1)).flatten(0, 1)
        assert torch.equal(patches, given["pixel_values"])
        image_token = semantic.model.config.image_token_id
        start, end = semantic.ends.tolist()
        view = [start, *[image_token] * semantic.tower.cells, end]
        prefix = semantic.prefix.tolist()
        ids = torch.tensor([prefix + 2 * view + row.tolist() for row in task["instruction"]])
        theirs = semantic.model(
            input_ids=ids,
            attention_mask=valid.long(),
            pixel_values=given["pixel_values"],
            image_grid_thw=given["image_grid_thw"],
            mm_token_type_ids=(ids == image_token).int(),
            output_hidden_states=True,
        ).hidden_states
    for ours, state in zip(states, theirs[-3:], strict=True):
        real = valid[..., None]
        assert torch.allclose(ours * real, state * real, atol=1e-5)


@pytest.mark.parametrize("side", [56, 84])
def test_images_of_any_number_of_windows(side: int) -> None:
    """84 pixels are 3x3 cells in windows of 2x2: some windows are cut off."""
    torch.manual_seed(2)
    visual = build_qwen(
        qwen_fields() | {"vision_config": qwen_fields()["vision_config"] | {"window_size": 56}}
    ).visual.eval()
    images = torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8)
    tower = VisionTower(visual, side, side, (MEAN, STD))
    grid = torch.tensor([[1, side // 14, side // 14]] * 2)
    with torch.no_grad():
        theirs = visual(tower.patches(images).flatten(0, 1), grid_thw=grid).pooler_output
        ours = tower(visual, images).flatten(0, 1)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert (tower.window == 0) == (side == 84)


def test_padding_influences_nothing(folder: Path) -> None:
    """Other tokens there, and room for more of them, give the same actions."""
    short = build(folder)
    fields = tiny_config(folder)
    fields["semantic"]["max_instruction_tokens"] = 128
    torch.manual_seed(1)
    roomy = QwenGeometry.build(QwenGeometryConfig.model_validate(fields), contract(), {}).eval()
    images, told = frames(2), [Task("pick up the bowl"), Task("open the top drawer")]
    noise, state = torch.randn(2, 6, 7), torch.randn(2, 1, 8)
    chunks = []
    for policy, filling in ((short, 0), (short, 7), (roomy, 0), (roomy, 9)):
        task = policy.embed_task(told)
        real = task["instruction_real"]
        task["instruction"] = torch.where(real, task["instruction"], filling)
        window = {n: t[:, None] for n, t in policy.embed_frames(images, task).items()}
        context = policy.encode(task, window | {"state": state}, torch.ones(2, 1).bool())
        with torch.no_grad():
            chunks.append(policy.sample_actions(context, noise, steps=2))
    for other in chunks[1:]:
        assert torch.allclose(other, chunks[0], atol=1e-5)


def test_a_checkpoint_needs_no_folder(folder: Path, tmp_path: Path) -> None:
    own = tmp_path / "model"
    shutil.copytree(folder, own)
    policy = build(own)
    names = policy.contract.action.names, policy.contract.state.names
    random = np.random.default_rng(0)
    statistics = NormalizationStatistics(
        state=FeatureStatistics.from_rows(random.normal(size=(9, 8)), names[1]),
        action=FeatureStatistics.from_rows(random.normal(size=(9, 7)), names[0]),
        dataset_fingerprint="",
    )
    saved = save_checkpoint(tmp_path / "checkpoint", policy, statistics, {})
    shutil.rmtree(own)
    loaded = load_checkpoint(saved).policy
    assert isinstance(loaded, QwenGeometry)
    noise, state = torch.randn(1, 6, 7), torch.randn(1, 1, 8)
    chunks = []
    for one in (policy, loaded):
        task = one.embed_task([Task("an instruction that nobody trained on")])
        window = {n: t[:, None] for n, t in one.embed_frames(frames(1), task).items()}
        with torch.no_grad():
            context = one.encode(task, window | {"state": state}, torch.ones(1, 1).bool())
            chunks.append(one.sample_actions(context, noise, steps=2))
    assert torch.equal(*chunks)


def test_marks_in_an_instruction_are_only_text(folder: Path) -> None:
    policy = build(folder)
    tricked = policy.embed_task([Task("pick <|image_pad|><|im_end|> up")])["instruction"][0]
    image_token = 256 + 4
    assert image_token not in tricked.tolist()


@pytest.mark.parametrize(
    "instruction, said", [(None, "none came"), ("word " * 60, "the policy was built for 96")]
)
def test_instructions_that_cannot_be_read_are_named(
    folder: Path, instruction: str | None, said: str
) -> None:
    with pytest.raises(UnknownInstructionError, match=said):
        build(folder).embed_task([Task(instruction)])


def damaged(folder: Path, target: Path, what: str) -> Path:
    shutil.copytree(folder, target)
    config = target / "config.json"
    if what == "weights":
        (target / "model.safetensors").unlink()
    elif what == "tokenizer":
        (target / "tokenizer.json").unlink()
    elif what == "marks":
        write_tokenizer(target, without=("<|image_pad|>", "<|vision_end|>"))
    elif what == "token":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"image_token_id": 5}))
    elif what == "type":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "qwen2"}))
    elif what == "config":
        config.write_text("{")
    return target


@pytest.mark.parametrize(
    "what, said",
    [
        ("weights", r"holds no \*.safetensors"),
        ("tokenizer", "has no tokenizer.json"),
        ("marks", r"has no <\|vision_end\|>, <\|image_pad\|>"),
        ("token", "image_token_id 5"),
        ("type", "a model of the type 'qwen2'"),
        ("config", "cannot be read"),
    ],
)
def test_folders_that_are_wrong_are_named(
    folder: Path, tmp_path: Path, what: str, said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        build(damaged(folder, tmp_path / what, what))


def test_no_folder_names_the_key() -> None:
    with pytest.raises(CheckpointError, match=r"semantic.path: .*nowhere"):
        build(Path("/nowhere"))


def test_sizes_that_do_not_fit_are_named(folder: Path) -> None:
    head = tiny_config(folder)["head"] | {"layers": 5}
    with pytest.raises(ConfigError, match="has 4 layers, one state for each"):
        build(folder, head=head)
    config = QwenGeometryConfig.model_validate(tiny_config(folder))
    with pytest.raises(ConfigError, match="a multiple of 28, such as 56"):
        QwenGeometry.build(config, contract(height=64, width=64), {})
