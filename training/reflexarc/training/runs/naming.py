"""The folder of a run that was given none: ``runs/<name>_s<seed>_<time>``."""

from __future__ import annotations

import re
from datetime import datetime, timezone
from pathlib import Path

RUNS = Path("runs")


def new_run_folder(
    name: str, seed: int, *, parent: Path = RUNS, now: datetime | None = None
) -> Path:
    """A folder that is not there yet; names sort by time, which is UTC.

    Args:
        name, seed: of the recipe. What a file system might not take becomes ``-``.
        now: by default the present.
    """
    time = (now or datetime.now(timezone.utc)).strftime("%Y%m%dT%H%M%SZ")
    plain = re.sub(r"[^\w.-]+", "-", name).strip(".-") or "run"
    folder = parent / f"{plain}_s{seed}_{time}"
    another = 2
    while folder.exists():
        folder = parent / f"{plain}_s{seed}_{time}_{another}"
        another += 1
    return folder


def newest_run(name: str, seed: int, *, parent: Path = RUNS) -> Path | None:
    """The newest folder that :func:`new_run_folder` gave such a run, to be named in a message."""
    found = sorted(parent.glob(f"{name}_s{seed}_*Z*")) if parent.is_dir() else []
    return found[-1] if found else None
