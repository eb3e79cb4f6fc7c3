"""Write a checkpoint of a run: what is served, what resuming needs, what a probe reads."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from reflexarc.contract import NormalizationStatistics
from reflexarc.policy.checkpoint import save_checkpoint
from reflexarc.training.distributed.engine import TrainedModules
from reflexarc.training.errors import DiskFullError
from reflexarc.training.run_folder import RunFolder
from reflexarc.training.training_state import Progress, write_training_state

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_SPACE_WORDS = ("no space", "quota", "file too large")
OBJECTIVE_FILE = "objective.safetensors"
"""The objective's own tensors (predictor, target network); not listed in the manifest."""


def save_training_checkpoint(
    folder: Path,
    served: TrainedModules,
    statistics: NormalizationStatistics,
    provenance: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    progress: Progress,
) -> None:
    """Write ``folder`` at once, whole.

    Args:
        served: holding the weights to be served.
        tensors: of :func:`training_tensors`, taken before the averaged weights were put in place.
    """
    state = served.objective.state_dict()
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}

    def write_also(unfinished: Path) -> None:
        write_training_state(unfinished, tensors, progress)
        if own:
            save_file(own, unfinished / OBJECTIVE_FILE)

    save_checkpoint(folder, served.policy, statistics, provenance, write_also=write_also)


@contextmanager
def naming_a_full_disk(run: RunFolder) -> Iterator[None]:
    """Within the block a disk that takes no more raises DiskFullError, which says what is kept."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not _is_no_space(error):
            raise
        last = run.pointed("last")
        kept = "no checkpoint was saved before" if last is None else f"`last` is still {last.name}"
        free = shutil.disk_usage(run.path).free
        raise DiskFullError(
            f"the disk of {run.path} took no more ({error}; {free / 2**20:,.0f} MiB free); {kept}. "
            "Make room, then continue with the same command and --resume",
            field="output",
        ) from error


def _is_no_space(error: OSError | SafetensorError) -> bool:
    if isinstance(error, OSError):
        return error.errno in _NO_SPACE
    return any(words in str(error).lower() for words in _NO_SPACE_WORDS)
