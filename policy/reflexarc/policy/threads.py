"""How many CPU threads a policy computes on."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

# Where a container's share of the processor stands, by version of cgroups.
_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_OLD_QUOTA = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
_OLD_PERIOD = Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us")


def use_threads(count: int | None = None) -> int:
    """Let torch compute on ``count`` threads, in all of this process; returns how many.

    None takes ``OMP_NUM_THREADS`` where that is set, else every core this process may use.
    """
    if count is None:
        stated = os.environ.get("OMP_NUM_THREADS", "")
        count = int(stated) if stated.isdecimal() and int(stated) else usable_cores()
    torch.set_num_threads(count)
    return count


def usable_cores() -> int:
    """Cores that this process may run on and has the time of, at least 1.

    A container may see all cores of its machine and be given the time of two: threads for all of
    them would wait for each other most of the time.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quota = _quota()
    return cores if quota >= cores else max(1, math.ceil(quota))


def _quota() -> float:
    """Cores' worth of time that the container is given; infinite without a limit."""
    try:
        if _QUOTA.is_file():
            most, period = _QUOTA.read_text().split()[:2]
        else:
            most, period = _OLD_QUOTA.read_text(), _OLD_PERIOD.read_text()
        quota = float(most) / float(period)  # "max" is no number
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf
    return quota if quota > 0 else math.inf
