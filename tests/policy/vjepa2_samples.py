"""A V-JEPA 2 of random weights that encodes in milliseconds, and a head on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from reflexarc.contract import Camera, PolicyContract
from reflexarc.contract.policy_contract import LIBERO_STATE_EEF_JOINT, History, libero_action

SIZE, CHANNELS = 64, 48
INSTRUCTIONS = ("pick up the milk", "put the red bowl on the plate")


def tiny_vjepa2_config() -> dict[str, Any]:
    return {
        "patch_size": 16, "crop_size": SIZE, "frames_per_clip": 16, "tubelet_size": 2,
        "hidden_size": CHANNELS, "num_attention_heads": 2, "num_hidden_layers": 2,
        "mlp_ratio": 2.0, "pred_hidden_size": 24, "pred_num_attention_heads": 2,
        "pred_num_hidden_layers": 1, "num_pooler_layers": 1, "pred_num_mask_tokens": 1,
    }  # fmt: skip


def save_tiny_vjepa2(folder: Path) -> Path:
    """As a user's folder: what ``save_pretrained`` writes, predictor and all."""
    from transformers import VJEPA2Config, VJEPA2Model

    with torch.random.fork_rng():
        torch.manual_seed(3)
        VJEPA2Model(VJEPA2Config(**tiny_vjepa2_config())).save_pretrained(folder)
    return folder


def tiny_contract(*, cameras: int = 1, goal: bool = True, language: bool = False) -> PolicyContract:
    names = ("agentview", "eye_in_hand")[:cameras]
    return PolicyContract(
        family="vjepa2_head",
        cameras=tuple(
            Camera(name=name, height=SIZE, width=SIZE, orientation="rotated_180",
                   source_height=SIZE, source_width=SIZE)
            for name in names
        ),
        state=LIBERO_STATE_EEF_JOINT,
        history=History(frames=16, states=5),
        action=libero_action(8),
        needs_language=language,
        needs_goal_image=goal,
    )  # fmt: skip


def tiny_head_config(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "clips": {"name": "vjepa2", "path": str(folder)},
        "grid_side": 2, "hidden_dim": 32, "num_layers": 2, "num_heads": 4, "feed_forward": 64,
        "dropout": 0.0, "proprioception_hidden": (16, 24), "proprioception_tokens": 4,
        "language_dimension": 12, **changes,
    }  # fmt: skip
