"""How a training run ended."""

from __future__ import annotations

import signal
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reflexarc.training.training_state import Progress


@dataclass
class Outcome:
    """How a run ended.

    Attributes:
        steps_run: optimiser steps of this process, less than those of a resumed run.
        stopped_by: the signal that stopped it early, or None when it ran to its end.
    """

    progress: Progress
    steps_run: int
    total_steps: int
    steps_per_epoch: int
    samples_per_second: float
    last: Path | None
    best: Path | None
    stopped_by: signal.Signals | None = None


def summary_of(outcome: Outcome) -> dict[str, Any]:
    """The outcome as plain values, for ``summary.json``."""
    values = asdict(outcome)
    for name in ("last", "best"):
        path = getattr(outcome, name)
        values[name] = None if path is None else path.name
    values["stopped_by"] = None if outcome.stopped_by is None else outcome.stopped_by.name
    return values
