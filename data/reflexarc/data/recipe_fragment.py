"""The part of a recipe that a dataset decides, for a person to paste and shorten."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from reflexarc.data.dataset import EpisodeDataset
from reflexarc.data.lerobot.dataset import LeRobotDataset
from reflexarc.data.libero_writer import atomic_path


def recipe_fragment(dataset: EpisodeDataset, paths: Sequence[Path]) -> str:
    """``contract`` and ``data`` of a recipe as YAML, with every part and camera there is."""
    lines = [
        "contract:",
        f"  cameras: {json.dumps(list(dataset.cameras))}",
        f"  orientation: {dataset.orientations[0]}",
        "data:",
        f"  paths: {json.dumps([str(path) for path in paths])}",
    ]
    if len({e.instruction for e in dataset.episodes}) == len(dataset.episodes) > 1:
        lines.append("  split_by: dataset  # every episode has an instruction of its own")
    if isinstance(dataset, LeRobotDataset) and dataset.libero is None:
        modality, spec = dataset.info.modality, dataset.action_spec(1)
        state = list(modality.state) or [part.columns.key for part in dataset.mapping.state]
        action = list(modality.action) or [part.columns.key for part in dataset.mapping.action]
        lines += [
            f"  state: {json.dumps(state)}",
            f"  action: {json.dumps(action)}",
            f"  cameras: {json.dumps(dict(dataset.mapping.cameras))}",
            f"  action_kind: {spec.kind}  # or delta_osc, velocity",
            "  # gripper: {name: ..., open: 0.0, closed: 1.0}",
        ]
    return "\n".join(lines) + "\n"


def write_recipe_fragment(dataset: EpisodeDataset, paths: Sequence[Path], output: Path) -> None:
    """Write :func:`recipe_fragment` atomically."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(output) as temporary:
        temporary.write_text(recipe_fragment(dataset, paths))
