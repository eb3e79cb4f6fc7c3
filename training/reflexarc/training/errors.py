"""Errors of training; each has a code, as all named errors have."""

from __future__ import annotations

from reflexarc.contract.errors import ReflexarcError


class TrainingDivergedError(ReflexarcError):
    """A loss or gradient that is not finite; the step is named and nothing was overwritten."""

    code = "training_diverged"


class DiskFullError(ReflexarcError):
    """The disk took no more while the run was written; what stood there before is whole."""

    code = "disk_full"


class ProcessLostError(ReflexarcError):
    """Another process of the run ended, or its machine went; `last` stands as it was saved."""

    code = "process_lost"
