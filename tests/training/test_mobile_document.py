"""The full-size recipe says what the document says, or a reason stands here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from reflexarc.contract.errors import ConfigError
from reflexarc.data.mobile.layout import VELOCITIES
from reflexarc.policy.mobile_vla.config import Kosmos2Config, MobileVLAConfig
from reflexarc.training.config import Recipe
from reflexarc.training.objectives.velocity_chunk import VelocityChunkObjective
from reflexarc.training.precision import precision_on
from reflexarc.training.recipe_files import load_recipe
from reflexarc.training.samples import split_episodes

DOCUMENT = yaml.safe_load(Path(__file__).with_name("mobile_document.yaml").read_text())
EPISODES = DOCUMENT["dataset"]["episodes"]


@dataclass(frozen=True)
class Differs:
    """What we have instead, and why."""

    ours: Any
    reason: str


def full_size() -> Recipe:
    return load_recipe("mobile_vla")


def policy() -> MobileVLAConfig:
    return MobileVLAConfig.model_validate(full_size().policy)


def backbone() -> Kosmos2Config:
    found = policy().backbone
    assert isinstance(found, Kosmos2Config)
    return found


def split() -> tuple[int, int]:
    recipe = full_size()
    told = ["navigate_to_the_target_location"] * EPISODES
    train, held_out = split_episodes(told, recipe.data.validation_fraction, recipe.data.split_seed)
    return len(train), len(held_out)


def chunk_shape(frames: int, horizon: int) -> list[int]:
    """17 actions unfolded by 10."""
    actions = torch.zeros(frames + horizon - 1, 2)
    return list(actions.unfold(0, horizon, 1).transpose(1, 2).shape)


def trainable_gigabytes() -> float:
    """Adapters, action token, LSTM and head in single precision."""
    config, width = policy(), 2048
    with torch.device("meta"):
        lstm = torch.nn.LSTM(width, config.lstm_hidden, num_layers=config.lstm_layers)
    widths = [config.lstm_hidden, *config.head_hidden, 20]
    head = sum((a + 1) * b for a, b in pairwise(widths))
    lora = 24 * 4 * 2 * width * backbone().lora.rank
    return 4 * (sum(p.numel() for p in lstm.parameters()) + head + lora + width) / 1e9


READ: dict[str, Callable[[Recipe], Any]] = {
    "model.backbone": lambda r: {"kosmos2": "Kosmos-2"}[backbone().name],
    "model.method": lambda r: "LoRA" if backbone().lora else "all of it",
    "model.policy_head": lambda r: "LSTM" if policy().lstm_layers == 4 else "another",
    "training.max_epochs": lambda r: r.training.epochs,
    "training.batch_size": lambda r: r.training.batch_size // r.training.accumulate,
    "training.gradient_accumulation": lambda r: r.training.accumulate,
    "training.effective_batch_size": lambda r: r.training.batch_size,
    "training.learning_rate": lambda r: r.optimizer.learning_rate,
    "training.weight_decay": lambda r: r.optimizer.weight_decay,
    "training.optimizer": lambda r: "AdamW",
    "training.precision": lambda r: {"fp16": "16-mixed"}.get(r.training.precision, "another"),
    "dataset.pattern": lambda r: r.data.pattern,
    "dataset.episodes": lambda r: sum(split()),
    "dataset.train_fraction": lambda r: r.data.train_fraction,
    "dataset.train_episodes": lambda r: split()[0],
    "dataset.held_out_episodes": lambda r: split()[1],
    "dataset.steps_per_epoch": lambda r: split()[0] // r.training.batch_size,
    "dataset.window_size": lambda r: r.contract.history.frames,
    "dataset.fwd_pred_next_n": lambda r: r.contract.horizon,
    "dataset.frames_per_sample": lambda r: r.contract.history.frames + r.contract.horizon,
    "dataset.velocities": lambda r: list(VELOCITIES),
    "dataset.default_instruction": lambda r: r.data.fallback_instruction,
    "dataset.text_tokens": lambda r: backbone().max_text_tokens,
    "dataset.image_size": lambda r: r.contract.image_size,
    "lora.r": lambda r: backbone().lora.rank,
    "lora.alpha": lambda r: backbone().lora.alpha,
    "lora.dropout": lambda r: backbone().lora.dropout,
    "lora.backbone_frozen": lambda r: True,  # tests/policy/test_kosmos2.py counts what is trained
    "lora.trainable": lambda r: ["lora", "policy head"],
    "checkpoints.save_top_k": lambda r: r.training.keep_best,
    "checkpoints.every_n_epochs": lambda r: r.training.checkpoint_every,
    "checkpoints.monitor": lambda r: (
        "val_loss" if r.best_metric == "loss_velocity" else r.best_metric
    ),
    "checkpoints.save_last": lambda r: True,  # every run keeps `last`
    "checkpoints.gigabytes_each": lambda r: round(trainable_gigabytes(), 2),
    "shapes.rgb": lambda r: [r.contract.history.frames, 3, *(r.contract.image_size,) * 2],
    "shapes.action_window": lambda r: r.contract.history.frames + r.contract.horizon - 1,
    "shapes.action_chunk": lambda r: chunk_shape(r.contract.history.frames, r.contract.horizon),
    "shapes.velocities": lambda r: chunk_shape(r.contract.history.frames, r.contract.horizon),
    "loss.name": lambda r: "Huber" if r.objective.huber_delta == 1 else "another",  # type: ignore[union-attr]
    "loss.reported_as": lambda r: r.objective.metrics[0],
}
"""The document's key to our value of it."""

DEVIATIONS = {
    "dataset.steps_per_epoch": Differs(
        23, "185 training episodes in batches of 8; the document divides all 231 by 8. Ours "
        "makes a sample of every frame, not one of an episode: an epoch has more steps"
    ),
    "checkpoints.gigabytes_each": Differs(
        0.21, "adapters, action token, LSTM and head; Kosmos-2 is named, not copied"
    ),
    "shapes.action_chunk": Differs(
        [8, 10, 2], "17 actions unfolded by 10 give 8 chunks, one for each frame of the window"
    ),
}  # fmt: skip

BEYOND = {
    "policy.backbone.precision", "contract.cameras", "contract.orientation",
    "contract.action_normalization", "data.suite", "data.paths", "data.control_hz",
    "objective.name", "schedule.name", "training.seed", "training.validate_every",
}  # fmt: skip
"""Keys of the recipe that the document does not give."""

COVERED = {
    "policy.backbone.name", "policy.backbone.path", "policy.backbone.lora.rank",
    "policy.backbone.lora.alpha", "policy.backbone.lora.dropout",
    "policy.backbone.max_text_tokens", "policy.lstm_layers", "policy.lstm_hidden",
    "contract.image_size", "contract.horizon", "contract.history.frames", "data.pattern",
    "data.train_fraction", "data.fallback_instruction", "objective.huber_delta",
    "optimizer.learning_rate", "optimizer.weight_decay", "training.batch_size",
    "training.accumulate", "training.epochs", "training.precision", "training.checkpoint_every",
    "training.keep_best", "training.best_metric",
}  # fmt: skip


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        path = f"{prefix}{name}"
        found |= flat(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return found


STATED = flat(DOCUMENT)


@pytest.mark.parametrize("key", STATED)
def test_a_setting_is_the_documents_or_has_its_reason(key: str) -> None:
    ours, stated = READ[key](full_size()), STATED[key]
    if key in DEVIATIONS:
        assert ours != stated, f"{key} no longer differs: take it off the list"
        assert ours == DEVIATIONS[key].ours
        assert DEVIATIONS[key].reason
    else:
        assert ours == pytest.approx(stated) if isinstance(stated, float) else ours == stated


def test_nothing_is_left_out_on_either_side() -> None:
    assert READ.keys() == STATED.keys()
    assert DEVIATIONS.keys() <= STATED.keys()
    recipes = resources.files("reflexarc.training") / "recipes"
    written = yaml.safe_load((recipes / "mobile_vla.yaml").read_text())
    keys = {key for key in flat(written) if key not in ("name", "description", "family")}
    assert keys == BEYOND | COVERED
    assert not BEYOND & COVERED


def test_the_recipe_for_cpus_is_the_same_family_on_packaged_encoders() -> None:
    small, full = load_recipe("mobile_vla_small"), full_size()
    assert small.family == full.family == "mobile_vla"
    assert small.policy["backbone"]["name"] == "compact"
    assert small.contract.history == full.contract.history
    assert small.contract.horizon == full.contract.horizon
    assert small.policy["lstm_layers"] == full.policy["lstm_layers"] == 4
    assert small.data.fallback_instruction is None, "nobody is told what no episode says"
    assert VelocityChunkObjective(small.objective).needs_window_actions  # type: ignore[arg-type]


def test_a_split_is_said_once() -> None:
    assert full_size().data.validation_fraction == pytest.approx(0.2)
    both = ["data.train_fraction=0.8", "data.validation_fraction=0.1"]
    with pytest.raises(ConfigError, match="give one of them"):
        load_recipe("mobile_vla", both)


def test_half_precision_gives_way_on_mps() -> None:
    assert precision_on("fp16", torch.device("mps"))[0] == "fp32"
    assert "fp32" in (precision_on("bf16", torch.device("mps"))[1] or "")
    assert precision_on("fp32", torch.device("mps")) == ("fp32", None)
    assert precision_on("bf16", torch.device("cpu")) == ("bf16", None)
