"""Write a checkpoint of a run: what is served, what resuming needs, what a probe reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from reflexarc.contract import NormalizationStatistics
from reflexarc.policy.checkpoint import save_checkpoint
from reflexarc.policy.interface import Policy
from reflexarc.training.objective import Objective
from reflexarc.training.training_state import Progress, write_training_state

OBJECTIVE_FILE = "objective.safetensors"
"""The objective's own tensors (predictor, target network); not listed in the manifest."""


def save_training_checkpoint(
    folder: Path,
    policy: Policy,
    objective: Objective,
    statistics: NormalizationStatistics,
    provenance: Mapping[str, Any],
    tensors: dict[str, Tensor],
    progress: Progress,
) -> None:
    """Write ``folder`` at once, whole.

    Args:
        policy: holding the weights to be served.
        tensors: of :func:`training_tensors`, taken before the averaged weights were put in place.
    """
    own = {name: t.detach().cpu().contiguous() for name, t in objective.state_dict().items()}

    def write_also(unfinished: Path) -> None:
        write_training_state(unfinished, tensors, progress)
        if own:
            save_file(own, unfinished / OBJECTIVE_FILE)

    save_checkpoint(folder, policy, statistics, provenance, write_also=write_also)
