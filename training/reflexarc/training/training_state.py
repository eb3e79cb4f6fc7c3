"""What resuming needs beyond the checkpoint: raw weights, moments, position. No pickle.

``training_state/tensors.safetensors`` and ``training_state/progress.json``. There is no state of
a random generator, a schedule or a sampler: all are functions of the seed and the step, on every
process. Tensors are whole, so that another number of processes can go on from them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from reflexarc.contract.errors import CheckpointError
from reflexarc.training.distributed.engine import Engine, TrainedModules
from reflexarc.training.metrics import Metrics
from reflexarc.training.optimization import AveragedWeights, trained_parameters
from reflexarc.training.run_folder import TRAINING_STATE

_TENSORS = "tensors.safetensors"
_PROGRESS = "progress.json"


@dataclass
class Progress:
    """Where a run stands, and on which demonstrations.

    Attributes:
        step: optimiser steps done.
        best_metric, best_step: the best validation so far; None before the first.
        seconds: spent on training, over all processes of the run.
        training, validation: the last means that were logged; empty before the first.
        interval: what was measured of the steps since then, one map a step.
        scaler: of float16's loss scale; None in another precision.
    """

    dataset_fingerprint: str
    step: int = 0
    best_metric: float | None = None
    best_step: int | None = None
    seconds: float = 0.0
    training: Metrics = field(default_factory=dict)
    validation: Metrics = field(default_factory=dict)
    interval: list[Metrics] = field(default_factory=list)
    scaler: dict[str, Any] | None = None


def training_tensors(
    modules: TrainedModules,
    optimizer: torch.optim.Optimizer,
    averaged: AveragedWeights | None,
    engine: Engine,
) -> dict[str, Tensor]:
    """A copy of every tensor of the state by name, on the CPU of the first process."""
    # A parameter that no loss has reached yet has no moments; on resuming it must have them.
    _make_moments(optimizer)
    return engine.gathered(_collect(modules, optimizer, averaged, engine))


def write_training_state(
    checkpoint: Path, tensors: Mapping[str, Tensor], progress: Progress
) -> None:
    """Write ``training_state/`` into a checkpoint's folder that is still being made."""
    folder = checkpoint / TRAINING_STATE
    folder.mkdir()
    save_file(dict(tensors), folder / _TENSORS)
    (folder / _PROGRESS).write_text(json.dumps(asdict(progress)))
    for name in (_TENSORS, _PROGRESS):
        _flush_to_disk(folder / name)


def load_training_state(
    checkpoint: Path,
    modules: TrainedModules,
    optimizer: torch.optim.Optimizer,
    averaged: AveragedWeights | None,
    engine: Engine,
) -> Progress:
    """Put everything back in place and return where the run stood.

    Raises CheckpointError when the state is missing, cut short or of another model.
    """
    folder = checkpoint / TRAINING_STATE
    try:
        tensors = load_file(folder / _TENSORS)
        progress = Progress(**json.loads((folder / _PROGRESS).read_text()))
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint} cannot be resumed, its {TRAINING_STATE} is not readable: {error}"
        ) from error
    _make_moments(optimizer)
    wanted = _collect(modules, optimizer, averaged, engine)
    if wanted.keys() != tensors.keys():
        differing = sorted(wanted.keys() ^ tensors.keys())
        raise CheckpointError(
            f"{folder} belongs to another model: {len(differing)} tensors differ, first "
            f"{differing[0]}"
        )
    with torch.no_grad():
        for name, target in wanted.items():
            if target.shape != tensors[name].shape:
                raise CheckpointError(
                    f"{folder}: {name} has shape {tuple(tensors[name].shape)}, the model "
                    f"{tuple(target.shape)}"
                )
            engine.put(target, tensors[name])
        engine.put_moments(optimizer, trained_parameters(modules), tensors)
    return progress


def _collect(
    modules: TrainedModules,
    optimizer: torch.optim.Optimizer,
    averaged: AveragedWeights | None,
    engine: Engine,
) -> dict[str, Tensor]:
    """Every tensor of the state by name, the live ones, so that loading copies into them."""
    # All weights but the backbones' that the checkpoint names: trained, frozen in this stage, and
    # those that only move, an objective's target network.
    tensors = {
        f"weight/{name}": value
        for name, value in modules.state_dict().items()
        if modules.is_trained(name)
    }
    tensors |= engine.moments(optimizer, trained_parameters(modules))
    for name, value in (averaged.values if averaged else {}).items():
        tensors[f"average/{name}"] = value
    return tensors


def _make_moments(optimizer: torch.optim.Optimizer) -> None:
    """Make AdamW's state where it has none yet, as its first step would."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in optimizer.state:
                optimizer.state[parameter] = {
                    # A fused step counts on the parameter's device, another on the CPU.
                    "step": torch.zeros((), device=parameter.device if group["fused"] else "cpu"),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def _flush_to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
